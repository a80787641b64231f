"""Where the time of some steps went: intervals of several kinds, made into parts that add up to the wall clock.

At any moment of a step the device computes, or it does not; in that case it communicates, or it does not; in that case
the host waits for data, or something else keeps it (it launches, runs Python, reads a number back). The four parts are
compute, exposed communication, data wait and host gaps. Communication at a moment of compute is hidden: it costs
nothing, and is a part of compute. All in integers, nanoseconds say, so that nothing is rounded.
"""

from collections.abc import Iterable
from dataclasses import dataclass

COMPUTE, COMMUNICATION, DATA_WAIT = "compute", "communication", "data wait"

Interval = tuple[int, int, str]  # start, end, kind
Span = tuple[int, int]  # start, end


@dataclass(frozen=True)
class TimeShares:
    """Parts of the wall clock, and what of the communication they hide."""

    wall: int
    compute: int
    exposed_communication: int
    data_wait: int
    host_gaps: int
    hidden_communication: int

    @property
    def communication(self) -> int:
        return self.exposed_communication + self.hidden_communication


def time_shares(intervals: Iterable[Interval], windows: Iterable[Span]) -> TimeShares:
    """The parts of `windows`, the time to account for; intervals may overlap, and reach beyond them."""
    wall = merged(windows)
    by_kind: dict[str, list[Span]] = {COMPUTE: [], COMMUNICATION: [], DATA_WAIT: []}
    for start, end, kind in intervals:
        by_kind[kind].append((start, end))
    compute, communication, waiting = (common(merged(spans), wall) for spans in by_kind.values())
    idle = without(wall, compute)
    quiet = without(idle, communication)
    return TimeShares(
        wall=length(wall),
        compute=length(compute),
        exposed_communication=length(common(communication, idle)),
        data_wait=length(common(waiting, quiet)),
        host_gaps=length(without(quiet, waiting)),
        hidden_communication=length(common(communication, compute)),
    )


def merged(spans: Iterable[Span]) -> list[Span]:
    """What spans cover together, as spans in order that do not touch one another."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def common(one: list[Span], other: list[Span]) -> list[Span]:
    """What two merged lists both cover."""
    found: list[Span] = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(one: list[Span], other: list[Span]) -> list[Span]:
    """What the first of two merged lists covers and the second does not."""
    found: list[Span] = []
    j = 0
    for start, end in one:
        while j < len(other) and other[j][1] <= start:
            j += 1
        k = j
        while k < len(other) and other[k][0] < end:
            if start < other[k][0]:
                found.append((start, other[k][0]))
            start = other[k][1]
            k += 1
        if start < end:
            found.append((start, end))
    return found


def length(spans: Iterable[Span]) -> int:
    return sum(end - start for start, end in spans)
