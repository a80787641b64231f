"""The course of a training run, recorded step by step, and what two courses of the same run must have in common."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
import torch
from torch.distributed.tensor import DTensor

from llamatrain.config import RunConfig
from llamatrain.data.loader import IGNORE_INDEX, Batch
from llamatrain.distributed import World
from llamatrain.trainer import Trainer
from tests.small_run import trainer_for

LOSS_TOLERANCE = 1e-5  # docs/design.md, "Tolerances": fp32, relative, on losses and gradient norms
BF16_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 1e-5  # of each first gradient, relative to its largest entry

Spoil = Callable[[Trainer, Batch], None]


@dataclass
class Course:
    """What some steps did, as all ranks saw it together."""

    samples: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    valid_targets: list[list[int]] = field(default_factory=list)  # by rank and micro-batch
    initial_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    first_gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor with the parts of all ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def course_of(world: World, config: RunConfig, steps: int = 20, spoil: Spoil | None = None) -> Course:
    """Train `steps` steps. `spoil` gets the trainer and every batch before its step: a test's planted fault."""
    course = Course()
    with ExitStack() as resources:
        trainer = trainer_for(config, resources, world)
        course.initial_weights = {name: whole(p) for name, p in trainer.parameters.items()}
        for batch in resources.enter_context(trainer.open_loader()):
            if spoil is not None:
                spoil(trainer, batch)
            if trainer.step == 0:
                trainer.accumulate_gradients(batch)
                grads = {name: p.grad for name, p in trainer.parameters.items()}
                course.first_gradients = {name: whole(grad) for name, grad in grads.items() if grad is not None}
                trainer.optimizer.zero_grad()
            loss, norm = trainer.train_step(batch)
            own = [int((m.targets != IGNORE_INDEX).sum()) for m in batch.micro_batches()]
            course.samples.append([n for samples in world.gather(batch.samples.tolist()) for n in samples])
            course.valid_targets.append([n for counts in world.gather(own) for n in counts])
            course.losses.append(loss.item())
            course.norms.append(norm.item())
            if trainer.step == steps:
                return course
    raise AssertionError("the loader ended")


def check_same_course(one: Course, other: Course, *, tolerance: float = LOSS_TOLERANCE) -> None:
    """Equal samples and initial weights; losses, gradient norms and first gradients within the tolerances."""
    assert one.samples == other.samples
    assert one.initial_weights.keys() == other.initial_weights.keys()
    for name, weight in one.initial_weights.items():
        assert torch.equal(weight, other.initial_weights[name]), name
    assert other.losses == pytest.approx(one.losses, rel=tolerance)
    assert other.norms == pytest.approx(one.norms, rel=tolerance)
    if tolerance == LOSS_TOLERANCE:
        assert one.first_gradients.keys() == other.first_gradients.keys()
        for name, gradient in one.first_gradients.items():
            difference = (gradient - other.first_gradients[name]).abs().max()
            assert difference <= GRADIENT_TOLERANCE * gradient.abs().max(), name
