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
before the backward. What is elementwise is taken from `llamatrain.model.elementwise`, as it stands or compiled.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamatrain.model.attention import Attend
from llamatrain.model.attention_reference import SavedAttention
from llamatrain.model.elementwise import EAGER, Elementwise
from llamatrain.model.llama import Block
from llamatrain.model.sharing import ALONE, Alone, on_this_rank


def own_backward(block: Block, x: Tensor, cos: Tensor, sin: Tensor, doc_lengths: Sequence[int] | None) -> Tensor:
    """`Block.plain_forward` made of the two halves, to be a block's `training_forward`."""
    a, f, eps = block.attention, block.feed_forward, block.attention_norm.eps
    norm, wq, wk, wv, wo = (on_this_rank(m.weight).to(x.dtype) for m in (block.attention_norm, a.wq, a.wk, a.wv, a.wo))
    h = attention_half(
        x,
        norm,
        wq,
        wk,
        wv,
        wo,
        cos,
        sin,
        eps=eps,
        head_dim=a.head_dim,
        attend=a.attend,
        doc_lengths=doc_lengths,
        sharing=a.sharing,
        elementwise=a.elementwise,
    )
    norm, w1, w2, w3 = (on_this_rank(m.weight).to(x.dtype) for m in (block.ffn_norm, f.w1, f.w2, f.w3))
    return feed_forward_half(h, norm, w1, w2, w3, eps=eps, sharing=f.sharing, elementwise=f.elementwise)


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
    attend: Attend,
    doc_lengths: Sequence[int] | None = None,
    sharing: Alone = ALONE,
    elementwise: Elementwise = EAGER,
) -> Tensor:
    """x + wo(attention(rope(wq n), rope(wk n), wv n)) with n = norm(x): [B, T, D], x's dtype.

    wq [H*K, D], wk and wv [Hkv*K, D], wo [D, H*K] and norm_weight [D] have x's dtype; cos and sin [T, K/2].
    """
    out: Tensor = _AttentionHalf.apply(
        x, norm_weight, wq, wk, wv, wo, cos, sin, eps, head_dim, attend, doc_lengths, sharing, elementwise
    )
    return out


def feed_forward_half(
    h: Tensor,
    norm_weight: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    *,
    eps: float,
    sharing: Alone = ALONE,
    elementwise: Elementwise = EAGER,
) -> Tensor:
    """h + w2(silu(w1 n) * w3 n) with n = norm(h): [B, T, D], h's dtype.

    w1 and w3 [F, D], w2 [D, F] and norm_weight [D] have h's dtype.
    """
    out: Tensor = _FeedForwardHalf.apply(h, norm_weight, w1, w2, w3, eps, sharing, elementwise)
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
        attend: Attend,
        doc_lengths: Sequence[int] | None,
        sharing: Alone,
        elementwise: Elementwise,
    ) -> Tensor:
        normed, rstd = elementwise.rms_norm_and_rstd(x, norm_weight, eps)  # [B, T, D], [B, T, 1]
        normed = sharing.gather(normed)
        heads, normed = (*normed.shape[:2], -1, head_dim), normed.flatten(0, 1)  # [B*T, D]
        q = torch.mm(normed, wq.t()).view(heads)  # [B, T, H, K]
        k = torch.mm(normed, wk.t()).view(heads)  # [B, T, Hkv, K]
        v = torch.mm(normed, wv.t()).view(heads)
        del normed
        out, saved = attend.forward(*elementwise.rope(q, k, cos, sin), v, doc_lengths=doc_lengths)
        ctx.save_for_backward(x, rstd, q, k, v, out, norm_weight, wq, wk, wv, wo, cos, sin, *saved.tensors)
        ctx.kernels, ctx.attend, ctx.doc_lengths, ctx.sharing = saved.kernels, attend, doc_lengths, sharing
        ctx.elementwise = elementwise
        return x + sharing.scatter(torch.mm(_matrix(out), wo.t()).unflatten(0, out.shape[:2]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, q, k, v, out, norm_weight, wq, wk, wv, wo, cos, sin, *saved = ctx.saved_tensors
        needs_x, needs_norm, needs_q, needs_k, needs_v, needs_o = ctx.needs_input_grad[:6]
        sharing, elementwise = ctx.sharing, ctx.elementwise
        flat = sharing.gather(grad).reshape(-1, grad.shape[-1])  # [B*T, D]
        dwo = torch.mm(flat.t(), _matrix(out)) if needs_o else None
        grads = ctx.attend.backward(
            torch.mm(flat, wo).view(out.shape),
            *elementwise.rope(q, k, cos, sin),
            v,
            out,
            SavedAttention(ctx.kernels, tuple(saved)),
            doc_lengths=ctx.doc_lengths,
        )
        dq, dk, dv = (_matrix(g) for g in (*elementwise.rope_backward(*grads[:2], cos, sin), grads[2]))
        del grads
        normed = sharing.gather(elementwise.rms_norm_again(x, rstd, norm_weight)).flatten(0, 1)
        dwq = torch.mm(dq.t(), normed) if needs_q else None
        dwk = torch.mm(dk.t(), normed) if needs_k else None
        dwv = torch.mm(dv.t(), normed) if needs_v else None
        del normed
        dx = dnorm = None
        if needs_x or needs_norm:
            dnormed = torch.mm(dq, wq).addmm_(dk, wk).addmm_(dv, wv).unflatten(0, q.shape[:2])
            del dq, dk, dv
            dx, dnorm = elementwise.rms_norm_backward(sharing.scatter(dnormed), x, rstd, norm_weight, grad)
        return dx, dnorm, dwq, dwk, dwv, dwo, None, None, None, None, None, None, None, None


class _FeedForwardHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        norm_weight: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        eps: float,
        sharing: Alone,
        elementwise: Elementwise,
    ) -> Tensor:
        normed, rstd = elementwise.rms_norm_and_rstd(h, norm_weight, eps)  # [B, T, D], [B, T, 1]
        normed = sharing.gather(normed)
        tokens, normed = normed.shape[:2], normed.flatten(0, 1)  # [B*T, D]
        gate, up = torch.mm(normed, w1.t()), torch.mm(normed, w3.t())  # [B*T, F] each
        del normed
        ctx.save_for_backward(h, rstd, gate, up, norm_weight, w1, w2, w3)
        ctx.sharing, ctx.elementwise = sharing, elementwise
        return h + sharing.scatter(torch.mm(elementwise.swiglu(gate, up), w2.t()).unflatten(0, tokens))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, rstd, gate, up, norm_weight, w1, w2, w3 = ctx.saved_tensors
        needs_h, needs_norm, needs_1, needs_2, needs_3 = ctx.needs_input_grad[:5]
        sharing, elementwise = ctx.sharing, ctx.elementwise
        whole = sharing.gather(grad)  # [B, T, D]
        flat = whole.reshape(-1, grad.shape[-1])
        dgate, dup, product = elementwise.swiglu_backward(torch.mm(flat, w2), gate, up)
        dw2 = torch.mm(flat.t(), product) if needs_2 else None
        del product
        normed = sharing.gather(elementwise.rms_norm_again(h, rstd, norm_weight)).flatten(0, 1)
        dw1 = torch.mm(dgate.t(), normed) if needs_1 else None
        dw3 = torch.mm(dup.t(), normed) if needs_3 else None
        del normed
        dh = dnorm = None
        if needs_h or needs_norm:
            dnormed = torch.mm(dgate, w1).addmm_(dup, w3).view(whole.shape)
            del dgate, dup
            dh, dnorm = elementwise.rms_norm_backward(sharing.scatter(dnormed), h, rstd, norm_weight, grad)
        return dh, dnorm, dw1, dw2, dw3, None, None, None


def _matrix(x: Tensor) -> Tensor:
    """[B, T, H, K] -> [B*T, H*K]; a view where the memory has that order."""
    return x.reshape(x.shape[0] * x.shape[1], -1)
