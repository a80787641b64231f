"""The slow rank is found and named; where nobody is slow, nobody is named for long."""

import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from llamatrain.config import RunConfig
from llamatrain.data.loader import Batch
from llamatrain.distributed import World
from llamatrain.model.llama import Attention
from llamatrain.observe.stragglers import PATIENCE, TELL_EVERY, Judge
from llamatrain.trainer import Trainer
from tests.ranks import on_ranks
from tests.small_run import metrics, small_config, trainer_for

SLEEP_S = 0.05
NODES = ["n0", "n0", "n1", "n1"]


def test_the_record_names_the_slowest_rank_and_its_node() -> None:
    fields = Judge(NODES, 1.3).record([(10.0, 1.0), (11.0, 5.0), (30.0, 0.0), (9.0, 0.5)])
    assert fields == {
        "perf/compute_ms_min": 9.0,
        "perf/compute_ms_mean": 15.0,
        "perf/compute_ms_max": 30.0,
        "perf/slowest_rank": 2,
        "perf/slowest_node": "n1",
        "perf/data_wait_ms_max": 5.0,
        "perf/data_wait_slowest_rank": 1,
    }


def test_ranks_without_a_number_yet_are_left_out() -> None:
    none = float("nan")
    assert Judge(NODES, 1.3).record([(none, none)] * 4) == {}
    fields = Judge(NODES, 1.3).record([(none, 1.0), (4.0, none), (none, none), (none, none)])
    assert (fields["perf/slowest_rank"], fields["perf/data_wait_slowest_rank"]) == (1, 0)


@pytest.mark.parametrize(
    ("times", "factor", "warned"),
    [
        ([10, 10, 30, 10], 1.3, 1),
        ([10, 30], 1.3, 1),
        ([10, 10, 12, 10], 1.3, 0),
        ([1, 1, 2, 1], 1.3, 0),  # too little to be more than noise
        ([10, 10, 30, 10], 0, 0),
    ],
)
def test_who_is_slow_for_long_is_told_once_in_a_while(
    times: list[float], factor: float, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    judge = Judge(NODES, factor)
    sent = [(ms, 0.0) for ms in times]
    for _ in range(PATIENCE - 1):
        judge.record(sent)
    assert caplog.records == []
    for _ in range(TELL_EVERY):
        judge.record(sent)
    assert len(caplog.records) == warned
    judge.record(sent)
    assert len(caplog.records) == 2 * warned
    if warned:
        assert f"rank {times.index(30)} on {NODES[times.index(30)]} is slow: 30.0 ms" in caplog.text


def test_who_is_slow_now_and_then_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    judge = Judge(NODES, 1.3)
    for step in range(10 * PATIENCE):
        judge.record([(30.0 if rank == step % 4 else 10.0, 0.0) for rank in range(4)])
    assert caplog.records == []


def train_with_a_slow_rank(world: World, config: RunConfig) -> None:
    """Rank 1 sleeps once a step: at its beginning in steps 1 to 4, in a block from 5 to 8, not in 9 to 12."""
    attend, train_step = Attention.forward, Trainer.train_step
    asleep = []

    def sleepy_step(self: Trainer, batch: Batch) -> Any:
        if self.step < 4:
            time.sleep(SLEEP_S)
        elif self.step < 8:
            asleep.append(self.step)
        return train_step(self, batch)

    def sleepy_attention(self: Attention, *args: Any, **kwargs: Any) -> Any:
        if asleep:
            asleep.clear()
            time.sleep(SLEEP_S)
        return attend(self, *args, **kwargs)

    if world.rank == 1:
        Trainer.train_step, Attention.forward = sleepy_step, sleepy_attention  # type: ignore[method-assign]
    with ExitStack() as resources:
        trainer_for(config, resources, world).fit()


@pytest.mark.parametrize(
    "parallel",
    [{}, *(pytest.param(layout, marks=pytest.mark.slow) for layout in ({"dp_replicate": 2}, {"pp": 2}, {"tp": 2}))],
    ids=str,
)
@pytest.mark.drill("a rank sleeps, outside and inside its blocks", "it is the slowest in the metrics", always=True)
def test_a_rank_that_sleeps_is_the_slowest_wherever_it_sleeps(
    parallel: dict[str, int], sources: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"train": {"micro_batch": 2}, "logging": {"every_steps": 4}, "parallel": parallel}
    settings |= {"evaluation": {"every_steps": 0}, "checkpoint": {"every_steps": 12}}
    config = small_config(tmp_path, sources, **settings)
    on_ranks(2, train_with_a_slow_rank, config)
    outside, inside, awake = metrics(tmp_path)  # a log line has the steps up to the one before it
    sleep_ms = 1e3 * SLEEP_S
    assert outside["perf/slowest_rank"] == 1
    assert outside["perf/slowest_node"] == socket.gethostname()
    assert outside["perf/compute_ms_max"] - outside["perf/compute_ms_min"] > 0.8 * sleep_ms
    assert inside["perf/compute_ms_max"] > 0.8 * sleep_ms
    if "tp" not in parallel:  # there the other rank waits within the block
        assert inside["perf/slowest_rank"] == 1
        assert inside["perf/compute_ms_max"] - inside["perf/compute_ms_min"] > 0.8 * sleep_ms
    assert awake["perf/compute_ms_max"] - awake["perf/compute_ms_min"] < 0.8 * sleep_ms
    assert awake["perf/data_wait_ms_max"] >= 0


def test_alone_nobody_is_slow(sources: dict[str, Path], tmp_path: Path) -> None:
    config = small_config(tmp_path, sources, train={"steps": 2}, evaluation={"every_steps": 0})
    with ExitStack() as resources:
        trainer = trainer_for(config, resources)
        trainer.fit()
        assert trainer.stragglers._wait_ms == []  # what nobody would take is not kept
    assert not any(key.startswith(("perf/compute", "perf/slowest")) for key in metrics(tmp_path)[-1])
