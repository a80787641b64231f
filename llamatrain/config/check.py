"""What `python -m llamatrain.check` is asked for."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError


@dataclass
class CheckConfig:
    checkpoint: str | None = None  # a run's directory (all its checkpoints) or one step-… directory


def check_check(settings: CheckConfig) -> None:
    """Raises ConfigError."""
    if not settings.checkpoint:
        raise ConfigError("no checkpoint to check: give checkpoint=RUN_OR_STEP_DIRECTORY")
