"""Weights between llamatrain, Hugging Face and Meta's files: the same logits, the same ids, nothing executed."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from llamatrain.checkpoint import commit, store
from llamatrain.checkpoint.inference import load_model_for_inference
from llamatrain.checkpoint.interchange import conversion, hf_tokenizer, huggingface, meta, pickles
from llamatrain.checkpoint.interchange.conversion import RECORD_FILE, convert
from llamatrain.config import InitConfig, RunConfig, validate
from llamatrain.config.convert import ConvertConfig, check_convert
from llamatrain.config.model import ModelConfig
from llamatrain.distributed import World
from llamatrain.errors import CheckpointError, ConfigError, DataError, UnhealthyRun
from llamatrain.model.llama import Llama
from llamatrain.resilience.control import StopRequest
from llamatrain.session import run_on
from llamatrain.tokenizer import Tokenizer
from tests.conftest import TINY_VOCAB
from tests.ranks import on_ranks
from tests.real_text import english_documents
from tests.small_run import assert_same_run, metrics, small_config, status, train_in_process
from tests.test_model import tiny
from tests.test_tokenizer import AWKWARD, TEXTS

CPU = torch.device("cpu")
ROWS = TINY_VOCAB + 8  # of the embedding: the tokenizer has fewer ids than the model
FORMS = ("llamatrain", "huggingface", "meta")
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "tied": {"tied_embeddings": True},
    "wide": {"ffn_dim": 88, "n_kv_heads": 2},
}


def built(**changes: Any) -> Llama:
    return tiny(vocab_size=ROWS, **changes).eval()


@pytest.fixture(scope="session")
def checkpoint(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(**changes) is a run's folder with a checkpoint of the tiny model."""

    def make(**changes: Any) -> Path:
        return run_with(built(**changes), tmp_path_factory.mktemp("run"), tiny_tokenizer)

    return make


def run_with(model: Llama, directory: Path, tokenizer: Path) -> Path:
    (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    content = {
        "tokens": 4096,
        "model": dataclasses.asdict(model.config),
        "tokenizer_sha256": Tokenizer(tokenizer).sha256,
    }
    groups = {"model": dict(model.named_parameters()), "optimizer": {"first.norm.weight": torch.ones(3)}}
    store.save(directory / "checkpoints", 7, groups, content)
    return directory


def converted(source: Path, output: Path, to: str, **changes: Any) -> Path:
    config = ConvertConfig(input=str(source), output=str(output), to=to, **changes)
    check_convert(config)
    return convert(config)


def loaded(path: Path) -> Llama:
    return load_model_for_inference(path, CPU, compute_dtype=torch.float32)[0]


def assert_same_weights(model: Llama, other: Llama, *, dtype: torch.dtype = torch.float32) -> None:
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name].to(dtype), theirs[name].to(dtype))] == []


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


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same_logits_and_back(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    ours = built(**SHAPES[name])
    there = converted(checkpoint(**SHAPES[name]), tmp_path / "there", "huggingface", max_shard_gib=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(there)
    tokens = torch.randint(TINY_VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = ours(tokens)
        assert (theirs(tokens).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        for parameter in theirs.parameters():  # other weights, written by transformers
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
        back = converted(tmp_path / "theirs", tmp_path / "back", "llamatrain", tokenizer=str(there / "tokenizer.model"))
        wanted = theirs(tokens).logits
        assert (loaded(back)(tokens) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_transformers_writes_on_as_generate_does(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llamatrain.model.generation import generate

    run = checkpoint(n_kv_heads=2)
    there = converted(run, tmp_path / "there", "huggingface")
    ours, tokenizer = load_model_for_inference(run, CPU, compute_dtype=torch.float32)
    prompt = " The year was 1984"
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(there), AutoTokenizer.from_pretrained(there)
    inputs = their_tokenizer(prompt, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == tokenizer.encode(prompt, bos=True)
    continued = theirs.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()
    ids = tokenizer.encode(prompt, bos=True)
    wanted = generate(
        ours, [ids], max_new_tokens=20, temperature=0, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
    )
    assert continued == ids + wanted[0]


# Tokenizers


@pytest.fixture(scope="session")
def their_tokenizer(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        converted(checkpoint(), tmp_path_factory.mktemp("tokenizer") / "there", "huggingface")
    )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_ids_and_texts_are_those_of_sentencepiece(their_tokenizer: Any, tiny_tokenizer: Path, text: str) -> None:
    assert_same_tokenizer(their_tokenizer, Tokenizer(tiny_tokenizer), text)


def test_ids_of_awkward_and_real_texts_are_those_of_sentencepiece(
    their_tokenizer: Any, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    ours = Tokenizer(tiny_tokenizer)
    runs = [char * count for char in "a =-e\n" for count in range(1, 40)]
    for text in [
        *AWKWARD,
        "",
        " ",
        "<s>",
        "<unk></s>",
        "\u2581",
        "a" * 10_000,
        *runs,
        *english_documents(tmp_path)[:3],
    ]:
        assert_same_tokenizer(their_tokenizer, ours, text[:20_000])


def assert_same_tokenizer(theirs: Any, ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text, bos=True)
    assert theirs(text)["input_ids"] == ids
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids[1:]
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_the_tokenizers_ids_for_bos_eos_and_unknown(their_tokenizer: Any) -> None:
    theirs = their_tokenizer
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, 2, TINY_VOCAB)


def test_a_tokenizer_that_normalizes_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("the cat sat on the mat\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=280, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match="it normalizes texts"):
        hf_tokenizer.pieces_of(tmp_path / "m.model")


# Meta's layout


def test_shards_are_cut_as_fairscales_layers_cut(
    checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = checkpoint(n_kv_heads=2)
    there = converted(run, tmp_path / "there", "meta", shards=2)
    assert f"the model has {ROWS} ids, the tokenizer {TINY_VOCAB}" in caplog.text
    whole = built(n_kv_heads=2).state_dict()
    shards = [torch.load(there / f"consolidated.{i:02d}.pth", weights_only=True) for i in range(2)]
    mapped = torch.load(there / "consolidated.01.pth", weights_only=True, mmap=True)
    for i, shard in enumerate(shards):
        assert shard.keys() == {*whole, "rope.freqs"}
        for name in whole:
            kind = name.split(".")[-2]
            dim = {"wo": 1, "w2": 1, "tok_embeddings": 1}.get(kind, None if "norm" in kind else 0)
            part = whole[name] if dim is None else whole[name].chunk(2, dim)[i]
            assert torch.equal(shard[name], part), name
    assert all(torch.equal(mapped[name], shards[1][name]) for name in mapped)
    params = json.loads((there / "params.json").read_text())
    assert params["n_kv_heads"] == 2 and params["rope_theta"] == 500.0 and params["norm_eps"] == 1e-3
    assert zipfile.ZipFile(there / "consolidated.00.pth").testzip() is None


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_what_torch_saves_in_metas_layout_is_read(tiny_tokenizer: Path, tmp_path: Path, shards: int, cut: int) -> None:
    """Files as Meta's, written by torch.save: a state_dict in half precision with a buffer; Llama 3 cuts rows."""
    model = built(n_kv_heads=4)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    state["rope.freqs"] = (500.0 ** -(torch.arange(0, 16, 2) / 16)).half()
    folder = tmp_path / "Meta" / "7B"
    folder.mkdir(parents=True)
    (folder.parent / "tokenizer.model").write_bytes(tiny_tokenizer.read_bytes())
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 8, "norm_eps": 1e-3, "rope_theta": 500.0}
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": -1}))
    for i in range(shards):
        own = {}
        for name, tensor in state.items():
            dim = cut if name == "tok_embeddings.weight" else meta.cut_dimension(name) if "rope" not in name else None
            own[name] = tensor if dim is None else tensor.chunk(shards, dim)[i].clone()
        torch.save(own, folder / f"consolidated.{i:02d}.pth")
    back = converted(folder, tmp_path / "back", "llamatrain")
    assert_same_weights(loaded(back), model, dtype=torch.half)
    assert loaded(back).config.max_seq_len == 2048


def test_shards_are_recut_into_any_number(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    run = checkpoint()
    one = converted(run, tmp_path / "one", "meta", shards=4, dtype="bf16")
    two = converted(one, tmp_path / "two", "meta", shards=1)
    three = converted(two, tmp_path / "three", "meta", shards=4)
    for i in range(4):
        name = f"consolidated.{i:02d}.pth"
        assert (one / name).read_bytes() == (three / name).read_bytes()
    with pytest.raises(ConfigError, match=r"shards=3.*possible: \[1, 2, 4\]"):
        converted(run, tmp_path / "four", "meta", shards=3)
    assert not (tmp_path / "four").exists()


def test_a_norm_that_differs_between_shards_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    there = converted(checkpoint(), tmp_path / "there", "meta", shards=2)
    shard = torch.load(there / "consolidated.01.pth")
    shard["norm.weight"] += 1
    torch.save(shard, there / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"norm\.weight is not that of consolidated\.00\.pth"):
        converted(there, tmp_path / "back", "llamatrain")
    (there / "consolidated.00.pth").unlink()
    os.mkfifo(there / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="there is no such file"):
        converted(there, tmp_path / "back", "llamatrain")
    (there / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: missing"):
        converted(there, tmp_path / "back", "llamatrain")


def logits_of_fairscales_layers(world: World, files: Path, tokens: Tensor) -> Tensor:
    """The model as the released code builds it, of fairscale's layers and complex rotations, from one rank's file."""
    from fairscale.nn.model_parallel.initialize import initialize_model_parallel
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear

    initialize_model_parallel(world.size)
    params = json.loads((files / "params.json").read_text())
    shard = torch.load(files / f"consolidated.{world.rank:02d}.pth", weights_only=True)
    dim, n_heads = params["dim"], params["n_heads"]
    width = dim // n_heads
    hidden = meta.ffn_width(dim, params["multiple_of"], params.get("ffn_dim_multiplier"))

    def apply(name: str, layer: torch.nn.Module, x: Tensor) -> Tensor:
        layer.load_state_dict({"weight": shard[f"{name}.weight"]})
        return layer(x)  # type: ignore[no-any-return]

    def column(name: str, x: Tensor, outputs: int, *, gather: bool = False) -> Tensor:
        return apply(name, ColumnParallelLinear(dim, outputs, bias=False, gather_output=gather), x)

    def row(name: str, x: Tensor, inputs: int) -> Tensor:
        return apply(name, RowParallelLinear(inputs, dim, bias=False, input_is_parallel=True), x)

    def norm(name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * shard[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:  # [B, T, H, K]
        turns = torch.polar(torch.ones(()), torch.outer(torch.arange(x.shape[1]).float(), shard["rope.freqs"]))
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(3)

    with torch.no_grad():
        h = apply("tok_embeddings", ParallelEmbedding(params["vocab_size"], dim), tokens)
        for i in range(params["n_layers"]):
            at, ff, x = f"layers.{i}.attention", f"layers.{i}.feed_forward", norm(f"layers.{i}.attention_norm", h)
            heads = {"wq": n_heads, "wk": params.get("n_kv_heads", n_heads), "wv": params.get("n_kv_heads", n_heads)}
            q, k, v = (column(f"{at}.{w}", x, n * width).unflatten(-1, (-1, width)) for w, n in heads.items())
            q, k, v = (part.transpose(1, 2) for part in (rotate(q), rotate(k), v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            h = h + row(f"{at}.wo", out.transpose(1, 2).flatten(2), dim)
            x = norm(f"layers.{i}.ffn_norm", h)
            gate = torch.nn.functional.silu(column(f"{ff}.w1", x, hidden))
            h = h + row(f"{ff}.w2", gate * column(f"{ff}.w3", x, hidden), hidden)
        return column("output", norm("norm", h), params["vocab_size"], gather=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped", "tied", "wide"])
def test_fairscales_layers_compute_the_same_logits_from_the_shards(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    there = converted(checkpoint(**SHAPES[name]), tmp_path / "there", "meta", shards=2)
    tokens = torch.randint(TINY_VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = built(**SHAPES[name])(tokens)
    for logits in on_ranks(2, logits_of_fairscales_layers, there, tokens):
        assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@settings(max_examples=60, deadline=None)
@given(dim=st.integers(1, 300).map(lambda n: 2 * n), width=st.integers(1, 3000))
def test_every_feed_forward_width_can_be_said_in_params(dim: int, width: int) -> None:
    params = meta.params_of(ModelConfig(dim=dim, n_heads=1, ffn_dim=width))
    assert meta.ffn_width(dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == width


def test_params_of_the_papers_models_are_those_released() -> None:
    released = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": 32000}
    assert meta.params_of(ModelConfig()) == released
    assert [meta.ffn_width(dim, 256, None) for dim in (4096, 5120, 6656, 8192)] == [11008, 13824, 17920, 22016]
    assert meta.ffn_width(8192, 4096, 1.3) == 28672  # Llama 2 70B


# Pickles


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def archive_with(path: Path, program: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


def test_a_pickle_that_runs_a_command_is_refused_by_name(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"tok_embeddings.weight": Evil(ran)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"asks for (posix|os)\.system.*nothing of it was run"):
        pickles.read_header(tmp_path / "evil.pth")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("program", "refusal"),
    [
        (b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.", r"builtins\.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"os\.system"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor\n.", r"torch\._utils\._rebuild_tensor,"),
        (b"\x80\x02ctorch\nload\n.", r"torch\.load"),
        (b"(cos\nsystem\nX\x01\x00\x00\x00xo.", r"os\.system"),
        (b"(S'x'\nios\nsystem\n.", "opcode"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "a call of collections.OrderedDict"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "no dictionary"),
        (b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read|opcode|can be read"),
        (b"\x80\x02" + b")" + b"\x85" * 2_000 + b".", "no dictionary"),
        (b"\x80\x02}", "can be read"),
        (b"0.", "can be read|opcode"),
        (b"", "can be read"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path: Path, program: bytes, refusal: str) -> None:
    with pytest.raises(CheckpointError, match=refusal):
        pickles.read_header(archive_with(tmp_path / "file.pth", program))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_and_nothing_else(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "file.pth"
    torch.save({"a": torch.ones(3, 4), "b": torch.ones(2).half()}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([None, None, -1, -300, 700]))])
    try:
        for region in pickles.read_header(path).values():
            assert region.bytes <= len(content)
            region.read()
    except CheckpointError:
        pass


class Huge:
    """A tensor of `shape` in a storage said to hold `count` numbers."""

    def __init__(self, shape: tuple[int, ...], count: int) -> None:
        self.shape, self.count = shape, count


def test_a_few_bytes_that_ask_for_terabytes_are_refused(tmp_path: Path) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", value.count) if isinstance(value, Huge) else None

        def reducer_override(self, value: Any) -> Any:
            return NotImplemented

    for shape, count, said in (
        ((2**40,), 2**40, "is to hold"),
        ((2**40,), 4, "is to begin at 0"),
        ((2**61, 8), 4, "begin"),
    ):
        strides = tuple(8 if i + 1 < len(shape) else 1 for i in range(len(shape)))

        class Tensorlike:
            def __reduce__(self, shape: Any = shape, count: int = count, strides: Any = strides) -> Any:
                return torch._utils._rebuild_tensor_v2, (Huge(shape, count), 0, shape, strides, False, None)

        with open(tmp_path / "program", "wb") as file:
            Pickler(file, protocol=2).dump({"tok_embeddings.weight": Tensorlike()})
        path = archive_with(tmp_path / "file.pth", (tmp_path / "program").read_bytes(), {"data/0": b"\0" * 16})
        with pytest.raises(CheckpointError, match=said):
            pickles.read_header(path)


def test_strange_tensors_and_archives_are_refused(tmp_path: Path) -> None:
    cases: dict[str, tuple[Any, str]] = {
        "turned": ({"a": torch.ones(3, 4).t()}, "gaps or turned"),
        "double": ({"a": torch.ones(3).double()}, r"torch\.DoubleStorage"),
        "nested": ({"a": {"b": torch.ones(3)}}, "a is no tensor"),
        "list": ([torch.ones(3)], "no dictionary of tensors"),
    }
    for name, (content, refusal) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=refusal):
            pickles.read_header(tmp_path / name)
    torch.save({"a": torch.ones(3)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"not a file of torch\.save as torch 1\.6"):
        pickles.read_header(tmp_path / "old")
    with zipfile.ZipFile(tmp_path / "squeezed", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(CheckpointError, match="compressed"):
        pickles.read_header(tmp_path / "squeezed")


def test_views_and_parameters_are_read_from_where_they_lie(tmp_path: Path) -> None:
    whole = torch.arange(20.0)
    torch.save({"a": whole[8:12].view(2, 2), "b": torch.nn.Parameter(whole[12:])}, tmp_path / "file")
    found = pickles.read_header(tmp_path / "file")
    assert found["a"].read().tolist() == [[8, 9], [10, 11]] and found["b"].read().tolist() == whole[12:].tolist()


# Files of Hugging Face


@pytest.fixture
def there(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return converted(checkpoint(), tmp_path / "there", "huggingface")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"model_type": "mistral"}, r'model_type is "mistral"'),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters is of type yarn"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2}}, "rope_parameters has factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"rope_theta": 1e4}, "are not the same"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"hidden_size": 128, "head_dim": 32}, r"is \[520, 64\], and \[520, 128\]"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    ],
)
def test_what_this_program_does_not_compute_is_refused_by_name(
    there: Path, tmp_path: Path, changes: dict[str, Any], refusal: str
) -> None:
    change_json(there / "config.json", **changes)
    with pytest.raises(CheckpointError, match=refusal):
        converted(there, tmp_path / "back", "llamatrain")
    assert not (tmp_path / "back").exists()


def test_settings_that_are_not_known_are_told(there: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_json(there / "config.json", some_vendor_version="1.2")
    converted(there, tmp_path / "back", "llamatrain")
    assert "taken to have no part in the computation: some_vendor_version" in caplog.text


def safetensors_of(header: Any, body: int = 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * body


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        (b"", "cannot be read"),
        (safetensors_of({}, length=2**63), "a header of 9223372036854775808 bytes"),
        (safetensors_of({}, length=99_999_999), "a header of 99999999 bytes"),
        (safetensors_of(b"[]"), "no JSON object"),
        (safetensors_of(b"{\xff"), "header cannot be read"),
        (safetensors_of(b'{"a": 1, "a": 2}'), "stands there twice"),
        (safetensors_of(b"[" * 100_000), "header cannot be read"),
        (safetensors_of({"a": entry(0, 2**42, [2**40])}), "truncated|describes"),
        (safetensors_of({"a": entry(0, 16, [2**40])}), "has 16 bytes"),
        (safetensors_of({"a": entry(0, 16, [4]), "b": entry(0, 16, [4])}), "b begins at byte"),
        (safetensors_of({"a": entry(0, 8, [2]), "b": entry(4, 16, [3])}), "b begins at byte"),
        (safetensors_of({"a": entry(4, 16, [3])}), "a begins at byte"),
        (safetensors_of({"a": entry(0, 8, [2])}), "truncated or padded"),
        (safetensors_of({"a": entry(0, 16, [-4])}), "does not describe a"),
        (safetensors_of({"a": entry(0, 16, [2, 8], "I8")}), "a is of dtype I8"),
        (safetensors_of({"a": {"dtype": "F32"}}), "does not describe a"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path: Path, content: bytes, refusal: str) -> None:
    from llamatrain.checkpoint.interchange import safetensors_files

    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=refusal):
        safetensors_files.read_header(tmp_path / "model.safetensors")


def test_an_index_that_points_elsewhere_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    there = converted(checkpoint(), tmp_path / "there", "huggingface", max_shard_gib=1e-4)
    index = there / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for file, refusal in (("../x.safetensors", r"is to lie in '\.\./x"), ("model.pkl", "is to lie in 'model.pkl'")):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], "lm_head.weight": file}}))
        with pytest.raises(CheckpointError, match=refusal):
            converted(there, tmp_path / "back", "llamatrain")
    moved = {**good["weight_map"], "lm_head.weight": good["weight_map"]["model.embed_tokens.weight"]}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match=r"disagree about lm_head\.weight"):
        converted(there, tmp_path / "back", "llamatrain")


def test_old_pickled_weights_are_read_too(there: Path, tmp_path: Path) -> None:
    weights = load_file(there / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(weights, there / "pytorch_model.bin")
    (there / "model.safetensors").unlink()
    assert_same_weights(loaded(converted(there, tmp_path / "back", "llamatrain")), built())
    torch.save({**weights, "x": Evil(tmp_path / "ran")}, there / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        converted(there, tmp_path / "again", "llamatrain")


# Numbers


def test_weights_are_cast_and_what_does_not_fit_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    there = converted(checkpoint(), tmp_path / "there", "huggingface", dtype="bf16")
    assert {tensor.dtype for tensor in load_file(there / "model.safetensors").values()} == {torch.bfloat16}
    assert_same_weights(loaded(converted(there, tmp_path / "back", "llamatrain")), built(), dtype=torch.bfloat16)
    weights = load_file(there / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, there / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight holds 9\.984e\+04.*dtype=bf16"):
        converted(there, tmp_path / "half", "huggingface", dtype="fp16")
    assert not (tmp_path / "half").exists() and not list(tmp_path.glob(".half*"))


def test_numbers_that_are_not_finite_are_told(there: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(there / "model.safetensors")
    weights["lm_head.weight"][3, 3] = float("nan")
    save_file(weights, there / "model.safetensors")
    converted(there, tmp_path / "back", "llamatrain")
    assert "output.weight holds numbers that are not finite" in caplog.text


# The output


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
    with pytest.raises(ConfigError, match="remove the directory yourself"):
        converted(run, out, "huggingface", overwrite=True)
    with pytest.raises(ConfigError, match="the input lies there"):
        converted(run, run, "llamatrain", overwrite=True)


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


# Training from an import


def journal(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["event"] == kind]


@pytest.fixture(scope="session")
def imported(
    tiny_dataset: Any, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunConfig]:
    """A small run, exported and imported again, and the run's configuration."""
    directory = tmp_path_factory.mktemp("imported")
    config = small_config(directory / "first", sources, checkpoint={"asynchronous": False})
    train_in_process(config)
    there = converted(directory / "first", directory / "there", "huggingface", max_shard_gib=1e-5)
    return converted(there, directory / "import", "llamatrain", max_shard_gib=1e-5), config


def begun_with(origin: Path, config: RunConfig, run_dir: Path, **changes: dict[str, Any]) -> RunConfig:
    groups = {"init": {"from_": str(origin)}, "train": {"steps": 2}, **changes}
    settled = {name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
    return dataclasses.replace(config, run_dir=str(run_dir), **settled)


def test_a_run_begins_with_the_weights_of_an_import(imported: tuple[Path, RunConfig], tmp_path: Path) -> None:
    origin, first = imported
    run = begun_with(origin, first, tmp_path / "run")
    train_in_process(run)
    validated = [
        record for record in metrics(first.run_dir) if "eval/validation/loss" in record and record["step"] == 12
    ]
    begun = [record for record in metrics(run.run_dir) if "eval/validation/loss" in record and record["step"] == 0]
    assert validated[0]["eval/validation/loss"] == begun[0]["eval/validation/loss"]
    (noted,) = journal(tmp_path / "run", "initial weights")
    sha256 = commit.manifest_hash(origin / "checkpoints" / "step-00000000")
    assert noted["manifest_sha256"] == sha256
    (start,) = journal(tmp_path / "run", "start")
    assert start["config"]["init"] == {"from": str(origin), "sha256": sha256, "allow": []}
    assert f"sha256: {sha256}" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_resumed_run_reads_the_import_no_more(imported: tuple[Path, RunConfig], tmp_path: Path) -> None:
    origin, first = imported
    shutil.copytree(origin, tmp_path / "origin")
    whole = begun_with(origin, first, tmp_path / "whole", checkpoint={"every_steps": 1})
    train_in_process(whole)
    parts = begun_with(
        tmp_path / "origin", first, tmp_path / "parts", train={"steps": 2, "stop_after_step": 1},
        checkpoint={"every_steps": 1},
    )  # fmt: skip
    train_in_process(parts)
    shutil.rmtree(tmp_path / "origin")
    train_in_process(dataclasses.replace(parts, train=dataclasses.replace(parts.train, stop_after_step=None)))
    assert len(journal(tmp_path / "parts", "initial weights")) == 1
    assert_same_run(whole.run_dir, parts.run_dir, step=2)
    with pytest.raises(ConfigError, match=r"init\.from was .* is None: the run began with those weights"):
        train_in_process(dataclasses.replace(parts, init=InitConfig()))


def train_checked(config: RunConfig) -> None:
    validate(config)
    train_in_process(config)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"model": {"dim": 64}}, r"model\.dim=32 model\.ffn_dim=96 \(model\.dim is 64 here.*set that"),
        ({"model": {"n_layers": 3}}, r"model\.n_layers=2"),
        ({"model": {"tied_embeddings": True}}, r"model\.tied_embeddings=false"),
        ({"model": {"rope_theta": 5e5}}, r"model\.rope_theta=10000\.0 .*init\.allow=\[model\.rope_theta\]"),
        ({"init": {"from_": "nowhere"}}, "neither a checkpoint nor a run or an import"),
        ({"init": {"from_": "there"}}, r"llamatrain\.convert input=.* to=llamatrain makes"),
        ({"init": {"sha256": "0" * 64}}, "put that checkpoint back"),
        ({"init": {"allow": ["model.dim"]}}, "nothing to allow"),
    ],
)
def test_weights_of_another_model_do_not_begin_a_run(
    imported: tuple[Path, RunConfig], tmp_path: Path, changes: dict[str, dict[str, Any]], refusal: str
) -> None:
    origin, first = imported
    init: dict[str, Any] = {"from_": str(origin), **changes.get("init", {})}
    if init["from_"] == "there":
        init["from_"] = str(origin.parent / "there")
    config = begun_with(origin, first, tmp_path / "run", **{**changes, "init": init})
    with pytest.raises((ConfigError, CheckpointError), match=refusal):
        train_checked(config)


@pytest.mark.slow
def test_another_rotary_base_is_taken_by_name_and_another_length_without(
    imported: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    origin, first = imported
    init = {"from_": str(origin), "allow": ["model.rope_theta"]}
    model = {"rope_theta": 5e5, "max_seq_len": 64}
    run = begun_with(origin, first, tmp_path / "run", init=init, model=model, data={"seq_len": 64})
    train_in_process(run)
    assert status(run.run_dir)["state"] == "done"


def test_weights_of_another_tokenizer_are_refused(
    imported: tuple[Path, RunConfig], tmp_path: Path, tiny_tokenizer: Path
) -> None:
    origin, first = imported
    shutil.copytree(origin, tmp_path / "origin")
    from data_tools.train_tokenizer import TrainTokenizerSettings, train_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("".join(f"another tokenizer of other words {n * 7919}\n" for n in range(300)))
    train_tokenizer(TrainTokenizerSettings(input=str(text), output=str(tmp_path / "t"), vocab_size=300))
    other = converted(origin, tmp_path / "other", "llamatrain", tokenizer=str(tmp_path / "t" / "tokenizer.model"))
    with pytest.raises(DataError, match="would mean other words"):
        train_in_process(begun_with(other, first, tmp_path / "run"))


def test_an_import_is_not_trained_in_place(imported: tuple[Path, RunConfig], tmp_path: Path) -> None:
    origin, first = imported
    shutil.copytree(origin, tmp_path / "origin")
    with pytest.raises(UnhealthyRun, match=r"it is an import.*init\.from="):
        train_in_process(begun_with(origin, first, tmp_path / "origin", init={"from_": None}))
    assert loaded(tmp_path / "origin")


MESHES: list[dict[str, Any]] = [{"dp_shard": 2}, {"tp": 2, "dp_shard": 1}, {"pp": 2, "dp_shard": 1}]


def course_of(world: World, config: RunConfig) -> list[float]:
    run_on(world, config, StopRequest())
    return [record["train/loss"] for record in metrics(config.run_dir) if "train/loss" in record] if world.leads else []


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_any_mesh_begins_with_the_weights(
    imported: tuple[Path, RunConfig], tmp_path: Path, mesh: dict[str, Any]
) -> None:
    origin, first = imported
    alone = begun_with(origin, first, tmp_path / "alone")
    train_in_process(alone)
    wanted = [record["train/loss"] for record in metrics(alone.run_dir) if "train/loss" in record]
    losses, _ = on_ranks(2, course_of, begun_with(origin, first, tmp_path / "spread", parallel=mesh))
    assert losses == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_init_from_is_typed_as_it_is_documented(imported: tuple[Path, RunConfig], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llamatrain.train", "model=15m", "data.sources.a.path=x", "train.steps=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    typed = [*command, f"init.from={imported[0]}", "init.allow=[model.norm_eps]", "--cfg", "job"]
    done = subprocess.run(typed, capture_output=True, text=True, env=environment)
    assert f"from: {imported[0]}" in done.stdout, done.stderr


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
    bars = []

    def shown(**settings: Any) -> Any:
        bars.append(tqdm(**{**settings, "disable": False, "file": io.StringIO()}))
        return bars[0]

    monkeypatch.setattr(conversion, "tqdm", shown)
    converted(checkpoint(tied_embeddings=True), tmp_path / "out", to, **changes)
    assert bars[0].n == bars[0].total > 0


# Memory

MEASURE = """
import sys
from pathlib import Path
from llamatrain.checkpoint.interchange import conversion
from llamatrain.config import InitConfig, RunConfig, validate
from llamatrain.config.convert import ConvertConfig

def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

source, output, to, shards, gib = sys.argv[1:]
settings = ConvertConfig(input=source, output=output, to=to, shards=int(shards), max_shard_gib=float(gib))
before = kib("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the highest mark from here on
conversion.convert(settings)
print((kib("VmHWM:") - before) * 1024)
"""


def memory_taken(source: Path, output: Path, to: str, *, shards: int = 1, gib: float = 5.0) -> int:
    """Bytes by which a conversion raised its process's memory at most."""
    command = [sys.executable, "-c", MEASURE, str(source), str(output), to, str(shards), str(gib)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
def test_a_conversion_takes_less_memory_than_two_shards(tiny_tokenizer: Path, tmp_path: Path) -> None:
    config = ModelConfig(dim=512, n_layers=24, n_heads=8, vocab_size=2048, attention="sdpa")
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    run = run_with(model, tmp_path, tiny_tokenizer)
    total = sum(parameter.nbytes for parameter in model.parameters())
    del model
    shard = total // 4  # 83 MB
    assert shard > 80e6
    peaks = {}
    peaks["meta"] = memory_taken(run, tmp_path / "meta", "meta", shards=4)
    peaks["huggingface"] = memory_taken(tmp_path / "meta", tmp_path / "hf", "huggingface", gib=shard / 2**30)
    peaks["llamatrain"] = memory_taken(tmp_path / "hf", tmp_path / "own", "llamatrain", gib=shard / 2**30)
    print({to: f"{peak / 2**20:.0f} MiB of {shard / 2**20:.0f} MiB a shard" for to, peak in peaks.items()})
    assert all(peak < 2 * shard for peak in peaks.values()), peaks
