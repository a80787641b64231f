"""What somebody else wrote into a checkpoint or a data set: nothing of it runs, hangs, or takes memory without bound.

Whoever made these files could write to the run's folder and corrected every hash. Each ends in one message, or loads
as what it says it is. (tests/test_checkpoint.py has the damage that disks and accidents do, and pickles.)
"""

import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamatrain.checkpoint import commit, inference, store
from llamatrain.checkpoint.boxes import cover
from llamatrain.config import RunConfig
from llamatrain.config.build import build
from llamatrain.data.loader import Loader
from llamatrain.data.order import DataState, SampleOrder
from llamatrain.data.shards import MANIFEST_FILE as DATASET_FILE
from llamatrain.data.shards import Manifest, check_hashes, check_sizes, read_manifest
from llamatrain.data.sources import Source
from llamatrain.errors import LONGEST, CheckpointError, ConfigError, DataError, LlamatrainError, UnhealthyRun
from llamatrain.files import sha256_of_file, sha256_of_json
from llamatrain.trainer import Trainer
from tests.small_run import small_config, train_in_process, trainer_for
from tests.test_checkpoint import places

pytestmark = pytest.mark.drill(
    "hostile files, manifests and settings; secrets in settings and environment",
    "refused by name, at once and in little memory, or the same run; the secrets are in no file and on no screen",
    always=True,
)

T = TypeVar("T")
Change = Callable[[dict[str, Any]], Any]
REPOSITORY = Path(__file__).parents[2]
AT_ONCE_S = 2.0  # of this process; each takes milliseconds

ABSURD = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**40, -(10**40), 0.5, -0.0, float("nan"), float("inf"), 1e308, "", "7",
    "\0", "\ud800", "\x1b[2J", "..", "../../x.safetensors", "/etc/passwd", "x" * 100_000, [], {}, [[]], [None],
    {"": {}}, [0] * 1000, {"a": {"b": {"c": []}}},
]  # fmt: skip


def mutate(document: dict[str, Any], data: st.DataObject) -> None:
    """Put something absurd into one or two places, take a place away, or name it otherwise."""
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(places(document)))
        node: Any = document
        for key in way:
            node = node[key]
        kind = data.draw(st.sampled_from(["absurd", "absurd", "absurd", "gone", "renamed"]))
        if kind == "absurd":
            node[last] = deepcopy(data.draw(st.sampled_from(ABSURD)))
        elif kind == "gone" or isinstance(node, list):
            del node[last]
        else:
            node[data.draw(st.sampled_from(["", "\0", "..", "\ud800", "x" * 300]))] = node.pop(last)


def rewrite(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the hash that it must have."""
    manifest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    (checkpoint / commit.MANIFEST_FILE).write_bytes(commit.as_written(manifest, sha256_of_json(manifest)))


def edit(checkpoint: Path, change: Change) -> None:
    manifest = json.loads((checkpoint / commit.MANIFEST_FILE).read_text())
    change(manifest)
    for name, entry in manifest["files"].items():
        if (checkpoint / name).is_file():
            entry.update(size=(checkpoint / name).stat().st_size, sha256=sha256_of_file(checkpoint / name))
    rewrite(checkpoint, manifest)


def tried(work: Callable[[], T]) -> tuple[T | None, LlamatrainError | None]:
    """What it returns, or what it refused."""
    try:
        return work(), None
    except LlamatrainError as error:
        return None, error


def is_one_clean_line(error: LlamatrainError) -> bool:
    message = str(error)
    return message.isprintable() and len(message) <= LONGEST and "Traceback" not in message


# ---------------------------------------------------------------------- checkpoints, file by file


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {"weight": torch.arange(12.0).reshape(4, 3), "scale": torch.tensor(2.5)}
    return store.save(tmp_path, 1, {"model": tensors}, {})


def load(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {"weight": torch.zeros(4, 3), "scale": torch.zeros(())}
    store.Reader(checkpoint, store.open_checkpoint(checkpoint)).fill("model", found)
    return found


def with_header(header: bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file: the length of the header, the header, the values."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (4, 3), offsets: Any = (4, 52), dtype: Any = "F32") -> dict[str, Any]:
    scale = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    return {"scale": scale, "weight": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


VALUES = bytes(52)
HOSTILE_FILES = {
    "a header of 2^63 bytes": with_header(b"{}", VALUES, length=2**63),
    "a header of 2^64 - 1 bytes": with_header(b"{}", VALUES, length=2**64 - 1),
    "a header beyond the end": with_header(b"{}", VALUES, length=1000),
    "no header": VALUES,
    "a header nested 50,000 deep": with_header(b"[" * 50_000, VALUES),
    "a header that is no text": with_header(b'{"\xff": 1}', VALUES),
    "values beyond the end": with_header(entry(offsets=(52, 100)), VALUES),
    "values that overlap": with_header(entry(offsets=(0, 48)), VALUES),
    "values that leave a gap": with_header(entry(offsets=(5, 53)), VALUES + b"\0"),
    "values backwards": with_header(entry(offsets=(52, 4)), VALUES),
    "negative offsets": with_header(entry(offsets=(-48, 0)), VALUES),
    "a negative shape": with_header(entry(shape=(-4, -3)), VALUES),
    "a shape beyond 2^64": with_header(entry(shape=(2**62, 2**62)), VALUES),
    "a shape of fractions": with_header(entry(shape=(4.0, 3.0)), VALUES),
    "a dtype that there is not": with_header(entry(dtype="F99"), VALUES),
    "another dtype of that size": with_header(entry(dtype="I32"), VALUES),
    "text for a tensor": with_header({**entry(), "weight": "x"}, VALUES),
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_a_hostile_safetensors_file_is_refused_at_once(kind: str, checkpoint: Path) -> None:
    (checkpoint / store.file_name("model", 0)).write_bytes(HOSTILE_FILES[kind])
    edit(checkpoint, lambda manifest: None)
    began = time.process_time()
    with pytest.raises(CheckpointError, match=r"cannot be read|is not the chunk") as refusal:
        load(checkpoint)
    assert is_one_clean_line(refusal.value)
    assert time.process_time() - began < AT_ONCE_S


def test_a_header_larger_than_any_of_ours_is_not_parsed(checkpoint: Path) -> None:
    """Safetensors takes 100 MB; with a million entries that is 10 s and 2 GB."""
    header = json.dumps(entry()).encode()
    (checkpoint / store.file_name("model", 0)).write_bytes(with_header(header + b" " * 20_000_000, VALUES))
    edit(checkpoint, lambda manifest: None)
    with pytest.raises(CheckpointError, match=r"safetensors: cannot be read \(a header of 20000\d+ bytes"):
        load(checkpoint)


def no_manifest_so_large(checkpoint: Path) -> None:
    with open(checkpoint / commit.MANIFEST_FILE, "wb") as file:
        file.truncate(2**40)  # sparse


def a_pipe(checkpoint: Path) -> None:
    name = store.file_name("model", 0)
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    manifest = json.loads((checkpoint / commit.MANIFEST_FILE).read_text())
    manifest["files"][name].update(size=0)
    rewrite(checkpoint, manifest)


def weight(**changes: Any) -> Callable[[Path], None]:
    def change(manifest: dict[str, Any]) -> None:
        described = manifest["tensors"]["model"]["weight"]
        described.update(changes)
        if "chunks" in changes:
            described.pop("rows", None)

    return lambda checkpoint: edit(checkpoint, change)


HOSTILE_MANIFESTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a manifest of 1 TiB": (no_manifest_so_large, "larger than any manifest"),
    "a pipe for a file": (a_pipe, "and no file"),
    "a name with NUL": (lambda c: edit(c, lambda m: m["files"].update({"model.\0.safetensors": {}})), "not say its"),
    "a name that is absolute": (lambda c: edit(c, lambda m: m["files"].update({"/x.safetensors": {}})), "holds only"),
    "the step of another": (lambda c: edit(c, lambda m: m.update(step=7)), "of step 7: the directory was renamed"),
    "a step that is true": (lambda c: edit(c, lambda m: m.update(step=True)), "step is True"),
    "a step of text": (lambda c: edit(c, lambda m: m.update(step="1")), "step is '1'"),
    "a version of 100,000 letters": (lambda c: edit(c, lambda m: m.update(version="x" * 10**5)), "schema version x"),
    "a dtype of pickles": (weight(dtype="object"), "of dtype object"),
    "a shape that no file can hold": (weight(shape=[4 * 10**15, 3], rows=4 * 10**15), "its files are smaller"),
    "20,000 chunks": (weight(shape=[1, 20_000], chunks=[[0, [0, i], [1, 1]] for i in range(20_000)]), "smaller"),
    "a tensor whose name commands the terminal": (
        lambda c: edit(c, lambda m: m["tensors"]["model"].update({"\x1b]0;\x07\ud800": {}})),
        r"lacks shape or dtype of \\x1b\]0;\\x07\\ud800$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE_MANIFESTS)
def test_a_hostile_manifest_is_refused_at_once(kind: str, checkpoint: Path) -> None:
    change, message = HOSTILE_MANIFESTS[kind]
    change(checkpoint)
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message) as refusal:
        load(checkpoint)
    assert is_one_clean_line(refusal.value)
    assert time.process_time() - began < 5 * AT_ONCE_S  # 20,000 chunks are looked at one by one


def test_many_chunks_are_compared_in_time_that_grows_with_their_number() -> None:
    columns = 4_000
    chunks = [[0, [0, column], [1, 1]] for column in range(columns)]
    began = time.process_time()
    assert cover([1, columns], chunks)
    chunks[5] = chunks[6]  # the right volume, one place twice, one left out
    assert not cover([1, columns], chunks)
    assert time.process_time() - began < AT_ONCE_S  # comparing each with each would take 10


@given(st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_chunks_cover_a_tensor_if_and_only_if_every_place_is_in_one(
    rows: int, columns: int, rng: random.Random
) -> None:
    boxes = []
    for _ in range(rng.randint(1, 5)):
        top, left = rng.randint(0, rows), rng.randint(0, columns)
        boxes.append([0, [top, left], [rng.randint(0, rows - top), rng.randint(0, columns - left)]])
    if rng.random() < 0.7:  # or hardly any would
        cut = rng.randint(0, rows)
        boxes = [[0, [0, 0], [cut, columns]], [1, [cut, 0], [rows - cut, columns]], *boxes[: rng.randint(0, 1)]]
        if rng.random() < 0.5:  # as much, elsewhere
            boxes[0][1] = [rng.randint(0, rows - cut), 0]
    held = np.zeros((rows, columns), int)
    for _, (top, left), (height, width) in boxes:
        held[top : top + height, left : left + width] += 1
    assert cover([rows, columns], boxes) == bool((held == 1).all())


# ---------------------------------------------------------------------- a run that resumes from what it finds


@pytest.fixture(scope="module")
def corpus(tiny_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset("text", [f"{i} green bottles. " * 9 for i in range(60)], tmp_path_factory.mktemp("data"))


def config_for(run_dir: Path, corpus: Path, **groups: dict[str, Any]) -> RunConfig:
    return small_config(run_dir, {"text": corpus}, train={"steps": 4}, evaluation={"every_steps": 0}, **groups)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trainer, Path, dict[str, Any]]]:
    """A trainer that has resumed, its only checkpoint, and the manifest."""
    run_dir = tmp_path_factory.mktemp("hostile") / "run"
    config = config_for(run_dir, corpus)
    train_in_process(config)
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    with ExitStack() as resources:
        yield trainer_for(config, resources), checkpoint, json.loads((checkpoint / commit.MANIFEST_FILE).read_text())


def restore(trainer: Trainer, checkpoint: Path, manifest: dict[str, Any]) -> int:
    """The step a run resumes at, from a checkpoint with this manifest; whatever comes of it, it stays in its place."""
    rewrite(checkpoint, manifest)
    try:
        restored = trainer.snapshots.restore()
    finally:
        aside = checkpoint.with_name(commit.REFUSED_PREFIX + checkpoint.name)
        if aside.exists():
            aside.rename(checkpoint)
    assert restored is not None
    return restored[0]


def resume_from_something_absurd(trained: tuple[Trainer, Path, dict[str, Any]], data: st.DataObject) -> None:
    trainer, checkpoint, manifest = trained
    expected = {name: tensor.detach().clone() for name, tensor in trainer.parameters.items()}  # type: ignore[union-attr]
    changed = json.loads(json.dumps(manifest))
    mutate(changed, data)
    step, refused = tried(lambda: restore(trainer, checkpoint, changed))
    if refused is None:
        assert step == 4
        assert all(torch.equal(tensor, trainer.parameters[name]) for name, tensor in expected.items())
    else:
        assert is_one_clean_line(refused)
    assert restore(trainer, checkpoint, manifest) == 4


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_a_run_resumes_right_or_stops_cleanly_whatever_the_manifest_says(
    trained: tuple[Trainer, Path, dict[str, Any]], data: st.DataObject
) -> None:
    resume_from_something_absurd(trained, data)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=500, deadline=None)
def test_and_so_500_times(trained: tuple[Trainer, Path, dict[str, Any]], data: st.DataObject) -> None:
    resume_from_something_absurd(trained, data)


STATES = {
    "more updates than steps": lambda m: m["optimizer"].update(step=5),
    "updates without end": lambda m: m["optimizer"].update(step=float("inf")),
    "a learning rate of a thousand digits": lambda m: m["config"]["optim"].update(lr=10**1000),
    "a setting that there is not": lambda m: m["config"].update(shell="rm"),
    "as many ranks as infinity": lambda m: m["mesh"].update(world_size=float("inf")),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_field_that_cannot_be_is_refused(kind: str, trained: tuple[Trainer, Path, dict[str, Any]]) -> None:
    trainer, checkpoint, manifest = trained
    changed = json.loads(json.dumps(manifest))
    STATES[kind](changed)
    with pytest.raises(UnhealthyRun, match="a field of the manifest cannot be used"):
        restore(trainer, checkpoint, changed)
    assert restore(trainer, checkpoint, manifest) == 4


def test_a_random_state_that_is_none_is_refused(trained: tuple[Trainer, Path, dict[str, Any]]) -> None:
    trainer, checkpoint, manifest = trained
    path = checkpoint / store.file_name("rng", 0)
    content = path.read_bytes()
    path.write_bytes(content[:-5056] + b"\xff" * 5056)
    changed = json.loads(json.dumps(manifest))
    changed["files"][path.name]["sha256"] = sha256_of_file(path)
    with pytest.raises(UnhealthyRun, match="is no state of a generator"):
        restore(trainer, checkpoint, changed)
    path.write_bytes(content)
    assert restore(trainer, checkpoint, manifest) == 4


def test_a_model_that_its_tensors_are_not_of_is_not_built(trained: tuple[Trainer, Path, dict[str, Any]]) -> None:
    _, checkpoint, manifest = trained
    for name, value in (("n_layers", 10**12), ("dim", 2**40), ("max_seq_len", 10**12), ("n_heads", 0)):
        rewrite(checkpoint, {**manifest, "model": {**manifest["model"], name: value}})
        with pytest.raises(CheckpointError, match=r"the manifest's model cannot be built"):
            inference.load_model_for_inference(checkpoint, torch.device("cpu"), compute_dtype=torch.float32)
    rewrite(checkpoint, dict(manifest))


# ---------------------------------------------------------------------- data sets


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    for path in corpus.iterdir():
        if path.suffix in (".bin", ".idx", ".json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def opened(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    check_sizes(manifest)
    check_hashes(manifest)
    return manifest


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_data_set_opens_right_or_is_refused_whatever_its_manifest_says(copied: Path, data: st.DataObject) -> None:
    path = copied / DATASET_FILE
    original = path.read_text()
    content = json.loads(original)
    mutate(content, data)
    path.write_text(json.dumps(content))
    manifest, refused = tried(lambda: opened(copied))
    path.write_text(original)
    if manifest is None:
        assert isinstance(refused, DataError)
        assert is_one_clean_line(refused)
    else:
        assert all(Source("text", 1.0, manifest, split, 32).leftover_tokens >= 0 for split in manifest.splits)
        assert 0 <= manifest.bos_id < manifest.vocab_size


def one_shard(**changes: Any) -> Change:
    return lambda content: content["splits"]["train"][0].update(changes)


HOSTILE_DATA_SETS: dict[str, Change] = {
    "the directory above for a file": one_shard(file="..", tokens=0),
    "a name with NUL": one_shard(index_file="a\0b"),
    "a name that cannot be encoded": one_shard(file="\ud800"),
    "a count that is true": one_shard(documents=True),
    "a count beyond 2^63": one_shard(tokens=2**63),
    "a hash that is a list": one_shard(sha256=["0"]),
    "no ids at all": lambda content: content.update(vocab_size=0),
    "more ids than its type holds": lambda content: content.update(vocab_size=2**40),
    "BOS beyond the vocabulary": lambda content: content.update(bos_id=512),
    "EOS below zero": lambda content: content.update(eos_id=-1),
    "splits in a list": lambda content: content.update(splits=[content["splits"]]),
}


@pytest.mark.parametrize("kind", HOSTILE_DATA_SETS)
def test_a_hostile_data_set_is_refused(kind: str, copied: Path) -> None:
    content = json.loads((copied / DATASET_FILE).read_text())
    HOSTILE_DATA_SETS[kind](content)
    (copied / DATASET_FILE).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"dataset\.json: ") as refusal:
        opened(copied)
    assert is_one_clean_line(refusal.value)


def test_no_pipe_is_waited_for_and_no_depth_followed(copied: Path) -> None:
    path = copied / DATASET_FILE
    content = json.loads(path.read_text())
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot be read"):
        opened(copied)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a file"):
        opened(copied)
    path.unlink()
    os.mkfifo(copied / "pipe")
    content["splits"]["train"][0].update(file="pipe", tokens=0)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="pipe: named in the manifest and no file"):
        opened(copied)


def batches(directory: Path, *, document_mask: bool = False) -> Loader:
    source = Source("text", 1.0, read_manifest(directory), "train", 32)
    state = DataState.start({"text": 1})
    order = SampleOrder(["text"], [source.windows], seed=0, segments=state.segments)
    return Loader(
        [source], order, state, seq_len=32, global_batch=8, micro_batch=8, prefetch_steps=1, document_mask=document_mask
    )


def test_an_id_outside_the_vocabulary_is_refused_with_its_place(copied: Path) -> None:
    tokens = np.fromfile(copied / "train-00000.bin", "<u2")
    with batches(copied) as loader:
        next(loader)
    tokens[::32] = 512
    tokens.tofile(copied / "train-00000.bin")
    with (
        batches(copied) as loader,
        pytest.raises(DataError, match=r"train-00000\.bin: token \d+ is id 512, there are 512;"),
    ):
        next(loader)


def test_an_index_in_disorder_is_refused_by_name(copied: Path) -> None:
    starts = np.fromfile(copied / "train-00000.idx", "<u8")
    starts[1::2] = 2**40
    starts.tofile(copied / "train-00000.idx")
    with (
        batches(copied, document_mask=True) as loader,
        pytest.raises(DataError, match=r"idx: starts of documents do not"),
    ):
        list(zip(loader, range(20), strict=False))


# ---------------------------------------------------------------------- secrets

SECRETS = {
    name: f"planted-{name.lower()}-5ecfe7"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SLURM_JWT", "MY_PASSWORD")
}


def where_secrets_are(run_dir: Path, *texts: str) -> list[str]:
    contents = {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    contents |= {f"text {number}": text.encode() for number, text in enumerate(texts)}
    return [name for name, content in contents.items() if b"5ecfe7" in content]


def test_secrets_of_the_environment_are_in_no_file_and_on_no_screen(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**SECRETS, "LLAMATRAIN_TRACEBACK": "1"}.items():
        monkeypatch.setenv(name, value)
    config = config_for(tmp_path / "run", corpus)
    take_step = Trainer.train_step

    def crash(trainer: Trainer, *batch: Any) -> Any:
        if trainer.step == 2:
            raise RuntimeError("a step that fails")
        return take_step(trainer, *batch)

    monkeypatch.setattr(Trainer, "train_step", crash)
    with pytest.raises(RuntimeError, match="a step that fails"):
        train_in_process(config)
    monkeypatch.undo()
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    train_in_process(config)
    out, err = capfd.readouterr()
    logs = "".join(path.read_text() for path in (tmp_path / "run" / "logs").iterdir())
    assert "a step that fails" in logs
    assert "step 4/4" in out
    assert where_secrets_are(tmp_path / "run", out, err) == []
    (tmp_path / "run" / "planted").write_text(os.environ["HF_TOKEN"])
    assert len(where_secrets_are(tmp_path / "run", os.environ["MY_PASSWORD"])) == 2  # the search works


@pytest.mark.parametrize("values", [{"wandb_api_key": "5ecfe7"}, {"logging": {"wandb_api_key": {"x": "5ecfe7"}}}])
def test_a_secret_typed_as_a_setting_is_refused_without_being_repeated(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="there is no such setting") as refusal:
        build(RunConfig, values)
    assert "5ecfe7" not in str(refusal.value)


@pytest.mark.slow
def test_a_secret_typed_at_the_command_line_is_not_repeated(tmp_path: Path) -> None:
    for key in ("logging.wandb_api_key", "wandb_api_key", "data.sources.text.token", "++logging.secret"):
        arguments = [f"{key}={SECRETS['WANDB_API_KEY']}", f"run_dir={tmp_path}/run", "train.steps=1"]
        command = [sys.executable, "-m", "llamatrain.train", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)
        assert done.returncode == 2
        assert "there is no such setting" in done.stderr
        assert where_secrets_are(tmp_path, done.stdout, done.stderr) == []


@pytest.mark.slow
def test_no_secret_leaves_through_torchrun_wandb_or_a_crash(corpus: Path, tmp_path: Path) -> None:
    environment = {**os.environ, **SECRETS, "LLAMATRAIN_TRACEBACK": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_MAX_RESTARTS": "x5ecfe7"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    shape = ["model=15m", "model.dim=64", "model.n_layers=2", "model.n_heads=2", "model.vocab_size=512"]
    batch = ["data.seq_len=32", "train.global_batch_tokens=256", "train.micro_batch=2", "train.device=cpu"]
    rest = ["optim.warmup_steps=1", "train.steps=6", "logging.every_steps=1", "checkpoint.every_steps=2"]
    for crash, wandb in (("", "off"), (CRASHING, "offline")):
        (tmp_path / "crash.py").write_text(crash)
        script = [str(tmp_path / "crash.py")] if crash else ["-m", "llamatrain.train"]
        arguments = [*shape, *batch, *rest, f"data.sources.text.path={corpus}", f"run_dir={tmp_path}/run{wandb}"]
        command = [*launcher, *script, *arguments, f"logging.wandb={wandb}"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=180, check=False
        )
        assert (done.returncode == 0) == (not crash), done.stderr
        assert ("a step that fails" in done.stderr) == bool(crash)
        assert where_secrets_are(tmp_path, done.stdout, done.stderr) == []


CRASHING = """
from llamatrain import train
from llamatrain.trainer import Trainer
plain = Trainer.train_step
def crash(trainer, *batch):
    if trainer.step == 3 and trainer.world.rank == 1:
        raise RuntimeError("a step that fails")
    return plain(trainer, *batch)
Trainer.train_step = crash
train.main()
"""
