"""Which window of which source sample g of a run is. Pure functions of (window counts, weights, seed, g).

No torch. Three pieces, each O(1) in g, so that starting at sample 10^12 costs what starting at 0 does:

* The mixture. Weights become whole parts of a period S of at most 10,000 samples (`round_weights`), and a
  table of one period says which source each of its samples uses. It is built by Tijdeman's chairman
  assignment ("The chairman assignment problem", Discrete Mathematics 32, 1980): use k of source i has a
  release and a deadline, and among the released the earliest deadline goes first. After any number of
  samples each of the K sources is then within 1 - 1/(2K - 2) < 1 sample of its share. (The obvious rule,
  largest deficit first, is not: its worst deviation exceeds one sample.) After S samples source i has been
  used exactly W_i times, so the table repeats, and "the k-th use of source i" is arithmetic.
* The epoch. Use k of a source with n windows falls in epoch k // n and is position k % n of that epoch's
  permutation of the windows, keyed by the seed, the source's *name* and the epoch: another source, or
  another order of the sources in the configuration, changes nothing in it.
* The state. What a checkpoint has to remember is `DataState`: the next sample, the ranges passed over, and
  the mixture segments. A segment begins where the weights were changed and knows how often each source was
  used before, so that every source goes on with its next window, without repeating one or leaving one out.

All promises are about the rounded weights; `describe_rounding` says what they are.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from llamatrain.data.permutation import permute
from llamatrain.errors import DataError

LARGEST = 2**62  # of any number in a data state: samples are counted in 64 bits
LARGEST_PERIOD = 10_000  # samples in the mixture's table: a share is exact, or rounded to 0.01 %


# The mixture


def round_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Whole parts in the proportion of the weights: at most LARGEST_PERIOD in all, without common divisor.

    Exact where such parts exist; else the largest remainders of LARGEST_PERIOD parts are rounded up, and no
    source gets less than one. Sources of weight 0 are left out. Raises DataError.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise DataError(f"data.sources.{name}.weight={weight}: must be a number of at least 0")
    # str(): what was typed, 0.67, not the nearest binary fraction; sorted: the order given decides no ties
    exact = {name: Fraction(str(weight)) for name, weight in sorted(weights.items()) if weight > 0}
    if not 1 <= len(exact) <= LARGEST_PERIOD:
        raise DataError(f"{len(exact)} data.sources have a weight above 0; 1 to {LARGEST_PERIOD} can be mixed")
    total = sum(exact.values())
    period = min(LARGEST_PERIOD, math.lcm(*((weight / total).denominator for weight in exact.values())))
    shares = {name: weight / total * period for name, weight in exact.items()}
    parts = {name: max(1, math.floor(share)) for name, share in shares.items()}
    while (missing := period - sum(parts.values())) != 0:
        step = 1 if missing > 0 else -1
        movable = [name for name in parts if parts[name] + step >= 1]
        parts[max(movable, key=lambda name: step * (shares[name] - parts[name]))] += step
    divisor = math.gcd(*parts.values())
    return {name: part // divisor for name, part in parts.items()}


def describe_rounding(weights: Mapping[str, float]) -> str:
    """One line for the log: what each source's weight asks for and the parts it gets."""
    parts = round_weights(weights)
    period, total = sum(parts.values()), sum(weights.values())
    shares = (
        f"{name} {weights[name] / total:.4%} -> {part}/{period} ({part / period:.4%})" for name, part in parts.items()
    )
    return "mixture: " + ", ".join(shares)


def quota_table(parts: Sequence[int]) -> np.ndarray:
    """Which source each sample of a period uses, int64 [sum(parts)]; all parts >= 1. Tijdeman's assignment.

    With S the period, D = 2K - 2 and slots counted from 1, use k of source i may come from the first slot g
    with W_i·g/S >= k + 1/D on, and must come by the first slot with W_i·g/S > k + 1 - 1/D.
    """
    period, spread = sum(parts), 2 * len(parts) - 2
    if spread == 0:
        return np.zeros(period, np.int64)
    released: list[list[tuple[int, int]]] = [[] for _ in range(period + 2)]  # by slot: (deadline, source)

    def release(source: int, use: int, earliest: int) -> None:
        slot = -(-(use * period * spread + period) // (parts[source] * spread))
        deadline = ((use + 1) * period * spread - period) // (parts[source] * spread)
        if slot <= period:
            released[max(slot, earliest)].append((deadline, source))

    for source in range(len(parts)):
        release(source, 0, 1)
    table, uses, waiting = np.empty(period, np.int64), [0] * len(parts), list[tuple[int, int]]()
    for slot in range(1, period + 1):
        for entry in released[slot]:
            heapq.heappush(waiting, entry)
        _, source = heapq.heappop(waiting)
        table[slot - 1] = source
        uses[source] += 1
        release(source, uses[source], slot + 1)
    return table


class Schedule:
    """Which source sample g of a mixture uses, and how often that source was used before."""

    def __init__(self, weights: Mapping[str, int]) -> None:
        self.names = tuple(sorted(weights))
        self.parts = np.array([weights[name] for name in self.names], np.int64)
        self.period = int(self.parts.sum())
        self._source = quota_table(self.parts.tolist())
        self._use = np.empty(self.period, np.int64)
        for source, part in enumerate(self.parts):
            self._use[self._source == source] = np.arange(part)

    def sample(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position in `names`, which use of that source) of each sample number, int64 like `g`."""
        period, slot = np.divmod(g, self.period)
        source = self._source[slot]
        return source, period * self.parts[source] + self._use[slot]

    def counts(self, g: int) -> np.ndarray:
        """How often each source is used by samples 0 … g-1, int64 [sources]."""
        period, slot = divmod(g, self.period)
        return period * self.parts + np.bincount(self._source[:slot], minlength=len(self.names))


# The state


def _whole(value: Any, what: str, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= LARGEST:
        raise DataError(f"data state: {what} is {value!r}, not a whole number of at least {least}")
    return value


def _fields(content: Any, what: str, names: set[str]) -> dict[str, Any]:
    if not isinstance(content, dict) or set(content) != names:
        raise DataError(f"data state: {what} must hold {', '.join(sorted(names))}, and is {content!r}")
    return content


def _counts(content: Any, what: str, *, least: int) -> dict[str, int]:
    if not isinstance(content, dict):
        raise DataError(f"data state: {what} is {content!r}, not a table of sources")
    return {name: _whole(count, f"{what} of {name}", least=least) for name, count in content.items()}


def _list(content: Any, what: str) -> list[Any]:
    if not isinstance(content, list):
        raise DataError(f"data state: {what} is {content!r}, not a list")
    return content


@dataclass(frozen=True)
class Segment:
    """A stretch of the run with one mixture: weights by `round_weights`, from sample `first_sample` on."""

    first_sample: int
    weights: dict[str, int]
    counts_before: dict[str, int]  # uses of every source ever used, before first_sample

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(self.weights)

    def counts(self, sample: int) -> dict[str, int]:
        """How often each source is used by all samples before `sample`, a sample of this segment."""
        counts = dict(self.counts_before)
        here = self.schedule.counts(sample - self.first_sample).tolist()
        for name, count in zip(self.schedule.names, here, strict=True):
            counts[name] = counts.get(name, 0) + count
        return counts

    @staticmethod
    def from_json(content: Any) -> "Segment":
        content = _fields(content, "a segment", {"first_sample", "weights", "counts_before"})
        first = _whole(content["first_sample"], "a segment's first_sample")
        weights = _counts(content["weights"], "weights", least=1)
        before = _counts(content["counts_before"], "counts_before", least=0)
        if not 1 <= sum(weights.values()) <= LARGEST_PERIOD:
            raise DataError(f"data state: the weights of a segment sum to {sum(weights.values())}")
        if sum(before.values()) != first:
            raise DataError(f"data state: counts_before sum to {sum(before.values())} at sample {first}")
        return Segment(first, weights, before)


@dataclass(frozen=True)
class DataState:
    """Where a run stands in its data. Without rollbacks, step t has samples [t·G, (t+1)·G)."""

    next_sample: int
    passed_over: tuple[tuple[int, int], ...]  # ranges [a, b) that are never trained on; ascending, apart
    segments: tuple[Segment, ...]

    @staticmethod
    def start(weights: Mapping[str, int]) -> "DataState":
        """The state of a run that has read nothing; weights by `round_weights`."""
        return DataState(0, (), (Segment(0, dict(weights), {}),))

    @property
    def samples_read(self) -> int:
        """How many samples the run has trained on."""
        next_one = self.next_sample
        return next_one - sum(min(end, next_one) - first for first, end in self.passed_over if first < next_one)

    def sample_at(self, offsets: np.ndarray) -> np.ndarray:
        """Number of the sample that comes `offsets` samples from now (0: the next one), int64 alike."""
        samples = offsets + self.next_sample
        for first, end in self.passed_over:
            if end > self.next_sample:
                first = max(first, self.next_sample)
                samples = np.where(samples >= first, samples + (end - first), samples)
        return samples

    def take(self, count: int) -> np.ndarray:
        """Numbers of the next `count` samples, int64 [count]."""
        return self.sample_at(np.arange(count, dtype=np.int64))

    def span(self, count: int) -> tuple[int, int]:
        """First of the next `count` samples and the number after the last; some in between may be passed over."""
        first, last = self.sample_at(np.array([0, count - 1], np.int64)).tolist()
        return first, last + 1

    def advance(self, count: int) -> "DataState":
        """The state when the next `count` samples have been consumed."""
        return replace(self, next_sample=int(self.sample_at(np.array([count], np.int64))[0]))

    def pass_over(self, first: int, end: int) -> "DataState":
        """The same state without samples [first, end), whether they lie ahead or behind."""
        if not 0 <= first < end:
            raise DataError(f"samples [{first}, {end}) cannot be passed over: the range is empty or negative")
        merged: list[tuple[int, int]] = []
        for a, b in sorted([*self.passed_over, (first, end)]):
            if merged and a <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
            else:
                merged.append((a, b))
        return replace(self, passed_over=tuple(merged))

    def change_weights(self, weights: Mapping[str, int]) -> "DataState":
        """The same state with another mixture from the next sample on; every source goes on where it is."""
        current = self.segments[-1]
        if dict(weights) == current.weights:
            return self
        before = tuple(segment for segment in self.segments if segment.first_sample < self.next_sample)
        added = Segment(self.next_sample, dict(weights), current.counts(self.next_sample) if before else {})
        return replace(self, segments=(*before, added))

    def to_json(self) -> dict[str, Any]:
        return {
            "next_sample": self.next_sample,
            "passed_over": [list(bounds) for bounds in self.passed_over],
            "segments": [
                {"first_sample": s.first_sample, "weights": s.weights, "counts_before": s.counts_before}
                for s in self.segments
            ],
        }

    @staticmethod
    def from_json(content: Any) -> "DataState":
        """Raises DataError for anything `to_json` would not have written."""
        content = _fields(content, "it", {"next_sample", "passed_over", "segments"})
        next_sample = _whole(content["next_sample"], "next_sample")
        passed_over, end = [], -1
        for bounds in _list(content["passed_over"], "passed_over"):
            if len(_list(bounds, "a range of passed_over")) != 2:
                raise DataError(f"data state: passed_over holds {bounds!r}, not a range [first, end)")
            first = _whole(bounds[0], "the beginning of a passed-over range", least=end + 1)
            end = _whole(bounds[1], "the end of a passed-over range", least=first + 1)
            passed_over.append((first, end))
        segments = tuple(Segment.from_json(segment) for segment in _list(content["segments"], "segments"))
        starts = [segment.first_sample for segment in segments]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] > next_sample:
            raise DataError(f"data state: segments begin at samples {starts}, with sample {next_sample} next")
        return DataState(next_sample, tuple(passed_over), segments)


def check_segments(segments: Sequence[Segment], names: Sequence[str]) -> None:
    """Raises DataError when a checkpoint's mixture draws on a source that the configuration does not name."""
    missing = sorted(set(segments[-1].weights) - set(names))
    if missing:
        raise DataError(
            f"the checkpoint's mixture draws on source {missing[0]!r} and data.sources names only "
            f"{', '.join(sorted(names))}: add data.sources.{missing[0]}.path=DIRECTORY, with "
            f"data.sources.{missing[0]}.weight=0 if it is to be drawn on no more"
        )


# All of it together


@dataclass(frozen=True)
class Locations:
    """Where samples lie; int64 arrays, one entry a sample."""

    source: np.ndarray  # position in the order's `names`
    epoch: np.ndarray  # of that source
    shard: np.ndarray  # position in the source's list of shards
    window: np.ndarray  # within the shard: its first token is window·seq_len


class SampleOrder:
    """Where every sample of a run lies. Made from the shards' window counts alone, in time O(shards)."""

    def __init__(
        self,
        names: Sequence[str],
        windows_per_shard: Sequence[Sequence[int]],
        *,
        seed: int,
        segments: Sequence[Segment],
    ) -> None:
        """Raises DataError when the current mixture draws on a source that is missing or has no window."""
        self.names = tuple(names)
        self.seed = seed
        self.segments = tuple(segments)
        counts = [np.asarray(windows, np.int64) for windows in windows_per_shard]
        self.windows = {name: int(windows.sum()) for name, windows in zip(self.names, counts, strict=True)}
        self._shard_starts = [np.cumsum(windows) - windows for windows in counts]  # the first window of each
        self._first_samples = np.array([segment.first_sample for segment in self.segments], np.int64)
        check_segments(self.segments, self.names)
        for name in self.segments[-1].weights:
            self._windows_of(name)

    def _windows_of(self, name: str) -> int:
        windows = self.windows.get(name, 0)
        if windows == 0:
            raise DataError(
                f"data.sources.{name}: the mixture draws on it and no shard of it holds a whole sample: "
                f"lower data.seq_len, add data, or set data.sources.{name}.weight=0"
            )
        return windows

    def locate(self, samples: np.ndarray) -> Locations:
        """Where the samples of these numbers (int64, any order) lie; cheapest a few thousand at a time."""
        found = Locations(*(np.empty(samples.shape, np.int64) for _ in range(4)))
        segment_of = np.searchsorted(self._first_samples, samples, "right") - 1
        for s in np.unique(segment_of).tolist():
            segment = self.segments[s]
            rows = np.flatnonzero(segment_of == s)
            source, use = segment.schedule.sample(samples[rows] - segment.first_sample)
            for i in np.unique(source).tolist():
                name, chosen = segment.schedule.names[i], np.flatnonzero(source == i)
                self._locate_uses(found, rows[chosen], name, use[chosen] + segment.counts_before.get(name, 0))
        return found

    def _locate_uses(self, found: Locations, rows: np.ndarray, name: str, uses: np.ndarray) -> None:
        """Fill in `rows` of `found` with where these uses of one source lie."""
        windows = self._windows_of(name)
        place = self.names.index(name)
        epochs, positions = np.divmod(uses, windows)
        window = np.empty_like(uses)
        for epoch in np.unique(epochs).tolist():
            at = np.flatnonzero(epochs == epoch)
            window[at] = permute(positions[at], windows, seed=self.seed, name=name, epoch=epoch)
        shard = np.searchsorted(self._shard_starts[place], window, "right") - 1
        found.source[rows] = place
        found.epoch[rows] = epochs
        found.shard[rows] = shard
        found.window[rows] = window - self._shard_starts[place][shard]

    def counts(self, sample: int) -> dict[str, int]:
        """How often each source is used by samples 0 … sample-1."""
        return self.segments[int(np.searchsorted(self._first_samples, sample, "right")) - 1].counts(sample)

    def epochs(self, sample: int) -> dict[str, float]:
        """How many times over each source has been read after `sample` samples."""
        counts = self.counts(sample)
        return {name: counts.get(name, 0) / windows for name, windows in self.windows.items() if windows}
