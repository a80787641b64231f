"""How much of a run's time was training that counts: its attempts on the clock, from the run's journal. No torch.

The clock runs from the first launch to the last thing known of the run, but for the time after it was done, and for
launches that found it done. Its parts:

    productive   steps whose result the run has kept, so far
    data_wait    those steps waiting for their data (of rank 0)
    validating   validation of what was kept
    saving       training held up by checkpoints, not what is written beside it
    other        profiling
    lost         whatever was done after the checkpoint from which the run went on, a hang's last seconds too
    starting     from the first launch to its first step
    restarting   from the end of an attempt to the first step of the next: nobody at work, or loading

They add up to it, whatever happened, since every moment between two entries is given to one part. The journal has
`launch` and `start` (before the first step) and an end (stop, done, crash, unhealthy), if the process came to write
one; if not, the next process to come says when its last heartbeat was. With every checkpoint, and at the end, an
`account` says how long the attempt has waited for data, validated and saved so far; the rest between two accounts is
productive until a later start shows that it is lost. What an attempt did after its last account is lost at once, as no
checkpoint holds it. Goodput is the productive part's share.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from llamatrain.observe.records import Record
from llamatrain.run_directory import BAD_INPUT, CRASH, DONE, UNHEALTHY, RunDirectory

log = logging.getLogger("llamatrain")

PARTS = ("productive", "data_wait", "validating", "saving", "other", "lost", "starting", "restarting")
COUNTED = ("data_wait", "validating", "saving", "other")  # by the process itself, in its accounts
ENDS = ("stop", DONE, CRASH, UNHEALTHY, BAD_INPUT)
EVENTS = ("launch", "start", "account", "rollback", *ENDS)

WITHOUT_A_WORD = "ended without a word"
AT_WORK = "at work"

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Stretch:
    """Training between two accounts."""

    since: float
    until: float
    first: int  # the last step before it
    last: int  # its last step
    seconds: dict[str, float]  # by part


@dataclass
class Attempt:
    """One process group, from its launch to its end. Times in seconds since 1970."""

    launched: float
    ended: float
    world_size: int
    after_done: bool = False  # launched when the run was done
    started: float | None = None  # before the first step; None if it did not come to one
    from_step: int = 0
    to_step: int = 0
    end: str = WITHOUT_A_WORD
    reason: str | None = None
    kept: list[Stretch] = field(default_factory=list)  # so far
    lost: list[tuple[float, float]] = field(default_factory=list)  # when it did what came to nothing

    @property
    def device_hours(self) -> float:
        return (self.ended - self.launched) * self.world_size / 3600

    @property
    def is_idle(self) -> bool:
        """Whether it found a run that was done, and left, or was refused."""
        return self.after_done and (self.started is None or (self.end == DONE and self.to_step == self.from_step))

    def lose(self, since: float, until: float) -> None:
        """Add to `lost`, as spans in order that do not touch one another."""
        apart = [span for span in self.lost if span[1] < since or until < span[0]]
        touching = [(since, until), *(span for span in self.lost if span not in apart)]
        if since < until:
            self.lost = sorted([*apart, (min(span[0] for span in touching), max(span[1] for span in touching))])


class Ledger:
    """The attempts, and seconds by part, from the journal's entries fed in their order."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.attempts: list[Attempt] = []
        self._now: float | None = None  # up to when every moment has its part
        self._open: Attempt | None = None  # of which no end is known
        self._over = False  # done, as far as is known
        self._as_done: tuple[dict[str, float], list[Attempt]] = ({}, [])  # parts and attempts, when it was done last
        self._step = 0
        self._counted = dict.fromkeys(COUNTED, 0.0)  # by this attempt up to now
        for entry in entries:
            self.feed(entry)

    @property
    def wall_s(self) -> float:
        return sum(self.parts.values())

    @property
    def goodput(self) -> float:
        """The share of the wall clock that was productive; 0 where none has passed."""
        return self.parts["productive"] / self.wall_s if self.wall_s else 0.0

    def feed(self, entry: Entry) -> None:
        """Account for the time up to an entry; others than EVENTS, or without a time, change nothing."""
        event, at = entry["event"], entry.get("time")
        if event not in EVENTS or not isinstance(at, int | float) or (self._over and event != "launch"):
            return
        if self._now is None or self._over:
            self._now = at  # before the first launch, or after the end
        at = max(at, self._now)  # clocks of two nodes may differ
        if "last_heartbeat" in entry:  # told by a process that found the one before gone
            self._end(min(max(entry["last_heartbeat"] or self._now, self._now), at))
        if event == "launch":
            self._launch(at, entry)
        elif event == "start":
            self._start(at, entry)
        elif not self._over:
            self._go_on(at, entry)

    def at_work(self, heartbeat: float, *, step: int) -> None:
        """Account for the time up to the last sign of life of a run at work."""
        self.feed({"event": "account", "time": heartbeat, "step": step})
        if self._open is not None:
            self._open.end = AT_WORK

    def goodput_at(self, now: float, counted: Mapping[str, float]) -> float:
        """The goodput of a run that trains, if it wrote an account now."""
        assert self._now is not None
        passed = max(0.0, now - self._now)
        productive = self.parts["productive"] + self._split(passed, counted)["productive"]
        return productive / (self.wall_s + passed) if self.wall_s + passed else 0.0

    def _launch(self, at: float, entry: Entry) -> None:
        self._end(at)
        if self._over:
            self._now = at
            self._as_done = deepcopy((self.parts, self.attempts))
        self._pass(at)
        self._open = Attempt(at, at, entry.get("world_size", 1), after_done=self._over)
        self.attempts.append(self._open)
        self._over = False

    def _start(self, at: float, entry: Entry) -> None:
        if self._open is None or self._open.started is not None:
            self._launch(at, entry)
        assert self._open is not None
        self._pass(at)
        self._lose(after=entry.get("resumed_from") or 0)
        self._step = entry.get("step", 0)
        self._counted = dict.fromkeys(COUNTED, 0.0)
        self._open.started = self._open.ended = at
        self._open.from_step = self._open.to_step = self._step

    def _go_on(self, at: float, entry: Entry) -> None:
        """To an account, a rollback, or an end."""
        attempt, event = self._open, entry["event"]
        if attempt is None:
            self._pass(at)
            self._over = event == DONE
            return
        if event in ENDS:
            attempt.end, attempt.reason = event, entry.get("reason")
        self._advance(at, step=entry.get("step"), counted=entry.get("counted"))
        if event == "rollback":
            self._step = entry.get("to_step", 0)
            self._lose(after=self._step)
        if event in ENDS:
            self._close(attempt)

    def _end(self, at: float) -> None:
        """The attempt at work, if there is one, is gone since then, without a word."""
        if self._open is not None:
            self._advance(at, step=None)
            self._close(self._open)

    def _close(self, attempt: Attempt) -> None:
        """No more is heard of it; one that found the run done, has changed nothing but to have been there."""
        self._open, self._over = None, attempt.end == DONE
        if attempt.is_idle:
            attempt.kept, attempt.lost = [], []
            self.parts, attempts = self._as_done
            self.attempts, self._over = [*attempts, attempt], True

    def _advance(self, at: float, *, step: int | None, counted: Mapping[str, float] | None = None) -> None:
        """Time of the attempt at work, up to `step`; without one, no checkpoint holds what was trained."""
        attempt = self._open
        assert attempt is not None and self._now is not None
        attempt.ended = at
        if attempt.started is None:
            self._pass(at)
            return
        since, self._now = self._now, at
        if step is None:
            self.parts["lost"] += at - since
            attempt.lose(since, at)
            return
        seconds = self._split(at - since, counted or {})
        self._counted = {part: max(self._counted[part], (counted or {}).get(part, 0.0)) for part in COUNTED}
        for part, value in seconds.items():
            self.parts[part] += value
        attempt.kept.append(Stretch(since, at, self._step, step, seconds))
        attempt.to_step = max(attempt.to_step, step)
        self._step = step

    def _pass(self, at: float) -> None:
        """Time without training."""
        assert self._now is not None
        has_started = any(attempt.started is not None for attempt in self.attempts)
        self.parts["restarting" if has_started else "starting"] += at - self._now
        self._now = at

    def _split(self, seconds: float, counted: Mapping[str, float]) -> dict[str, float]:
        """Seconds of training by part; what is not counted, is steps."""
        parts = {part: max(0.0, counted.get(part, 0.0) - self._counted[part]) for part in COUNTED}
        if (total := sum(parts.values())) > seconds:  # one clock counts, another tells the time
            parts = {part: value * (seconds / total) for part, value in parts.items()}
        return {"productive": max(0.0, seconds - sum(parts.values())), **parts}

    def _lose(self, *, after: int) -> None:
        """The run goes on from step `after`: what was done beyond it is lost."""
        for attempt in reversed(self.attempts):
            while attempt.kept:
                stretch = attempt.kept[-1]
                if stretch.last <= after:
                    return
                attempt.kept.pop()
                within = stretch.first < after
                share = (stretch.last - after) / (stretch.last - stretch.first) if within else 1.0
                middle = stretch.until - share * (stretch.until - stretch.since) if within else stretch.since
                for part, seconds in stretch.seconds.items():
                    moved = min(seconds * share, self.parts[part])
                    self.parts[part] -= moved
                    self.parts["lost"] += moved
                attempt.lose(middle, stretch.until)
                if within:
                    left = {part: seconds * (1 - share) for part, seconds in stretch.seconds.items()}
                    attempt.kept.append(Stretch(stretch.since, middle, stretch.first, after, left))
                    return


def table(ledger: Ledger) -> str:
    """The parts that there are, and their shares."""
    if not ledger.wall_s:
        return "goodput –: the journal tells of no time yet"
    lines = [f"goodput {ledger.goodput:.1%} of {ledger.wall_s:,.1f} s"]
    for part, seconds in ledger.parts.items():
        if seconds:
            lines.append(f"  {part:<11}{seconds:>14,.1f} s{seconds / ledger.wall_s:>8.1%}")
    return "\n".join(lines)


class Accounts:
    """Keeps a run's accounts while it trains: on rank 0, from its `start` on."""

    def __init__(self, directory: RunDirectory, counted: Mapping[str, float]) -> None:
        """`counted`: seconds of this attempt by part, which somebody else adds up."""
        self._directory, self._counted = directory, counted
        self._ledger = self._read()

    def write(self, step: int) -> None:
        """Put an account into the journal; a disk that does not take it, loses it."""
        with suppress(OSError):
            self._directory.record("account", step=step, counted=dict(self._counted))
            self._ledger = self._read()

    def record(self) -> Record:
        """The log line's field, on rank 0."""
        if self._ledger is None:
            return {}
        return {"perf/goodput": self._ledger.goodput_at(time.time(), self._counted)}

    def end(self, step: int) -> None:
        """The last account of this attempt, and the parts into journal and log."""
        self.write(step)
        if self._ledger is None or self._found_it_done():
            return
        with suppress(OSError):
            self._directory.record("goodput", step=step, goodput=self._ledger.goodput, parts_s=self._ledger.parts)
        log.info(table(self._ledger))

    def _found_it_done(self) -> bool:
        attempts = self._ledger.attempts if self._ledger is not None else []
        return bool(attempts) and attempts[-1].after_done and attempts[-1].to_step == attempts[-1].from_step

    def _read(self) -> Ledger | None:
        return Ledger(self._directory.events(*EVENTS)) if self._directory.leads else None
