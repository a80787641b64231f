"""Meta's files: cut as fairscale's layers cut, read from any number of shards, and what the released ones hold."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamatrain.checkpoint.interchange import meta
from llamatrain.config.model import ModelConfig
from llamatrain.distributed import World
from llamatrain.errors import CheckpointError, ConfigError
from tests.conftest import TINY_VOCAB
from tests.interchange.converting import ROWS, SHAPES, assert_same_weights, built, change_json, converted, loaded
from tests.ranks import on_ranks


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
    state["rope.freqs"] = frequencies = (500.0 ** -(torch.arange(0, 16, 2) / 16)).half()
    if shards == 1:  # as in 7B
        state |= {f"layers.{i}.attention.inner_attention.rope.freqs": frequencies for i in range(2)}
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


@pytest.mark.parametrize("told", [-1, ROWS])
def test_a_missing_last_shard_is_named(checkpoint: Callable[..., Path], tmp_path: Path, told: int) -> None:
    there = converted(checkpoint(), tmp_path / "there", "meta", shards=4)
    change_json(there / "params.json", vocab_size=told)
    for i in (3, 2):
        (there / f"consolidated.{i:02d}.pth").unlink()
        with pytest.raises(
            CheckpointError, match=rf"cut into 4 shards, and {i} are.* consolidated\.{i:02d}\.pth missing"
        ):
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


@settings(max_examples=60)
@given(dim=st.integers(1, 300).map(lambda n: 2 * n), width=st.integers(1, 3000))
def test_every_feed_forward_width_can_be_said_in_params(dim: int, width: int) -> None:
    params = meta.params_of(ModelConfig(dim=dim, n_heads=1, ffn_dim=width))
    assert meta.ffn_width(dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == width


def test_params_of_the_papers_models_are_those_released() -> None:
    released = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": 32000}
    assert meta.params_of(ModelConfig()) == released
    assert [meta.ffn_width(dim, 256, None) for dim in (4096, 5120, 6656, 8192)] == [11008, 13824, 17920, 22016]
    assert meta.ffn_width(8192, 4096, 1.3) == 28672  # Llama 2 70B


def test_rotary_frequencies_of_another_base_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    there = converted(checkpoint(), tmp_path / "there", "meta")
    shard = torch.load(there / "consolidated.00.pth")
    name = "layers.1.attention.inner_attention.rope.freqs"
    torch.save({**shard, name: 10_000.0 ** -(torch.arange(0, 16, 2) / 16)}, there / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=rf"{name} are not those of rope_theta=500"):
        converted(there, tmp_path / "back", "llamatrain")


def test_sizes_that_the_files_have_not_take_no_memory(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    there = converted(checkpoint(), tmp_path / "there", "meta")
    change_json(there / "params.json", dim=2**38)  # the table of rotary frequencies would take 256 GiB
    with pytest.raises(CheckpointError, match="rope"):
        converted(there, tmp_path / "back", "llamatrain")
