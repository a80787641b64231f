"""AdamW and its schedule; defaults are the paper's (section 2.3)."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError

DECAYS = ("matrices", "all")


@dataclass
class OptimConfig:
    lr: float = 3e-4  # peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: str = "matrices"  # which parameters decay: matrices (the norms do not) | all
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping
    warmup_steps: int = 2000
    schedule_steps: int | None = None  # where the cosine ends; None: at the end of the run
    min_lr_ratio: float = 0.1  # the cosine ends at this share of lr and stays there


def check_optim(optim: OptimConfig) -> None:
    """Raises ConfigError."""
    if optim.lr <= 0:
        raise ConfigError(f"optim.lr={optim.lr}: must be above 0")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            raise ConfigError(f"optim.{name}={getattr(optim, name)}: must lie in [0, 1)")
    for name in ("eps", "weight_decay", "clip_norm", "warmup_steps"):
        if getattr(optim, name) < 0:
            raise ConfigError(f"optim.{name}={getattr(optim, name)}: must not be negative")
    if optim.schedule_steps is not None and optim.schedule_steps < 1:
        raise ConfigError(f"optim.schedule_steps={optim.schedule_steps}: must be at least 1")
    if not 0 <= optim.min_lr_ratio <= 1:
        raise ConfigError(f"optim.min_lr_ratio={optim.min_lr_ratio}: must lie in [0, 1]")
    if optim.decay not in DECAYS:
        raise ConfigError(f"optim.decay={optim.decay}: choose one of {', '.join(DECAYS)}")
