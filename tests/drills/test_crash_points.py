"""Killed at every call that changes the run directory, and at random: what was saved is there, and the run ends as if
nothing had been.

A killed process loses nothing that a call has handed to the system; what a machine without power loses is not tried.
"""

import random
import signal
from dataclasses import dataclass

import pytest

from tests.drills.conftest import Undisturbed, Yard
from tests.drills.forks import Fault, Forks
from tests.drills.runs import config_for, lost_for_good, lost_on_disk

pytestmark = [pytest.mark.drill, pytest.mark.timeout(7200)]

PROMISE = "every checkpoint there is whole, none noted is gone; the run ends bitwise like the undisturbed one"
LAYOUTS = [pytest.param(1, id="1 rank"), pytest.param(2, id="2 ranks")]


@dataclass(frozen=True)
class Point:
    """A run and what happens to it; `again`: and to its second start."""

    number: int
    asynchronous: bool
    fault: Fault
    again: Fault | None = None

    def __str__(self) -> str:
        twice = f", then {self.again}" if self.again else ""
        return f"{'asynchronous' if self.asynchronous else 'synchronous'}, {self.fault}{twice}"


def crash_points(undisturbed: Undisturbed) -> list[Point]:
    """Before every call of every rank, and in the middle of every write; saving beside training and not."""
    faults = [
        Fault(action, first=number, rank=rank)
        for rank, calls in enumerate(undisturbed.calls)
        for number, call in enumerate(calls, start=1)
        for action in (("kill", "torn") if call.startswith("write ") else ("kill",))
    ]
    both = [(asynchronous, fault) for asynchronous in (False, True) for fault in faults]
    return [Point(number, *point) for number, point in enumerate(both)]


def survive(yard: Yard, forks: Forks, point: Point, whole: Undisturbed, *, ranks: int = 1) -> str | None:
    """Let it happen; what is lost, if anything."""
    run_dir, log = yard.place(point.number)
    config = config_for(run_dir, yard.sources, asynchronous=point.asynchronous)
    for fault in (point.fault, point.again):
        if fault is not None:
            end = forks.run(config, fault, log, ranks=ranks)[fault.rank]
            # beside training the order of calls is not always the same: the last may not come
            if end.status not in (-signal.SIGKILL, 0):
                return f"it ended with {end.status}: {end.said[-1500:]}"
            if loss := lost_on_disk(run_dir):
                return loss
    return lost_for_good(forks, config, whole.run_dir, log, ranks=ranks)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_killed_at_any_call(ranks: int, yard: Yard) -> None:
    whole = yard.undisturbed(ranks)
    points = yard.drills.pick(crash_points(whole), sample={1: 28, 2: 12}[ranks])
    where = "" if ranks == 1 else ", one of two ranks"
    fault = f"SIGKILL at a system call of a run that saves{where}"
    yard.drill(fault, PROMISE, points, lambda forks, point: survive(yard, forks, point, whole, ranks=ranks))


def test_killed_at_any_call_and_again_while_it_starts_again(yard: Yard) -> None:
    rng, whole = random.Random(yard.drills.seed), yard.undisturbed(1)

    def drawn(last: int) -> Fault:
        return Fault(rng.choice(["kill", "torn"]), first=rng.randint(1, last))

    points = [
        Point(n, bool(n % 2), drawn(len(whole.calls[0])), drawn(60)) for n in range(60 if yard.drills.full else 4)
    ]
    fault = "the same, and again in the start after it"
    yard.drill(fault, PROMISE, points, lambda forks, point: survive(yard, forks, point, whole))


def test_killed_at_random(yard: Yard) -> None:
    rng, whole, times = random.Random(yard.drills.seed), yard.undisturbed(1), 100 if yard.drills.full else 4
    points = [Point(n, bool(n % 2), Fault(kill_after_s=rng.uniform(0.05, 1.5))) for n in range(times)]
    fault = "kill -9 at a random moment of a run that saves"
    yard.drill(fault, PROMISE, points, lambda forks, point: survive(yard, forks, point, whole))
