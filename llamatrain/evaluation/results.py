"""What a task finds. No torch."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A number with its 95 % interval, None where there is none, and over how many questions it is."""

    value: float
    low: float | None
    high: float | None
    questions: int


@dataclass
class TaskResult:
    metrics: dict[str, Metric]  # by name: accuracy, exact_match, pass@1, bits_per_byte …
    items: list[dict[str, Any]] = field(
        default_factory=list
    )  # a line of items.jsonl each: prompt, answer, gold, scores
    shortened: int = 0  # prompts that lost their front, since the model is not long enough
    note: str = ""  # how it came about otherwise than the task's description says
