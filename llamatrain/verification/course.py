"""The course of a training run, recorded step by step, and how far two courses of the same run lie apart.

The tolerances are those of docs/design.md. Losses alone would prove little: AdamW hides a wrong scale of the gradient
from them. So the norm before clipping and every parameter's first gradient are compared too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llamatrain.data.loader import IGNORE_INDEX, Batch
from llamatrain.distributed import World
from llamatrain.flat import FlatPart
from llamatrain.trainer import Trainer

TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3}  # relative, of losses and gradient norms
GRADIENT_TOLERANCE = 1e-5  # of each first gradient, relative to its largest entry; fp32

Before = Callable[[Trainer, Batch], None]


@dataclass
class Course:
    """What some steps did, as all ranks saw it together."""

    samples: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    valid_targets: list[list[int]] = field(default_factory=list)  # by rank and micro-batch
    initial_weights: dict[str, Tensor] = field(default_factory=dict)
    first_gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Differences:
    """How far a course lies from another."""

    same_samples: bool
    same_initial_weights: bool
    loss: float  # largest relative difference of a step
    norm: float
    gradient: float  # largest difference of a first gradient, relative to that parameter's largest entry
    worst_gradient: str

    def failures(self, precision: str) -> list[str]:
        """What is outside the tolerances."""
        tolerance = TOLERANCES[precision]
        found = {
            "samples differ": not self.same_samples,
            "initial weights differ": not self.same_initial_weights,
            f"losses differ by {self.loss:.1e}": not self.loss <= tolerance,
            f"gradient norms differ by {self.norm:.1e}": not self.norm <= tolerance,
            f"the first gradient of {self.worst_gradient} differs by {self.gradient:.1e}": (
                precision == "fp32" and not self.gradient <= GRADIENT_TOLERANCE
            ),
        }
        return [told for told, wrong in found.items() if wrong]


def whole(tensor: Tensor | FlatPart, world: World) -> Tensor:
    """A copy, on the host, of a tensor with the parts of all ranks; all ranks call it."""
    if isinstance(tensor, FlatPart):
        return torch.cat(world.gather(tensor.memory.cpu().clone())).view(tensor.shape)
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def gathered(tensors: Mapping[str, Tensor | FlatPart], trainer: Trainer) -> dict[str, Tensor]:
    """Copies of named tensors, whole, those of all ranks; all ranks call it."""
    own = {name: whole(tensor, trainer.world) for name, tensor in tensors.items()}
    shares = trainer.world.gather(own) if trainer.layout.pp > 1 else [own]
    return {name: tensor for share in shares for name, tensor in share.items()}


def follow(trainer: Trainer, steps: int, before: Before | None = None) -> Course:
    """Train `steps` steps. `before` gets the trainer and every batch before its step."""
    course, world = Course(), trainer.world
    course.initial_weights = gathered(trainer.parameters, trainer)
    with trainer.open_loader() as loader:
        for batch in loader:
            if before is not None:
                before(trainer, batch)
            if trainer.step == 0:
                trainer.accumulate_gradients(batch)
                grads = {name: p.grad for name, p in trainer.parameters.items()}
                present = {name: grad for name, grad in grads.items() if grad is not None}
                course.first_gradients = gathered(present, trainer)
                trainer.optimizer.zero_grad()
            loss, norm = trainer.train_step(batch)
            own = [int((m.targets != IGNORE_INDEX).sum()) for m in batch.micro_batches()]
            own_samples = batch.samples.tolist()
            if not trainer.share.counts_targets:  # another rank works on the same ones
                own, own_samples = [], []
            course.samples.append([n for samples in world.gather(own_samples) for n in samples])
            course.valid_targets.append([n for counts in world.gather(own) for n in counts])
            course.losses.append(loss.item())
            course.norms.append(norm.item())
            if trainer.step == steps:
                break
    return course


def differences(one: Course, other: Course) -> Differences:
    """How far `other` lies from `one`."""
    gradients = {
        name: _relative(one.first_gradients[name], other.first_gradients[name])
        for name in one.first_gradients.keys() & other.first_gradients.keys()
    }
    complete = gradients.keys() == one.first_gradients.keys() == other.first_gradients.keys()
    worst = max(gradients, key=lambda name: gradients[name], default="")
    return Differences(
        same_samples=one.samples == other.samples,
        same_initial_weights=same_tensors(one.initial_weights, other.initial_weights),
        loss=_furthest(one.losses, other.losses),
        norm=_furthest(one.norms, other.norms),
        gradient=gradients[worst] if complete and worst else float("inf"),
        worst_gradient=worst,
    )


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max()).item()


def _furthest(one: list[float], other: list[float]) -> float:
    if len(one) != len(other):
        return float("inf")
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))
