"""Causal attention: one function, three backends that agree.

- reference: the formula in fp32 with its whole [T, T] matrix; the others are tested against it.
- sdpa: torch's scaled_dot_product_attention, on CPU and CUDA.
- xformers: memory_efficient_attention, the paper's choice (section 2.4); CUDA only. Unlike sdpa it needs no
  [T, T] mask for packed documents.

`attention` is differentiated by autograd. `attention_forward` and `attention_backward` run the same kernels for a
backward written by hand, which decides itself what stays in memory between the two.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from llamatrain.config.model import ATTENTION_BACKENDS
from llamatrain.errors import ConfigError

logger = logging.getLogger(__name__)
aten = torch.ops.aten


def resolve_backend(name: str, device: torch.device) -> str:
    """The backend to use for `model.attention=name` on `device`: xformers, sdpa or reference.

    auto is xformers on CUDA where it works (sdpa where not, which is logged once), and sdpa on the CPU.
    Raises ConfigError for an unknown name, and for xformers where it does not work.
    """
    if name not in ATTENTION_BACKENDS:
        raise ConfigError(f"model.attention={name}: choose one of {', '.join(ATTENTION_BACKENDS)}")
    if name == "auto":
        return _automatic_backend(device)
    if name == "xformers":
        failure = _xformers_failure(device)
        if failure is not None:
            raise ConfigError(f"model.attention=xformers cannot run: {failure}; set model.attention=sdpa")
    return name


@lru_cache
def _automatic_backend(device: torch.device) -> str:
    if device.type != "cuda":
        return "sdpa"
    failure = _xformers_failure(device)
    if failure is None:
        return "xformers"
    logger.warning("attention: sdpa in place of xformers, which cannot run here (%s)", failure)
    return "sdpa"


def _xformers_failure(device: torch.device) -> str | None:
    """Why xformers cannot compute attention on `device`, in one line; None if it can."""
    if device.type != "cuda":
        return f"xformers has no operator for the {device.type.upper()}"
    probe = torch.zeros(1, 16, 1, 64, dtype=torch.bfloat16, device=device)
    try:
        _xformers(probe, probe, probe, None)
    except Exception as error:  # no package, a wrong build, an old GPU: whatever it is, it is the reason
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str,
    doc_lengths: Sequence[int] | None = None,
    query_offset: int = 0,
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, each query seeing itself and what is before it: [B, Tq, H, K], q's dtype.

    q [B, Tq, H, K]; k, v [B, Tk, Hkv, K], where Hkv divides H and query head h reads key head h // (H / Hkv).
    query_offset: the position of the first query among the keys (a KV cache holds earlier keys).
    doc_lengths: lengths of packed documents over the flattened batch, adding up to B*T; a query sees its own
    document only, and a document that crosses the end of a row is cut there. Not together with query_offset.
    """
    keys = query_offset + q.shape[1]
    if doc_lengths is not None:
        if query_offset or k.shape[1] != q.shape[1]:
            raise ValueError("attention: doc_lengths need as many keys as queries and query_offset=0")
        _check_documents(q, doc_lengths)
    if k.shape[1] < keys:
        raise ValueError(f"attention: {k.shape[1]} keys for queries at {query_offset} to {keys - 1}")
    k, v = k[:, :keys], v[:, :keys]  # no query sees later keys; now the last query stands at the last key
    if backend == "xformers":
        return _xformers(q, k, v, doc_lengths)
    if backend == "sdpa":
        return _sdpa(q, k, v, doc_lengths)
    if backend == "reference":
        return _reference(q, k, v, doc_lengths)
    raise ValueError(f"attention: no backend {backend!r}; resolve_backend gives one")


class SavedAttention(NamedTuple):
    """What `attention_backward` needs beside q, k, v and the output."""

    kernel: str  # the one that ran; its backward must be the same one's
    lse: Tensor  # [B, H, T] fp32, log of each softmax's denominator, in the layout (and padding) of the kernel
    rest: tuple[Tensor | None, ...] = ()  # a few bytes of random state, which CUDA kernels keep even without dropout


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str, doc_lengths: Sequence[int] | None = None
) -> tuple[Tensor, SavedAttention]:
    """`attention` of as many queries as keys, and what its backward needs. Not differentiable.

    Unlike `attention` it keeps fp64 where the kernel does: so that gradients can be checked by differences.
    """
    _check_training_inputs(q, k, doc_lengths)
    if backend == "xformers":
        return _xformers_forward(q, k, v, doc_lengths)
    if backend == "sdpa":
        return _sdpa_forward(q, k, v, doc_lengths)
    if backend == "reference":
        return _reference_forward(q, k, v, doc_lengths)
    raise ValueError(f"attention: no backend {backend!r}; resolve_backend gives one")


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: SavedAttention,
    *,
    backend: str,
    doc_lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of `out` [B, T, H, K]; arguments and results of `attention_forward`."""
    if backend == "xformers":
        dq, dk, dv = _xformers_backward(grad_out, q, k, v, out, saved, doc_lengths)
    elif backend == "sdpa" and saved.kernel != "formula":
        dq, dk, dv = _sdpa_backward(grad_out, q, k, v, out, saved, doc_lengths)
    else:
        dq, dk, dv = _reference_backward(grad_out, q, k, v, doc_lengths)
    return dq, _sum_of_query_heads(dk, k.shape[2]), _sum_of_query_heads(dv, v.shape[2])


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if that is what it has."""
    return x if x.dtype == torch.float64 else x.float()


def _check_training_inputs(q: Tensor, k: Tensor, doc_lengths: Sequence[int] | None) -> None:
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"attention: {k.shape[1]} keys for {q.shape[1]} queries; a backward needs as many")
    if doc_lengths is not None:
        _check_documents(q, doc_lengths)


def _check_documents(q: Tensor, doc_lengths: Sequence[int]) -> None:
    if sum(doc_lengths) != q.shape[0] * q.shape[1] or min(doc_lengths) < 1:
        raise ValueError(f"attention: doc_lengths must be positive and add up to {q.shape[0]}*{q.shape[1]}")


def _visible(batch: int, queries: int, keys: int, doc_lengths: Sequence[int] | None, device: torch.device) -> Tensor:
    """Which keys each query sees: bool [Tq, Tk], or [B, 1, T, T] for packed documents."""
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if doc_lengths is None:
        return causal
    lengths = torch.tensor(doc_lengths, device=device)
    numbers = torch.arange(len(doc_lengths), device=device)
    document = numbers.repeat_interleave(lengths, output_size=batch * keys).view(batch, 1, keys)
    return causal & (document[..., :, None] == document[..., None, :])


def _each_query_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, T, Hkv, K] repeated for the query heads that share them: [B, T, H, K]."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _sum_of_query_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """Undo `_each_query_head` in the gradient: [B, T, Hkv, K], added in fp32."""
    return grad if grad.shape[2] == kv_heads else grad.unflatten(2, (kv_heads, -1)).sum(3)


# reference


def _reference(q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None) -> Tensor:
    k, v = _each_query_head(k, q.shape[2]), _each_query_head(v, q.shape[2])
    weights = _scores(q.float(), k.float(), doc_lengths).softmax(dim=-1)  # [B, H, Tq, Tk]
    return torch.einsum("bhqs,bshk->bqhk", weights, v.float()).to(q.dtype)


def _scores(q: Tensor, k: Tensor, doc_lengths: Sequence[int] | None) -> Tensor:
    """q k^T / sqrt(K), -inf where a query does not see the key: [B, H, Tq, Tk]."""
    visible = _visible(q.shape[0], q.shape[1], k.shape[1], doc_lengths, q.device)
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5
    return scores.masked_fill(~visible, float("-inf"))


def _reference_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None
) -> tuple[Tensor, SavedAttention]:
    k, v = _each_query_head(k, q.shape[2]), _each_query_head(v, q.shape[2])
    scores = _scores(at_least_fp32(q), at_least_fp32(k), doc_lengths)
    out = torch.einsum("bhqs,bshk->bqhk", scores.softmax(dim=-1), at_least_fp32(v)).to(q.dtype)
    return out, SavedAttention("formula", scores.logsumexp(dim=-1))


def _reference_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """With P = softmax(S): dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q."""
    dtype = q.dtype
    k, v = _each_query_head(k, q.shape[2]), _each_query_head(v, q.shape[2])
    grad_out, q, k, v = (at_least_fp32(x) for x in (grad_out, q, k, v))
    weights = _scores(q, k, doc_lengths).softmax(dim=-1)  # [B, H, T, T]; exp(S - lse) would round where S is large
    dv = torch.einsum("bhqs,bqhk->bshk", weights, grad_out)
    grad = torch.einsum("bqhk,bshk->bhqs", grad_out, v)
    grad = weights * (grad - (weights * grad).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    dq = torch.einsum("bhqs,bshk->bqhk", grad, k)
    dk = torch.einsum("bhqs,bqhk->bshk", grad, q)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


# sdpa


def _sdpa(q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None) -> Tensor:
    square = q.shape[1] == k.shape[1]
    q, k, v, mask = _sdpa_inputs(q, k, v, doc_lengths)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and square, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out.transpose(1, 2)


def _sdpa_inputs(
    q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v as torch wants them, [B, H, T, K], and the mask if the causal one that it knows is not enough."""
    queries, keys = q.shape[1], k.shape[1]
    mask = None
    if doc_lengths is not None or 1 < queries < keys:
        mask = _visible(q.shape[0], queries, keys, doc_lengths, q.device)
        # The only fused CUDA kernel that takes a mask wants as many key heads as query heads.
        k, v = _each_query_head(k, q.shape[2]), _each_query_head(v, q.shape[2])
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask


def _sdpa_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """The kernel that scaled_dot_product_attention would train with; formula where it has none to call by name."""
    grouped = k.shape[1] != q.shape[1]
    with torch.enable_grad():  # some kernels have a forward only
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, mask is None, enable_gqa=grouped)
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


def _sdpa_forward(q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None) -> tuple[Tensor, SavedAttention]:
    unmoved = q, k, v
    q, k, v, mask = _sdpa_inputs(q, k, v, doc_lengths)
    kernel, bias, causal = _sdpa_kernel(q, k, v, mask), _bias(mask, q), mask is None
    rest: tuple[Tensor | None, ...] = ()
    if kernel == "flash_cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)
    elif kernel == "flash":
        out, lse, _, _, _, _, *rest, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    elif kernel == "cudnn":
        out, lse, _, _, _, _, *rest, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal)
    elif kernel == "efficient":
        k, v, bias = _for_efficient(q, k, v, bias)
        out, lse, *rest = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal)
    else:
        return _reference_forward(*unmoved, doc_lengths)
    return out.transpose(1, 2), SavedAttention(kernel, lse, tuple(rest))


def _sdpa_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: SavedAttention,
    doc_lengths: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of the kernel that ran; dk and dv may still be those of each query head."""
    length = q.shape[1]
    q, k, v, mask = _sdpa_inputs(q, k, v, doc_lengths)
    grad, out, lse, rest = grad_out.transpose(1, 2), out.transpose(1, 2), saved.lse, saved.rest
    bias, causal = _bias(mask, q), mask is None
    lengths = (None, None, length, length)  # the two None: no tensors of row ends, since all rows are equally long
    if saved.kernel == "flash_cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias
        )
    elif saved.kernel == "flash":
        grads = aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, *lengths, 0.0, causal, *rest)
    elif saved.kernel == "cudnn":
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, *rest, bias, *lengths, 0.0, causal
        )
    else:
        k, v, bias = _for_efficient(q, k, v, bias)
        *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, bias, out, lse, *rest, 0.0, [True, True, True, False], causal
        )
    dq, dk, dv = (g.transpose(1, 2) for g in grads)
    return dq, dk, dv


def _for_efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v and the bias with as many heads as q [B, H, T, K]: this kernel shares neither."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return k, v, None if bias is None else bias.expand(*q.shape[:3], k.shape[2])


# xformers


def _xformers(q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None) -> Tensor:
    import xformers.ops  # takes seconds and warns on machines without CUDA: only where it is used

    shape = q.shape
    q, k, v, mask = _xformers_inputs(q, k, v, doc_lengths)
    operator = _xformers_operator()
    out: Tensor = xformers.ops.memory_efficient_attention(q, k, v, attn_bias=mask, op=operator)
    return out.view(shape)


def _xformers_inputs(
    q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor, Any]:
    # xformers can share key heads among query heads in the forward only: repeat them.
    k, v = _each_query_head(k, q.shape[2]), _each_query_head(v, q.shape[2])
    mask = xformers_mask(q.shape[0], q.shape[1], k.shape[1], doc_lengths)
    if doc_lengths is not None:
        q, k, v = _as_one_row(q), _as_one_row(k), _as_one_row(v)
    return q, k, v, mask


def _as_one_row(x: Tensor) -> Tensor:
    """[B, T, H, K] -> [1, B*T, H, K], which xformers' block masks take."""
    return x.reshape(1, -1, *x.shape[2:])


def _xformers_operator() -> Any:
    """The pair of kernels (forward, backward), or None for xformers to choose."""
    import xformers.ops

    # Flash attention's backward adds in no fixed order; the CUTLASS kernels do when asked to.
    deterministic = torch.are_deterministic_algorithms_enabled()
    return xformers.ops.MemoryEfficientAttentionCutlassOp if deterministic else None


def _xformers_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None
) -> tuple[Tensor, SavedAttention]:
    from xformers.ops import fmha

    shape = q.shape
    q, k, v, mask = _xformers_inputs(q, k, v, doc_lengths)
    operator = _xformers_operator()
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, attn_bias=mask, op=None if operator is None else operator[0]
    )
    return out.view(shape), SavedAttention("xformers", lse)


def _xformers_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: SavedAttention,
    doc_lengths: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, and of k and v for each query head."""
    from xformers.ops import fmha

    shape = q.shape
    q, k, v, mask = _xformers_inputs(q, k, v, doc_lengths)
    if doc_lengths is not None:
        grad_out, out = _as_one_row(grad_out), _as_one_row(out)
    operator = _xformers_operator()
    dq, dk, dv = fmha.memory_efficient_attention_backward(
        grad_out, out, saved.lse, q, k, v, attn_bias=mask, op=None if operator is None else operator[1]
    )
    return dq.view(shape), dk.view(shape), dv.view(shape)


def xformers_mask(batch: int, queries: int, keys: int, doc_lengths: Sequence[int] | None) -> Any:
    """xformers' form of the mask; with documents, for the batch laid out as one row."""
    from xformers.ops import fmha

    if doc_lengths is not None:
        row_ends = range(keys, batch * keys + 1, keys)
        ends = sorted({*accumulate(doc_lengths), *row_ends})
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths)
    if queries == keys:
        return fmha.attn_bias.LowerTriangularMask()
    return fmha.attn_bias.LowerTriangularFromBottomRightMask()
