"""kill -9 at seeded moments, a quarter and more of them inside a save: nothing is lost, nothing done twice."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from llamatrain.checkpoint.commit import TEMPORARY_PREFIX
from llamatrain.config import RunConfig
from tests.small_run import assert_same_run, metrics, saved_steps, small_config, status, train_in_process

KILLS = 20
KILLS_IN_A_SAVE = 8
MOMENTS = ("saving", "training", "saving", "starting")
PATIENCE_S = 60

# Children are forked from a server that has torch loaded but has not used it: an attempt starts in no time.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.small_run"])


def config_for(run_dir: Path, source: Path) -> RunConfig:
    """400 short steps, a save at every second one that writes 20 MB."""
    return small_config(
        run_dir,
        {"text": source},
        model={"dim": 192, "n_layers": 3, "ffn_multiple_of": 64},
        train={"steps": 400, "global_batch_tokens": 64, "micro_batch": 2},
        checkpoint={"every_steps": 2},
        evaluation={"every_steps": 50, "max_tokens": 100},
    )


def start(config: RunConfig) -> BaseProcess:
    process = processes.Process(target=train_in_process, args=(config,))
    process.start()
    return process


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.is_alive(), f"the run ended by itself with status {process.exitcode}"
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.0005)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"))


def kill_once(config: RunConfig, rng: random.Random, when: str) -> bool:
    """Start the run and kill it, at once or after a few steps; returns whether a save was under way."""
    run_dir = Path(config.run_dir)
    starts = lines(run_dir / "journal.jsonl")
    process = start(config)
    if when == "starting":
        time.sleep(rng.uniform(0.01, 0.4))
    else:
        wait_for(lambda: lines(run_dir / "journal.jsonl") > starts, process)  # it has resumed, its metrics are cut
        reached = lines(run_dir / "metrics.jsonl") + rng.randint(1, 8)
        wait_for(lambda: lines(run_dir / "metrics.jsonl") >= reached, process)
    if when == "saving":
        wait_for(lambda: saving(run_dir), process)
        time.sleep(rng.uniform(0, 0.03))
    elif when == "training":
        time.sleep(rng.uniform(0, 0.1))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return when != "starting" and saving(run_dir)  # a start may find, and not yet have removed, an earlier one's


@pytest.mark.slow
@pytest.mark.timeout(600)  # twenty starts, each of which imports torch
def test_twenty_kills_end_in_the_bits_of_the_undisturbed_run(
    tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"On day {i} the ship sailed {i * 7 % 31} leagues and saw nothing. " * 3 for i in range(200)]
    source = tiny_dataset("text", texts, tmp_path / "data", validation_fraction=0.05)
    undisturbed = start(config_for(tmp_path / "undisturbed", source))
    undisturbed.join()
    assert undisturbed.exitcode == 0

    config = config_for(tmp_path / "killed", source)
    rng = random.Random(20)
    hits = [kill_once(config, rng, MOMENTS[attempt % len(MOMENTS)]) for attempt in range(KILLS)]
    with capsys.disabled():
        print(
            f"\n{KILLS} kills, {sum(hits)} of them inside a save, newest checkpoint {saved_steps(config.run_dir)[-1]}"
        )
    assert sum(hits) >= KILLS_IN_A_SAVE
    last = start(config)
    last.join()
    assert last.exitcode == 0
    assert status(config.run_dir)["state"] == "done"
    assert not saving(Path(config.run_dir))
    assert_same_run(tmp_path / "undisturbed", config.run_dir, step=400)
    steps = [record["step"] for record in metrics(config.run_dir) if "train/loss" in record]
    assert steps == list(range(1, 401))
    attempts = [entry for entry in journal(config.run_dir) if entry["event"] == "start"]
    assert len(attempts) <= KILLS + 1  # those killed early did not come to write theirs


def journal(run_dir: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / "journal.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside_saves_and_leaves_with_status_zero(
    number: signal.Signals, tiny_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    texts = [f"Verse {i} of {i * i}, sung by all. " * 5 for i in range(100)]
    source = tiny_dataset("text", texts, tmp_path / "data", validation_fraction=0.05)
    config = config_for(tmp_path / "run", source)
    process = processes.Process(target=train_with_handlers, args=(config,))
    process.start()
    wait_for(lambda: lines(tmp_path / "run" / "metrics.jsonl") >= 3, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0
    found = status(config.run_dir)
    assert (found["state"], found["reason"]) == ("preempted", number.name)
    assert saved_steps(config.run_dir)[-1] == found["step"]


def train_with_handlers(config: RunConfig) -> None:
    from llamatrain.train import train

    train(config)
