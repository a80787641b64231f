"""A bit that flips on one rank is noticed in every layout that has something to compare it with."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamatrain.distributed import World
from llamatrain.errors import UnhealthyRun
from llamatrain.trainer import Trainer
from tests.ranks import on_ranks
from tests.small_run import small_config, trainer_for

STEP = 6  # the last whose state is whole
NOTICED = "noticed at the next comparison, the rank or the pair named, and the tensor"
FLIPPED = "a bit flips on one rank: replicas, norms over tensor parallelism, weights kept gathered"


def first_number(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.int32)[:1]


def flip_weight(trainer: Trainer, name: str) -> None:
    from torch.distributed.tensor import DTensor

    parameter = trainer.parameters[name]
    assert isinstance(parameter, DTensor)
    first_number(parameter.to_local().detach()).bitwise_xor_(1)


def flip_moment(trainer: Trainer, name: str) -> None:
    from torch.distributed.tensor import DTensor

    moment = trainer.snapshots.weights_and_moments()["optimizer"][f"{name}.exp_avg_sq"]
    assert isinstance(moment, DTensor)
    first_number(moment.to_local()).bitwise_xor_(1)


def flip_gathered(trainer: Trainer, name: str) -> None:
    """In a layer's weight while it is gathered, before the forward of the next micro-batch."""
    module = trainer.model.get_submodule(name.rpartition(".")[0])

    def flip(*_: Any) -> None:
        first_number(module.weight.detach()).bitwise_xor_(1)
        handle.remove()

    handle = module.register_forward_pre_hook(flip)


def no_fault(trainer: Trainer, name: str) -> None:
    pass


def train(
    world: World,
    sources: dict[str, Path],
    run_dir: Path,
    parallel: dict[str, Any],
    fault: Callable[[Trainer, str], None],
    name: str,
    rank: int,
    resilience: dict[str, Any],
) -> str:
    """Eight steps, copies compared at every second; after six of them something happens to one rank."""
    config = small_config(
        run_dir,
        sources,
        parallel=parallel,
        train={"replay_check_every_steps": 0, "steps": 8, "micro_batch": 1},
        checkpoint={"every_steps": 100},
        evaluation={"every_steps": 0},
        resilience={"compare_copies_every_steps": 2, "preflight": False, **resilience},
    )
    with ExitStack() as resources:
        trainer = trainer_for(config, resources, world)
        plain = trainer._after_step

        def after_step(loss: Tensor, grad_norm: Tensor) -> None:
            plain(loss, grad_norm)
            # what is gathered lives for one step, so it must be hit in the one that is compared
            if trainer.step == STEP + (fault is flip_gathered) and world.rank == rank:
                fault(trainer, name)

        trainer._after_step = after_step  # type: ignore[method-assign]
        try:
            trainer.fit()
        except UnhealthyRun as error:
            return str(error)
    return ""


PAIR, ONE = "no majority to tell which is right", "has another than the 3 others"
CASES = [
    pytest.param(2, {"dp_replicate": 2}, flip_weight, "layers.1.attention.wq.weight", PAIR, id="replicas-weight"),
    pytest.param(2, {"dp_replicate": 2}, flip_moment, "layers.0.feed_forward.w2.weight", PAIR, id="replicas-moment"),
    pytest.param(4, {"dp_replicate": 4}, flip_moment, "layers.0.feed_forward.w2.weight", ONE, id="four-replicas"),
    pytest.param(2, {"tp": 2}, flip_weight, "layers.0.ffn_norm.weight", PAIR, id="tp-norm"),
    pytest.param(
        2,
        {"reshard_after_forward": "never"},
        flip_gathered,
        "layers.1.feed_forward.w1.weight",
        PAIR,
        id="kept-gathered",
    ),
    pytest.param(
        4, {"reshard_after_forward": "never"}, flip_gathered, "layers.1.feed_forward.w1.weight", ONE, id="kept-by-four"
    ),
]


@pytest.mark.drill(FLIPPED, NOTICED)
@pytest.mark.parametrize(("ranks", "parallel", "fault", "name", "told"), CASES)
def test_a_flipped_bit_is_noticed(
    ranks: int,
    parallel: dict[str, Any],
    fault: Callable[[Trainer, str], None],
    name: str,
    told: str,
    sources: dict[str, Path],
    tmp_path: Path,
) -> None:
    messages = on_ranks(ranks, train, sources, tmp_path / "run", parallel, fault, name, 1, {})
    assert len(set(messages)) == 1
    assert messages[0].startswith("step 8: copies of ")
    assert told in messages[0] and "rank 1 on " in messages[0]
    if fault is flip_gathered or fault is flip_moment:
        assert name in messages[0]
    assert (tmp_path / "run" / "checkpoints").exists() is False  # nothing was saved from it


@pytest.mark.slow
def test_without_the_comparison_nobody_would_know(sources: dict[str, Path], tmp_path: Path) -> None:
    fault, name = flip_weight, "layers.1.attention.wq.weight"
    off = {"compare_copies_every_steps": 0}
    assert on_ranks(2, train, sources, tmp_path / "off", {"dp_replicate": 2}, fault, name, 1, off) == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel", [{}, {"dp_replicate": 2}, {"tp": 2}, {"reshard_after_forward": "never"}, {"pp": 2}]
)
def test_where_nothing_happens_nothing_is_told(
    parallel: dict[str, Any], sources: dict[str, Path], tmp_path: Path
) -> None:
    messages = on_ranks(2, train, sources, tmp_path / "run", parallel, no_fault, "", 1, {})
    assert messages == ["", ""]


def replayed(
    world: World, sources: dict[str, Path], run_dir: Path, parallel: dict[str, Any], wrong_call: int | None
) -> str:
    """Three steps, the second run twice before it is taken; on rank 1 a forward may go wrong once."""
    config = small_config(
        run_dir,
        sources,
        parallel=parallel,
        train={"replay_check_every_steps": 2, "steps": 3, "micro_batch": 2},
        evaluation={"every_steps": 0},
        resilience={"preflight": False},
    )
    with ExitStack() as resources:
        trainer = trainer_for(config, resources, world)
        calls, plain = 0, trainer.passes.accumulate

        def accumulate(*args: Any) -> Tensor:
            nonlocal calls
            calls += 1
            loss = plain(*args)
            return loss * (1 + 1e-6) if calls == wrong_call and world.rank == 1 else loss

        trainer.passes.accumulate = accumulate  # type: ignore[method-assign]
        try:
            trainer.fit()
        except UnhealthyRun as error:
            return str(error)
    return ""


@pytest.mark.drill("a rank computes wrongly once, in a step that is run twice", "the step and the rank are named")
@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"pp": 2}])
def test_a_step_that_does_not_repeat_is_told_with_the_rank(
    parallel: dict[str, Any], sources: dict[str, Path], tmp_path: Path
) -> None:
    assert on_ranks(2, replayed, sources, tmp_path / "good", parallel, None) == ["", ""]
    messages = on_ranks(2, replayed, sources, tmp_path / "bad", parallel, 3)
    assert len(set(messages)) == 1
    assert messages[0].startswith("step 2, run twice from the same state, gave other bits in the loss of rank 1 alone")
