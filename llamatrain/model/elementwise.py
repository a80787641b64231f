"""What is done to every number or every token by itself: norms, rotations, SwiGLU, the loss, and their gradients.

`llamatrain.model.llama` lets autograd differentiate them, `llamatrain.model.block_backward` does it by hand; both take
them from here. They compute in fp32 (fp64 stays fp64) and return the dtype of their input.

As they stand, each operation in them is a kernel that reads its inputs from memory and writes its output there, and
autograd keeps much of what lies between. They are pure functions of tensors and numbers, so that they can be compiled
to a kernel or two each (`llamatrain.model.compilation`); of such a function autograd keeps the inputs only.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if that is what it has."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), rounded to x's dtype before the product."""
    return rms_norm_and_rstd(x, weight, eps)[0]


def rms_norm_and_rstd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm`, and 1 / sqrt(mean(x^2) + eps) of each token: [B, T, 1], fp32."""
    full = at_least_fp32(x)
    rstd = torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + eps)
    return (full * rstd).to(x.dtype) * weight.to(x.dtype), rstd


def rms_norm_again(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """`rms_norm` of x whose rstd is known; the weight has x's dtype."""
    return (at_least_fp32(x) * rstd).to(x.dtype) * weight


def rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, with `residual` (what goes around the norm) added, and of the weight.

    With n = x rstd and g = grad * weight: dx = rstd (g - n mean(g n)).
    """
    normed = at_least_fp32(x) * rstd
    dweight = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0)
    dnormed = at_least_fp32(grad * weight)
    dx = rstd * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype) + residual, dweight


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, T, H, K] by the rows [T, K/2] of `rope_tables`."""
    real, imaginary = at_least_fp32(x).unflatten(-1, (-1, 2)).unbind(-1)  # [B, T, H, K/2] each
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B, T, H, K] and keys [B, T, Hkv, K], turned."""
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin)


def rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys before they were turned: turned back."""
    return rope(dq, dk, cos, -sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and `swiglu` itself once more. At most four tensors of their size live at a time."""
    active = F.silu(gate)
    product, dup = active * up, grad * active
    del active
    dactive = grad * up
    del grad
    return torch.ops.aten.silu_backward(dactive, gate), dup, product


def cross_entropy(logits: Tensor, row: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(row) of each token [n, 1], fp32, and the gradient of its logits [n, V], in their dtype; 0 if not `valid`.

    row int64 [n, 1], valid bool [n, 1]. A row that is none of the vocabulary makes NaN, not an error.
    """
    shifted = at_least_fp32(logits)
    shifted = shifted - shifted.amax(1, keepdim=True)
    exps = shifted.exp()
    total = exps.sum(1, keepdim=True)
    here = torch.arange(logits.shape[1], device=logits.device) == row  # [n, V]
    at_target = shifted.where(here, 0).sum(1, keepdim=True)
    known = (row >= 0) & (row < logits.shape[1])
    loss = (total.log() - at_target).where(known, float("nan")).where(valid, 0)
    return loss, (exps / total - here.to(exps.dtype)).where(valid, 0).to(logits.dtype)


class Elementwise(NamedTuple):
    """All of them, as they stand or compiled."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rms_norm_and_rstd: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = rms_norm_and_rstd
    rms_norm_again: Callable[[Tensor, Tensor, Tensor], Tensor] = rms_norm_again
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rms_norm_backward
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rope
    rope_backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rope_backward
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = swiglu_backward

    cross_entropy: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = cross_entropy

    def while_training(self) -> "Elementwise":
        """These where gradients are taken; elsewhere, where shapes change from call to call, those as they stand."""
        return self if torch.is_grad_enabled() else EAGER


EAGER = Elementwise()
