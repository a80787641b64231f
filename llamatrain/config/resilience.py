"""What a run notices of its own failing, and what it does about it."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError

SPIKE_ACTIONS = ("log", "skip", "rollback")


@dataclass
class ResilienceConfig:
    preflight: bool = True  # look at machines, links, disk and packages before the model is built
    hang_timeout_s: int = 480  # a rank that comes no further for so long ends the run, with a report; 0: never
    hang_timeout_at_start_s: int = 1500  # the same until its second step is done: opening, loading, compiling
    compare_copies_every_steps: int = 100  # weights and moments that several ranks have, bit for bit; 0: never
    spike_action: str = "log"  # on a loss or gradient norm far above the last ones: log | skip | rollback
    spike_sigma: float = 6.0  # so many standard deviations above the window's mean is a spike
    spike_window: int = 128  # steps whose numbers are compared with; before there are so many, nothing is a spike
    rollback_skip_steps: int = 1  # a rollback passes over the samples of so many steps, the spike's and those before
    max_rollbacks: int = 3  # so many without a new checkpoint in between; the next spike ends the run
    max_bad_steps: int = 10  # so many skipped in a row end the run


def check_resilience(resilience: ResilienceConfig) -> None:
    """Raises ConfigError."""
    if resilience.compare_copies_every_steps < 0:
        raise ConfigError(
            f"resilience.compare_copies_every_steps={resilience.compare_copies_every_steps}: must not be negative"
        )
    for name in ("hang_timeout_s", "hang_timeout_at_start_s"):
        if getattr(resilience, name) < 0:
            raise ConfigError(f"resilience.{name}={getattr(resilience, name)}: must not be negative; 0 is no limit")
    if resilience.spike_action not in SPIKE_ACTIONS:
        choices = ", ".join(SPIKE_ACTIONS)
        raise ConfigError(f"resilience.spike_action={resilience.spike_action}: choose one of {choices}")
    if not resilience.spike_sigma > 0:
        raise ConfigError(f"resilience.spike_sigma={resilience.spike_sigma}: must be more than 0")
    if resilience.spike_window < 2:
        raise ConfigError(f"resilience.spike_window={resilience.spike_window}: must be at least 2")
    for name in ("rollback_skip_steps", "max_bad_steps"):
        if getattr(resilience, name) < 1:
            raise ConfigError(f"resilience.{name}={getattr(resilience, name)}: must be at least 1")
    if resilience.max_rollbacks < 0:
        raise ConfigError(f"resilience.max_rollbacks={resilience.max_rollbacks}: must not be negative")
