"""Causal attention: one function, three backends that agree.

- reference: the formula in fp32 with its whole [T, T] matrix; the others are tested against it.
- sdpa: torch's scaled_dot_product_attention, on CPU and CUDA.
- xformers: memory_efficient_attention, the paper's choice (section 2.4); CUDA only. Unlike sdpa it needs no
  [T, T] mask for packed documents.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamatrain.config.model import ATTENTION_BACKENDS
from llamatrain.errors import ConfigError

logger = logging.getLogger(__name__)


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
    batch, queries, keys = q.shape[0], q.shape[1], query_offset + q.shape[1]
    if doc_lengths is not None:
        if query_offset or k.shape[1] != queries:
            raise ValueError("attention: doc_lengths need as many keys as queries and query_offset=0")
        if sum(doc_lengths) != batch * queries or min(doc_lengths) < 1:
            raise ValueError(f"attention: doc_lengths must be positive and add up to {batch}*{queries}")
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


def _reference(q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None) -> Tensor:
    k, v = _each_query_head(k, q.shape[2]), _each_query_head(v, q.shape[2])
    visible = _visible(q.shape[0], q.shape[1], k.shape[1], doc_lengths, q.device)
    scores = torch.einsum("bqhk,bshk->bhqs", q.float(), k.float()) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)  # [B, H, Tq, Tk]
    return torch.einsum("bhqs,bshk->bqhk", weights, v.float()).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    mask = None
    if doc_lengths is not None or 1 < queries < keys:
        mask = _visible(q.shape[0], queries, keys, doc_lengths, q.device)
        # The only fused CUDA kernel that takes a mask wants as many key heads as query heads.
        k, v = _each_query_head(k, q.shape[2]), _each_query_head(v, q.shape[2])
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # [B, H, T, K]
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and queries == keys,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, doc_lengths: Sequence[int] | None) -> Tensor:
    import xformers.ops  # takes seconds and warns on machines without CUDA: only where it is used

    # xformers can share key heads among query heads in the forward only: repeat them.
    k, v = _each_query_head(k, q.shape[2]), _each_query_head(v, q.shape[2])
    shape, mask = q.shape, xformers_mask(q.shape[0], q.shape[1], k.shape[1], doc_lengths)
    if doc_lengths is not None:  # block masks take one row
        q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    # Flash attention's backward adds in no fixed order; the CUTLASS kernels do when asked to.
    deterministic = torch.are_deterministic_algorithms_enabled()
    operator = xformers.ops.MemoryEfficientAttentionCutlassOp if deterministic else None
    out: Tensor = xformers.ops.memory_efficient_attention(q, k, v, attn_bias=mask, op=operator)
    return out.view(shape)


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
