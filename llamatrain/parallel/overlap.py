"""Whether communication can hide behind computation: the rule, told at a run's start with the rates it stands on.

The rule is `arithmetic.tokens_that_hide`: it compares the time a block's weights and gradients are on their way with
the time its products take. Rates that are not configured are measured, by rank 0's clock, in messages of the size that
the run itself will send. What the answer was worth is seen in a profile of the run (`logging.profile_steps`).
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from llamatrain.arithmetic import (
    block_parameters,
    element_bytes,
    parameter_count,
    peak_flops,
    reduced_bytes,
    tokens_that_hide,
)
from llamatrain.config import RunConfig
from llamatrain.config.parallel import Layout, ParallelConfig, layout
from llamatrain.device import PRECISIONS, device_name, finish
from llamatrain.distributed import World, all_gather_single
from llamatrain.errors import ConfigError
from llamatrain.flat import FlatPart
from llamatrain.parallel.mesh import SHARDS

log = logging.getLogger(__name__)

ASSUMED_MFU = 0.5  # of the data sheet's FLOP/s; LLaMA's own runs reached 47 to 55 %
REPETITIONS = 5
LARGEST_MESSAGE = {"cpu": 2**22, "cuda": 2**28}  # bytes; larger ones are no faster
LARGEST_PRODUCT = 512  # rows and columns of the matrices by which a device of no known peak is measured
GIB = 2**30

Needs = dict[str, float]  # tokens, by phase of a micro-batch


@dataclass(frozen=True)
class Rates:
    """What the rule stands on, the same on all ranks."""

    flops: float  # a second, of one device
    gather: float  # bytes a second
    all_reduce: float  # bytes a second
    flops_told: str  # where the number is from
    gather_told: str
    all_reduce_told: str


def tell(config: RunConfig, parameters: Mapping[str, Tensor | FlatPart], device: torch.device, world: World) -> None:
    """Log what the rule says of a run with these parameters and, where it fails, what helps. All ranks call it."""
    sharded = next((parameter for parameter in parameters.values() if isinstance(parameter, DTensor)), None)
    ranks = layout(config.parallel, world.size)
    if sharded is None or ranks.shards == ranks.dp_replicate == 1:
        if world.size > 1:
            log.info(nothing_to_hide(ranks))
        return
    rates = find_rates(config, sharded.device_mesh, device, world)
    log.info(verdict(config, rates, world.size))
    helping = list(advice(config, rates, world.size, per_node=world.process.local_world_size))
    if helping:
        log.info("  what helps: %s", "; ".join(helping))


def nothing_to_hide(ranks: Layout) -> str:
    """One line for a layout in which no rank shares weights with another, or has a copy of them."""
    others = [f"parallel.{axis}={size}" for axis, size in ranks.sizes().items() if size > 1]
    return (
        f"overlap rule: FSDP sends nothing here, so it has nothing to hide; traffic of {_join(others)} is not in the "
        "rule (a profile shows it: logging.profile_steps)"
    )


def verdict(config: RunConfig, rates: Rates, world_size: int) -> str:
    """One line: tokens there are, tokens it takes, and by which rates."""
    needs, tokens = tokens_needed(config, rates, world_size), tokens_of(config, world_size)
    failing = [phase for phase, need in needs.items() if need > tokens]
    ranks = layout(config.parallel, world_size)
    stands_on = [f"{rates.flops / 1e12:.3g} TFLOP/s, {rates.flops_told}"]
    if ranks.shards > 1:
        stands_on.append(f"gathers {rates.gather / GIB:.3g} GiB/s, {rates.gather_told}")
    if ranks.dp_replicate > 1:
        stands_on.append(f"all-reduces {rates.all_reduce / GIB:.3g} GiB/s, {rates.all_reduce_told}")
    on_cpu = "; on CPU, ranks wait for every transfer all the same" if config.train.device == "cpu" else ""
    return (
        f"overlap rule {f'fails in {_join(failing)}' if failing else 'holds'}: a micro-batch has {tokens:,} tokens on "
        f"each rank, to hide communication takes {_told(needs)} ({'; '.join(stands_on)}){on_cpu}"
    )


def advice(config: RunConfig, rates: Rates, world_size: int, *, per_node: int) -> Iterator[str]:
    """Settings that bring what the rule demands nearer, with what it demands then; none if it holds."""
    needs, tokens = tokens_needed(config, rates, world_size), tokens_of(config, world_size)
    if max(needs.values()) <= tokens:
        return
    yield _larger_micro_batch(config, wanted=config.train.micro_batch * max(needs.values()) / tokens, size=world_size)
    parallel, ranks = config.parallel, layout(config.parallel, world_size)
    held = parameter_count(config.model) / ranks.tp / ranks.pp / GIB
    changes: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("reduce_dtype=bf16", {"reduce_dtype": "bf16"}, "sums of gradients are rounded"),
        ("reduce_scatter=last", {"reduce_scatter": "last", "all_reduce": "last"}, f"{4 * held:.2g} GiB more"),
        (
            "reshard_after_forward=never",
            {"reshard_after_forward": "never"},
            f"{element_bytes(config) * held:.2g} GiB more",
        ),
    )
    for name, values, cost in changes:
        then = tokens_needed(replace(config, parallel=replace(parallel, **values)), rates, world_size)
        if any(tokens < need > then.get(phase, need) for phase, need in needs.items()):
            changed = {phase: need for phase, need in then.items() if need != needs.get(phase)}
            yield f"parallel.{name} (then {_told(changed)}; {cost})"
    inside = _inside_nodes(parallel, ranks, world_size // per_node, per_node)
    if inside is not None:
        yield (
            f"parallel.dp_replicate={inside.dp_replicate}, gathers inside a node ({16 * held / inside.shards:.3g} GiB "
            "a device for weights, gradients and moments)"
        )


def _larger_micro_batch(config: RunConfig, *, wanted: float, size: int) -> str:
    ranks, batch_tokens = layout(config.parallel, size), config.train.global_batch_tokens
    fewest = ranks.pp if config.parallel.pipeline_schedule == "1f1b" else 1  # micro-batches that a pipeline takes
    share = config.global_batch // ranks.data_parallel  # sequences of a step on each rank
    allowed = [n for n in range(1, share // fewest + 1) if share % n == 0]
    enough = math.ceil(wanted)
    if allowed[-1] >= enough:
        return f"train.micro_batch={next(n for n in allowed if n >= enough)}"
    then = enough * fewest * ranks.data_parallel * config.data.seq_len
    return (
        f"train.micro_batch={enough} with train.global_batch_tokens={then}, which would be another training "
        f"({batch_tokens} allows train.micro_batch={allowed[-1]} at most)"
    )


def _inside_nodes(parallel: ParallelConfig, ranks: Layout, nodes: int, per_node: int) -> Layout | None:
    """The layout with one copy of the weights in each node, where gathers leave nodes and this would end it."""
    if nodes < 2 or ranks.shards * ranks.tp <= per_node:
        return None
    try:
        return layout(replace(parallel, dp_replicate=nodes, dp_shard=None), nodes * per_node)
    except ConfigError:  # the other axes leave no room for it
        return None


def tokens_of(config: RunConfig, world_size: int) -> int:
    """Tokens of a micro-batch on one rank."""
    return config.train.micro_batch * config.data.seq_len // layout(config.parallel, world_size).cp


def tokens_needed(config: RunConfig, rates: Rates, world_size: int) -> Needs:
    return tokens_that_hide(
        config, world_size=world_size, flops=rates.flops, gather=rates.gather, all_reduce=rates.all_reduce
    )


# ---------------------------------------------------------------------- rates


def find_rates(config: RunConfig, mesh: DeviceMesh, device: torch.device, world: World) -> Rates:
    """The rates of this run: configured, known, or measured where they are not. All ranks call it."""
    settings, ranks = config.parallel, layout(config.parallel, world.size)
    size = block_parameters(config.model) // ranks.tp
    found = (
        *_flops(config, device),
        *_rate(settings.bandwidth_gib_s, mesh, SHARDS, gather_rate, element_bytes(config) * size, device),
        *_rate(
            settings.replicate_bandwidth_gib_s,
            mesh,
            "dp_replicate",
            all_reduce_rate,
            reduced_bytes(config) * size // ranks.shards,
            device,
        ),
    )
    flops, flops_told, gather, gather_told, all_reduce, all_reduce_told = world.decide(lambda: found)
    return Rates(flops, gather, all_reduce, flops_told, gather_told, all_reduce_told)


def _rate(
    configured: float | None,
    mesh: DeviceMesh,
    axis: str,
    measure: Callable[[dist.ProcessGroup, int, torch.device], float],
    message: int,
    device: torch.device,
) -> tuple[float, str]:
    group = mesh.get_group(axis) if axis in (mesh.mesh_dim_names or ()) else None
    if group is None or dist.get_world_size(group) == 1:
        return math.inf, "nothing is sent"
    if configured is not None:
        return configured * GIB, "as configured"
    message = min(message, LARGEST_MESSAGE[device.type])
    return measure(group, message, device), f"measured over {dist.get_world_size(group)} ranks"


def gather_rate(group: dist.ProcessGroup, message: int, device: torch.device) -> float:
    """Bytes of a gathered tensor that arrive on all ranks of a group, a second. All of them call it."""
    ranks = dist.get_world_size(group)
    own = torch.zeros(max(1, message // ranks // 4), device=device)
    whole = torch.zeros(ranks * own.numel(), device=device)
    seconds = median_seconds(lambda: all_gather_single(whole, own, group=group), device)
    return whole.nbytes / seconds


def all_reduce_rate(group: dist.ProcessGroup | None, message: int, device: torch.device) -> float:
    """Bytes of a tensor that are added up over a group (None: all ranks), a second. All of its ranks call it."""
    tensor = torch.zeros(max(1, message // 4), device=device)
    return tensor.nbytes / median_seconds(lambda: dist.all_reduce(tensor, group=group), device)


def _flops(config: RunConfig, device: torch.device) -> tuple[float, str]:
    """FLOP/s to expect of a device, and where the number is from."""
    peak = peak_flops(device_name(device)) if device.type == "cuda" and config.train.precision == "bf16" else None
    if peak is not None:
        return ASSUMED_MFU * peak, f"{ASSUMED_MFU:.0%} of the data sheet's"
    tokens = config.train.micro_batch * config.data.seq_len
    if device.type == "cuda":
        rows, dim, width = tokens, config.model.dim, config.model.ffn_width
    else:
        rows, dim, width = (min(n, LARGEST_PRODUCT) for n in (tokens, config.model.dim, config.model.ffn_width))
    dtype = PRECISIONS[config.train.precision]
    x, w = torch.ones(rows, dim, dtype=dtype, device=device), torch.ones(dim, width, dtype=dtype, device=device)
    return 2 * rows * dim * width / median_seconds(lambda: x @ w, device), "a matrix product measured"


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long some work takes on the device."""
    return statistics.median(seconds_of(work, device))


def seconds_of(work: Callable[[], object], device: torch.device) -> list[float]:
    """How long some work takes on the device, time after time; the first is left out."""
    seconds = []
    for _ in range(1 + REPETITIONS):
        finish(device)
        began = time.perf_counter()
        work()
        finish(device)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _told(needs: Needs) -> str:
    return _join([f"{math.ceil(need):,} in {phase}" for phase, need in needs.items()])


def _join(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
