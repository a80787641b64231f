"""What goes wrong on one rank is skipped, or rolled back from, by all of them together."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamatrain.config import RunConfig
from llamatrain.data.loader import Batch
from llamatrain.distributed import World, local_part
from llamatrain.optim.adamw import step_count
from llamatrain.resilience.control import StopRequest
from llamatrain.session import run_on
from llamatrain.trainer import Trainer
from tests.ranks import on_ranks
from tests.small_run import assert_same_run, metrics, small_config, status, trainer_for
from tests.test_bad_steps import SPIKE, SPIKE_STEP, events, settings

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "hsdp": {"dp_replicate": 2},
    "tp": {"tp": 2},
    "cp": {"cp": 2},
    "pp": {"pp": 2},
}


def local_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """What this rank has of the gradients, those of the norms last."""
    found = {}
    for name, parameter in sorted(trainer.parameters.items(), key=lambda entry: -len(entry[1].shape)):
        assert isinstance(parameter, torch.nn.Parameter) and parameter.grad is not None
        found[name] = local_part(parameter.grad)[0]
    return found


def spoil_a_matrix(trainer: Trainer) -> None:
    next(iter(local_gradients(trainer).values())).view(-1)[0] = math.nan


def spoil_a_norm(trainer: Trainer) -> None:
    next(part for part in reversed(local_gradients(trainer).values()) if part.numel()).view(-1)[0] = math.inf


def spoil_activations(trainer: Trainer) -> None:
    """Of the coming step, in its forward."""
    block = next(iter(trainer.model.layers.values()))
    hook = block.register_forward_hook(lambda module, inputs, output: _poisoned(output))
    accumulate = trainer.passes.accumulate

    def once(*args: Any) -> Tensor:
        loss = accumulate(*args)
        hook.remove()
        del trainer.passes.accumulate
        return loss

    trainer.passes.accumulate = once  # type: ignore[method-assign]


def _poisoned(output: Any) -> Any:
    return tuple(value * math.nan for value in output) if isinstance(output, tuple) else output * math.nan


def course(world: World, config: RunConfig, fault: Callable[[Trainer], None] | None, early: bool) -> list[Any]:
    """Three steps, in the second of which `fault` strikes rank 1: what stayed the same, and counts, after each."""
    accumulate, found = Trainer.accumulate_gradients, []

    def faulty(self: Trainer, batch: Batch) -> Tensor:
        strikes = fault is not None and world.rank == 1 and self.step == 1
        if strikes and early:
            fault(self)  # type: ignore[misc]
        loss = accumulate(self, batch)
        if strikes and not early:
            fault(self)  # type: ignore[misc]
        return loss

    Trainer.accumulate_gradients = faulty  # type: ignore[method-assign]
    try:
        with ExitStack() as resources:
            trainer = trainer_for(config, resources, world)
            loader = resources.enter_context(trainer.open_loader())
            for _ in range(3):
                before = state(trainer)
                trainer.train_step(next(loader))
                trainer.bad_steps.settle()
                after = state(trainer)
                same = {name for name in before if torch.equal(before[name], after[name])}
                guard = trainer.bad_steps.guard
                found.append((len(same) == len(before), len(same), guard.skipped, step_count(trainer.optimizer)))
            trainer.snapshots.finish_save()
    finally:
        Trainer.accumulate_gradients = accumulate  # type: ignore[method-assign]
    return found


def state(trainer: Trainer) -> dict[str, Tensor]:
    groups = trainer.snapshots.weights_and_moments()
    parts = {name: local_part(tensor)[0] for tensors in groups.values() for name, tensor in tensors.items()}  # type: ignore[arg-type]
    return {name: part.detach().clone() for name, part in parts.items() if part.numel()}


def all_courses(world: World, directory: Path, sources: dict[str, Path]) -> dict[tuple[str, str], list[Any]]:
    found = {}
    faults = {"matrix": spoil_a_matrix, "norm": spoil_a_norm, "activations": spoil_activations}
    for layout, parallel in LAYOUTS.items():
        for name, fault in faults.items():
            groups = {"train": {"steps": 12, "micro_batch": 2}, "parallel": parallel}
            config = small_config(directory / f"{layout}-{name}", sources, **groups)
            found[layout, name] = course(world, config, fault, name == "activations")
    return found


@pytest.mark.drill(
    "NaN in a weight's gradient or in activations of one rank", "skipped by all ranks, counted, weights kept"
)
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(sources: dict[str, Path], tmp_path: Path) -> None:
    one, other = on_ranks(2, all_courses, tmp_path, sources)
    for case in one:
        for rank in (one, other):
            (moved, _, none, first), (same, _, skipped, second), (again, _, still, third) = rank[case]
            assert (moved, same, again) == (False, True, False), case
            assert ((none, skipped, still), (first, second, third)) == ((0, 1, 1), (1, 1, 2)), case


def train(world: World, config: RunConfig, die: bool) -> None:
    """A run; rank 1 has a spike at SPIKE, and ends without a word, if it is to, two steps after the rollback."""
    accumulate, step = Trainer.accumulate_gradients, Trainer.train_step

    def spiking(self: Trainer, batch: Batch) -> Tensor:
        loss = accumulate(self, batch)
        if self.data_state.next_sample == SPIKE[0] and world.rank == 1:
            next(iter(local_gradients(self).values())).view(-1)[0] = 1e6
        return loss

    def dying(self: Trainer, batch: Batch) -> Any:
        if die and self.rollbacks and self.step == SPIKE_STEP - 1 and world.rank == 1:
            raise KeyError("dies")
        return step(self, batch)

    Trainer.accumulate_gradients, Trainer.train_step = spiking, dying  # type: ignore[method-assign]
    run_on(world, config, StopRequest())


@pytest.mark.drill(
    "a spike on one rank, and the death of a rank after the rollback",
    "skipped, or all go back and pass over its samples; started again, the same choices and the same bits",
)
@pytest.mark.parametrize("parallel", [{}, {"tp": 2}])
def test_a_spike_on_one_rank_takes_all_back_and_survives_a_death(
    parallel: dict[str, Any], sources: dict[str, Path], tmp_path: Path
) -> None:
    def config(directory: str, action: str) -> RunConfig:
        groups: dict[str, Any] = {"train": {"steps": 12, "micro_batch": 2}, "parallel": parallel}
        return settings(tmp_path / directory, sources, resilience={"spike_action": action}, **groups)

    on_ranks(2, train, config("skipped", "skip"), False)
    assert metrics(tmp_path / "skipped")[-1]["train/skipped"] == 1
    assert [event["samples"] for event in events(tmp_path / "skipped", "skipped")] == [SPIKE]

    on_ranks(2, train, config("whole", "rollback"), False)
    with pytest.raises((KeyError, SystemExit)):
        on_ranks(2, train, config("broken", "rollback"), True)
    on_ranks(2, train, config("broken", "rollback"), False)
    for run_dir in (tmp_path / "whole", tmp_path / "broken"):
        assert [event["samples"] for event in events(run_dir, "rollback")] == [SPIKE]
        assert status(run_dir)["state"] == "done"
    assert_same_run(tmp_path / "whole", tmp_path / "broken", step=12)
