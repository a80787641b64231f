"""Causal attention by torch's scaled_dot_product_attention and the kernels behind it, on CPU and CUDA.

Packed documents need a mask of [B, 1, Tq, Tk]. Arguments are those of `llamatrain.model.attention_reference`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend

from llamatrain.model import attention_reference as reference
from llamatrain.model.attention_reference import Documents, SavedAttention, each_query_head, visible_keys

aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    square, mask = q.shape[1] == k.shape[1], _mask(q, k, documents)
    q, k, v = _inputs(q, k, v, masked=mask is not None)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and square, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out.transpose(1, 2)


def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, SavedAttention]:
    kernel, mask = _kernel(q, k, v, documents)
    if kernel == "formula":
        return reference.forward(q, k, v, documents)
    causal = kernel == "flash" or (mask is None and q.shape[1] == k.shape[1])
    q, k, v = _inputs(q, k, v, masked=mask is not None)
    bias, seed, offset = _bias(mask, q), None, None
    if kernel == "flash_cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)
    elif kernel == "flash":
        out, lse, *_, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    elif kernel == "cudnn":
        out, lse, *_, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal)
    else:
        k, v, bias = _for_efficient(q, k, v, bias)
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal)
    return out.transpose(1, 2), SavedAttention((kernel,), (lse, seed, offset))


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: SavedAttention, documents: Documents
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of the kernel that ran; dk and dv may still be those of each query head."""
    (kernel,), (lse, *random) = saved
    if kernel == "formula":
        return reference.backward(grad_out, q, k, v, out, saved, documents)
    mask = None if kernel == "flash" else _mask(q, k, documents)
    lengths = (None, None, q.shape[1], k.shape[1])  # None: no tensors of row ends, since all rows are equally long
    causal = kernel == "flash" or (mask is None and q.shape[1] == k.shape[1])
    q, k, v = _inputs(q, k, v, masked=mask is not None)
    grad, out, bias = grad_out.transpose(1, 2), out.transpose(1, 2), _bias(mask, q)
    if kernel == "flash_cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias
        )
    elif kernel == "flash":
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, *lengths, 0.0, causal, *random
        )
    elif kernel == "cudnn":
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, *random, bias, *lengths, 0.0, causal
        )
    else:
        k, v, bias = _for_efficient(q, k, v, bias)
        *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, bias, out, lse, *random, 0.0, [True, True, True, False], causal
        )
    dq, dk, dv = (g.transpose(1, 2) for g in grads)
    return dq, dk, dv


def _mask(q: Tensor, k: Tensor, documents: Documents) -> Tensor | None:
    """Which keys each query sees, unless that is all of them or torch's is_causal says it."""
    if documents is None and q.shape[1] in (1, k.shape[1]):
        return None
    return visible_keys(q.shape[0], q.shape[1], k.shape[1], documents, q.device)


def _inputs(q: Tensor, k: Tensor, v: Tensor, *, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as torch wants them: [B, H, T, K]."""
    if masked:  # the only fused CUDA kernel that takes a mask wants as many key heads as query heads
        k, v = each_query_head(k, q.shape[2]), each_query_head(v, q.shape[2])
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _kernel(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[str, Tensor | None]:
    """Whose forward and backward to call, by a name of our own, and with which mask; formula: nobody's."""
    if documents is None and q.shape[1] < k.shape[1] and _flash_attention_serves(q, k, v):
        return "flash", None
    mask = _mask(q, k, documents)
    return _choice_of_torch(*_inputs(q, k, v, masked=mask is not None), mask), mask


def _flash_attention_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether CUDA's flash attention can be called without asking torch, for fewer queries than keys.

    torch would not take it: its is_causal begins at the first key, while this kernel's causal mask ends at the last,
    which is what is wanted here. torch.nn.attention.bias.causal_lower_right rests on that too.
    """
    if q.device.type == "cpu" or q.shape[-1] % 8:
        return False
    q, k, v = (x.detach().requires_grad_() for x in _inputs(q, k, v, masked=False))
    return can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, k.shape[1] != q.shape[1]))


def _choice_of_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """The kernel that scaled_dot_product_attention would train with; formula where it has none to call by name."""
    grouped, causal = k.shape[1] != q.shape[1], mask is None and q.shape[2] == k.shape[2]
    with torch.enable_grad():  # some kernels have a forward only
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, enable_gqa=grouped)
    if q.device.type == "cpu":
        return "flash_cpu" if choice == SDPBackend.FLASH_ATTENTION.value else "formula"
    if q.shape[-1] % 8:  # torch pads heads for flash attention; such narrow models are not worth it
        return "formula"
    kernels = {
        SDPBackend.FLASH_ATTENTION.value: "flash",
        SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
        SDPBackend.CUDNN_ATTENTION.value: "cudnn",  # torch's first choice on Hopper with a recent cuDNN
    }
    return kernels.get(choice, "formula")


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """0 where a query sees the key and -inf elsewhere, in rows that begin at multiples of 8 elements.

    The memory-efficient kernel asks for that; `scaled_dot_product_attention` makes the same of a mask.
    """
    if mask is None:
        return None
    keys = mask.shape[-1]
    bias = mask.new_full((*mask.shape[:-1], -(-keys // 8) * 8), float("-inf"), dtype=like.dtype)
    return bias[..., :keys].masked_fill_(mask, 0.0)


def _for_efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v and the bias with as many heads as q [B, H, T, K]: this kernel shares neither."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return k, v, None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
