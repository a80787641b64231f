"""llamatrain and its peers behind one door: a step on the same tokens, from the same weights, with the same AdamW.

llamatrain is a real run's `Trainer`, composed as `llamatrain.train` does it, given its batches by hand. A peer is its
own model and its own loss in the plain loop; that is no slower than the trainer the peer brings. All clip at 1 and
end in `llamatrain.optim.adamw`, torch's fused AdamW.

A contender's setting is what it may choose for itself. llamatrain's is overrides of its configuration.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from llamatrain.config import RunConfig
from llamatrain.config.build import build
from llamatrain.config.run import validate
from llamatrain.data.loader import Batch
from llamatrain.distributed import World
from llamatrain.verification.corpus import write_corpus
from llamatrain.verification.runner import compose
from tests.benchmarks import peers
from tests.benchmarks.workload import OPTIM, Setting, Workload

OURS = "llamatrain"
PEERS = ("transformers", "litgpt")
CORPUS_VOCABULARY = 331  # of the data set that a run must have; its tokens are not used


class Contender(Protocol):
    def step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step on rows int64 [R, T+1]: its loss, and the gradient's norm before clipping."""

    def close(self) -> None:
        """Give back what is not memory."""


class Llamatrain:
    """A run of one process; `setting` is overrides of its configuration."""

    def __init__(self, workload: Workload, setting: Setting) -> None:
        self._resources = ExitStack()
        directory = Path(self._resources.enter_context(TemporaryDirectory()))
        write_corpus(directory / "data", vocab_size=CORPUS_VOCABULARY)
        config = run_config(workload, setting, directory)
        validate(config)
        self.trainer = compose(config, World(), self._resources)

    def step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.trainer.train_step(self._batch(rows))

    def _batch(self, rows: Tensor) -> Batch:
        config, count = self.trainer.config, len(rows)
        return Batch(
            samples=np.arange(count),
            sources=np.zeros(count, np.int64),
            rows=rows,
            seq_len=config.data.seq_len,
            micro_batch=config.train.micro_batch,
            document_lengths=None,
            valid_targets=count * config.data.seq_len,
            state_after=self.trainer.data_state,
        )

    def close(self) -> None:
        self._resources.close()


def run_config(workload: Workload, setting: Setting, directory: Path) -> RunConfig:
    """A run that neither saves nor validates. Raises ConfigError if the setting has an override that does not exist."""
    values: dict[str, Any] = {
        "name": "bench",
        "run_dir": str(directory / "run"),
        "model": asdict(workload.model),
        "data": {"sources": {"noise": {"path": str(directory / "data")}}, "seq_len": workload.seq_len},
        "train": {
            "steps": OPTIM.schedule_steps,
            "global_batch_tokens": workload.tokens_per_step,
            "micro_batch": workload.micro_batch,
            "precision": workload.precision,
            "device": workload.device,
        },
        "optim": asdict(OPTIM),
        "parallel": {},
        "evaluation": {"every_steps": 0},
    }
    for key, value in setting.items():
        group, _, name = key.partition(".")
        values[group][name] = value
    return build(RunConfig, values)


def build_contender(
    name: str, workload: Workload, setting: Setting, weights: Mapping[str, Tensor] | None = None
) -> Contender:
    """`weights`, by Hugging Face's names, are what a peer begins with, if not with its own; ours draws seed 0's."""
    if name == OURS:
        return Llamatrain(workload, setting)
    if name == "transformers":
        return peers.transformers(workload, setting, weights)
    if name == "litgpt":
        return peers.litgpt(workload, setting, weights)
    raise ValueError(f"there is no contender {name}: choose one of {', '.join((OURS, *PEERS))}")


# Settings to try


def settings_on_cpu(name: str, precision: str, *, smoke: bool) -> list[Setting]:
    """What may be a contender's best on a CPU; the first is how it comes. A smoke test compiles in bf16 only."""
    compiling: tuple[str, ...] = ("off", "layers", "model")
    if smoke:
        compiling = ("off", "layers") if precision == "bf16" else ("off",)
    if name == OURS:
        choices = ("block_backward",) if smoke else ("none", "block_backward")
        compiled = (False, True)[: len(compiling)]
        return [{"parallel.recompute": choice, "train.compile": on} for on in compiled for choice in choices]
    weights = ("fp32",) if precision == "fp32" else ("autocast",) if smoke else ("autocast", "copies")
    chunks = (128, 0) if name == "litgpt" and not smoke else (0,)  # its pretraining cuts the loss into 128 tokens
    chunked = [{"loss_chunk": chunk} if name == "litgpt" else {} for chunk in chunks]
    return [{"compile": how, "weights": kind, **chunk} for how in compiling for kind in weights for chunk in chunked]


def same_start(losses: Mapping[str, float], *, tolerance: float) -> bool:
    """Whether all contenders' first losses are those of one model."""
    values = list(losses.values())
    return all(math.isfinite(loss) for loss in values) and max(values) - min(values) <= tolerance * min(values)
