"""Validation during training."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError


@dataclass
class EvaluationConfig:
    every_steps: int = 0  # 0: never; otherwise also before the first step and after the last
    max_tokens: int | None = None  # per source, from the front of its validation split; None: all of it
    micro_batch: int = 8  # sequences per forward


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """Raises ConfigError."""
    if evaluation.every_steps < 0:
        raise ConfigError(f"evaluation.every_steps={evaluation.every_steps}: must not be negative")
    if evaluation.max_tokens is not None and evaluation.max_tokens < 2:
        raise ConfigError(f"evaluation.max_tokens={evaluation.max_tokens}: must be at least 2")
    if evaluation.micro_batch < 1:
        raise ConfigError(f"evaluation.micro_batch={evaluation.micro_batch}: must be at least 1")
