"""A run small enough for tests: its configuration, running it in this process, reading what it left."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llamatrain.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ResilienceConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from llamatrain.distributed import World
from llamatrain.resilience.control import StopRequest
from llamatrain.session import run
from llamatrain.trainer import Trainer
from llamatrain.verification.runner import compose
from tests.conftest import TINY_VOCAB

SEQ_LEN = 32
GLOBAL_BATCH = 8


def small_config(run_dir: Path, sources: dict[str, Path], **groups: dict[str, Any]) -> RunConfig:
    """12 steps of a two-layer model, every step logged, saved at 4, 8, 12; `groups` change single settings."""
    config = RunConfig(
        name="small",
        run_dir=str(run_dir),
        model=ModelConfig(
            dim=32, n_layers=2, n_heads=2, vocab_size=TINY_VOCAB, max_seq_len=SEQ_LEN, ffn_multiple_of=32
        ),
        data=DataConfig(
            sources={name: SourceConfig(str(path), 1.0 + i) for i, (name, path) in enumerate(sources.items())},
            seq_len=SEQ_LEN,
        ),
        train=TrainConfig(steps=12, global_batch_tokens=GLOBAL_BATCH * SEQ_LEN, micro_batch=4, device="cpu"),
        optim=OptimConfig(lr=6e-4, warmup_steps=10, schedule_steps=40),
        checkpoint=CheckpointConfig(every_steps=4, keep_last=2),
        logging=LoggingConfig(every_steps=1),
        evaluation=EvaluationConfig(every_steps=6, micro_batch=4),
        resilience=ResilienceConfig(hang_timeout_s=0, hang_timeout_at_start_s=0),  # no process beside each rank
    )
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in groups.items()})


def train_in_process(config: RunConfig) -> None:
    run(config, StopRequest())


def trainer_for(config: RunConfig, resources: ExitStack, world: World | None = None) -> Trainer:
    """A composed trainer that has not taken a step."""
    return compose(config, world or World(), resources)


def metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def reproducible(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what may differ between equal runs: speed and time stamps."""
    return [
        {key: value for key, value in record.items() if key != "time" and not key.startswith("perf/")}
        for record in records
    ]


def status(run_dir: str | Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(run_dir) / "status.json").read_text())
    return content


def saved_steps(run_dir: str | Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (Path(run_dir) / "checkpoints").glob("step-*"))


def saved_tensors(run_dir: str | Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, under `<file>/<key>`."""
    directory = Path(run_dir) / "checkpoints" / f"step-{step:08d}"
    files = sorted(directory.glob("*.safetensors"))
    return {f"{path.name}/{key}": tensor.clone() for path in files for key, tensor in load_file(path).items()}


def assert_same_run(first: str | Path, second: str | Path, *, step: int) -> None:
    """Weights, optimizer state and RNG at `step`, and all metrics, are equal bit for bit."""
    one, other = saved_tensors(first, step), saved_tensors(second, step)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert reproducible(metrics(first)) == reproducible(metrics(second))
