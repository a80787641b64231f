"""How the run is spread over its processes."""

from dataclasses import dataclass, field
from math import prod

from llamatrain.errors import ConfigError

AXES = ("dp_replicate", "dp_shard")  # outermost first: neighbours along the last axis are neighbours on a node
RESHARD_AFTER_FORWARD = ("always", "never")
REDUCE_DTYPES = ("fp32", "bf16")
MICRO_BATCHES = ("each", "last")
RECOMPUTE = ("none", "block_backward", "selective", "full")  # by what backward does again, least first
LINEARS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")  # a block's, in the order of its forward
SAVABLE = ("wq", "wk", "wv", "attention", "wo", "w1", "w3")  # outputs of a block's parts that its backward reads


@dataclass
class ParallelConfig:
    dp_shard: int | None = None  # ranks that share one copy of the weights; null: all that dp_replicate leaves
    dp_replicate: int = 1  # copies of the weights (HSDP): gathers stay within dp_shard ranks
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
    timeout_s: int = 600  # a collective of a step that takes longer ends the run
    host_timeout_s: int = 1800  # the same where ranks wait for files or for each other's start


@dataclass(frozen=True)
class Layout:
    """How many ranks lie along each axis of the mesh."""

    dp_replicate: int
    dp_shard: int

    @property
    def data_parallel(self) -> int:
        """Ranks with samples of their own."""
        return self.dp_replicate * self.dp_shard

    def sizes(self) -> dict[str, int]:
        """Ranks by axis, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}


def check_parallel(parallel: ParallelConfig) -> None:
    """Raises ConfigError."""
    _check_recompute(parallel)
    choices = {"reshard_after_forward": RESHARD_AFTER_FORWARD, "reduce_dtype": REDUCE_DTYPES}
    choices |= {"reduce_scatter": MICRO_BATCHES, "all_reduce": MICRO_BATCHES}
    for name, allowed in choices.items():
        if getattr(parallel, name) not in allowed:
            raise ConfigError(f"parallel.{name}={getattr(parallel, name)}: choose one of {', '.join(allowed)}")
    for name in ("timeout_s", "host_timeout_s", "dp_replicate", "dp_shard"):
        value = getattr(parallel, name)
        if value is not None and value < 1:
            raise ConfigError(f"parallel.{name}={value}: must be at least 1")
    for name in ("forward_prefetch", "backward_prefetch"):
        if getattr(parallel, name) < 0:
            raise ConfigError(f"parallel.{name}={getattr(parallel, name)}: must not be negative")
    if parallel.reduce_scatter == "last" and parallel.all_reduce == "each":
        raise ConfigError(
            "parallel.all_reduce=each sums what parallel.reduce_scatter=last has not reduced yet: "
            "set parallel.all_reduce=last, or parallel.reduce_scatter=each"
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
    given = {axis: getattr(parallel, axis) for axis in AXES}
    fixed = prod(size for size in given.values() if size is not None)
    told = " x ".join(f"parallel.{axis}={size}" for axis, size in given.items() if size not in (None, 1))
    if world_size % fixed or (parallel.dp_shard is not None and fixed != world_size):
        pairs = [(n, world_size // n) for n in range(1, world_size + 1) if world_size % n == 0]
        wanted = (parallel.dp_replicate, parallel.dp_shard)
        nearest = min(
            pairs, key=lambda pair: sum(abs(n - w) for n, w in zip(pair, wanted, strict=True) if w not in (None, 1))
        )
        raise ConfigError(
            f"{told} makes {fixed} ranks, there are {world_size}: "
            f"the nearest that works is parallel.dp_replicate={nearest[0]} parallel.dp_shard={nearest[1]}"
        )
    return Layout(parallel.dp_replicate, parallel.dp_shard or world_size // fixed)
