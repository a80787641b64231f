"""Which settings may differ between a run's start and its resumption.

The choices that `auto` made at the start are kept. A structural setting (what the weights are, what the samples
are) is refused if changed; for every other one the new value is taken and the difference is told.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llamatrain.config.run import RunConfig
from llamatrain.errors import ConfigError

AUTO_FIELDS = (  # auto, or null, leaves it to the program
    ("train", "device"),
    ("train", "precision"),
    ("train", "compile"),
    ("model", "attention"),
    ("parallel", "recompute"),
)
STRUCTURAL_GROUPS = ("model",)
NOT_STRUCTURAL = ("model.attention",)
STRUCTURAL = ("data.seq_len", "data.seed", "data.document_mask", "train.seed", "train.global_batch_tokens")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def is_structural(key: str) -> bool:
    group = key.partition(".")[0]
    mixture = key.startswith("data.sources.") and not key.endswith(".path")
    return (group in STRUCTURAL_GROUPS and key not in NOT_STRUCTURAL) or key in STRUCTURAL or mixture


def keep_auto_choices(config: RunConfig, earlier: RunConfig) -> RunConfig:
    """`config` with what it leaves to the program set as at the run's start."""
    for group, name in AUTO_FIELDS:
        if getattr(getattr(config, group), name) in ("auto", None):
            chosen = getattr(getattr(earlier, group), name)
            config = replace(config, **{group: replace(getattr(config, group), **{name: chosen})})
    return config


def differences(config: RunConfig, earlier: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that changed since the run's start: key -> (then, now). Raises ConfigError on a structural one."""
    now, then = flatten(config.as_dict()), flatten(earlier.as_dict())
    changed = {
        key: (then.get(key), now.get(key))
        for key in sorted({**then, **now})
        if then.get(key) != now.get(key) and key not in ("name", "run_dir")
    }
    structural = [f"{key} was {old}, is {new}" for key, (old, new) in changed.items() if is_structural(key)]
    if structural:
        raise ConfigError(
            f"{config.run_dir} holds a run with other settings ({'; '.join(structural)}): "
            "set them back, or start another run with name=…"
        )
    return changed
