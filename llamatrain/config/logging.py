"""What is written about the run, and where."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError

WANDB_MODES = ("off", "offline", "online")
PROFILE_TRACES = ("rank0", "all")


@dataclass
class LoggingConfig:
    every_steps: int = 10
    straggler_factor: float = 1.3  # told: a rank that takes so many times as long as the median; 0: none
    wandb: str = "off"  # off | offline | online
    wandb_project: str = "llamatrain"
    wandb_entity: str | None = None
    profile_steps: int = 0  # how many to profile (0: none), each time the run starts; into profile/ of the run's folder
    profile_after_steps: int = 10  # steps of this start before them: compilation and first allocations are over
    profile_traces: str = "rank0"  # rank0 | all: whose trace files are written; every rank is summarised


def check_logging(logging: LoggingConfig) -> None:
    """Raises ConfigError."""
    if logging.every_steps < 1:
        raise ConfigError(f"logging.every_steps={logging.every_steps}: must be at least 1")
    if logging.straggler_factor != 0 and logging.straggler_factor <= 1:
        raise ConfigError(f"logging.straggler_factor={logging.straggler_factor}: must be above 1; 0 tells of none")
    if logging.wandb not in WANDB_MODES:
        raise ConfigError(f"logging.wandb={logging.wandb}: choose one of {', '.join(WANDB_MODES)}")
    if logging.profile_steps < 0:
        raise ConfigError(f"logging.profile_steps={logging.profile_steps}: must not be negative; 0 profiles nothing")
    if logging.profile_after_steps < 1:
        raise ConfigError(
            f"logging.profile_after_steps={logging.profile_after_steps}: must be at least 1, in which the profiler "
            "itself warms up"
        )
    if logging.profile_traces not in PROFILE_TRACES:
        raise ConfigError(f"logging.profile_traces={logging.profile_traces}: choose one of {', '.join(PROFILE_TRACES)}")
