"""Where a run's initial weights come from: drawn, or those of a checkpoint."""

from dataclasses import dataclass, field

from llamatrain.errors import ConfigError

CAN_DIFFER = ("model.rope_theta", "model.norm_eps", "data.tokenizer")


@dataclass
class InitConfig:
    from_: str | None = None  # a checkpoint, run or import of llamatrain to begin with its weights; typed `init.from=`
    sha256: str | None = None  # of its manifest; None: whatever it is, noted in the run's config.yaml
    allow: list[str] = field(default_factory=list)  # of CAN_DIFFER: what may be another than those were trained with


def check_init(init: InitConfig) -> None:
    """Raises ConfigError."""
    for name in init.allow:
        if name not in CAN_DIFFER:
            raise ConfigError(f"init.allow={name}: there is nothing to allow; choose of {', '.join(CAN_DIFFER)}")
    if init.from_ is None and (init.sha256 or init.allow):
        name = "sha256" if init.sha256 else "allow"
        raise ConfigError(f"init.{name} is of weights to begin with, and there are none: set init.from=PATH")
    if init.from_ == "":
        raise ConfigError("init.from is empty: give a checkpoint's path, or null to draw the weights")
