"""Numbers against tokens: taken from records, smoothed, thinned for drawing, read off in between."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWN_POINTS = 600  # more than a plot has pixels for


@dataclass(frozen=True)
class Series:
    """Values at rising tokens; NaN where a record had none that is finite."""

    tokens: Array
    values: Array

    def __len__(self) -> int:
        return len(self.tokens)

    def __bool__(self) -> bool:
        return bool(np.isfinite(self.values).any())

    @property
    def last(self) -> float:
        return float(self.values[-1])

    def finite(self) -> "Series":
        there = np.isfinite(self.values)
        return Series(self.tokens[there], self.values[there])

    def at(self, tokens: float) -> float | None:
        """Between two of its points on the line between them; None outside, or without any."""
        known = self.finite()
        if not len(known) or not known.tokens[0] <= tokens <= known.tokens[-1]:
            return None
        return float(np.interp(tokens, known.tokens, known.values))

    def least(self) -> tuple[float, float] | None:
        """The smallest value, and at how many tokens."""
        known = self.finite()
        if not len(known):
            return None
        where = int(known.values.argmin())
        return float(known.values[where]), float(known.tokens[where])


def series(records: Iterable[Mapping[str, Any]], key: str) -> Series:
    """A field of those records that have it, null as NaN."""
    found = [(record["tokens"], record[key]) for record in records if key in record]
    tokens = np.array([at for at, _ in found], np.float64)
    values = np.array([np.nan if value is None else value for _, value in found], np.float64)
    return Series(tokens, values)


def nothing_in(found: Sequence[Series]) -> str:
    """Why there is nothing to draw."""
    return "no value that was logged is finite" if any(map(len, found)) else "no step has been logged yet"


def window_of(found: Iterable[Series]) -> float:
    """Over how many tokens to take a mean, the same for all: the fiftieth part of the longest."""
    return max((float(one.tokens[-1] - one.tokens[0]) for one in found if len(one)), default=0.0) / 50


def reach(one: Series, window: float) -> int:
    """How many points to each side of one lie within a window of tokens, if all lie equally far apart."""
    if len(one) < 2:
        return 0
    apart = float(one.tokens[-1] - one.tokens[0]) / (len(one) - 1)
    return int(window / apart / 2 + 1e-9) if apart else 0


def smoothed(one: Series, window: float) -> Series:
    """The mean over each point's neighbours, without NaN, as many to both sides, so fewer at the beginning, where there
    is more fall than noise. At the end, where it is the other way round, none of those with fewer."""
    known = one.finite()
    sums = np.concatenate(([0.0], np.cumsum(known.values)))
    places, most = np.arange(len(known)), reach(known, window)
    sides = np.minimum(np.minimum(places, len(known) - 1 - places), most)
    values = (sums[places + sides + 1] - sums[places - sides]) / (2 * sides + 1)
    kept = len(known) - most if 2 * most < len(known) else len(known)
    return Series(known.tokens[:kept], values[:kept])


def trailing_mean(one: Series, tokens: float, window: float) -> float | None:
    """The mean of the points in the window of tokens that ends there; with none in it, `at`."""
    known = one.finite()
    there = (known.tokens > tokens - window) & (known.tokens <= tokens)
    return float(known.values[there].mean()) if there.any() else one.at(tokens)


def tail_mean(one: Series) -> float | None:
    """`trailing_mean` at the end: a value less noisy than the last one."""
    known = one.finite()
    return trailing_mean(known, float(known.tokens[-1]), window_of([known])) if len(known) else None


@dataclass(frozen=True)
class Band:
    """A series in few points, each of several neighbours: their mean, least and greatest."""

    tokens: Array
    mean: Array
    least: Array
    greatest: Array


def thinned(one: Series, points: int = DRAWN_POINTS) -> Band:
    """At most `points` of them; those that share one are as many as their neighbours', not as many tokens."""
    known = one.finite()
    edges = np.linspace(0, len(known), min(points, len(known)) + 1).astype(int)
    parts = [slice(a, b) for a, b in pairwise(edges)]
    return Band(
        np.array([known.tokens[part].mean() for part in parts]),
        np.array([known.values[part].mean() for part in parts]),
        np.array([known.values[part].min() for part in parts]),
        np.array([known.values[part].max() for part in parts]),
    )


def equal_tokens(found: Iterable[Series]) -> float | None:
    """The most tokens that all of some series reach; None if one is empty or they do not overlap."""
    known = [one.finite() for one in found]
    if not known or not all(len(one) for one in known):
        return None
    most = min(float(one.tokens[-1]) for one in known)
    return most if all(float(one.tokens[0]) <= most for one in known) else None
