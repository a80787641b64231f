"""Courses of small runs, and asserting that two are the same run."""

from contextlib import ExitStack

from llamatrain.config import RunConfig
from llamatrain.distributed import World
from llamatrain.verification.course import TOLERANCES, Before, Course, differences, follow
from tests.small_run import trainer_for

STEPS = 20
LOSS_TOLERANCE, BF16_TOLERANCE = TOLERANCES["fp32"], TOLERANCES["bf16"]


def course_of(world: World, config: RunConfig, steps: int = STEPS, before: Before | None = None) -> Course:
    """The course of a run from its start; `before` is a test's planted fault, called before every step."""
    with ExitStack() as resources:
        return follow(trainer_for(config, resources, world), steps, before)


def check_same_course(one: Course, other: Course, *, tolerance: float = LOSS_TOLERANCE) -> None:
    """Equal samples and initial weights; losses, gradient norms and first gradients within the tolerances."""
    precision = "bf16" if tolerance == BF16_TOLERANCE else "fp32"
    assert differences(one, other).failures(precision) == []
