"""The whole configuration of a training run, and the checks that concern more than one group."""

from dataclasses import dataclass, field, replace
from typing import Any

from llamatrain.config.build import plain
from llamatrain.config.checkpoint import CheckpointConfig, check_checkpoint
from llamatrain.config.data import DataConfig, check_data
from llamatrain.config.evaluation import EvaluationConfig, check_evaluation
from llamatrain.config.init import InitConfig, check_init
from llamatrain.config.logging import LoggingConfig, check_logging
from llamatrain.config.model import ModelConfig, check_model
from llamatrain.config.optim import OptimConfig, check_optim
from llamatrain.config.parallel import (
    Layout,
    ParallelConfig,
    as_typed,
    check_parallel,
    check_sharding,
    layout,
    meshes,
    misfit,
)
from llamatrain.config.resilience import ResilienceConfig, check_resilience
from llamatrain.config.train import TrainConfig, check_train
from llamatrain.errors import ConfigError


@dataclass
class RunConfig:
    name: str = "llama"
    run_dir: str = "runs/${name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)

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
        return plain(self)


def nearest_multiple(value: int, unit: int) -> int:
    """The positive multiple of `unit` nearest to `value`."""
    return max(1, round(value / unit)) * unit


def validate(config: RunConfig, *, world_size: int = 1) -> None:
    """Check every group, then what concerns several, for a run on `world_size` processes. Raises ConfigError."""
    for name in ("name", "run_dir"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty: {name}=…")
    check_model(config.model)
    check_init(config.init)
    check_data(config.data)
    check_train(config.train)
    check_optim(config.optim)
    check_parallel(config.parallel)
    check_sharding(config.parallel, device=config.train.device, precision=config.train.precision)
    check_checkpoint(config.checkpoint)
    check_logging(config.logging)
    check_evaluation(config.evaluation)
    check_resilience(config.resilience)
    seq_len = config.data.seq_len
    if seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"data.seq_len={seq_len} is longer than model.max_seq_len={config.model.max_seq_len}: "
            f"lower it, or set model.max_seq_len={seq_len}"
        )
    mesh = mesh_of(config, world_size)
    if config.evaluation.samples and mesh.pp > 1:
        raise ConfigError(
            f"evaluation.samples with parallel.pp={mesh.pp}: a pipeline cannot write on from prompts; "
            "set evaluation.samples=[] (llamatrain.generate writes from its checkpoints)"
        )
    if config.evaluation.tasks and mesh.pp > 1:
        raise ConfigError(
            f"evaluation.tasks with parallel.pp={mesh.pp}: a pipeline cannot answer questions; "
            "set evaluation.tasks=[] (llamatrain.evaluate takes its checkpoints)"
        )
    if config.optim.warmup_steps > config.schedule_steps:
        raise ConfigError(
            f"optim.warmup_steps={config.optim.warmup_steps} is longer than the schedule of "
            f"{config.schedule_steps} steps: lower it, or raise train.steps or optim.schedule_steps"
        )


def mesh_of(config: RunConfig, world_size: int) -> Layout:
    """The mesh of a run on `world_size` ranks. Raises ConfigError naming the nearest that model and batch go with."""
    parallel = config.parallel
    refusal = misfit(parallel, world_size)
    if refusal is None:
        mesh = layout(parallel, world_size)
        refusal = beyond_the_model(config, mesh)
        if refusal is None:
            check_batch(config, mesh)
            return mesh
    works = next((mesh for mesh in meshes(parallel, world_size) if _refusal(config, mesh) is None), None)
    if works is not None:
        raise ConfigError(f"{refusal}: the nearest that works is {as_typed(works, parallel)}")
    plain = Layout(dp_shard=world_size)
    raise ConfigError(
        f"{refusal}; no mesh of {world_size} ranks goes with this model and this batch, not even "
        f"parallel.dp_shard={world_size} alone: {_refusal(config, plain)}"
    )


def _refusal(config: RunConfig, mesh: Layout) -> str | None:
    """Why a run with this mesh is refused; None if it is not."""
    sizes: dict[str, Any] = {**mesh.sizes()}
    try:
        check_parallel(replace(config.parallel, **sizes))
        check_batch(config, mesh)
    except ConfigError as error:
        return str(error)
    return beyond_the_model(config, mesh)


def beyond_the_model(config: RunConfig, mesh: Layout) -> str | None:
    """What the model has too little of for a mesh, or what does not divide among its ranks; None if all does."""
    model, seq_len = config.model, config.data.seq_len
    divided = {
        "model.n_heads": model.n_heads,
        "model.n_kv_heads": model.kv_heads,
        "the feed-forward width, model.ffn_dim": model.ffn_width,
        "model.vocab_size": model.vocab_size,
    }
    for name, size in divided.items():
        if size % mesh.tp:
            return f"{name}={size} does not divide among parallel.tp={mesh.tp} ranks"
    parts = mesh.tp * (2 * mesh.cp if mesh.cp > 1 else 1)  # of each sequence; two for each cp rank, an early, a late
    if seq_len % parts:
        return (
            f"data.seq_len={seq_len} does not divide into the {parts} parts that parallel.cp={mesh.cp} and "
            f"parallel.tp={mesh.tp} make of a sequence (data.seq_len={nearest_multiple(seq_len, parts)} does)"
        )
    if mesh.pp > model.n_layers:
        return f"parallel.pp={mesh.pp} stages are more than the model.n_layers={model.n_layers} layers they are made of"
    if mesh.pp > 1 and model.tied_embeddings:
        return (
            f"model.tied_embeddings=true with parallel.pp={mesh.pp}: the first stage embeds and the last has the head, "
            "so one weight cannot be both (model.tied_embeddings=false has two)"
        )
    return None


def check_batch(config: RunConfig, mesh: Layout) -> None:
    """A batch must divide among the ranks, and fill a pipeline. Raises ConfigError naming what would do."""
    train, seq_len, stages, devices = config.train, config.data.seq_len, mesh.pp, mesh.data_parallel
    batch_tokens, per_forward = train.global_batch_tokens, seq_len * train.micro_batch * devices
    fewest = stages if config.parallel.pipeline_schedule == "1f1b" else 1  # micro-batches of a step on each rank
    share, rest = divmod(batch_tokens, seq_len * devices)  # sequences of a step on each rank
    smaller = None  # micro-batch that would do
    if not rest and share >= fewest:
        smaller = f"train.micro_batch={largest_divisor(share, min(train.micro_batch, share // fewest))}"
    if batch_tokens % per_forward:
        larger = max(nearest_multiple(batch_tokens, per_forward), fewest * per_forward)
        raise ConfigError(
            f"train.global_batch_tokens={batch_tokens} does not divide into data.seq_len={seq_len} tokens x "
            f"train.micro_batch={train.micro_batch} sequences x {devices} devices = {per_forward} tokens; "
            f"{f'{smaller} does, and trains the same; or ' if smaller else ''}"
            f"the nearest that does is train.global_batch_tokens={larger}"
        )
    if share // train.micro_batch < fewest:
        ways = [smaller] if smaller else []
        ways += [f"train.global_batch_tokens={fewest * per_forward}", "parallel.pipeline_schedule=gpipe (idles longer)"]
        raise ConfigError(
            f"parallel.pipeline_schedule=1f1b needs at least as many micro-batches as parallel.pp={stages} stages, a "
            f"step has {share // train.micro_batch} on each rank; what would do: {', or '.join(ways)}"
        )


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`."""
    return next(n for n in range(min(number, limit), 0, -1) if number % n == 0)
