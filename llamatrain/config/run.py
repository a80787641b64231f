"""The whole configuration of a training run, and the checks that concern more than one group."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from llamatrain.config.checkpoint import CheckpointConfig, check_checkpoint
from llamatrain.config.data import DataConfig, check_data
from llamatrain.config.evaluation import EvaluationConfig, check_evaluation
from llamatrain.config.logging import LoggingConfig, check_logging
from llamatrain.config.model import ModelConfig, check_model
from llamatrain.config.optim import OptimConfig, check_optim
from llamatrain.config.parallel import Layout, ParallelConfig, check_parallel, check_sharding, layout
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
    check_sharding(config.parallel, device=config.train.device, precision=config.train.precision)
    check_checkpoint(config.checkpoint)
    check_logging(config.logging)
    check_evaluation(config.evaluation)
    seq_len, batch_tokens = config.data.seq_len, config.train.global_batch_tokens
    if seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"data.seq_len={seq_len} is longer than model.max_seq_len={config.model.max_seq_len}: "
            f"lower it, or set model.max_seq_len={seq_len}"
        )
    mesh = layout(config.parallel, world_size)
    check_shares(config, mesh)
    devices = mesh.data_parallel
    per_forward = seq_len * config.train.micro_batch * devices
    if batch_tokens % per_forward:
        raise ConfigError(
            f"train.global_batch_tokens={batch_tokens} does not divide into data.seq_len={seq_len} tokens x "
            f"train.micro_batch={config.train.micro_batch} sequences x {devices} devices = {per_forward} tokens; "
            f"the nearest that does is train.global_batch_tokens={nearest_multiple(batch_tokens, per_forward)}"
        )
    check_stages(config, mesh)
    if config.optim.warmup_steps > config.schedule_steps:
        raise ConfigError(
            f"optim.warmup_steps={config.optim.warmup_steps} is longer than the schedule of "
            f"{config.schedule_steps} steps: lower it, or raise train.steps or optim.schedule_steps"
        )


def check_shares(config: RunConfig, mesh: Layout) -> None:
    """What several ranks share must divide among them. Raises ConfigError naming the nearest that works."""
    model, seq_len = config.model, config.data.seq_len
    divided = {
        "model.n_heads": model.n_heads,
        "model.n_kv_heads": model.kv_heads,
        "the feed-forward width, model.ffn_dim": model.ffn_width,
        "model.vocab_size": model.vocab_size,
    }
    for name, size in divided.items():
        if size % mesh.tp:
            works = largest_divisor(math.gcd(*divided.values()), mesh.tp)
            raise ConfigError(
                f"{name}={size} does not divide among parallel.tp={mesh.tp} ranks: the nearest that all of the "
                f"model does is parallel.tp={works}"
            )
    parts = mesh.tp * (2 * mesh.cp if mesh.cp > 1 else 1)  # of each sequence; two for each cp rank, an early, a late
    if seq_len % parts:
        raise ConfigError(
            f"data.seq_len={seq_len} does not divide into the {parts} parts that parallel.cp={mesh.cp} and "
            f"parallel.tp={mesh.tp} make of a sequence; the nearest that does is "
            f"data.seq_len={nearest_multiple(seq_len, parts)}"
        )


def check_stages(config: RunConfig, mesh: Layout) -> None:
    """What a pipeline demands of the model and of the batch. Raises ConfigError naming what would do."""
    model, stages = config.model, mesh.pp
    if stages == 1:
        return
    if stages > model.n_layers:
        raise ConfigError(
            f"parallel.pp={stages} stages are more than the model.n_layers={model.n_layers} layers they are made of: "
            f"parallel.pp={model.n_layers} at most"
        )
    if model.tied_embeddings:
        raise ConfigError(
            f"model.tied_embeddings=true with parallel.pp={stages}: the first stage embeds and the last has the head, "
            "so one weight cannot be both; set model.tied_embeddings=false, or parallel.pp=1"
        )
    share = config.global_batch // mesh.data_parallel  # sequences of a step on each rank
    micro_batches = share // config.train.micro_batch
    if config.parallel.pipeline_schedule == "1f1b" and micro_batches < stages:
        batch = stages * config.train.micro_batch * mesh.data_parallel * config.data.seq_len
        ways = [f"train.global_batch_tokens={batch}", "parallel.pipeline_schedule=gpipe (which idles longer)"]
        if share >= stages:
            ways.insert(0, f"train.micro_batch={largest_divisor(share, share // stages)}")
        raise ConfigError(
            f"parallel.pipeline_schedule=1f1b needs at least as many micro-batches as parallel.pp={stages} stages, a "
            f"step has {micro_batches} on each rank; what would do: {', or '.join(ways)}"
        )


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`."""
    return next(n for n in range(min(number, limit), 0, -1) if number % n == 0)
