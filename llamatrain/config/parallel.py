"""How the run is spread over its processes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod

from llamatrain.errors import ConfigError

# outermost first: neighbours along the last axis are neighbours on a node
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
SHARDING = ("fsdp2", "fairscale")
RESHARD_AFTER_FORWARD = ("always", "never")
REDUCE_DTYPES = ("fp32", "bf16")
MICRO_BATCHES = ("each", "last")
SCHEDULES = ("1f1b", "gpipe")
RECOMPUTE = ("none", "block_backward", "selective", "full")  # by what backward does again, least first
LINEARS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")  # a block's, in the order of its forward
SAVABLE = ("wq", "wk", "wv", "attention", "wo", "w1", "w3")  # outputs of a block's parts that its backward reads


@dataclass
class ParallelConfig:
    sharding: str = "fsdp2"  # by whom weights are spread: torch's FSDP2, or fairscale's FSDP, which is CUDA's only
    dp_shard: int | None = None  # ranks that share one copy of the weights; null: all that dp_replicate leaves
    dp_replicate: int = 1  # copies of the weights (HSDP): gathers stay within dp_shard ranks
    tp: int = 1  # ranks that share each layer's weights and each sequence (tensor and sequence parallelism)
    cp: int = 1  # ranks that share each sequence, and one copy of the weights as dp_shard does (context parallelism)
    pp: int = 1  # stages that the layers are cut into (pipeline parallelism)
    # when a stage works on which micro-batch: each backward as soon as it can be, so that at most pp of them are in
    # memory (1f1b), or all forwards first (gpipe)
    pipeline_schedule: str = "1f1b"
    # a layer's gathered weights after its forward: freed, and gathered again for backward (always), or kept (never)
    reshard_after_forward: str = "always"
    reduce_dtype: str = "fp32"  # of gradients on their way between ranks; bf16 halves the traffic and rounds the sum
    forward_prefetch: int = 0  # layers gathered ahead on purpose; 0: as the host reaches them, which on GPUs is ahead
    backward_prefetch: int = 0  # the same in backward; 0: one, torch's own
    reduce_scatter: str = "each"  # gradients leave after each micro-batch, or the last: more memory, less traffic
    all_reduce: str = "last"  # the same between the copies of dp_replicate
    # what backward computes again instead of having kept it: nothing (none), elementwise operations (block_backward,
    # the paper's), whatever recompute_save does not name (selective), each block (full); auto: the first of these,
    # in this order, that fits the memory
    recompute: str = "auto"
    recompute_save: list[str] = field(default_factory=lambda: list(SAVABLE))  # outputs that selective keeps
    recompute_budget_gib: float | None = None  # for auto: memory of a device that may be used; null: 9/10 of it
    # bytes a second, in GiB, for the overlap rule told at the start; null: measured there
    bandwidth_gib_s: float | None = None  # at which weights arrive gathered on the ranks that share them
    replicate_bandwidth_gib_s: float | None = None  # at which copies of dp_replicate add their gradients up
    timeout_s: int = 600  # a collective of a step that takes longer ends the run
    host_timeout_s: int = 1800  # the same where ranks wait for files or for each other's start


@dataclass(frozen=True)
class Layout:
    """How many ranks lie along each axis of the mesh."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def data_parallel(self) -> int:
        """Groups of ranks with samples of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Ranks that FSDP spreads a weight over: those of dp_shard, and those that share their sequences."""
        return self.dp_shard * self.cp

    def sizes(self) -> dict[str, int]:
        """Ranks by axis, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    def share(self, rank: int) -> "Share":
        """What a rank has to do."""
        place, rest = {}, rank
        for axis, size in reversed(self.sizes().items()):
            rest, place[axis] = divmod(rest, size)
        return Share(
            data_rank=place["dp_replicate"] * self.dp_shard + place["dp_shard"],
            has_loss=place["tp"] == 0 and place["pp"] == self.pp - 1,
            counts_targets=place["tp"] == place["cp"] == place["pp"] == 0,
        )


@dataclass(frozen=True)
class Share:
    """What of a run's work is a rank's."""

    data_rank: int  # which of the `data_parallel` parts of a batch it works on
    has_loss: bool  # whether the loss it computes counts: the ranks of a tp group all have the same
    counts_targets: bool  # whether it is the one to count the targets of its samples, of those that work on them


def stage_layers(n_layers: int, stages: int) -> list[range]:
    """The layers of each pipeline stage; with none to spare, each has at least one.

    What does not divide goes to stages in the middle: the last has the head and the loss to compute besides, the
    first keeps the most micro-batches in memory.
    """
    each, more = divmod(n_layers, stages)
    first_with_more = (stages - more) // 2
    counts = [each + (first_with_more <= stage < first_with_more + more) for stage in range(stages)]
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def check_parallel(parallel: ParallelConfig) -> None:
    """Raises ConfigError."""
    _check_recompute(parallel)
    choices = {"sharding": SHARDING, "reshard_after_forward": RESHARD_AFTER_FORWARD, "reduce_dtype": REDUCE_DTYPES}
    choices |= {"reduce_scatter": MICRO_BATCHES, "all_reduce": MICRO_BATCHES, "pipeline_schedule": SCHEDULES}
    for name, allowed in choices.items():
        if getattr(parallel, name) not in allowed:
            raise ConfigError(f"parallel.{name}={getattr(parallel, name)}: choose one of {', '.join(allowed)}")
    for name in ("timeout_s", "host_timeout_s", *AXES):
        value = getattr(parallel, name)
        if value is not None and value < 1:
            raise ConfigError(f"parallel.{name}={value}: must be at least 1")
    for name in ("forward_prefetch", "backward_prefetch"):
        if getattr(parallel, name) < 0:
            raise ConfigError(f"parallel.{name}={getattr(parallel, name)}: must not be negative")
    for name in ("bandwidth_gib_s", "replicate_bandwidth_gib_s"):
        rate = getattr(parallel, name)
        if rate is not None and not rate > 0:
            raise ConfigError(f"parallel.{name}={rate}: must be above 0, or null to measure it")
    if parallel.reduce_scatter == "last" and parallel.all_reduce == "each":
        raise ConfigError(
            "parallel.all_reduce=each sums what parallel.reduce_scatter=last has not reduced yet: "
            "set parallel.all_reduce=last, or parallel.reduce_scatter=each"
        )
    if parallel.sharding == "fairscale":
        _check_fairscale(parallel)


def _check_fairscale(parallel: ParallelConfig) -> None:
    """Refuse what goes with FSDP2 only."""
    one_axis = "it spreads flat shards over all ranks alike, and knows of no mesh"
    no_prefetch = "it gathers a layer when the host reaches it"
    in_compute_dtype = "what it does not reduce at once it adds up in the compute dtype, rounding at every micro-batch"
    allowed = {
        "pp": (1, one_axis),
        "dp_replicate": (1, one_axis),
        "cp": (1, one_axis),
        "tp": (1, one_axis),
        "forward_prefetch": (0, no_prefetch),
        "backward_prefetch": (0, no_prefetch),
        "reduce_scatter": ("each", in_compute_dtype),
    }
    for name, (value, reason) in allowed.items():
        if getattr(parallel, name) != value:
            raise ConfigError(
                f"parallel.{name}={getattr(parallel, name)} does not go with parallel.sharding=fairscale: {reason}; "
                f"set parallel.{name}={value}, or parallel.sharding=fsdp2"
            )


def check_sharding(parallel: ParallelConfig, *, device: str, precision: str) -> None:
    """Refuse what fairscale cannot do on a device in a precision; either may still be auto. Raises ConfigError."""
    if parallel.sharding != "fairscale":
        return
    if device == "cpu":
        raise ConfigError(
            "parallel.sharding=fairscale needs CUDA, whose streams fairscale works with, and train.device is cpu: "
            "set parallel.sharding=fsdp2, or leave out parallel=fairscale"
        )
    if precision == "fp32" and parallel.reduce_dtype == "bf16":
        raise ConfigError(
            "parallel.reduce_dtype=bf16 does not go with parallel.sharding=fairscale in train.precision=fp32: it "
            "reduces gradients in the dtype they are computed in; set parallel.reduce_dtype=fp32"
        )


def _check_recompute(parallel: ParallelConfig) -> None:
    if parallel.recompute not in ("auto", *RECOMPUTE):
        raise ConfigError(f"parallel.recompute={parallel.recompute}: choose one of auto, {', '.join(RECOMPUTE)}")
    for name in parallel.recompute_save:
        if name == "w2":
            raise ConfigError(
                "parallel.recompute_save names w2: backward does not read its output, it would be kept for nothing; "
                f"leave it out and choose of {', '.join(SAVABLE)}"
            )
        if name not in SAVABLE:
            raise ConfigError(f"parallel.recompute_save names {name}: choose of {', '.join(SAVABLE)}")
    budget = parallel.recompute_budget_gib
    if budget is not None and not budget > 0:
        raise ConfigError(f"parallel.recompute_budget_gib={budget}: must be above 0, or null for the device's memory")


def layout(parallel: ParallelConfig, world_size: int) -> Layout:
    """The mesh of a run on `world_size` ranks. Raises ConfigError naming the nearest that works."""
    refusal = misfit(parallel, world_size)
    if refusal is not None:
        works = as_typed(next(meshes(parallel, world_size)), parallel)
        raise ConfigError(f"{refusal}: the nearest that works is {works}")
    given = {axis: getattr(parallel, axis) for axis in AXES}
    fixed = prod(size for size in given.values() if size is not None)
    return Layout(**{**given, "dp_shard": parallel.dp_shard or world_size // fixed})


def misfit(parallel: ParallelConfig, world_size: int) -> str | None:
    """Why what was asked for is no mesh of so many ranks; None if it is one."""
    asked = _asked(parallel)
    fixed = prod(asked.values())
    if world_size % fixed == 0 and (parallel.dp_shard is None or fixed == world_size):
        return None
    told = " x ".join(f"parallel.{axis}={size}" for axis, size in (asked or {"dp_shard": 1}).items())
    return f"{told} makes {fixed} ranks, there are {world_size}"


def meshes(parallel: ParallelConfig, world_size: int) -> Iterator[Layout]:
    """All meshes of so many ranks, those nearest to what was asked for first."""
    asked = _asked(parallel)
    found = sorted(_factorisations(world_size, len(AXES)), key=lambda sizes: _distance(sizes, asked))
    return (Layout(**dict(zip(AXES, sizes, strict=True))) for sizes in found)


def as_typed(mesh: Layout, parallel: ParallelConfig) -> str:
    """The settings that make what was asked for this mesh."""
    asked = _asked(parallel)
    return " ".join(f"parallel.{axis}={size}" for axis, size in mesh.sizes().items() if size > 1 or axis in asked)


def _asked(parallel: ParallelConfig) -> dict[str, int]:
    return {axis: size for axis in AXES if (size := getattr(parallel, axis)) not in (None, 1)}


def _distance(sizes: tuple[int, ...], asked: dict[str, int]) -> tuple[int, int, int]:
    """How far a mesh is from what was asked for: first in axes that were left alone; dp_shard takes what is left."""
    found = dict(zip(AXES, sizes, strict=True))
    unasked = sum(size > 1 for axis, size in found.items() if axis not in asked and axis != "dp_shard")
    return unasked, sum(abs(found[axis] - size) for axis, size in asked.items()), sum(found[axis] for axis in asked)


def _factorisations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of `count` factors, in order."""
    if count == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        for rest in _factorisations(number // first, count - 1):
            yield (first, *rest)
