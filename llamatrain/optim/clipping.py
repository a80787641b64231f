"""Clipping of the gradient by its norm (Pascanu et al., arXiv 1211.5063), however it is spread over ranks."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llamatrain.distributed import World, is_a_copy, local_part
from llamatrain.flat import FlatPart, updated

EPSILON = 1e-6  # torch's own, in torch.nn.utils.clip_grads_with_norm_


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter | FlatPart], max_norm: float, world: World) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm`; all ranks call it.

    Returns the norm before, an fp32 scalar, the same on all ranks. Every rank squares what it has, of copies one
    rank alone, and one sum over all ranks does for every way of spreading: torch's own sums along one axis of a mesh
    after the other, and knows nothing of stages. The norm of the other copies counts nothing while it is finite, so
    a number that is not makes the sum so, on whichever rank it stands.
    """
    tensors = dict.fromkeys(map(updated, parameters))  # several parameters may lie in one
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    parts = [local_part(grad)[0] for grad in grads]
    counted = [part for grad, part in zip(grads, parts, strict=True) if not is_a_copy(grad)]
    copies = [part for grad, part in zip(grads, parts, strict=True) if is_a_copy(grad)]
    norm = torch.nn.utils.get_total_norm(counted).to(next(iter(tensors)).device)
    if world.size > 1:
        own = norm.square()
        if copies:
            own = own + 0.0 * torch.nn.utils.get_total_norm(copies)
        norm = world.sum(own).sqrt()
    if parts:
        torch._foreach_mul_(parts, (max_norm / (norm + EPSILON)).clamp(max=1.0))
    return norm
