"""A run's attempts, one process group each, on the clock: when it trained, and what of it came to nothing.

`observe.goodput` says how many seconds each part of the wall clock had; this says when. Both read the same journal.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llamatrain.observe.goodput import ENDS
from llamatrain.run_directory import DONE

WITHOUT_A_WORD = "ended without a word"
AT_WORK = "at work"

Entry = Mapping[str, Any]


@dataclass
class Attempt:
    """From a launch to its end. Times in seconds since 1970."""

    launched: float
    ended: float
    world_size: int
    started: float | None = None  # before the first step; None if it did not come to one
    from_step: int = 0
    to_step: int = 0
    end: str = WITHOUT_A_WORD
    reason: str | None = None
    device: str | None = None
    marks: list[tuple[float, int]] = field(default_factory=list)  # when a step was known to be done
    lost: list[tuple[float, float]] = field(default_factory=list)  # when it trained what was not kept

    @property
    def device_hours(self) -> float:
        return (self.ended - self.launched) * self.world_size / 3600

    @property
    def is_idle(self) -> bool:
        """Whether it found a run that was done, and left."""
        return self.end == DONE and self.to_step == self.from_step


def attempts_of(journal: Iterable[Entry], *, now: float | None = None, step: int = 0) -> list[Attempt]:
    """In their order. `now`: the last sign of life of a run that is at work, and `step` where it is then."""
    found: list[Attempt] = []
    open_: Attempt | None = None
    for entry in journal:
        event, at = entry["event"], entry.get("time")
        if not isinstance(at, int | float):
            continue
        if event == "launch":
            if open_ is not None:
                open_.ended = min(max(open_.ended, entry.get("last_heartbeat") or 0.0), at)
            open_ = Attempt(launched=at, ended=at, world_size=entry.get("world_size", 1))
            found.append(open_)
        elif open_ is not None:
            open_.ended = max(open_.ended, at)
            _take(open_, entry, found)
            open_ = None if event in ENDS else open_
    if open_ is not None and now is not None:
        open_.ended, open_.end = max(open_.ended, now), AT_WORK
        open_.to_step = max(open_.to_step, step)
    return found


def _take(attempt: Attempt, entry: Entry, all_so_far: list[Attempt]) -> None:
    event, at, step = entry["event"], entry["time"], entry.get("step")
    if event == "start":
        attempt.started, attempt.from_step = at, step or 0
        attempt.to_step = attempt.from_step
        attempt.device = (entry.get("environment") or {}).get("device")
        for earlier in all_so_far[:-1]:
            _lose(earlier, after=entry.get("resumed_from") or 0, until=earlier.ended)
    elif event == "rollback":
        _lose(attempt, after=entry.get("to_step", 0), until=at)
    elif event == "account" and step is not None:
        attempt.marks.append((at, step))
    if event in ENDS:
        attempt.end, attempt.reason = event, entry.get("reason")
    if event != "rollback" and attempt.started is not None and isinstance(step, int):
        attempt.to_step = max(attempt.to_step, step)


def _lose(attempt: Attempt, *, after: int, until: float) -> None:
    """What it trained beyond step `after`, up to the moment `until`, came to nothing."""
    saved_all = attempt.end in ("stop", DONE) and attempt.to_step <= after
    if attempt.started is None or until <= attempt.started or saved_all:
        return
    since = max((at for at, step in attempt.marks if step <= after), default=attempt.started)
    apart = [span for span in attempt.lost if span[1] < since]
    since = min([since, *(begin for begin, _ in attempt.lost[len(apart) :])])
    attempt.lost = [*apart, (since, until)]
