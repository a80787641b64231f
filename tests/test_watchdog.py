"""What happens to a rank that comes no further, and whom of many the watchdog names."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from llamatrain.resilience.hang import LastSign, Report, add_stacks, judge, own_line, threads_of
from llamatrain.resilience.pulse import Beat
from llamatrain.resilience.watchman import Clock

REPOSITORY = Path(__file__).parents[1]
LIMIT_S = 0.6

RANK = """
import ctypes, os, signal, sys, time
from pathlib import Path
from llamatrain.config import ResilienceConfig
from llamatrain.process import Process
from llamatrain.resilience.watchdog import Watchdog

def stand_still(how):
    if how == "asleep":
        time.sleep(60)
    elif how == "holding Python's lock":
        ctypes.PyDLL(None).sleep(60)
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "long saving":
        watchdog.beat(7, "saving")
        with open(os.devnull, "wb", buffering=0) as file:
            for _ in range(30):
                time.sleep(limit_s / 10)
                file.write(bytes(2**20))

run_dir, how, limit_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
settings = ResilienceConfig(hang_timeout_s=limit_s, hang_timeout_at_start_s=60)
with Watchdog(settings, run_dir, Process(), hang="hang-now", attempt="first") as watchdog:
    print(watchdog._watchman.pid, flush=True)
    watchdog.beat(0, "starting")
    watchdog.beat(0, "training")
    for step in range(1, 8):
        time.sleep(limit_s / 8)
        watchdog.beat(step, "training")
    stand_still(how)
"""


def start(run_dir: Path, how: str, *, taken: str | None = None) -> subprocess.Popen[str]:
    """A rank that comes to a standstill; `taken`: a name in its run directory that no folder can have."""
    run_dir.mkdir()
    if taken is not None:
        (run_dir / taken).touch()
    command = [sys.executable, "-c", RANK, str(run_dir), how, str(LIMIT_S)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True)


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_rank_that_stands_still_is_reported_with_its_line_and_ended(tmp_path: Path) -> None:
    said = {
        "asleep": "is at step 7 (training) for",
        "holding Python's lock": "is at step 7 (training) for",
        "stopped": "stopped from outside (SIGSTOP, or a debugger)",
    }
    ranks = {how: start(tmp_path / how, how) for how in said}
    for how, rank in ranks.items():
        _, err = rank.communicate(timeout=60)
        run_dir = tmp_path / how
        assert rank.returncode == -signal.SIGKILL, err
        status = json.loads((run_dir / "status.json").read_text())
        assert (status["state"], status["step"], status["attempt"]) == ("unhealthy", 7, "first")
        assert f"rank 0 on {status['host']} (pid {rank.pid}) " in status["reason"]
        assert (
            said[how] in status["reason"]
            and "in stand_still" in (run_dir / "hang-now/rank00000.stacks.txt").read_text()
        )
        assert status["reason"] in err
        entry = json.loads((run_dir / "journal.jsonl").read_text())
        assert (entry["event"], entry["reason"]) == ("unhealthy", status["reason"])
        assert json.loads((run_dir / "hang-now" / "conclusion.json").read_text())["guilty"] == [0]


def test_what_the_run_directory_does_not_take_is_told_on_the_console(tmp_path: Path) -> None:
    rank = start(tmp_path / "run", "asleep", taken="hang-now")
    _, err = rank.communicate(timeout=60)
    assert rank.returncode == -signal.SIGKILL
    assert "hang-now cannot be written: rank 0 on " in err and "in stand_still" in err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "unhealthy"


def test_a_run_that_beats_ends_as_ever_and_leaves_nothing_behind(tmp_path: Path) -> None:
    ends = {"not at all": 0, "killed": -signal.SIGKILL, "long saving": 0}
    ranks = {how: start(tmp_path / how, how) for how in ends}
    for how, expected in ends.items():
        out, err = ranks[how].communicate(timeout=60)
        assert (ranks[how].returncode, err) == (expected, "")
        deadline = time.monotonic() + 10
        while exists(int(out)):
            assert time.monotonic() < deadline, "the watchman outlives its rank"
            time.sleep(0.05)
        assert list((tmp_path / how).iterdir()) == []


# ---------------------------------------------------------------------- time


def beat(beats: int, steps_done: int = 0) -> Beat:
    return Beat(beats, steps_done, steps_done, 0.0, "training")


def test_until_two_steps_are_done_the_limit_is_that_of_the_start() -> None:
    clock = Clock(10, 100)
    clock.look(beat(1, 1), 0.1)
    for _ in range(99):
        clock.look(beat(1, 1), 0.5)
    assert not clock.expired and clock.limit_s == 100
    clock.look(beat(2, 2), 0.5)
    assert clock.limit_s > 90  # the second step took 50 s, and the third may take twice as long
    clock.look(beat(3, 3), 0.5)
    assert clock.limit_s == 10


def test_steps_that_take_longer_than_the_limit_do_not_end_the_run() -> None:
    clock = Clock(10, 100)
    for step in range(6):
        for _ in range(60):
            clock.look(beat(step, step), 0.5)
            assert not clock.expired
    for _ in range(100):
        clock.look(beat(5, 5), 0.5)
    assert clock.expired


def test_time_in_which_the_watchman_was_suspended_too_does_not_count() -> None:
    clock = Clock(10, 100)
    clock.look(beat(5, 5), 0.5)
    clock.look(beat(5, 5), 86_400)
    assert not clock.expired
    for _ in range(20):
        clock.look(beat(5, 5), 0.5)
    assert clock.expired


def test_a_limit_of_0_is_none() -> None:
    for clock, steps in ((Clock(0, 1), 5), (Clock(1, 0), 0)):
        for _ in range(1000):
            clock.look(beat(steps, steps), 0.05)
        assert not clock.expired


# ---------------------------------------------------------------------- blame


def reports(ranks: int = 3) -> list[Report]:
    """Of ranks that all wait in the fourth collective of their common group."""
    found = []
    for rank in range(ranks):
        report = Report(rank, f"node{rank}", 100 + rank, 7, "training", 0.0, 12.0, "no progress for 12 s", "S", "")
        report.has_stacks = report.in_collective = True
        report.lines = ["llamatrain/distributed.py:10 in sum"]
        report.collectives = [collective(number, done=number < 4) for number in (2, 3, 4)]
        found.append(report)
    return found


def collective(
    number: int, *, group: str = "0", op: str = "all_reduce", elements: int = 8, done: bool
) -> dict[str, Any]:
    line = "llamatrain/distributed.py:10 in sum"
    return {
        "group": group, "number": number, "op": op, "elements": elements, "dtype": "Float", "done": done, "line": line,
        "beside": False,
    }  # fmt: skip


def test_ranks_in_the_same_place_are_not_blamed() -> None:
    found = judge(reports(), {})
    assert found.guilty == [] and "no rank is behind the others" in found.message


def test_a_rank_that_left_no_report_is_named_with_its_last_sign() -> None:
    found = judge(reports()[:2], {2: LastSign("node2", 102, 6, "saving", 0.0), 3: None})
    assert found.guilty == [2, 3]
    assert "rank 2 gives no sign: it ran on node2 (pid 102), where at " in found.message
    assert "it was at step 6 (saving)" in found.message and "rank 3 gives no sign, and never did" in found.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": "T"}, "stopped from outside"),
        ({"has_stacks": False, "state": "D", "kernel_function": "rpc_wait"}, "(state D in rpc_wait)"),
        ({"collectives": None}, "Python there answers nothing"),
    ],
)
def test_a_rank_that_cannot_answer_is_named(change: dict[str, Any], words: str) -> None:
    found = reports()
    for name, value in change.items():
        setattr(found[1], name, value)
    conclusion = judge(found, {})
    assert conclusion.guilty == [1]
    assert words in conclusion.message and "rank 0 waits in all_reduce of 8 Float" in conclusion.message


def test_the_rank_that_has_not_come_to_where_others_wait_is_named() -> None:
    found = reports()
    found[2].collectives = found[2].collectives[:2] if found[2].collectives else None
    found[2].lines = ["llamatrain/data/loader.py:130 in __next__", "llamatrain/data/shards.py:5 in read"]
    conclusion = judge(found, {})
    assert conclusion.guilty == [2]
    assert (
        "at llamatrain/data/loader.py:130 in __next__ (other threads: llamatrain/data/shards.py:5" in conclusion.message
    )


def test_who_waits_for_another_is_not_the_one_to_blame() -> None:
    """Rank 0 waits for 1 in one group, 1 for 2 in another."""
    found = reports()
    found[0].collectives = [collective(4, done=False)]
    found[1].collectives = [collective(3, done=True), collective(9, group="1", done=False)]
    found[2].collectives = [collective(8, group="1", done=True)]
    assert judge(found, {}).guilty == [2]


def test_a_save_under_way_is_not_to_blame_if_anything_else_is() -> None:
    """The thread that writes is further on rank 0; rank 0 has not come to where the others wait in their step."""
    found = reports()
    beside = [collective(number, group="2", done=number == 1) | {"beside": True} for number in (1, 2)]
    found[0].collectives = [collective(3, done=True), *beside]
    for report in found[1:]:
        assert report.collectives is not None
        report.collectives += beside[:1]
    assert judge(found, {}).guilty == [0]
    found[0].collectives = [collective(4, done=True), *beside]
    for report in found[1:]:
        report.collectives = [collective(4, done=True), *beside[:1]]
    assert judge(found, {}).guilty == [1, 2]


@pytest.mark.parametrize("other", [{"op": "broadcast"}, {"elements": 9}])
def test_the_rank_in_another_collective_is_named(other: dict[str, Any]) -> None:
    found = reports()
    assert found[1].collectives is not None
    found[1].collectives[-1] |= other
    conclusion = judge(found, {})
    assert conclusion.guilty == [1]
    assert "where each has number 4 of group 0: rank 1 in " in conclusion.message
    assert "ranks 0, 2 in all_reduce of 8 Float at llamatrain/distributed.py:10 in sum" in conclusion.message
    assert judge(found[:2], {}).guilty == [0, 1]  # of two, neither can be told


def test_without_a_recorder_the_stack_tells_who_does_not_wait() -> None:
    found = reports()
    for report in found:
        report.collectives = []
    found[0].in_collective = False
    assert judge(found, {}).guilty == [0]
    found[1].step = 6
    assert judge(found, {}).guilty == [1]


# ---------------------------------------------------------------------- stacks


def test_stacks_are_read_as_faulthandler_writes_them() -> None:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        text = file.read().decode()
    main = threads_of(text)[0]
    assert any(name == "test_stacks_are_read_as_faulthandler_writes_them" for _, _, name in main)
    report = reports(1)[0]
    add_stacks(report, text)
    assert report.lines[0].startswith("tests/test_watchdog.py:") and not report.in_collective


def test_the_own_line_is_neither_pythons_nor_a_packages() -> None:
    python = (os.__file__, 1, "read")
    torch = ("/home/me/llamatrain/.venv/lib/python3.11/site-packages/torch/distributed/c10d.py", 2, "all_reduce")
    ours = (str(REPOSITORY / "llamatrain" / "trainer.py"), 3, "fit")
    installed = ("/usr/lib/python3/dist-packages/llamatrain/trainer.py", 4, "fit")
    theirs = ("/home/me/scripts/mine.py", 5, "main")
    assert own_line([python, torch, ours, theirs]) == "llamatrain/trainer.py:3 in fit"
    assert own_line([torch, installed]) == "llamatrain/trainer.py:4 in fit"
    assert own_line([python, theirs]) == "scripts/mine.py:5 in main"
    assert own_line([python, torch]) == ""
