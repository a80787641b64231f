"""The layouts a run may have, whether each fits, and which are the fastest. No torch.

What was set by the user stays; what has its default is searched: the mesh, the micro-batch, what stays gathered, what
is recomputed. A layout that the configuration's own checks refuse is not among them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from llamatrain.config import ParallelConfig, RunConfig, SourceConfig, TrainConfig
from llamatrain.config.parallel import AXES, RECOMPUTE, Layout, check_parallel, layout, misfit
from llamatrain.config.run import beyond_the_model, check_batch
from llamatrain.errors import ConfigError
from llamatrain.memory import USABLE, memory_by_part
from llamatrain.planning.hardware import Cluster
from llamatrain.planning.roofline import StepTime, step_time

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
LONG_SEQUENCE = 16_384  # tokens, from which on sharing sequences is tried
STAGES = (1, 2, 4, 8, 16, 32)
COPIES = 4  # numbers of copies of the weights that are tried


@dataclass(frozen=True)
class Choice:
    """A layout, what it takes, and how long."""

    config: RunConfig
    world_size: int
    recompute: str
    memory: dict[str, float]  # of the fullest GPU, by part
    time: StepTime

    @property
    def mesh(self) -> Layout:
        return layout(self.config.parallel, self.world_size)

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def rate(self) -> float:
        """Tokens a second on each GPU."""
        return self.config.train.global_batch_tokens / self.time.total / self.world_size

    def overrides(self) -> list[str]:
        """The layout as it is typed behind llamatrain.train or launch.slurm."""
        parallel, mesh = self.config.parallel, self.mesh
        typed: dict[str, Any] = {
            f"parallel.{axis}": size for axis, size in mesh.sizes().items() if size > 1 or axis == "dp_shard"
        }
        plain = ParallelConfig()
        typed |= {"train.micro_batch": self.config.train.micro_batch, "parallel.recompute": self.recompute}
        for name in ("reshard_after_forward", "sharding", "reduce_dtype", "reduce_scatter", "pipeline_schedule"):
            if getattr(parallel, name) != getattr(plain, name):
                typed[f"parallel.{name}"] = getattr(parallel, name)
        return [f"{key}={value}" for key, value in typed.items()]


def settled(config: RunConfig) -> RunConfig:
    """As the run settles it on CUDA; a data set is put where none was named."""
    train, model, data = config.train, config.model, config.data
    return replace(
        config,
        model=replace(model, attention="xformers" if model.attention == "auto" else model.attention),
        train=replace(
            train,
            device="cuda",
            precision="bf16" if train.precision == "auto" else train.precision,
            compile=True if train.compile is None else train.compile,
        ),
        data=data if data.sources else replace(data, sources={"any": SourceConfig(path="any")}),
    )


def usable(config: RunConfig, cluster: Cluster) -> float:
    """Bytes of a GPU that a run may take."""
    budget = config.parallel.recompute_budget_gib
    return USABLE * cluster.gpu.memory if budget is None else min(budget * 2**30, cluster.gpu.memory)


def as_asked(config: RunConfig, cluster: Cluster, *, world_size: int) -> Choice:
    """A settled run as it is, with the recompute choice that `auto` would make; the most sparing one if none fits."""
    asked = config.parallel.recompute
    for way in RECOMPUTE if asked == "auto" else (asked,):  # in the order of their cost
        memory = memory_by_part(config, way, world_size=world_size)
        if sum(memory.values()) <= usable(config, cluster):
            break
    return Choice(config, world_size, way, memory, step_time(config, way, cluster, world_size=world_size))


def fitting(config: RunConfig, cluster: Cluster, *, world_size: int) -> list[Choice]:
    """The layouts that fit, the fastest first; of equally fast ones the simplest."""
    tried = (
        as_asked(one, cluster, world_size=world_size) for one in candidates(config, cluster, world_size=world_size)
    )
    found = [choice for choice in tried if choice.bytes <= usable(config, cluster)]
    return sorted(found, key=lambda choice: (-choice.rate, _pieces(choice)))


def _pieces(choice: Choice) -> int:
    """How much there is to a layout."""
    mesh, parallel = choice.mesh, choice.config.parallel
    axes = sum(size > 1 for size in (mesh.pp, mesh.tp, mesh.cp, mesh.dp_replicate))
    return axes + (parallel.reshard_after_forward != "always") + (choice.recompute != "none")


def held(config: RunConfig) -> list[str]:
    """What of that which is searched was set by the user, and stays."""
    parallel, plain = config.parallel, ParallelConfig()
    axes = (name for name in (*AXES, "reshard_after_forward") if getattr(parallel, name) != getattr(plain, name))
    kept = [f"parallel.{name}={getattr(parallel, name)}" for name in axes]
    kept += [f"parallel.recompute={parallel.recompute}"] if parallel.recompute != "auto" else []
    micro_batch = config.train.micro_batch
    return kept + ([f"train.micro_batch={micro_batch}"] if micro_batch != TrainConfig().micro_batch else [])


def candidates(config: RunConfig, cluster: Cluster, *, world_size: int) -> Iterator[RunConfig]:
    """What is not refused, of what the user left to choose."""
    node = cluster.gpus_per_node
    asked, plain = config.parallel, ParallelConfig()

    def left(name: str, choices: Any, default: ParallelConfig | TrainConfig = plain) -> Any:
        own = getattr(asked if default is plain else config.train, name)
        return choices if own == getattr(default, name) else (own,)

    one_axis = asked.sharding == "fairscale"
    within_node = [n for n in (1, 2, 4, 8, 16) if node % n == 0 and not (one_axis and n > 1)]
    one_stage = one_axis or config.evaluation.samples or config.evaluation.tasks  # which a pipeline cannot answer
    stages = (1,) if one_stage else [n for n in STAGES if n <= config.model.n_layers]
    parts = within_node if config.data.seq_len >= LONG_SEQUENCE else (1,)
    batches = left("micro_batch", MICRO_BATCHES, TrainConfig())
    for tp, pp, cp in product(left("tp", within_node), left("pp", stages), left("cp", parts)):
        ranks, rest = divmod(world_size, tp * pp * cp)
        if rest:
            continue
        for copies in left("dp_replicate", _copies(ranks, tp * cp, node, one_axis=one_axis)):
            kept_gathered = ("always", "never") if ranks // copies * cp > 1 else ("always",)
            for gathered, micro_batch in product(left("reshard_after_forward", kept_gathered), batches):
                mesh = replace(asked, tp=tp, pp=pp, cp=cp, dp_replicate=copies, reshard_after_forward=gathered)
                tried = replace(config, parallel=mesh, train=replace(config.train, micro_batch=micro_batch))
                if not _refused(tried, world_size):
                    yield tried


def _copies(ranks: int, together: int, node: int, *, one_axis: bool) -> list[int]:
    """Numbers of copies of the weights: one, and those whose shards fill whole nodes, as many nodes as a power of 2."""
    found = [1]
    shards = max(1, node // together)
    while ranks // shards > 1 and ranks % shards == 0 and not one_axis and len(found) < COPIES:
        found.append(ranks // shards)
        shards *= 2
    return found


def _refused(config: RunConfig, world_size: int) -> bool:
    if misfit(config.parallel, world_size) is not None:
        return True
    mesh = layout(config.parallel, world_size)
    try:
        check_parallel(config.parallel)
        check_batch(config, mesh)
    except ConfigError:
        return True
    return beyond_the_model(config, mesh) is not None
