"""AdamW over named parameters, its decay groups, and its state as named tensors (paper, section 2.3)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llamatrain.config import OptimConfig
from llamatrain.flat import FlatPart, updated

MOMENTS = ("exp_avg", "exp_avg_sq")
Parameters = Iterable[tuple[str, nn.Parameter | FlatPart]]


def build_adamw(parameters: Parameters, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one group that decays and one that does not; the fused kernel, which CPU and CUDA both have.

    `optim.decay="matrices"` spares parameters of fewer than two dimensions (the norms), "all" spares none. The
    state exists from the start (zero moments, step 0), as torch would make it at the first update, so that a
    checkpoint can be written or read before any step. Of parameters laid flat, the flat shards are updated; raises
    ValueError if one has parts that decay and parts that do not.
    """
    decayed: dict[Tensor, None] = {}  # in order, each once
    spared: dict[Tensor, None] = {}
    for name, parameter in parameters:
        own, other = (decayed, spared) if optim.decay == "all" or len(parameter.shape) >= 2 else (spared, decayed)
        own[updated(parameter)] = None
        if updated(parameter) in other:
            raise ValueError(f"{name} lies flat among parameters that do not decay as it does")
    groups: list[dict[str, Any]] = [
        {"params": list(decayed), "weight_decay": optim.weight_decay},
        {"params": list(spared), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    for tensor in (*decayed, *spared):
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(tensor, memory_format=torch.preserve_format),
        }
    return optimizer


def moment_tensors(optimizer: torch.optim.AdamW, parameters: Parameters) -> dict[str, Tensor | FlatPart]:
    """The moments under `<parameter>.<moment>`; the tensors themselves, not copies."""
    moments: dict[str, Tensor | FlatPart] = {}
    for name, parameter in parameters:
        for moment in MOMENTS:
            state = optimizer.state[updated(parameter)][moment]
            moments[f"{name}.{moment}"] = parameter.within(state) if isinstance(parameter, FlatPart) else state
    return moments


def step_count(optimizer: torch.optim.AdamW) -> int:
    """Updates made so far, which AdamW's bias correction counts; the same for every parameter."""
    states = iter(optimizer.state.values())
    return int(next(states)["step"].item())


def set_step_count(optimizer: torch.optim.AdamW, count: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(float(count))


def start_anew(optimizer: torch.optim.AdamW) -> None:
    """As `build_adamw` made it: no moments, no updates counted."""
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()


def set_learning_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
