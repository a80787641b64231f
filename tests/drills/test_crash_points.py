"""Killed at every call that changes the run directory, and at random: what was saved is there, and the run ends as if
nothing had been.

A killed process loses nothing that a call has handed to the system; what a machine without power loses is not tried.
"""

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.drills.conftest import Undisturbed
from tests.drills.forks import Fault, Forks
from tests.drills.plugin import Drills
from tests.drills.runs import config_for, in_turn, lost_for_good, lost_on_disk

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


def survive(
    forks: Forks, point: Point, *, ranks: int, sources: dict[str, Path], reference: Path, tmp_path: Path
) -> str | None:
    """Let it happen; what is lost, if anything."""
    run_dir, log = tmp_path / str(point.number), tmp_path / f"{point.number}.log"
    config = config_for(run_dir, sources, asynchronous=point.asynchronous)
    for fault in (point.fault, point.again):
        if fault is not None:
            end = forks.run(config, fault, log, ranks=ranks)[fault.rank]
            # beside training the order of calls is not always the same: the last may not come
            if end.status not in (-signal.SIGKILL, 0):
                return f"it ended with {end.status}: {end.said[-1500:]}"
            if loss := lost_on_disk(run_dir):
                return loss
    return lost_for_good(forks, config, reference, log, ranks=ranks)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_killed_at_any_call(
    ranks: int,
    forks: list[Forks],
    undisturbed: Callable[[int], Undisturbed],
    sources: dict[str, Path],
    drills: Drills,
    tmp_path: Path,
) -> None:
    whole = undisturbed(ranks)
    points = drills.pick(crash_points(whole), sample={1: 28, 2: 12}[ranks])

    def one(server: Forks, point: Point) -> str | None:
        return survive(server, point, ranks=ranks, sources=sources, reference=whole.run_dir, tmp_path=tmp_path)

    losses = in_turn(forks, points, one)
    where = "" if ranks == 1 else ", one of two ranks"
    drills.report(f"SIGKILL at a system call of a run that saves{where}", PROMISE, times=len(points), losses=losses)


def test_killed_at_any_call_and_again_while_it_starts_again(
    forks: list[Forks],
    undisturbed: Callable[[int], Undisturbed],
    sources: dict[str, Path],
    drills: Drills,
    tmp_path: Path,
) -> None:
    whole, rng = undisturbed(1), random.Random(drills.seed)
    calls = len(whole.calls[0])

    def drawn(last: int) -> Fault:
        return Fault(rng.choice(["kill", "torn"]), first=rng.randint(1, last))

    points = [Point(n, bool(n % 2), drawn(calls), drawn(60)) for n in range(60 if drills.full else 4)]

    def one(server: Forks, point: Point) -> str | None:
        return survive(server, point, ranks=1, sources=sources, reference=whole.run_dir, tmp_path=tmp_path)

    losses = in_turn(forks, points, one)
    drills.report("the same, and again in the start after it", PROMISE, times=len(points), losses=losses)


def test_killed_at_random(
    forks: list[Forks],
    undisturbed: Callable[[int], Undisturbed],
    sources: dict[str, Path],
    drills: Drills,
    tmp_path: Path,
) -> None:
    whole, rng = undisturbed(1), random.Random(drills.seed)
    points = [
        Point(n, bool(n % 2), Fault(kill_after_s=rng.uniform(0.05, 1.5))) for n in range(100 if drills.full else 4)
    ]

    def one(server: Forks, point: Point) -> str | None:
        return survive(server, point, ranks=1, sources=sources, reference=whole.run_dir, tmp_path=tmp_path)

    losses = in_turn(forks, points, one)
    drills.report("kill -9 at a random moment of a run that saves", PROMISE, times=len(points), losses=losses)
