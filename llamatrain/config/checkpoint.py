"""When checkpoints are written and which are kept."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError


@dataclass
class CheckpointConfig:
    every_steps: int = 1000  # the last step is always saved
    every_minutes: float | None = None  # also when so long has passed since the last save
    asynchronous: bool = True  # training waits for a copy in host memory only, the rest is written beside it
    retries: int = 2  # so often is a write that failed tried again, after 1 s, 2 s, …
    max_failures: int = 3  # so many saves in a row that failed nevertheless end the run; 1: the first does
    keep_last: int = 2
    keep_every_steps: int = 0  # checkpoints at multiples of this are kept for ever; 0: none
    hours_between_failures: float | None = None  # of the whole run, for the advice; null: as Llama 3's, by GPUs
    verify_hashes: bool = True  # hash every file read on load (sizes and shapes are always checked)


def check_checkpoint(checkpoint: CheckpointConfig) -> None:
    """Raises ConfigError."""
    if checkpoint.every_steps < 1:
        raise ConfigError(f"checkpoint.every_steps={checkpoint.every_steps}: must be at least 1")
    if checkpoint.every_minutes is not None and not checkpoint.every_minutes > 0:
        raise ConfigError(f"checkpoint.every_minutes={checkpoint.every_minutes}: must be more than 0, or null")
    if checkpoint.retries < 0:
        raise ConfigError(f"checkpoint.retries={checkpoint.retries}: must not be negative")
    if checkpoint.max_failures < 1:
        raise ConfigError(f"checkpoint.max_failures={checkpoint.max_failures}: must be at least 1")
    if checkpoint.hours_between_failures is not None and not checkpoint.hours_between_failures > 0:
        raise ConfigError(
            f"checkpoint.hours_between_failures={checkpoint.hours_between_failures}: must be more than 0, or null"
        )
    if checkpoint.keep_last < 1:
        raise ConfigError(f"checkpoint.keep_last={checkpoint.keep_last}: must be at least 1")
    if checkpoint.keep_every_steps < 0:
        raise ConfigError(f"checkpoint.keep_every_steps={checkpoint.keep_every_steps}: must not be negative")
    if checkpoint.keep_every_steps % checkpoint.every_steps:
        raise ConfigError(
            f"checkpoint.keep_every_steps={checkpoint.keep_every_steps} must be a multiple of "
            f"checkpoint.every_steps={checkpoint.every_steps}"
        )
