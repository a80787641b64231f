"""Resumption on several processes: bitwise on as many as before, within the tolerances on more or fewer."""

import os
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatrain import session
from llamatrain.config import RunConfig
from llamatrain.data.loader import Batch
from llamatrain.distributed import World
from llamatrain.errors import ConfigError
from llamatrain.model import init
from llamatrain.resilience.control import StopRequest
from llamatrain.session import run_on
from llamatrain.trainer import Trainer
from tests.courses import LOSS_TOLERANCE
from tests.ranks import on_ranks
from tests.small_run import GLOBAL_BATCH, assert_same_run, metrics, reproducible, saved_steps, small_config, status

STEPS = 20


def config_for(run_dir: Path, sources: dict[str, Path], **groups: dict[str, Any]) -> RunConfig:
    train = {"steps": STEPS, "micro_batch": 2, **groups.pop("train", {})}
    return small_config(run_dir, sources, train=train, data={"document_mask": True}, **groups)


def train(world: World, config: RunConfig) -> tuple[list[list[int]], int]:
    """(samples of every step on this rank, numbers drawn for initial weights)."""
    samples: list[list[int]] = []
    drawn = 0
    step, generator = Trainer.train_step, init._splitmix64

    def recording(self: Trainer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        samples.append(batch.samples.tolist())
        return step(self, batch)

    def counting(counter: torch.Tensor, key: int) -> torch.Tensor:
        nonlocal drawn
        drawn += counter.numel()
        return generator(counter, key)

    Trainer.train_step, init._splitmix64 = recording, counting  # type: ignore[method-assign]
    try:
        run_on(world, config, StopRequest())
    finally:
        Trainer.train_step, init._splitmix64 = step, generator  # type: ignore[method-assign]
    return samples, drawn


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_resumed_run_is_bitwise_the_unbroken_one(ranks: int, sources: dict[str, Path], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    on_ranks(ranks, train, config_for(whole, sources))
    first = on_ranks(ranks, train, config_for(broken, sources, train={"stop_after_step": 7}))
    second = on_ranks(ranks, train, config_for(broken, sources))
    assert_same_run(whole, broken, step=STEPS)
    assert all(drawn > 0 for _, drawn in first)
    assert all(drawn == 0 for _, drawn in second)  # a checkpoint follows: nothing is drawn


def test_from_four_to_two_to_one_to_four_processes(sources: dict[str, Path], tmp_path: Path) -> None:
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    train(World(), config_for(alone, sources))
    samples: list[list[int]] = []
    for ranks, stop in ((4, 5), (2, 10), (1, 15), (4, None)):
        leg = on_ranks(ranks, train, config_for(moved, sources, train={"stop_after_step": stop}))
        samples += [list(chain(*rows)) for rows in zip(*(mine for mine, _ in leg), strict=True)]
    assert samples == [list(range(t * GLOBAL_BATCH, (t + 1) * GLOBAL_BATCH)) for t in range(STEPS)]
    assert (status(moved)["state"], saved_steps(moved)[-1]) == ("done", STEPS)
    one, other = reproducible(metrics(alone)), reproducible(metrics(moved))
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for record, again in zip(one, other, strict=True):
        assert again == pytest.approx(record, rel=LOSS_TOLERANCE)


def test_ranks_may_stand_in_different_directories(sources: dict[str, Path], tmp_path: Path) -> None:
    """A relative run_dir is rank 0's, as its own working directory has it."""
    for rank in range(2):
        (tmp_path / f"home{rank}").mkdir()
    for stop in (5, None):
        on_ranks(2, train_at_home, tmp_path, config_for(Path("run"), sources, train={"stop_after_step": stop}))
    assert status(tmp_path / "home0" / "run")["state"] == "done"
    assert not (tmp_path / "home1" / "run").exists()


def train_at_home(world: World, homes: Path, config: RunConfig) -> None:
    os.chdir(homes / f"home{world.rank}")
    train(world, config)


def test_ranks_that_would_compute_differently_are_named(sources: dict[str, Path], tmp_path: Path) -> None:
    config = config_for(tmp_path, sources, train={"precision": "auto"})
    with pytest.raises((ConfigError, SystemExit)):
        on_ranks(2, train_with_bf16_on_rank_1, config)
    found = status(tmp_path)
    assert found["state"] == "bad_input"
    assert "has another device: train.precision is bf16 there, fp32 on rank 0" in found["reason"]


def train_with_bf16_on_rank_1(world: World, config: RunConfig) -> None:
    if world.rank == 1:
        session.choose_precision = lambda *_: "bf16"  # type: ignore[attr-defined]
    train(world, config)


def test_validation_on_several_processes_counts_every_target_once(sources: dict[str, Path], tmp_path: Path) -> None:
    """Three micro-batch sizes, so that in some rounds a rank has fewer windows than others, or none."""
    settings = {"train": {"steps": 1, "micro_batch": 1}, "model": {"vocab_size": 512}}
    plain = config_for(tmp_path / "plain", sources, **settings)
    train(World(), plain)
    wanted = [record for record in metrics(plain.run_dir) if "eval/validation/loss" in record]
    for ranks, share in ((2, 3), (4, 5), (4, 64)):
        config = config_for(tmp_path / f"{ranks}-{share}", sources, **settings)
        config.evaluation.micro_batch = share
        on_ranks(ranks, train, config)
        found = [record for record in metrics(config.run_dir) if "eval/validation/loss" in record]
        for one, other in zip(reproducible(wanted), reproducible(found), strict=True):
            assert other == pytest.approx(one, rel=LOSS_TOLERANCE)
