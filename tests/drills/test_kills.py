"""kill -9 of one rank after the other of a run under torchrun, which starts all of them again: the end is the
undisturbed run's, bit for bit.

In one process alone, and inside its saves: tests/faults/test_kill.py.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.test_torchrun import SHAPE, finish, start, step_reached, wait_for, workers
from tests.drills.plugin import Drills
from tests.small_run import assert_same_run, status

pytestmark = [pytest.mark.drill, pytest.mark.timeout(7200)]

STEPS_A_KILL = 12  # of which a half is done before it, on average: a save at every fifth step
GUARDS = ["resilience.preflight=false", "train.max_starts_without_progress=1000"]


def killed(launcher: subprocess.Popen[str], run_dir: Path, rank: int, rng: random.Random, *, before_step: int) -> None:
    """Kill the rank at some step before that one, or one time in four while it starts; wait until all are gone."""
    wait_for(lambda: rank in workers(launcher), launcher)
    reached = step_reached(run_dir)
    if rng.random() < 0.25:
        starts_for = time.monotonic() + rng.uniform(0, 8)
        wait_for(lambda: time.monotonic() > starts_for or step_reached(run_dir) > reached, launcher)
    else:
        target = rng.randint(reached + 1, max(reached + 1, before_step))
        wait_for(lambda: step_reached(run_dir) >= target, launcher)
        time.sleep(rng.uniform(0, 0.02))
    before = workers(launcher)
    os.kill(before[rank], signal.SIGKILL)
    wait_for(lambda: not set(workers(launcher).values()) & set(before.values()), launcher)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_killed_one_after_the_other(ranks: int, sources: dict[str, Path], drills: Drills, tmp_path: Path) -> None:
    if ranks == 4 and not drills.full:
        pytest.skip("in the full drills: four processes on two cores take their time")
    kills, rng = (50 if drills.full else 8), random.Random(drills.seed)
    steps = (kills + 4) * STEPS_A_KILL
    shape = [*SHAPE, *GUARDS, f"data.sources.lines.path={sources['lines']}", f"train.steps={steps}"]
    shape += ["train.global_batch_tokens=256", "train.micro_batch=1"]
    exit_status, _, err = finish(start([*shape, f"run_dir={tmp_path}/whole"], ranks=ranks), patience_s=2 * steps)
    assert exit_status == 0, err
    order = [rank for _ in range(kills // ranks + 1) for rank in rng.sample(range(ranks), ranks)]
    with open(tmp_path / "said", "w") as said:  # more than a pipe holds
        launcher = start([*shape, f"run_dir={tmp_path}/killed"], ranks=ranks, restarts=kills + 1, output=said)
        try:
            for number, rank in enumerate(order[:kills], start=1):
                killed(launcher, tmp_path / "killed", rank, rng, before_step=number * STEPS_A_KILL)
            exit_status, _, _ = finish(launcher, patience_s=2 * steps)
        finally:
            launcher.kill()  # if it has not come to its end
    losses = []
    try:
        assert exit_status == 0, (tmp_path / "said").read_text()[-5000:]
        assert status(tmp_path / "killed")["state"] == "done"
        assert_same_run(tmp_path / "whole", tmp_path / "killed", step=steps)
        attempts = [json.loads(line) for line in (tmp_path / "killed" / "journal.jsonl").read_text().splitlines()]
        assert len({event["attempt"] for event in attempts}) == 1
    except AssertionError as error:
        losses.append(str(error))
    drills.report(
        f"kill -9 of each of {ranks} ranks in turn, at random steps of one run under torchrun",
        "it ends by itself, bitwise like the undisturbed run",
        times=kills,
        losses=losses,
    )
