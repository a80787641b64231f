"""The blocks' own backward under FSDP2: weights are freed after the forward and gathered again for the backward."""

from pathlib import Path

import pytest

from llamatrain.config import RunConfig
from llamatrain.data.loader import Batch
from llamatrain.distributed import World
from llamatrain.model import block_backward
from llamatrain.model.llama import Block
from llamatrain.trainer import Trainer
from tests.courses import BF16_TOLERANCE, Course, check_same_course, course_of
from tests.distributed.test_training import STEPS, config_for
from tests.ranks import on_ranks
from tests.small_run import GLOBAL_BATCH


def with_own_backward(trainer: Trainer, batch: Batch) -> None:
    for module in trainer.model.modules():
        if isinstance(module, Block):
            module.training_forward = block_backward.own_backward


def course_with_own_backward(world: World, config: RunConfig) -> tuple[Course, int]:
    """The course, and how often a block's own half was called."""
    calls, half = 0, block_backward.attention_half

    def counted(*inputs, **options):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return half(*inputs, **options)

    block_backward.attention_half = counted
    return course_of(world, config, STEPS, with_own_backward), calls


@pytest.fixture(scope="module")
def alone(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Course:
    """The plain model in one process, differentiated by autograd."""
    return course_of(World(), config_for(tmp_path_factory.mktemp("alone"), sources, micro_batch=GLOBAL_BATCH))


@pytest.mark.parametrize("reshard", ["always", "never"])
def test_own_backward_on_two_ranks_is_autograd_on_one(
    reshard: str, alone: Course, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = config_for(tmp_path, sources, micro_batch=2, parallel={"reshard_after_forward": reshard})
    course, calls = on_ranks(2, course_with_own_backward, config)[0]
    micro_batches, layers = GLOBAL_BATCH // 2 // 2, 2
    assert calls == (STEPS + 1) * micro_batches * layers  # the first gradients are taken twice
    check_same_course(alone, course)


def test_own_backward_in_bf16_stays_within_its_tolerance(sources: dict[str, Path], tmp_path: Path) -> None:
    bf16 = {"precision": "bf16"}
    plain = course_of(World(), config_for(tmp_path / "1", sources, micro_batch=GLOBAL_BATCH, train=bf16))
    config = config_for(tmp_path / "2", sources, train=bf16)
    check_same_course(plain, on_ranks(2, course_with_own_backward, config)[0][0], tolerance=BF16_TOLERANCE)
