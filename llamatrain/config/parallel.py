"""How the run is spread over its processes."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError

RESHARD_AFTER_FORWARD = ("always", "never")


@dataclass
class ParallelConfig:
    # what happens to a layer's gathered weights after its forward: freed, and gathered again for backward (always),
    # or kept until after backward (never)
    reshard_after_forward: str = "always"
    timeout_s: int = 600  # a collective of a step that takes longer ends the run
    host_timeout_s: int = 1800  # the same where ranks wait for files or for each other's start


def check_parallel(parallel: ParallelConfig) -> None:
    """Raises ConfigError."""
    if parallel.reshard_after_forward not in RESHARD_AFTER_FORWARD:
        raise ConfigError(
            f"parallel.reshard_after_forward={parallel.reshard_after_forward}: choose one of "
            f"{', '.join(RESHARD_AFTER_FORWARD)}"
        )
    for name in ("timeout_s", "host_timeout_s"):
        if getattr(parallel, name) < 1:
            raise ConfigError(f"parallel.{name}={getattr(parallel, name)}: must be at least 1")
