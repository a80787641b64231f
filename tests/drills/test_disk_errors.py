"""A disk that is full or broken, at every call that changes the run directory: training goes on, or ends in order.

In order: exit status 2 or 3, one line that says what was refused, no traceback, a status that does not claim more than
is true; and when the disk is mended, the run goes on and ends as if nothing had been.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llamatrain.run_directory import read_status
from tests.drills.conftest import Undisturbed, Yard
from tests.drills.forks import FOR_EVER, End, Fault, Forks
from tests.drills.runs import STEPS, config_for, lost_for_good, lost_on_disk, noted_steps

pytestmark = [pytest.mark.drill, pytest.mark.timeout(7200)]

PROMISE = (
    "training goes on, or ends in order and says why; checkpoints are whole; mended, the run ends bitwise the same"
)
ERRORS = {"ENOSPC": "No space left on device", "EDQUOT": "Disk quota exceeded", "EIO": "Input/output error"}
SPANS = {1: "once", 20: "for a while", FOR_EVER: "from then on"}
TRIES = {"retries": 1, "max_failures": 2}


@dataclass(frozen=True)
class Point:
    number: int
    asynchronous: bool
    fault: Fault


def error_points(undisturbed: Undisturbed, span: int) -> list[Point]:
    """At every call of every rank, one error after the other, so that each kind of call meets each."""
    calls = [(rank, n) for rank, calls in enumerate(undisturbed.calls) for n in range(1, len(calls) + 1)]
    return [
        Point(2 * i + asynchronous, bool(asynchronous), Fault("fail", n, span, list(ERRORS)[(i + i // 3) % 3], rank))
        for i, (rank, n) in enumerate(calls)
        for asynchronous in (0, 1)
    ]


def disorder(ends: list[End], run_dir: Path) -> str | None:
    """What is wrong with the end of a run whose disk failed."""
    statuses = {end.status for end in ends}
    said = "\n".join(end.said for end in ends)
    told = [line for line in said.splitlines() if line.startswith("error: ")]
    state = (read_status(run_dir) or {}).get("state")
    if "Traceback" in said:
        return f"a traceback: {said[-1500:]}"
    if statuses == {0}:
        return None if state == "done" else f"it ended with 0, the status is {state}"
    if not statuses <= {0, 2, 3}:  # 0 of a rank that was done
        return f"it ended with {statuses}: {said[-1500:]}"
    if len(told) != 1 or not any(text in told[0] for text in ERRORS.values()):
        return f"it does not say what was refused, in one line: {told}"
    return "the status is done, the run is not" if state == "done" and STEPS not in noted_steps(run_dir) else None


@pytest.mark.parametrize("ranks", [pytest.param(1, id="1 rank"), pytest.param(2, id="2 ranks")])
@pytest.mark.parametrize("span", SPANS, ids=SPANS.values())
def test_a_disk_that_refuses(span: int, ranks: int, yard: Yard) -> None:
    whole = yard.undisturbed(ranks)
    points = yard.drills.pick(error_points(whole, span), sample={1: 8, 2: 3}[ranks])

    def loss(forks: Forks, point: Point) -> str | None:
        run_dir, log = yard.place(point.number)
        config = config_for(run_dir, yard.sources, asynchronous=point.asynchronous, checkpoint=TRIES)
        ends = forks.run(config, point.fault, log, ranks=ranks)
        return (
            disorder(ends, run_dir)
            or lost_on_disk(run_dir)
            or lost_for_good(forks, config, whole.run_dir, log, ranks=ranks)
        )

    where = "" if ranks == 1 else ", of one of two ranks"
    yard.drill(f"a call refused {SPANS[span]} (no room, quota, I/O error){where}", PROMISE, points, loss)


def test_writes_that_take_a_part(yard: Yard) -> None:
    whole = yard.undisturbed(1)
    writes = [n for n, call in enumerate(whole.calls[0], start=1) if call.startswith("write ")]
    points = yard.drills.pick([Point(n, bool(n % 2), Fault("short", n)) for n in writes], sample=4)

    def loss(forks: Forks, point: Point) -> str | None:
        run_dir, log = yard.place(point.number)
        config = config_for(run_dir, yard.sources, asynchronous=point.asynchronous)
        (end,) = forks.run(config, point.fault, log)
        ended = f"it ended with {end.status}" if end.status else None
        return ended or lost_for_good(forks, config, whole.run_dir, log)

    yard.drill("a write that takes half of what it is given", "nobody notices", points, loss)


# ---------------------------------------------------------------------- a disk that is really full


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """disk(KiB) is a file system of that size; called again, the same with another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def sized(kib: int) -> Path:
        remount = ["-o", f"remount,size={kib}k"] if os.path.ismount(place) else ["-o", f"size={kib}k"]
        done = subprocess.run(["mount", "-t", "tmpfs", *remount, "tmpfs", str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return place

    yield sized
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_full(yard: Yard, disk: Callable[[int], Path]) -> None:
    whole, forks = yard.undisturbed(1), yard.forks[0]
    room = sum(path.stat().st_size for path in whole.run_dir.rglob("*") if path.is_file()) // 1024
    enough, losses, sizes = 8 * room, [], range(8, 2 * room + 100, 24 if yard.drills.full else 240)
    for number, kib in enumerate(sizes):
        run_dir, (_, log) = disk(kib) / str(number), yard.place(number)
        config = config_for(run_dir, yard.sources, asynchronous=bool(number % 2), checkpoint=TRIES)
        loss = disorder(forks.run(config, Fault(), log), run_dir) or lost_on_disk(run_dir)
        disk(enough)
        loss = loss or lost_for_good(forks, config, whole.run_dir, log)
        losses += [f"{kib} KiB: {loss}"] if loss else []
        subprocess.run(["rm", "-rf", str(run_dir)], check=True)
    yard.drills.report("a file system of so many sizes that is full", PROMISE, times=len(sizes), losses=losses)
