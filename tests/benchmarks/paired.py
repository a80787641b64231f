"""Comparing things that are measured in turns, on a machine whose speed changes meanwhile.

Everything has its turn in every round, in an order that changes from round to round, so that a busy moment of the
machine hits all alike and nobody always follows the same one. Compared are the rates of the same round. The median
of these ratios has an interval by bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, 13.3):
the rounds are drawn again, with repetition, many times. No torch.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True)
class Ratio:
    """How much faster one was than another: the median over rounds, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def turn_order(names: Sequence[T], round_number: int) -> list[T]:
    """Whose turn comes when: in 2n rounds everyone has every place twice, and each neighbour before and after it."""
    start = round_number // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order if round_number % 2 == 0 else order[::-1]


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of rates measured in the same rounds. The draws are the same at every call."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} rates do not come from the same rounds")
    ratios = np.asarray(ours, float) / np.asarray(theirs, float)
    draws = np.random.default_rng(SEED).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def median_share(rates: Sequence[float], peaks: Sequence[float]) -> float:
    """Median over rounds of a rate's share of the peak of the same round."""
    return statistics.median(rate / peak for rate, peak in zip(rates, peaks, strict=True))
