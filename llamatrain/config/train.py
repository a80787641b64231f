"""How long and in what portions the run trains."""

from dataclasses import dataclass, field

from llamatrain.errors import ConfigError

PRECISIONS = ("auto", "bf16", "fp32")
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class TrainConfig:
    steps: int | None = None  # optimizer steps of the whole run; or give train.tokens
    tokens: int | None = None  # tokens of the whole run, rounded up to whole steps
    global_batch_tokens: int = 4_194_304  # tokens per optimizer step over all devices (paper: 4M)
    micro_batch: int = 1  # sequences per device per forward
    seed: int = 0  # keys the initial weights
    precision: str = "auto"  # compute in bf16 | fp32 (weights are fp32); auto: bf16 on CUDA, fp32 on CPU
    device: str = "auto"  # auto | cpu | cuda
    deterministic: bool = False  # bitwise repeatable on CUDA too, slower; on CPU it always is
    compile: bool | None = None  # what is elementwise, by torch.compile, for training; null: on CUDA yes, on CPU no
    collect_garbage_every_steps: int = 50  # Python's garbage, by all ranks at the same steps; 0: as Python sees fit
    replay_check_every_steps: int = 1000  # run such a step twice from the same state and compare the bits; 0: never
    stop_after_step: int | None = None  # save and leave after this step; the schedule does not change
    # on resumption, settings that decide what model or which samples it is and may differ all the same from here on
    # (docs/resume-policy.md): [data.sources.web.weight,…]
    resume_allow: list[str] = field(default_factory=list)
    same_environment: bool = False  # refuse to resume with other versions or on another machine; false: tell it
    max_starts_without_progress: int = 10  # so many starts that came to no checkpoint, and a person has to look
    dry_run: bool = False  # build at full shape, one step, save, load, say how much memory it took, and leave


def check_train(train: TrainConfig) -> None:
    """Raises ConfigError."""
    if (train.steps is None) == (train.tokens is None):
        raise ConfigError("give the run's length as one of train.steps=N and train.tokens=N, and set the other to null")
    for name in (
        "steps",
        "tokens",
        "global_batch_tokens",
        "micro_batch",
        "stop_after_step",
        "max_starts_without_progress",
    ):
        value = getattr(train, name)
        if value is not None and value < 1:
            raise ConfigError(f"train.{name}={value}: must be at least 1")
    if train.replay_check_every_steps < 0:
        raise ConfigError(f"train.replay_check_every_steps={train.replay_check_every_steps}: must not be negative")
    if train.collect_garbage_every_steps < 0:
        raise ConfigError(
            f"train.collect_garbage_every_steps={train.collect_garbage_every_steps}: must not be negative; 0 leaves it "
            "to Python"
        )
    if not 0 <= train.seed < 2**63:
        raise ConfigError(f"train.seed={train.seed}: must lie in [0, 2^63)")
    if train.precision not in PRECISIONS:
        raise ConfigError(f"train.precision={train.precision}: choose one of {', '.join(PRECISIONS)}")
    if train.device not in DEVICES:
        raise ConfigError(f"train.device={train.device}: choose one of {', '.join(DEVICES)}")
