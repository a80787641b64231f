"""What `python -m llamatrain.goodput` is asked for."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError


@dataclass
class GoodputConfig:
    run_dir: str | None = None  # the folder of a run


def check_goodput(settings: GoodputConfig) -> None:
    """Raises ConfigError."""
    if not settings.run_dir:
        raise ConfigError("no run to look at: give run_dir=RUN_DIRECTORY")
