"""The whole configuration of a training run, and the checks that concern more than one group."""

from dataclasses import asdict, dataclass, field
from typing import Any

from llamatrain.config.checkpoint import CheckpointConfig, check_checkpoint
from llamatrain.config.data import DataConfig, check_data
from llamatrain.config.evaluation import EvaluationConfig, check_evaluation
from llamatrain.config.logging import LoggingConfig, check_logging
from llamatrain.config.model import ModelConfig, check_model
from llamatrain.config.optim import OptimConfig, check_optim
from llamatrain.config.parallel import ParallelConfig, check_parallel, layout
from llamatrain.config.train import TrainConfig, check_train
from llamatrain.errors import ConfigError


@dataclass
class RunConfig:
    name: str = "llama"
    run_dir: str = "runs/${name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step over all devices."""
        return self.train.global_batch_tokens // self.data.seq_len

    @property
    def total_steps(self) -> int:
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return -(-self.train.tokens // self.train.global_batch_tokens)

    @property
    def schedule_steps(self) -> int:
        return self.total_steps if self.optim.schedule_steps is None else self.optim.schedule_steps

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def nearest_multiple(value: int, unit: int) -> int:
    """The positive multiple of `unit` nearest to `value`."""
    return max(1, round(value / unit)) * unit


def validate(config: RunConfig, *, world_size: int = 1) -> None:
    """Check every group, then what concerns several, for a run on `world_size` processes. Raises ConfigError."""
    for name in ("name", "run_dir"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty: {name}=…")
    check_model(config.model)
    check_data(config.data)
    check_train(config.train)
    check_optim(config.optim)
    check_parallel(config.parallel)
    check_checkpoint(config.checkpoint)
    check_logging(config.logging)
    check_evaluation(config.evaluation)
    seq_len, batch_tokens = config.data.seq_len, config.train.global_batch_tokens
    if seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"data.seq_len={seq_len} is longer than model.max_seq_len={config.model.max_seq_len}: "
            f"lower it, or set model.max_seq_len={seq_len}"
        )
    devices = layout(config.parallel, world_size).data_parallel
    per_forward = seq_len * config.train.micro_batch * devices
    if batch_tokens % per_forward:
        raise ConfigError(
            f"train.global_batch_tokens={batch_tokens} does not divide into data.seq_len={seq_len} tokens x "
            f"train.micro_batch={config.train.micro_batch} sequences x {devices} devices = {per_forward} tokens; "
            f"the nearest that does is train.global_batch_tokens={nearest_multiple(batch_tokens, per_forward)}"
        )
    if config.optim.warmup_steps > config.schedule_steps:
        raise ConfigError(
            f"optim.warmup_steps={config.optim.warmup_steps} is longer than the schedule of "
            f"{config.schedule_steps} steps: lower it, or raise train.steps or optim.schedule_steps"
        )
