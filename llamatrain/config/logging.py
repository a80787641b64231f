"""What is written about the run, and where."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError

WANDB_MODES = ("off", "offline", "online")


@dataclass
class LoggingConfig:
    every_steps: int = 10
    wandb: str = "off"  # off | offline | online
    wandb_project: str = "llamatrain"
    wandb_entity: str | None = None


def check_logging(logging: LoggingConfig) -> None:
    """Raises ConfigError."""
    if logging.every_steps < 1:
        raise ConfigError(f"logging.every_steps={logging.every_steps}: must be at least 1")
    if logging.wandb not in WANDB_MODES:
        raise ConfigError(f"logging.wandb={logging.wandb}: choose one of {', '.join(WANDB_MODES)}")
