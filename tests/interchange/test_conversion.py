"""Conversions as a whole: nothing is lost, nothing is overwritten unasked, nothing is left half done."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from llamatrain.checkpoint import commit, store
from llamatrain.checkpoint.interchange import conversion, huggingface, pickles
from llamatrain.checkpoint.interchange.conversion import RECORD_FILE
from llamatrain.config.convert import ConvertConfig, check_convert
from llamatrain.distributed import World
from llamatrain.errors import CheckpointError, ConfigError, DataError
from tests.conftest import TINY_VOCAB
from tests.interchange.converting import SHAPES, assert_same_weights, built, converted, loaded, run_with
from tests.ranks import on_ranks
from tests.test_model import tiny


def test_a_length_may_be_changed_from_any_form(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    longer = converted(checkpoint(), tmp_path / "longer", "llamatrain", max_seq_len=96)
    assert loaded(longer).config.max_seq_len == 96
    theirs = converted(longer, tmp_path / "theirs", "huggingface", max_seq_len=192)
    assert json.loads((theirs / "config.json").read_text())["max_position_embeddings"] == 192


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("through", ["huggingface", "meta"])
def test_weights_come_back_bit_for_bit(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str, through: str
) -> None:
    run = checkpoint(**SHAPES[name])
    more: dict[str, Any] = {"shards": 2} if through == "meta" else {"max_shard_gib": 1e-4}
    there = converted(run, tmp_path / "there", through, **more)
    back = converted(there, tmp_path / "back", "llamatrain", max_seq_len=64, max_shard_gib=1e-4)
    assert_same_weights(loaded(back), built(**SHAPES[name]))
    ours, theirs = loaded(run).config, loaded(back).config
    for setting in ("ffn_width", "kv_heads", "rope_theta", "norm_eps", "tied_embeddings", "max_seq_len", "vocab_size"):
        assert getattr(ours, setting) == getattr(theirs, setting), setting
    files = sorted(path.name for path in there.iterdir())
    assert ("consolidated.01.pth" in files) if through == "meta" else (sum("model-000" in file for file in files) > 2)


def test_weights_are_cast_and_what_does_not_fit_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    there = converted(checkpoint(), tmp_path / "there", "huggingface", dtype="bf16")
    assert {tensor.dtype for tensor in load_file(there / "model.safetensors").values()} == {torch.bfloat16}
    assert_same_weights(loaded(converted(there, tmp_path / "back", "llamatrain")), built(), dtype=torch.bfloat16)
    weights = load_file(there / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, there / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight holds 9\.984e\+04.*dtype=bf16"):
        converted(there, tmp_path / "half", "huggingface", dtype="fp16")
    weights["model.norm.weight"][4] = float("nan")  # which hides it from a comparison
    save_file(weights, there / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight holds 9\.984e\+04"):
        converted(there, tmp_path / "half", "huggingface", dtype="fp16")
    assert not (tmp_path / "half").exists() and not list(tmp_path.glob(".half*"))


def test_numbers_that_are_not_finite_are_told(there: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(there / "model.safetensors")
    weights["lm_head.weight"][3, 3] = float("nan")
    save_file(weights, there / "model.safetensors")
    converted(there, tmp_path / "back", "llamatrain")
    assert "output.weight holds numbers that are not finite" in caplog.text


def test_nothing_is_overwritten_unasked(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    run, out = checkpoint(), tmp_path / "out"
    converted(run, out, "huggingface")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="overwrite=true replaces it"):
        converted(run, out, "meta")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    converted(run, out, "meta", overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "consolidated.00.pth", "conversion.json", "params.json", "tokenizer.model",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (out / RECORD_FILE).unlink()
    with pytest.raises(ConfigError, match=r"no conversion\.json there lists that"):
        converted(run, out, "huggingface", overwrite=True)
    with pytest.raises(ConfigError, match="the input lies there"):
        converted(run, run, "llamatrain", overwrite=True)


def tree_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ("evaluations/step-00000000/boolq.json", "evaluations"),
        ("checkpoints/step-00000000/notes", "checkpoints/step-00000000/notes"),
        ("mine", "mine"),
    ],
)
def test_overwriting_takes_nothing_that_the_command_has_not_written(
    checkpoint: Callable[..., Path], tmp_path: Path, theirs: str, told: str
) -> None:
    run, out = checkpoint(), converted(checkpoint(), tmp_path / "out", "llamatrain")
    (out / theirs).parent.mkdir(parents=True, exist_ok=True)
    (out / theirs).write_text("of an evening's work")
    before = tree_of(out)
    with pytest.raises(ConfigError, match=rf"more than that is there: {told};"):
        converted(run, out, "llamatrain", overwrite=True)
    assert tree_of(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / told).rename(tmp_path / "moved away")
    converted(run, out, "meta", overwrite=True)


def test_what_comes_to_the_output_meanwhile_is_kept(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, write = checkpoint(), tmp_path / "out", conversion.write

    def interrupted(*arguments: Any, **more: Any) -> None:
        write(*arguments, **more)
        out.mkdir(exist_ok=True)
        (out / "mine").write_text("!")

    monkeypatch.setattr(conversion, "write", interrupted)
    with pytest.raises(ConfigError, match="is there already"):
        converted(run, out, "meta")
    assert tree_of(tmp_path) == {"out/mine": b"!"}
    (out / "mine").unlink()
    monkeypatch.setattr(conversion, "write", write)
    before = tree_of(converted(run, out, "meta"))
    monkeypatch.setattr(conversion, "write", interrupted)
    with pytest.raises(ConfigError, match="more than that is there: mine;"):
        converted(run, out, "huggingface", overwrite=True)
    assert tree_of(tmp_path) == {"out/mine": b"!", **{f"out/{name}": content for name, content in before.items()}}


def test_a_conversion_that_fails_leaves_nothing(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = checkpoint(), tmp_path / "out"
    converted(run, out, "huggingface")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "tokenizer_files", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*nothing is left of it"):
        converted(run, out, "huggingface", overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_too_little_room_is_told_before_anything_is_written(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match="GiB are free there"):
        converted(checkpoint(), tmp_path / "out", "huggingface")


def killed_midway(world: World, run: Path, out: Path) -> None:
    """A conversion whose process is killed when it has written some tensors."""
    add, added = pickles.Writer.add, []

    def dying(writer: pickles.Writer, name: str, tensor: Tensor) -> None:
        if len(added) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        added.append(name)
        add(writer, name, tensor)

    pickles.Writer.add = dying  # type: ignore[method-assign]
    converted(run, out, "meta", shards=2)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_output_and_its_room_is_used_by_the_next(
    checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, out = checkpoint(), tmp_path / "out"
    with pytest.raises(RuntimeError, match="exit status -9"):
        on_ranks(1, killed_midway, run, out)
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    left = size_of(tmp_path)
    needed = size_of(converted(run, tmp_path_factory.mktemp("other") / "whole", "meta", shards=2))
    assert needed / 4 < left < needed

    def usage(path: Path) -> Any:
        return type("Usage", (), {"free": 1.2 * needed - size_of(tmp_path)})

    monkeypatch.setattr(conversion.shutil, "disk_usage", usage)
    assert size_of(converted(run, out, "meta", shards=2)) == needed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def killed_between_renames(world: World, run: Path, out: Path) -> None:
    """A conversion that is killed when what it replaces is out of the way and it has not its name yet."""
    rename = os.rename

    def dying(source: Path, target: Path) -> None:
        if Path(target) == out:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    conversion.os.rename = dying
    converted(run, out, "meta", overwrite=True)


@pytest.mark.slow
def test_a_conversion_killed_while_it_replaces_another_loses_neither(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    run, out = checkpoint(), converted(checkpoint(), tmp_path / "out", "huggingface")
    before = size_of(out)
    with pytest.raises(RuntimeError, match="exit status -9"):
        on_ranks(1, killed_between_renames, run, out)
    assert size_of(tmp_path / ".out.replaced") == before
    converted(run, out, "meta")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "consolidated.00.pth").is_file()


def run_of_ranks(count: int, directory: Path, tokenizer: Path) -> Path:
    """The tiny model's checkpoint as so many ranks write it, each its rows."""
    run = run_with(built(), directory, tokenizer)
    (whole,) = commit.list_checkpoints(run / "checkpoints")
    manifest = commit.read_manifest(whole)
    commit.delete(whole)
    weights, ranks = dict(built().named_parameters()), range(count)
    temporary, files = commit.begin(run / "checkpoints", 7), {}
    for rank in ranks:
        own = {name: tensor.detach().chunk(count)[rank].contiguous() for name, tensor in weights.items()}
        save_file(own, temporary / store.file_name("model", rank))
        files[store.file_name("model", rank)] = commit.seal(temporary / store.file_name("model", rank))
    for entry in manifest["tensors"]["model"].values():
        entry.pop("chunks", None)
        entry["rows"] = entry["shape"][0] // count
    commit.commit(temporary, manifest, files)
    return run


def test_a_checkpoint_of_many_ranks_is_read_layer_by_layer(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def counted(path: Path, *arguments: Any, **more: Any) -> Any:
        opened.append(path)
        return safe_open(path, *arguments, **more)

    (tmp_path / "run").mkdir()
    run = run_of_ranks(4, tmp_path / "run", tiny_tokenizer)
    monkeypatch.setattr(store, "safe_open", counted)
    there = converted(run, tmp_path / "there", "meta", shards=2)
    assert len(opened) == 4 * (built().config.n_layers + 3)  # embedding, norm and head alone
    assert_same_weights(loaded(converted(there, tmp_path / "back", "llamatrain")), built())


def test_an_altered_checkpoint_is_refused_before_anything_is_written(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    run = shutil.copytree(checkpoint(), tmp_path / "run")
    weights = run / "checkpoints" / "step-00000007" / "model.rank00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="its SHA-256 is not the manifest's"):
        converted(run, tmp_path / "out", "meta")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    converted(run, tmp_path / "out", "meta", verify_hashes=False)


def test_a_tokenizer_that_is_missing_or_too_large_is_named(
    checkpoint: Callable[..., Path], there: Path, tmp_path: Path, tiny_tokenizer: Path
) -> None:
    (there / "tokenizer.model").unlink()
    with pytest.raises(DataError, match="tokenizer=PATH"):
        converted(there, tmp_path / "back", "llamatrain")
    converted(there, tmp_path / "back", "llamatrain", tokenizer=str(tiny_tokenizer))
    small = tiny(vocab_size=100)
    (tmp_path / "small").mkdir()
    run = run_with(small, tmp_path / "small", tiny_tokenizer)
    damaged = tiny_tokenizer.read_bytes().replace(b"<0x41>", b"<0x\xa11>")
    for name, content in (("empty", b""), ("damaged", damaged)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="not a SentencePiece model, or a damaged one"):
            converted(run, tmp_path / "other", "huggingface", tokenizer=str(tmp_path / name))
    with pytest.raises(DataError, match="larger than any tokenizer"):
        converted(run, tmp_path / "other", "huggingface", tokenizer="/dev/zero")
    with pytest.raises(DataError, match=f"it has {TINY_VOCAB} ids, the model 100"):
        converted(run, tmp_path / "other", "huggingface")


def test_an_import_knows_what_it_was_made_from(there: Path, tmp_path: Path) -> None:
    back = converted(there, tmp_path / "back", "llamatrain")
    manifest = json.loads((back / "checkpoints" / "step-00000000" / "checkpoint.json").read_text())
    assert manifest["imported"]["format"] == "huggingface" and "model.safetensors" in manifest["imported"]["files"]
    assert json.loads((back / RECORD_FILE).read_text())["from"]["path"] == str(there)
    store.open_checkpoint(back / "checkpoints" / "step-00000000")


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"input": None}, "input=DIRECTORY"),
        ({"output": None}, "output=DIRECTORY"),
        ({"to": "onnx"}, "to=onnx"),
        ({"dtype": "int4"}, "dtype=int4"),
        ({"to": "llamatrain", "dtype": "bf16"}, "are fp32"),
        ({"shards": 2}, "only to=meta"),
        ({"to": "meta", "shards": 0}, "shards=0"),
        ({"max_shard_gib": 0.0}, "max_shard_gib=0.0"),
        ({"max_seq_len": 0}, "max_seq_len=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        check_convert(dataclasses.replace(ConvertConfig(input="a", output="b", to="huggingface"), **changes))


def test_what_lies_at_no_known_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a checkpoint or run"):
        converted(tmp_path, tmp_path / "out", "meta")
    with pytest.raises(ConfigError, match=r"input=.*nowhere: there is no such directory"):
        converted(tmp_path / "nowhere", tmp_path / "out", "meta")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=rf"^input={tmp_path}: neither a checkpoint nor a run directory with one"):
        converted(tmp_path, tmp_path / "out", "meta")


def test_what_takes_a_checkpoint_tells_how_to_make_one_of_other_programs_files(
    checkpoint: Callable[..., Path], there: Path, tmp_path: Path
) -> None:
    for files in (there, converted(checkpoint(), tmp_path / "meta", "meta")):
        with pytest.raises(ConfigError, match=rf"checkpoint={files}.*convert input={files} output=DIRECTORY to=llama"):
            loaded(files)
    with pytest.raises(ConfigError, match=r"checkpoint=.*nowhere: there is no such directory"):
        loaded(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"cannot be read \(File name too long\)"):
        loaded(tmp_path / ("x" * 300))


def test_a_checkpoint_that_is_none_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from llamatrain.generate import main; main()"
    command = [sys.executable, "-c", program, f"checkpoint={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "neither a checkpoint nor" in done.stderr


@pytest.mark.slow
def test_the_command_converts_and_tells_where(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llamatrain.convert", f"input={checkpoint()}", f"output={tmp_path / 'there'}"]
    done = subprocess.run([*command, "to=meta", "shards=2"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'there'}\n"), done.stderr
    done = subprocess.run([*command, "to=meta"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "overwrite=true" in done.stderr


@pytest.mark.parametrize(("to", "changes"), [("meta", {"shards": 4}), ("huggingface", {}), ("llamatrain", {})])
def test_the_progress_bar_ends_where_it_said(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, changes: dict[str, int]
) -> None:
    bars: list[Any] = []

    def shown(*steps: Any, **settings: Any) -> Any:
        bars.append(tqdm(*steps, **{**settings, "disable": False, "file": io.StringIO()}))
        return bars[-1]

    for module in (commit, conversion):
        monkeypatch.setattr(module, "tqdm", shown)
    converted(checkpoint(tied_embeddings=True), tmp_path / "out", to, **changes)
    assert [bar.desc.split()[0] for bar in bars] == ["checking", "to"] and bars[1].desc == f"to {to}"
    assert all(bar.n == bar.total > 0 for bar in bars)
