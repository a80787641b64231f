"""The layouts that are tried, and the small run that each is tried on. No torch.

A case is that run with some settings of its own. What it must not change is what the plain model in one process does
with the same weights and batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from llamatrain.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from llamatrain.config.parallel import RECOMPUTE, ParallelConfig, layout

STEPS = 20
GLOBAL_BATCH = 8  # sequences, on up to four ranks
SEQ_LEN = 64
VOCAB_SIZE = 331  # divides into no number of ranks
MODEL = ModelConfig(
    dim=64,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=VOCAB_SIZE,
    max_seq_len=SEQ_LEN,
    ffn_multiple_of=32,
    norm_eps=1e-5,
)
DIVISIBLE = {"vocab_size": VOCAB_SIZE + 1}  # for ranks that share the vocabulary


@dataclass(frozen=True)
class Case:
    """One layout on one number of processes."""

    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    sequences: int = GLOBAL_BATCH
    micro_batch: int = 1

    @property
    def name(self) -> str:
        """The settings that are not the defaults, as one would type them."""
        settings = {f"parallel.{key}": value for key, value in self.parallel.items()}
        settings |= {f"model.{key}": value for key, value in self.model.items()}
        if self.precision != "fp32":
            settings["train.precision"] = self.precision
        return " ".join(f"{key.removeprefix('parallel.')}={value}" for key, value in settings.items()) or "defaults"

    @property
    def plain(self) -> "Case":
        """The same model in one process, without anything."""
        return replace(self, ranks=1, parallel={}, micro_batch=self.sequences // 2)

    def config(self, run_dir: str, data: str) -> RunConfig:
        """The run of this case: documents masked, so that ranks and micro-batches have unequal numbers of targets."""
        config = RunConfig(
            name="verify",
            run_dir=run_dir,
            model=replace(MODEL, **self.model),
            data=DataConfig(sources={"synthetic": SourceConfig(data)}, seq_len=SEQ_LEN, document_mask=True),
            train=TrainConfig(
                steps=STEPS,
                global_batch_tokens=self.sequences * SEQ_LEN,
                precision=self.precision,
                micro_batch=self.micro_batch,
                compile=False,  # rounds otherwise in bf16
            ),
            optim=OptimConfig(lr=3e-4, warmup_steps=10, schedule_steps=100, clip_norm=0.5),
            checkpoint=CheckpointConfig(every_steps=STEPS),
            evaluation=EvaluationConfig(every_steps=0),
        )
        config.parallel = replace(config.parallel, **{"recompute": "none", **self.parallel})
        return config


def all_cases(ranks: int, *, ranks_per_node: int) -> Iterator[Case]:
    """Every axis alone and together with the others, on so many processes."""
    sequences = max(GLOBAL_BATCH, 2 * ranks)  # two micro-batches on each
    for case in _layouts(ranks, ranks_per_node):
        mesh = layout(ParallelConfig(**case.parallel), ranks)
        shared = mesh.data_parallel < ranks  # the fewer micro-batches, the fewer messages of such layouts; two a stage
        micro_batch = max(1, sequences // mesh.data_parallel // (2 * mesh.pp)) if shared else 1
        yield replace(case, sequences=sequences, micro_batch=micro_batch)


def _layouts(ranks: int, ranks_per_node: int) -> Iterator[Case]:
    tied = {"tied_embeddings": True}
    sharded: list[dict[str, Any]] = [
        {},
        {"reshard_after_forward": "never"},
        {"forward_prefetch": 1},
        {"forward_prefetch": 2, "backward_prefetch": 2},
        {"reduce_scatter": "last"},
    ]
    recomputed: list[dict[str, Any]] = [{"recompute": choice} for choice in RECOMPUTE if choice != "none"]
    if ranks == 1:
        for parallel, precision in product(recomputed, ("fp32", "bf16")):
            yield Case(ranks, parallel, precision=precision)
        return
    for parallel in sharded:
        yield Case(ranks, parallel)
    for parallel in recomputed:
        yield Case(ranks, parallel)
        yield Case(ranks, {**parallel, "reshard_after_forward": "never"}, precision="bf16")
    for copies in sorted({2, ranks // ranks_per_node} - {1, 0}):
        if ranks % copies == 0:
            yield Case(ranks, {"dp_replicate": copies})
            for scatter, reduce in (("last", "last"), ("each", "each")):
                yield Case(ranks, {"dp_replicate": copies, "reduce_scatter": scatter, "all_reduce": reduce})
    yield from _tensor_parallel(ranks)
    yield from _context_parallel(ranks)
    yield from _pipelines(ranks)
    yield Case(ranks, {}, model=tied)
    for copies, reshard in product((1, 2), ("always", "never")):
        if ranks % copies == 0:
            yield Case(ranks, {"dp_replicate": copies, "reshard_after_forward": reshard}, precision="bf16")


def _pipelines(ranks: int) -> Iterator[Case]:
    """Stages of both schedules, alone and with every other axis, with every way to recompute."""
    for choice in RECOMPUTE:
        yield Case(ranks, {"pp": 2, "recompute": choice})
    yield Case(ranks, {"pp": 2, "pipeline_schedule": "gpipe"})
    yield Case(ranks, {"pp": 2, "reduce_scatter": "last"})
    yield Case(ranks, {"pp": 2, "reshard_after_forward": "never"}, precision="bf16")
    yield Case(ranks, {"pp": 2}, model={"n_layers": 3})
    if ranks % 4 == 0:
        yield Case(ranks, {"pp": 4}, model={"n_layers": 5})
        yield Case(ranks, {"pp": 2, "dp_replicate": 2, "all_reduce": "each"})
        yield Case(ranks, {"pp": 2, "cp": 2})
        for choice in RECOMPUTE:
            yield Case(ranks, {"pp": 2, "tp": 2, "recompute": choice}, model=DIVISIBLE)


def _tensor_parallel(ranks: int) -> Iterator[Case]:
    """Tensor with sequence parallelism, alone or under FSDP, with every way to recompute."""
    for choice in RECOMPUTE:
        yield Case(ranks, {"tp": 2, "recompute": choice}, model=DIVISIBLE)
    for parallel in ({"recompute": "block_backward"}, {"reshard_after_forward": "never"}):
        yield Case(ranks, {"tp": 2, **parallel}, model=DIVISIBLE, precision="bf16")
    yield Case(ranks, {"tp": 2}, model={**DIVISIBLE, "tied_embeddings": True})


def _context_parallel(ranks: int) -> Iterator[Case]:
    """Shared sequences, alone, under FSDP and with tensor parallelism, with every way to recompute."""
    for choice in RECOMPUTE:
        yield Case(ranks, {"cp": 2, "recompute": choice})
    yield Case(ranks, {"cp": 2, "recompute": "block_backward"}, precision="bf16")
    if ranks % 4 == 0:
        yield Case(ranks, {"cp": 4})
        for choice in RECOMPUTE:
            yield Case(ranks, {"cp": 2, "tp": 2, "recompute": choice}, model=DIVISIBLE)
