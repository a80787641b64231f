"""AdamW over named parameters, its decay groups, and its state as named tensors (paper, section 2.3)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llamatrain.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_adamw(parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one group that decays and one that does not; the fused kernel, which CPU and CUDA both have.

    `optim.decay="matrices"` spares parameters of fewer than two dimensions (the norms), "all" spares none. The
    state exists from the start (zero moments, step 0), as torch would make it at the first update, so that a
    checkpoint can be written or read before any step.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for _, parameter in parameters:
        (decayed if optim.decay == "all" or parameter.ndim >= 2 else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    for parameter in decayed + spared:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def moment_tensors(optimizer: torch.optim.AdamW, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The moments under `<parameter>.<moment>`; the tensors themselves, not copies."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment] for name, parameter in parameters for moment in MOMENTS
    }


def step_count(optimizer: torch.optim.AdamW) -> int:
    """Updates made so far, which AdamW's bias correction counts; the same for every parameter."""
    states = iter(optimizer.state.values())
    return int(next(states)["step"].item())


def set_step_count(optimizer: torch.optim.AdamW, count: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(float(count))


def set_learning_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
