"""When checkpoints are written and which are kept."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError


@dataclass
class CheckpointConfig:
    every_steps: int = 1000  # the last step is always saved
    keep_last: int = 2
    keep_every_steps: int = 0  # checkpoints at multiples of this are kept for ever; 0: none
    verify_hashes: bool = True  # hash every file read on load (sizes and shapes are always checked)


def check_checkpoint(checkpoint: CheckpointConfig) -> None:
    """Raises ConfigError."""
    if checkpoint.every_steps < 1:
        raise ConfigError(f"checkpoint.every_steps={checkpoint.every_steps}: must be at least 1")
    if checkpoint.keep_last < 1:
        raise ConfigError(f"checkpoint.keep_last={checkpoint.keep_last}: must be at least 1")
    if checkpoint.keep_every_steps < 0:
        raise ConfigError(f"checkpoint.keep_every_steps={checkpoint.keep_every_steps}: must not be negative")
    if checkpoint.keep_every_steps % checkpoint.every_steps:
        raise ConfigError(
            f"checkpoint.keep_every_steps={checkpoint.keep_every_steps} must be a multiple of "
            f"checkpoint.every_steps={checkpoint.every_steps}"
        )
