"""What `python -m llamatrain.verify` is asked for."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError

SUITES = ("cpu", "cluster")


@dataclass
class VerifyConfig:
    suite: str = (
        "cpu"  # cpu: 1, 2 and 4 processes of this machine, which it starts; cluster: the ranks it is started on
    )
    only: str | None = None  # just the cases whose name has this text
    workspace: str = "runs/verify"  # on several nodes: where all can write


def check_verify(settings: VerifyConfig) -> None:
    """Raises ConfigError."""
    if settings.suite not in SUITES:
        raise ConfigError(f"suite={settings.suite}: choose one of {', '.join(SUITES)}")
    if not settings.workspace:
        raise ConfigError("workspace is empty: workspace=…")
