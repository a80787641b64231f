"""The bytes that the planner foretells of weights, gradients, optimizer state and activations are those of a run."""

import itertools
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llamatrain.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from llamatrain.config.parallel import RECOMPUTE, Layout, layout
from llamatrain.distributed import World, local_part
from llamatrain.memory import activation_bytes_per_token_layer, state_bytes
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from llamatrain.optim.adamw import build_adamw
from llamatrain.parallel.composition import build_model
from llamatrain.parallel.context import share_sequences
from llamatrain.parallel.mesh import build_mesh
from llamatrain.parallel.recompute import apply_recompute
from llamatrain.parallel.tensor import share_layers
from tests.benchmarks.bench_recompute import LiveBytes
from tests.ranks import on_ranks
from tests.test_model import some_tokens

SMALL: dict[str, Any] = {"dim": 48, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 70, "max_seq_len": 16}


def config_of(*, precision: str = "fp32", tied: bool = False, **parallel: Any) -> RunConfig:
    return RunConfig(
        # rows that FSDP's ranks cannot share evenly; those of tp must
        model=ModelConfig(**SMALL, vocab_size=514 if "tp" in parallel else 515, tied_embeddings=tied, attention="sdpa"),
        data=DataConfig(seq_len=16),
        train=TrainConfig(steps=2, global_batch_tokens=16 * 8, precision=precision, compile=False, device="cpu"),
        parallel=ParallelConfig(recompute="none", **parallel),
    )


def allocated(world: World, config: RunConfig) -> tuple[dict[str, int], dict[str, int]]:
    """What a rank holds after two steps, and what was foretold of it."""
    model, passes, parameters = build_model(config, torch.device("cpu"), world_size=world.size)
    init_weights(model, config.model, seed=0)
    optimizer = build_adamw(parameters.items(), OptimConfig())
    mesh = layout(config.parallel, world.size)
    tokens = some_tokens(1, 16)
    for _ in range(2):
        optimizer.zero_grad()
        passes.accumulate([(tokens, tokens, None)] * 2, 32)
        optimizer.step()
    state = [tensor for of_one in optimizer.state.values() for tensor in of_one.values()]
    held = {
        "weights": storage_bytes(parameters.values()),
        "gradients": storage_bytes(parameter.grad for parameter in parameters.values() if parameter.grad is not None),
        "optimizer state": storage_bytes(state),
    }
    place: dict[str, int] = {}
    rest = world.rank
    for axis, size in reversed(mesh.sizes().items()):
        rest, place[axis] = divmod(rest, size)
    shard = place["dp_shard"] * mesh.cp + place["cp"]
    return held, state_bytes(config, world_size=world.size, stage=place["pp"], shard=shard)


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Of the memory behind them, each piece once."""
    local: list[Tensor] = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    pieces = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}
    return sum(pieces.values())


def all_allocated(world: World, configs: list[RunConfig]) -> list[tuple[dict[str, int], dict[str, int]]]:
    return [allocated(world, config) for config in configs]


WAYS: dict[int, list[dict[str, Any]]] = {
    1: [{}, {"precision": "bf16", "tied": True}],
    2: [{}, {"tp": 2}, {"pp": 2}, {"cp": 2}],
    4: [
        {"precision": "bf16", "reduce_dtype": "bf16", "reshard_after_forward": "never"},
        {"dp_replicate": 2, "tied": True},
        {"tp": 2, "reduce_scatter": "last"},
    ],
}


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_allocates_what_was_foretold_to_the_byte(ranks: int) -> None:
    for of_rank in on_ranks(ranks, all_allocated, [config_of(**way) for way in WAYS[ranks]]):
        for way, (held, foretold) in zip(WAYS[ranks], of_rank, strict=True):
            assert held == foretold, way


SHAPE = ModelConfig(dim=256, n_layers=4, n_heads=8, n_kv_heads=4, ffn_dim=704, vocab_size=512, max_seq_len=128)


def kept_by_rank(world: World, axis: str, ways: list[tuple[str, torch.dtype]]) -> list[float]:
    """Bytes that a layer keeps for each token of a rank."""
    mesh = build_mesh(Layout(**{axis: world.size}), torch.device("cpu"))
    tokens = some_tokens(2, 128)

    def kept(layers: int, mode: str, dtype: torch.dtype) -> int:
        shape = replace(SHAPE, n_layers=layers, attention="sdpa")
        with torch.device("meta"):
            model = Llama(shape, compute_dtype=dtype)
        if axis == "tp":
            share_layers(model, mesh["tp"])
        else:
            assert dist.group.WORLD is not None
            share_sequences(model, dist.group.WORLD)
        apply_recompute(model, ParallelConfig(recompute=mode))
        model.to(dtype).to_empty(device="cpu")
        model.rebuild_rope_tables()
        init_weights(model, shape, seed=0)
        with LiveBytes([*(local_part(p)[0] for p in model.parameters()), *model.buffers(), tokens]) as live:
            logits = model(tokens)
            time.sleep(0.1)  # gloo's threads let go of the last collective's memory a little later
            return live.now() - logits.untyped_storage().nbytes()

    shared = world.size if axis == "cp" else 1
    return [(kept(4, *way) - kept(2, *way)) / 2 / tokens.numel() * shared for way in ways]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_a_layer_that_ranks_share_keeps_what_its_formula_says(axis: str) -> None:
    ways = list(itertools.product(RECOMPUTE, (torch.float32, torch.bfloat16)))
    tp = 2 if axis == "tp" else 1
    for of_rank in on_ranks(2, kept_by_rank, axis, ways):
        for (mode, dtype), kept in zip(ways, of_rank, strict=True):
            formula = activation_bytes_per_token_layer(SHAPE, mode, bytes_per_element=dtype.itemsize, tp=tp)
            assert kept == pytest.approx(formula, rel=0.005), (mode, dtype)  # 5 % is what was asked for
