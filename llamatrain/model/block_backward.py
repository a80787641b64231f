"""A block's two halves with a backward written by hand, which keeps less than autograd would.

The paper (arXiv 2302.13971, section 2.4): "we reduced the amount of activations that are recomputed during the
backward pass with checkpointing. More precisely, we save the activations that are expensive to compute, such as the
outputs of linear layers. This is achieved by manually implementing the backward function for the transformer layers,
instead of relying on the PyTorch autograd."

Kept between forward and backward: x, q, k, v (before RoPE), the attention's output and its lse; h, gate, up; and of
both norms the reciprocal of the root mean square. Done again in the backward: norms, RoPE, silu and the products, all
elementwise; no matrix product and no attention. In bf16 that is (8 + 4/r) d + 4 f + 4 a + 8 bytes per token and layer
(width d, FFN width f, a heads, r query heads per key head), where autograd keeps about twice as much.

The numbers are those of `llamatrain.model.llama.Block`: every step in the same dtype, rounded at the same places.
Weights come as tensors in the dtype of x; under FSDP2 these are the gathered parameters, which its hooks gather again
before the backward. What is elementwise stands in functions of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamatrain.model.attention import SavedAttention, at_least_fp32, attention_backward, attention_forward
from llamatrain.model.llama import Block


def own_backward(block: Block, x: Tensor, cos: Tensor, sin: Tensor, doc_lengths: Sequence[int] | None) -> Tensor:
    """`Block.plain_forward` made of the two halves, to be a block's `training_forward`."""
    a, f, eps = block.attention, block.feed_forward, block.attention_norm.eps
    norm, wq, wk, wv, wo = (m.weight.to(x.dtype) for m in (block.attention_norm, a.wq, a.wk, a.wv, a.wo))
    h = attention_half(
        x, norm, wq, wk, wv, wo, cos, sin, eps=eps, head_dim=a.head_dim, backend=a.backend, doc_lengths=doc_lengths
    )
    norm, w1, w2, w3 = (m.weight.to(x.dtype) for m in (block.ffn_norm, f.w1, f.w2, f.w3))
    return feed_forward_half(h, norm, w1, w2, w3, eps=eps)


def attention_half(
    x: Tensor,
    norm_weight: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    head_dim: int,
    backend: str,
    doc_lengths: Sequence[int] | None = None,
) -> Tensor:
    """x + wo(attention(rope(wq n), rope(wk n), wv n)) with n = norm(x): [B, T, D], x's dtype.

    wq [H*K, D], wk and wv [Hkv*K, D], wo [D, H*K] and norm_weight [D] have x's dtype; cos and sin [T, K/2].
    """
    out: Tensor = _AttentionHalf.apply(x, norm_weight, wq, wk, wv, wo, cos, sin, eps, head_dim, backend, doc_lengths)
    return out


def feed_forward_half(h: Tensor, norm_weight: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *, eps: float) -> Tensor:
    """h + w2(silu(w1 n) * w3 n) with n = norm(h): [B, T, D], h's dtype.

    w1 and w3 [F, D], w2 [D, F] and norm_weight [D] have h's dtype.
    """
    out: Tensor = _FeedForwardHalf.apply(h, norm_weight, w1, w2, w3, eps)
    return out


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        wo: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        head_dim: int,
        backend: str,
        doc_lengths: Sequence[int] | None,
    ) -> Tensor:
        rstd = rms_norm_rstd(x, eps)  # [B, T, 1]
        normed = rms_norm(x, rstd, norm_weight).flatten(0, 1)  # [B*T, D]
        heads = (*x.shape[:2], -1, head_dim)
        q = torch.mm(normed, wq.t()).view(heads)  # [B, T, H, K]
        k = torch.mm(normed, wk.t()).view(heads)  # [B, T, Hkv, K]
        v = torch.mm(normed, wv.t()).view(heads)
        del normed
        out, saved = attention_forward(
            rotate(q, cos, sin), rotate(k, cos, sin), v, backend=backend, doc_lengths=doc_lengths
        )
        ctx.save_for_backward(x, rstd, q, k, v, out, norm_weight, wq, wk, wv, wo, cos, sin, saved.lse, *saved.rest)
        ctx.kernel, ctx.backend, ctx.doc_lengths = saved.kernel, backend, doc_lengths
        return x + torch.mm(_matrix(out), wo.t()).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, q, k, v, out, norm_weight, wq, wk, wv, wo, cos, sin, lse, *rest = ctx.saved_tensors
        needs_x, needs_norm, needs_q, needs_k, needs_v, needs_o = ctx.needs_input_grad[:6]
        flat = grad.reshape(-1, grad.shape[-1])  # [B*T, D]
        dwo = torch.mm(flat.t(), _matrix(out)) if needs_o else None
        grads = attention_backward(
            torch.mm(flat, wo).view(out.shape),
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            out,
            SavedAttention(ctx.kernel, lse, tuple(rest)),
            backend=ctx.backend,
            doc_lengths=ctx.doc_lengths,
        )
        dq, dk, dv = (_matrix(g) for g in (rotate(grads[0], cos, -sin), rotate(grads[1], cos, -sin), grads[2]))
        del grads
        normed = rms_norm(x, rstd, norm_weight).flatten(0, 1)
        dwq = torch.mm(dq.t(), normed) if needs_q else None
        dwk = torch.mm(dk.t(), normed) if needs_k else None
        dwv = torch.mm(dv.t(), normed) if needs_v else None
        del normed
        dx = dnorm = None
        if needs_x or needs_norm:
            dnormed = torch.mm(dq, wq).addmm_(dk, wk).addmm_(dv, wv).view(x.shape)
            del dq, dk, dv
            dx, dnorm = rms_norm_backward(dnormed, x, rstd, norm_weight)
            dx += grad
        return dx, dnorm, dwq, dwk, dwv, dwo, None, None, None, None, None, None


class _FeedForwardHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, norm_weight: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, eps: float) -> Tensor:
        rstd = rms_norm_rstd(h, eps)  # [B, T, 1]
        normed = rms_norm(h, rstd, norm_weight).flatten(0, 1)  # [B*T, D]
        gate, up = torch.mm(normed, w1.t()), torch.mm(normed, w3.t())  # [B*T, F] each
        del normed
        ctx.save_for_backward(h, rstd, gate, up, norm_weight, w1, w2, w3)
        return h + torch.mm(swiglu(gate, up), w2.t()).view(h.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, rstd, gate, up, norm_weight, w1, w2, w3 = ctx.saved_tensors
        needs_h, needs_norm, needs_1, needs_2, needs_3 = ctx.needs_input_grad[:5]
        flat = grad.reshape(-1, grad.shape[-1])  # [B*T, D]
        dw2 = torch.mm(flat.t(), swiglu(gate, up)) if needs_2 else None
        dgate, dup = swiglu_backward(torch.mm(flat, w2), gate, up)
        normed = rms_norm(h, rstd, norm_weight).flatten(0, 1)
        dw1 = torch.mm(dgate.t(), normed) if needs_1 else None
        dw3 = torch.mm(dup.t(), normed) if needs_3 else None
        del normed
        dh = dnorm = None
        if needs_h or needs_norm:
            dnormed = torch.mm(dgate, w1).addmm_(dup, w3).view(h.shape)
            del dgate, dup
            dh, dnorm = rms_norm_backward(dnormed, h, rstd, norm_weight)
            dh += grad
        return dh, dnorm, dw1, dw2, dw3, None


def _matrix(x: Tensor) -> Tensor:
    """[B, T, H, K] -> [B*T, H*K]; a view where the memory has that order."""
    return x.reshape(x.shape[0] * x.shape[1], -1)


# The elementwise parts


def rms_norm_rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each token: [B, T, 1], fp32."""
    return torch.rsqrt(at_least_fp32(x).pow(2).mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """x * rstd in fp32, rounded to x's dtype, times the weight."""
    return (at_least_fp32(x) * rstd).to(x.dtype) * weight


def rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and the weight. With n = x rstd and g = grad * weight: dx = rstd (g - n mean(g n))."""
    normed = at_least_fp32(x) * rstd
    dweight = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0)
    dnormed = at_least_fp32(grad * weight)
    dx = rstd * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), dweight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rope`, but fp64 stays fp64. With -sin it turns back, which is the gradient's way."""
    real, imaginary = at_least_fp32(x).unflatten(-1, (-1, 2)).unbind(-1)  # [B, T, H, K/2] each
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
