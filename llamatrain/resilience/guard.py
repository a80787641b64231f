"""Which steps are bad, and when there are too many: decisions on numbers that the host has read. No torch.

A step is bad if its loss or the norm of its gradient is no finite number, or, with `resilience.spike_action=skip`, lies
above a limit; it is then skipped, on the device. The limit is the mean of the last steps' numbers plus so many of their
standard deviations, once there are enough steps. What was skipped is not among them, or one bad step would let the next
one pass.

All that is remembered goes into the checkpoint, as JSON, which keeps a double exactly: a resumed run decides alike.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from llamatrain.config.resilience import ResilienceConfig

LARGEST = 3.4028234663852886e38  # of fp32: whatever is finite is not above it


@dataclass(frozen=True)
class Limits:
    """What a step's numbers may be at most."""

    loss: float = LARGEST
    grad_norm: float = LARGEST


@dataclass(frozen=True)
class Numbers:
    """What the host knows of a step that is done."""

    step: int
    loss: float
    grad_norm: float
    skipped: bool  # it brought no update
    samples: tuple[int, int]  # [first, end)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def above(self, limits: Limits) -> bool:
        return self.loss > limits.loss or self.grad_norm > limits.grad_norm

    def describe(self) -> str:
        """For messages, with the samples as data_tools.show_samples takes them."""
        first, end = self.samples
        return f"step {self.step}: loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g}, samples {first}-{end - 1}"


class Spike(NamedTuple):
    """A step whose numbers are far above those before, and how far they might have been."""

    numbers: Numbers
    limits: Limits


def limit(values: Sequence[float], sigma: float) -> float:
    """Mean plus `sigma` standard deviations, of the population."""
    mean = math.fsum(values) / len(values)
    return mean + sigma * math.dist(values, (mean,) * len(values)) / math.sqrt(len(values))


class Guard:
    """The window of the last good steps, and counts of the bad ones. The same on all ranks, as the numbers are."""

    def __init__(self, settings: ResilienceConfig) -> None:
        self.skipped = 0  # since the run's start
        self.in_a_row = 0  # skipped, up to the last step noted
        self.first_bad_sample = 0  # of those in a row
        self.settings = settings
        self._window: deque[tuple[float, float]] = deque(maxlen=settings.spike_window)
        self._limits: Limits | None = None  # that follow from the window, once they are asked for

    def limits(self) -> Limits:
        """Above which the next step is a spike."""
        if len(self._window) < self.settings.spike_window:
            return Limits()
        if self._limits is None:
            losses, norms = zip(*self._window, strict=True)
            self._limits = Limits(*(limit(values, self.settings.spike_sigma) for values in (losses, norms)))
        return self._limits

    def update_limits(self) -> Limits:
        """Above which the next step brings no update."""
        return self.limits() if self.settings.spike_action == "skip" else Limits()

    def note(self, numbers: Numbers) -> bool:
        """Take in the step after the last one noted; whether it is a spike that was not skipped."""
        if numbers.skipped:
            if self.in_a_row == 0:
                self.first_bad_sample = numbers.samples[0]
            self.skipped += 1
            self.in_a_row += 1
            return False
        spike = numbers.above(self.limits())
        self.in_a_row = 0
        self._window.append((numbers.loss, numbers.grad_norm))
        self._limits = None
        return spike

    @property
    def too_many(self) -> bool:
        """Whether so many steps in a row were skipped that the run is to end."""
        return self.in_a_row >= self.settings.max_bad_steps

    def to_json(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "first_bad_sample": self.first_bad_sample,
            "window": [list(pair) for pair in self._window],
        }

    def load(self, content: Any) -> None:
        """As it was when `to_json` gave `content`; an empty one is the run's start. Raises ValueError, KeyError."""
        counts = [0, 0, 0]
        window: list[tuple[float, float]] = []
        if content:
            counts = [int(content[name]) for name in ("skipped", "in_a_row", "first_bad_sample")]
            window = [(float(loss), float(norm)) for loss, norm in content["window"]]
        self.skipped, self.in_a_row, self.first_bad_sample = counts
        self._window = deque(window, maxlen=self.settings.spike_window)
        self._limits = None


def for_journal(numbers: Numbers, limits: Limits) -> dict[str, Any]:
    """A step's numbers as an event has them: JSON knows no numbers that are not finite, so these are words."""

    def plain(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    fields = {
        **asdict(numbers),
        "samples": list(numbers.samples),
        "loss": plain(numbers.loss),
        "grad_norm": plain(numbers.grad_norm),
    }
    if limits != Limits():
        fields |= {"loss_limit": limits.loss, "grad_norm_limit": limits.grad_norm}
    return fields
