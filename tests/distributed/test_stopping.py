"""Requests to stop and to save on several processes: one step for all, one whole checkpoint, a bitwise resumption."""

import errno
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from llamatrain.checkpoint import commit, store
from llamatrain.config import RunConfig
from llamatrain.distributed import World
from llamatrain.errors import UnhealthyRun
from llamatrain.observe.rank_log import RankLog
from llamatrain.resilience.control import StopRequest
from llamatrain.run_directory import RunDirectory
from llamatrain.session import run_on
from llamatrain.trainer import Trainer
from tests.ranks import on_ranks
from tests.small_run import assert_same_run, saved_steps, small_config, status

RANKS = 2


def train(world: World, config: RunConfig, act: Callable[..., None] | None = None, *details: Any) -> None:
    """A run on ranks that have met; `act(world, *details)` plants what is to happen to it."""
    stop = StopRequest(announce=False)
    stop.install()
    if act is not None:
        act(world, *details)
    run_on(world, config, stop)


def config_for(run_dir: Path, sources: dict[str, Path], **groups: dict[str, Any]) -> RunConfig:
    return small_config(run_dir, sources, **{"train": {"micro_batch": 2}, "data": {"document_mask": True}, **groups})


@pytest.fixture(scope="module")
def unbroken(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = config_for(tmp_path_factory.mktemp("unbroken"), sources)
    on_ranks(RANKS, train, config)
    return config


def before(method: str, owner: type, act: Callable[[Any], None]) -> None:
    """Have `act(self)` called before every call of a method, in this process."""
    original = getattr(owner, method)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        act(self)
        return original(self, *args, **kwargs)

    setattr(owner, method, wrapped)


def signal_at(world: World, moment: str, number: signal.Signals, ranks: list[int], times: int) -> None:
    def send() -> None:
        for _ in range(times if world.rank in ranks else 0):
            signal.raise_signal(number)

    if moment == "before the first step":
        send()
    elif moment == "during step 5":
        before("train_step", Trainer, lambda trainer: send() if trainer.step == 4 else None)
    elif moment == "during the save of step 4":
        original = store._write

        def write(directory: Path, *args: Any) -> Any:
            if directory.name.endswith("step-00000004"):
                send()
            return original(directory, *args)

        store._write = write
    else:
        raise ValueError(moment)


@pytest.mark.parametrize(
    ("moment", "number", "ranks", "times", "step"),
    [
        ("before the first step", signal.SIGTERM, [1], 1, 1),
        ("before the first step", signal.SIGUSR1, [0, 1], 2, 1),
        ("during step 5", signal.SIGTERM, [1], 1, 6),
        ("during step 5", signal.SIGUSR1, [0, 1], 1, 6),
        ("during step 5", signal.SIGINT, [0, 1], 2, 6),  # torchrun hands on a Ctrl-C that all had already
        ("during the save of step 4", signal.SIGTERM, [0], 1, 6),
        ("during the save of step 4", signal.SIGUSR1, [1], 2, 6),
    ],
)
def test_a_signal_saves_once_at_a_common_step_and_the_rest_is_bitwise(
    moment: str,
    number: signal.Signals,
    ranks: list[int],
    times: int,
    step: int,
    unbroken: RunConfig,
    sources: dict[str, Path],
    tmp_path: Path,
) -> None:
    config = config_for(tmp_path, sources)
    on_ranks(RANKS, train, config, signal_at, moment, number, ranks, times)
    found = status(tmp_path)
    assert (found["state"], found["step"], found["reason"]) == ("preempted", step, number.name)
    assert saved_steps(tmp_path) == ([4, step] if step > 4 else [step])
    store.open_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}")
    assert not list((tmp_path / "checkpoints").glob(".*"))
    on_ranks(RANKS, train, config)
    assert status(tmp_path)["state"] == "done"
    assert_same_run(unbroken.run_dir, tmp_path, step=12)


def ask_at(world: World, name: str, step: int) -> None:
    """Put control/<name> there before a step, as somebody at a keyboard would."""
    if world.leads:

        def ask(trainer: Trainer) -> None:
            if trainer.step == step - 1:
                (trainer.directory.path / "control" / name).touch()
                trainer.agreement._looked_at = -1e9  # as if the last look was long ago

        before("train_step", Trainer, ask)


def test_a_stop_file_is_honoured_and_removed(unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path) -> None:
    config = config_for(tmp_path, sources)
    on_ranks(RANKS, train, config, ask_at, "stop", 2)
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == ("preempted", "control/stop")
    assert saved_steps(tmp_path) == [3]
    assert not (tmp_path / "control" / "stop").exists()
    on_ranks(RANKS, train, config)
    assert_same_run(unbroken.run_dir, tmp_path, step=12)


def test_a_stop_file_from_before_the_start_is_honoured_after_step_1(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "stop").touch()
    on_ranks(RANKS, train, config_for(tmp_path, sources))
    assert (status(tmp_path)["state"], saved_steps(tmp_path)) == ("preempted", [1])


def test_a_save_file_saves_once_and_the_run_goes_on(
    unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = config_for(tmp_path, sources, checkpoint={"keep_last": 9})
    on_ranks(RANKS, train, config, ask_at, "save", 5)
    assert saved_steps(tmp_path) == [4, 6, 8, 12]
    assert not (tmp_path / "control" / "save").exists()
    assert status(tmp_path)["state"] == "done"
    assert_same_run(unbroken.run_dir, tmp_path, step=12)


def test_a_save_file_at_the_last_steps_is_honoured_by_the_last_save(sources: dict[str, Path], tmp_path: Path) -> None:
    on_ranks(RANKS, train, config_for(tmp_path, sources), ask_at, "save", 12)
    assert saved_steps(tmp_path) == [8, 12]
    assert not (tmp_path / "control" / "save").exists()


def test_slow_pruning_does_not_end_the_run(sources: dict[str, Path], tmp_path: Path) -> None:
    on_ranks(RANKS, train_with_slow_pruning, config_for(tmp_path, sources))
    assert status(tmp_path)["state"] == "done"


def train_with_slow_pruning(world: World, config: RunConfig) -> None:
    """Deleting takes longer than a collective of a step may."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    prune = commit.prune

    def slowly(root: Path, **kwargs: Any) -> Any:
        time.sleep(2)
        return prune(root, **kwargs)

    commit.prune = slowly
    train(world, config)


def test_a_stop_breaks_validation_off_on_all_ranks(
    unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = config_for(tmp_path, sources)
    on_ranks(RANKS, train, config, signal_while_validating)
    assert (status(tmp_path)["state"], saved_steps(tmp_path)) == ("preempted", [4, 6])
    on_ranks(RANKS, train, config)
    assert_same_run(unbroken.run_dir, tmp_path, step=12)


def signal_while_validating(world: World) -> None:
    def send(trainer: Trainer) -> None:
        if trainer.step == 6 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before("_keep_validating", Trainer, send)


def test_a_failure_of_one_rank_is_in_the_status_and_in_its_log(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises((ZeroDivisionError, SystemExit)):  # of the rank that failed, of the one that noticed
        on_ranks(RANKS, train, config_for(tmp_path, sources), fail_on_rank_1)
    found = status(tmp_path)
    assert found["state"] == "running"
    assert found["reason"].startswith("rank 1 on ") and "ZeroDivisionError: planted" in found["reason"]
    assert "planted" in (tmp_path / "logs" / "rank00001.log").read_text()


def fail_on_rank_1(world: World) -> None:
    def fail(trainer: Trainer) -> None:
        if world.rank == 1 and trainer.step == 2:
            raise ZeroDivisionError("planted")

    before("train_step", Trainer, fail)


def test_starts_that_come_to_nothing_end_as_unhealthy_until_somebody_starts_anew(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    directory = RunDirectory(tmp_path)
    for _ in range(3):
        directory.record("launch")
    directory.close()
    config = config_for(tmp_path, sources, train={"max_starts_without_progress": 3, "micro_batch": 2})
    with pytest.raises((UnhealthyRun, SystemExit)):
        on_ranks(RANKS, train, config)
    assert status(tmp_path)["state"] == "unhealthy"
    assert "3 starts in a row ended without a checkpoint" in status(tmp_path)["reason"]
    on_ranks(RANKS, train, config)
    assert status(tmp_path)["state"] == "done"


def refused_its_log(world: World, config: RunConfig) -> str:
    """Rank 1 has no room for its log file."""
    if world.rank == 1:

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        RankLog.__init__ = full  # type: ignore[method-assign]
    try:
        run_on(world, config, StopRequest(announce=False))
    except UnhealthyRun as error:
        return str(error)
    return ""


def test_a_log_that_one_rank_cannot_open_ends_all_with_the_same_words(sources: dict[str, Path], tmp_path: Path) -> None:
    one, other = on_ranks(2, refused_its_log, config_for(tmp_path / "run", sources))
    assert one == other
    assert "the run's records cannot be written ([Errno 28] No space left on device)" in one
