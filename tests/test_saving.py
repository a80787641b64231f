"""Checkpoints written beside training: what they hold, what training waits for, and what happens when a disk fails."""

import json
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamatrain.arithmetic import save_interval_s, seconds_between_failures
from llamatrain.checkpoint import background, commit, store
from llamatrain.checkpoint.background import Background, Staging
from llamatrain.checkpoint.store import Share
from llamatrain.config import RunConfig
from llamatrain.errors import CheckpointError
from llamatrain.observe.records import MetricsLog
from llamatrain.resilience.control import SAVE_FILE, StopRequest
from llamatrain.session import run
from llamatrain.trainer import Trainer
from tests.small_run import assert_same_run, metrics, saved_steps, small_config, status, train_in_process

ASYNCHRONOUS = [pytest.param(True, id="beside"), pytest.param(False, id="blocking")]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "RETRY_AFTER_S", 0.0)


@pytest.fixture(scope="module")
def unbroken(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = small_config(tmp_path_factory.mktemp("unbroken"), sources, checkpoint={"asynchronous": False})
    train_in_process(config)
    return config


def journal(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["event"] == kind]


def failing(*tries: int, steps: tuple[int, ...] = (8,)) -> Callable[..., None]:
    """`fsync_path` on a disk that is full at these tries of writing these steps, counted from 1."""
    counts: dict[str, int] = {}

    def fsync_path(path: Path, original: Callable[[Path], None] = commit.fsync_path) -> None:
        original(path)
        if path.name.startswith("model.") and path.parent.name.endswith(tuple(f"{step:08d}" for step in steps)):
            counts[path.parent.name] = number = counts.get(path.parent.name, 0) + 1
            if number in tries:
                raise OSError(28, "No space left on device")

    return fsync_path


# ---------------------------------------------------------------------- staging and the thread


def test_what_is_staged_stays_when_the_tensors_change() -> None:
    tensors = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    staging = Staging(torch.device("cpu"))
    staged = staging.copy(Share.of({"model": tensors}))
    for tensor in tensors.values():
        tensor.zero_()
    (kept, offset), *_ = staged.boxes["model"]["w"]
    assert torch.equal(kept, torch.arange(6.0).view(2, 3)) and offset == [0, 0]
    assert staged.entries == Share.of({"model": tensors}).entries
    again = staging.copy(Share.of({"model": tensors}))
    assert again.boxes["model"]["w"][0][0].data_ptr() == kept.data_ptr()  # memory is taken once


def test_an_error_beside_training_is_raised_where_it_is_waited_for() -> None:
    beside = Background(daemon=True)

    def fail() -> None:
        raise CheckpointError("full")

    assert beside.wait() is False
    beside.start(fail)
    with pytest.raises(CheckpointError, match="full"):
        beside.wait()
    beside.start(lambda: None)
    assert beside.wait() is True


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("asynchronous", ASYNCHRONOUS)
def test_how_a_run_saves_does_not_change_what_it_saves(
    asynchronous: bool, unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = small_config(tmp_path, sources, checkpoint={"asynchronous": asynchronous, "every_steps": 2})
    train_in_process(config)
    assert_same_run(unbroken.run_dir, tmp_path, step=12)
    (*_, last) = journal(tmp_path, "checkpoint")
    assert 0 < last["blocked_s"] <= last["seconds"]


def test_training_goes_on_while_a_checkpoint_is_written_which_holds_the_step_it_was_begun_at(
    unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen_step_7, plain_write, plain_step = threading.Event(), store.write, Trainer.train_step

    def write(root: Path, step: int, *args: Any, **others: Any) -> Path:
        assert step != 4 or seen_step_7.wait(timeout=60), "training waits for the checkpoint"
        return plain_write(root, step, *args, **others)

    def train_step(self: Trainer, batch: Any) -> Any:
        if self.step == 7:
            seen_step_7.set()
        return plain_step(self, batch)

    monkeypatch.setattr(store, "write", write)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    train_in_process(small_config(tmp_path, sources, checkpoint={"keep_last": 3}))
    assert_same_run(unbroken.run_dir, tmp_path, step=12)
    monkeypatch.undo()
    blocking = small_config(tmp_path / "blocking", sources, checkpoint={"asynchronous": False, "keep_last": 3})
    train_in_process(blocking)
    assert_same_run(blocking.run_dir, tmp_path, step=4)


@pytest.mark.parametrize("asynchronous", ASYNCHRONOUS)
@pytest.mark.parametrize("tries", [(1,), (1, 2)])
def test_a_write_that_fails_is_tried_again(
    asynchronous: bool,
    tries: tuple[int, ...],
    unbroken: RunConfig,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commit, "fsync_path", failing(*tries))
    train_in_process(small_config(tmp_path, sources, checkpoint={"asynchronous": asynchronous, "retries": 2}))
    assert saved_steps(tmp_path) == [8, 12]
    assert [entry["step"] for entry in journal(tmp_path, "checkpoint failed")] == [8] * len(tries)
    assert_same_run(unbroken.run_dir, tmp_path, step=8)


@pytest.mark.parametrize("asynchronous", ASYNCHRONOUS)
def test_training_goes_on_without_a_checkpoint_that_cannot_be_written(
    asynchronous: bool,
    unbroken: RunConfig,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commit, "fsync_path", failing(1, 2))
    settings = {"asynchronous": asynchronous, "retries": 1, "max_failures": 2}
    train_in_process(small_config(tmp_path, sources, checkpoint=settings))
    assert saved_steps(tmp_path) == [4, 12]
    assert_same_run(unbroken.run_dir, tmp_path, step=12)


@pytest.mark.parametrize("asynchronous", ASYNCHRONOUS)
def test_so_many_failures_in_a_row_stop_the_run(
    asynchronous: bool, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "fsync_path", failing(1, steps=(2, 6, 8)))
    settings = {"asynchronous": asynchronous, "retries": 0, "max_failures": 2, "every_steps": 2}
    with pytest.raises(CheckpointError, match=r"step 8 could not be written.*No space left"):
        train_in_process(small_config(tmp_path, sources, checkpoint=settings))
    assert saved_steps(tmp_path) == [4]
    assert status(tmp_path)["state"] == "unhealthy"


@pytest.mark.parametrize("asynchronous", ASYNCHRONOUS)
def test_the_last_step_is_not_done_unless_it_is_saved(
    asynchronous: bool, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "fsync_path", failing(1, steps=(12,)))
    with pytest.raises(CheckpointError, match="step 12"):
        train_in_process(
            small_config(tmp_path, sources, checkpoint={"asynchronous": asynchronous, "retries": 0, "max_failures": 9})
        )
    assert status(tmp_path)["state"] == "unhealthy"
    monkeypatch.undo()
    train_in_process(small_config(tmp_path, sources))
    assert status(tmp_path)["state"] == "done"


def test_a_stop_during_a_save_saves_the_step_it_stops_at(
    unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, plain = StopRequest(), store.write

    def write(root: Path, step: int, *args: Any, **others: Any) -> Path:
        if step == 4:
            stop.reason = "SIGTERM"
        return plain(root, step, *args, **others)

    monkeypatch.setattr(store, "write", write)
    run(small_config(tmp_path, sources), stop)
    found = status(tmp_path)
    assert found["state"] == "preempted" and saved_steps(tmp_path)[-1] == found["step"] in range(4, 12)
    monkeypatch.undo()
    train_in_process(small_config(tmp_path, sources))
    assert_same_run(unbroken.run_dir, tmp_path, step=12)


def test_a_run_saves_by_the_clock_too(sources: dict[str, Path], tmp_path: Path) -> None:
    config = small_config(tmp_path, sources, checkpoint={"every_steps": 1000, "every_minutes": 1e-9, "keep_last": 20})
    train_in_process(config)
    assert saved_steps(tmp_path) == list(range(1, 13))


def test_the_save_file_goes_when_the_checkpoint_is_there(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / SAVE_FILE).touch()
    train_in_process(small_config(tmp_path, sources, checkpoint={"every_steps": 1000, "keep_last": 20}))
    assert saved_steps(tmp_path) == [1, 12]
    assert not (tmp_path / "control" / SAVE_FILE).exists()


def test_the_best_interval_is_told_from_what_saves_cost(
    sources: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_in_process(small_config(tmp_path, sources, checkpoint={"hours_between_failures": 3.0}))
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "loses least time" in line]
    assert "a failure every 3h00m" in line


# ---------------------------------------------------------------------- records on a full disk


def test_records_that_a_full_disk_does_not_take_are_written_when_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resumed_step=None)
    real = log._file

    class Full:
        name = real.name

        def write(self, content: bytes) -> int:
            if len(content) > 5:
                return real.write(content[:5])  # a write that takes a part
            raise OSError(28, "No space left on device")

    def put(record: Mapping[str, Any], *, full: bool) -> None:
        monkeypatch.setattr(log, "_file", Full() if full else real)
        log.write(dict(record))

    for step in range(1, 7):
        put({"step": step, "value": "x" * step}, full=step in (2, 3, 5))
    log.sync()
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, 7))
    log.close()


# ---------------------------------------------------------------------- Young and Daly


@given(st.floats(1e-2, 1e4), st.floats(60, 1e7))
def test_the_interval_loses_no_more_time_than_others(cost_s: float, failure_s: float) -> None:
    """Expected time for each second of training, failures being exponential: Daly, eq. 20, without restart time."""

    def lost(interval: float) -> float:
        return failure_s * math.expm1(min(700.0, (interval + cost_s) / failure_s)) / interval

    best = save_interval_s(cost_s, failure_s)
    assert best > 0
    if cost_s < failure_s / 2:
        assert all(lost(best) <= lost(best * factor) * 1.002 for factor in (0.5, 0.8, 1.25, 2.0))


def test_failures_are_those_of_llama_3() -> None:
    assert seconds_between_failures(16_384) / 3600 == pytest.approx(3.1, abs=0.05)
