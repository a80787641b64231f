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
from llamatrain.config.parallel import RECOMPUTE

STEPS = 20
GLOBAL_BATCH = 8  # sequences
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


@dataclass(frozen=True)
class Case:
    """One layout on one number of processes."""

    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"

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
        return replace(self, ranks=1, parallel={})

    def config(self, run_dir: str, data: str) -> RunConfig:
        """The run of this case: documents masked, so that ranks and micro-batches have unequal numbers of targets."""
        config = RunConfig(
            name="verify",
            run_dir=run_dir,
            model=replace(MODEL, **self.model),
            data=DataConfig(sources={"synthetic": SourceConfig(data)}, seq_len=SEQ_LEN, document_mask=True),
            train=TrainConfig(
                steps=STEPS, global_batch_tokens=GLOBAL_BATCH * SEQ_LEN, precision=self.precision, micro_batch=1
            ),
            optim=OptimConfig(lr=3e-4, warmup_steps=10, schedule_steps=100, clip_norm=0.5),
            checkpoint=CheckpointConfig(every_steps=STEPS),
            evaluation=EvaluationConfig(every_steps=0),
        )
        config.parallel = replace(config.parallel, **{"recompute": "none", **self.parallel})
        return config


def all_cases(ranks: int, *, ranks_per_node: int) -> Iterator[Case]:
    """Every axis alone and together with the others, on so many processes."""
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
    yield Case(ranks, {}, model=tied)
    for copies, reshard in product((1, 2), ("always", "never")):
        if ranks % copies == 0:
            yield Case(ranks, {"dp_replicate": copies, "reshard_after_forward": reshard}, precision="bf16")
