"""Profiles of several ranks, and the overlap rule by rates measured between them."""

import json
import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llamatrain.config import LoggingConfig, RunConfig
from llamatrain.distributed import World
from llamatrain.observe.profiler import LABELS, Profiler
from llamatrain.parallel import overlap
from tests.ranks import on_ranks
from tests.small_run import metrics, reproducible, small_config, trainer_for

SLEEP_S = 0.1


def loop(world: World, directory: Path, traces: str) -> None:
    """Four steps of which two are profiled; rank 1 is late before every collective."""
    settings = LoggingConfig(profile_steps=2, profile_after_steps=2, profile_traces=traces)
    with Profiler(
        settings, directory, step=0, world=world, device=torch.device("cpu"), pause=lambda seconds: None
    ) as profiler:
        for step, batch in enumerate(profiler.watched(iter([torch.ones(64)] * 9)), start=1):
            if world.rank == 1:
                time.sleep(SLEEP_S)
            dist.all_reduce(batch)
            if step == 4:
                return


def train(world: World, config: RunConfig) -> None:
    with ExitStack() as resources:
        trainer_for(config, resources, world).fit()


def ranks_of(directory: Path) -> list[dict[str, Any]]:
    (summary,) = directory.glob("profile/*/summary.json")
    ranks: list[dict[str, Any]] = json.loads(summary.read_text())["ranks"]
    return ranks


@pytest.mark.parametrize("traces", ["rank0", "all"])
def test_a_late_rank_is_a_host_gap_there_and_exposed_communication_elsewhere(traces: str, tmp_path: Path) -> None:
    on_ranks(2, loop, tmp_path, traces)
    prompt, late = ranks_of(tmp_path)
    assert prompt["exposed_communication_s"] > late["exposed_communication_s"] + SLEEP_S  # of two steps' two
    assert late["host_gaps_s"] > prompt["host_gaps_s"] + SLEEP_S
    assert len(list(tmp_path.glob("profile/*/rank*.json.gz"))) == (2 if traces == "all" else 1)


def test_training_on_two_ranks_profiles_itself_and_stays_the_same(sources: dict[str, Path], tmp_path: Path) -> None:
    train_settings = {"steps": 4, "micro_batch": 2}
    on_ranks(2, train, small_config(tmp_path / "plain", sources, train=train_settings, optim={"warmup_steps": 2}))
    profiled = small_config(
        tmp_path / "profiled",
        sources,
        train=train_settings,
        optim={"warmup_steps": 2},
        logging={"profile_steps": 2, "profile_after_steps": 1},
    )
    on_ranks(2, train, profiled)
    assert reproducible(metrics(tmp_path / "profiled")) == reproducible(metrics(tmp_path / "plain"))
    for rank in ranks_of(tmp_path / "profiled"):
        parts = [rank[f"{part}_s"] for part in LABELS]
        assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=1e-8)
        assert rank["compute_s"] > 0
        assert rank["exposed_communication_s"] > 0
        assert rank["hidden_communication_s"] == 0


class Lines(logging.Handler):
    """What is logged, as a list."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def told(world: World, config: RunConfig) -> list[str]:
    lines = Lines()
    overlap.log.addHandler(lines)
    overlap.log.setLevel(logging.INFO)
    with ExitStack() as resources:
        trainer = trainer_for(config, resources, world)
        overlap.tell(trainer.config, trainer.parameters, trainer.device, world)
    return lines.lines


def rates_found(world: World, config: RunConfig) -> tuple[overlap.Rates, float]:
    with ExitStack() as resources:
        trainer = trainer_for(config, resources, world)
        mesh = next(iter(trainer.parameters.values())).device_mesh  # type: ignore[attr-defined]
        before = torch.get_rng_state()
        began = time.perf_counter()
        rates = overlap.find_rates(trainer.config, mesh, trainer.device, world)
        seconds = time.perf_counter() - began
        assert torch.equal(torch.get_rng_state(), before)
        return rates, seconds


@pytest.mark.parametrize(
    ("ranks", "parallel", "gather", "all_reduce"),
    [
        (2, {}, "measured over 2 ranks", "nothing is sent"),
        (2, {"bandwidth_gib_s": 3.0}, "as configured", "nothing is sent"),
        (4, {"dp_replicate": 2}, "measured over 2 ranks", "measured over 2 ranks"),
        (4, {"tp": 2}, "measured over 2 ranks", "nothing is sent"),
    ],
)
def test_all_ranks_stand_on_the_same_rates(
    ranks: int, parallel: dict[str, Any], gather: str, all_reduce: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    answers = on_ranks(ranks, rates_found, small_config(tmp_path, sources, train={"micro_batch": 1}, parallel=parallel))
    rates = answers[0][0]
    assert all(other == rates for other, _ in answers)
    assert (rates.gather_told, rates.all_reduce_told) == (gather, all_reduce)
    assert 0 < rates.gather < float("inf")
    assert rates.gather == 3 * 2**30 or "bandwidth_gib_s" not in parallel
    assert max(seconds for _, seconds in answers) < 5  # a fraction of that on a machine with nothing else to do


def test_the_rule_is_told_where_weights_or_gradients_are_sent(sources: dict[str, Path], tmp_path: Path) -> None:
    slow = small_config(tmp_path / "slow", sources, parallel={"bandwidth_gib_s": 1e-6})
    for lines in on_ranks(2, told, slow):
        assert [line.partition(":")[0] for line in lines] == [
            "overlap rule fails in forward and backward",
            "  what helps",
        ]
    fast = small_config(tmp_path / "fast", sources, parallel={"bandwidth_gib_s": 1e6})
    assert [line.partition(":")[0] for line in on_ranks(2, told, fast)[0]] == ["overlap rule holds"]
    for lines in on_ranks(2, told, small_config(tmp_path / "tp", sources, parallel={"tp": 2})):
        assert [line.partition(",")[0] for line in lines] == ["overlap rule: FSDP sends nothing here"]
