"""How much of a run's time was training that counts: parts of the wall clock, from the run's journal. No torch.

The clock runs from the first launch to the last thing known of the run, but for the time after it was done. Its parts:

    productive   steps whose result the run has kept, so far
    data_wait    those steps waiting for their data (of rank 0)
    validating   validation
    saving       training held up by checkpoints, not what is written beside it
    other        profiling, going back to a checkpoint after a spike
    lost         steps that came to nothing: after the checkpoint from which the run went on
    starting     from the first launch to its first step
    restarting   from the end of an attempt to the first step of the next: nobody at work, or loading

They add up to it, whatever happened, since every moment between two entries is given to one part. The journal has
`launch` and `start` (before the first step) and an end (stop, done, crash, unhealthy), if the process came to write
one; if not, the next launch says when its last heartbeat was. With every checkpoint, and at the end, an `account` says
how long the attempt has waited for data, validated and saved so far; the rest between two accounts is productive until
a later start shows that it is lost. Goodput is the productive part's share.
"""

import copy
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llamatrain.observe.records import Record
from llamatrain.run_directory import BAD_INPUT, CRASH, DONE, UNHEALTHY, RunDirectory

log = logging.getLogger("llamatrain")

PARTS = ("productive", "data_wait", "validating", "saving", "other", "lost", "starting", "restarting")
COUNTED = ("data_wait", "validating", "saving", "other")  # by the process itself, in its accounts
ENDS = ("stop", DONE, CRASH, UNHEALTHY, BAD_INPUT)
EVENTS = ("launch", "start", "account", "rollback", *ENDS)

Entry = Mapping[str, Any]


@dataclass
class Stretch:
    """Training between two accounts; a later start may show that it is lost."""

    first: int  # the last step before it
    last: int | None  # its last step, None if nothing is known of it
    seconds: dict[str, float]  # productive, data_wait


class Ledger:
    """Seconds by part, from the journal's entries fed in their order."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._now: float | None = None  # up to when every moment has its part
        self._idle = "starting"  # the part of a moment without training
        self._training = self._over = False
        self._step = 0
        self._counted = dict.fromkeys(COUNTED, 0.0)  # by this attempt up to now
        self._stretches: list[Stretch] = []
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
        if event not in EVENTS or not isinstance(at, int | float):
            return
        if self._now is None or (self._over and event == "launch"):
            self._now = at  # before the first launch, or after the end
        at = max(at, self._now)  # clocks of two nodes may differ
        if event == "launch":
            if self._training:
                last_sign = entry.get("last_heartbeat") or self._now
                self._train(min(max(last_sign, self._now), at), step=None)
            self._pass(at)
        elif event == "start":
            self._pass(at)
            self._idle = "restarting"
            self._lose(after=entry.get("resumed_from") or 0)
            self._step = entry.get("step", 0)
            self._counted = dict.fromkeys(COUNTED, 0.0)
        elif self._training:
            self._train(at, step=entry.get("step"), counted=entry.get("counted"))
            if event == "rollback":
                self._step = entry.get("to_step", 0)
                self._lose(after=self._step)
        else:
            self._pass(at)
        self._training = event == "start" or (self._training and event in ("account", "rollback"))
        self._over = event == DONE

    def until(self, entry: Entry) -> "Ledger":
        """The ledger with one more entry; this one stays as it is."""
        later = copy.copy(self)
        later.parts, later._counted = dict(self.parts), dict(self._counted)
        later._stretches = list(self._stretches)
        later.feed(entry)
        return later

    def _pass(self, at: float) -> None:
        """Time without training."""
        assert self._now is not None
        self.parts[self._idle] += at - self._now
        self._now = at

    def _train(self, at: float, *, step: int | None, counted: Mapping[str, float] | None = None) -> None:
        """Time of training up to `step`; without an account of it, all of it is steps."""
        assert self._now is not None
        seconds, self._now = at - self._now, at
        more = dict.fromkeys(COUNTED, 0.0)
        if counted is not None:
            more = {part: max(0.0, counted.get(part, 0.0) - self._counted[part]) for part in COUNTED}
            self._counted = {part: self._counted[part] + more[part] for part in COUNTED}
        if (total := sum(more.values())) > seconds:  # one clock counts, another tells the time
            more = {part: value * (seconds / total) for part, value in more.items()}
        more["productive"] = max(0.0, seconds - sum(more.values()))
        for part, value in more.items():
            self.parts[part] += value
        kept = {part: more[part] for part in ("productive", "data_wait")}
        self._stretches.append(Stretch(self._step, step, kept))
        if step is not None:
            self._step = step

    def _lose(self, *, after: int) -> None:
        """The run goes on from step `after`: what was trained beyond it is lost."""
        while self._stretches:
            stretch = self._stretches[-1]
            if stretch.last is not None and stretch.last <= after:
                return
            within = stretch.last is not None and stretch.first < after
            share = (stretch.last - after) / (stretch.last - stretch.first) if within and stretch.last else 1.0
            for part, seconds in stretch.seconds.items():
                moved = min(seconds * share, self.parts[part])
                self.parts[part] -= moved
                self.parts["lost"] += moved
            self._stretches.pop()
            if within:
                left = {part: seconds * (1 - share) for part, seconds in stretch.seconds.items()}
                self._stretches.append(Stretch(stretch.first, after, left))
                return


def table(ledger: Ledger) -> str:
    """The parts that there are, and their shares."""
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

    def record(self, step: int) -> Record:
        """The log line's field, on rank 0."""
        if self._ledger is None:
            return {}
        now = {"event": "account", "time": time.time(), "step": step, "counted": self._counted}
        return {"perf/goodput": self._ledger.until(now).goodput}

    def end(self, step: int) -> None:
        """The last account of this attempt, and the parts into journal and log."""
        self.write(step)
        if self._ledger is None:
            return
        with suppress(OSError):
            self._directory.record("goodput", step=step, goodput=self._ledger.goodput, parts_s=self._ledger.parts)
        log.info(table(self._ledger))

    def _read(self) -> Ledger | None:
        return Ledger(self._directory.events(*EVENTS)) if self._directory.leads else None
