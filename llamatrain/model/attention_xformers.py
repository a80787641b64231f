"""Causal attention by xformers' memory_efficient_attention, the paper's choice (section 2.4); CUDA only.

Packed documents need no mask in memory: the batch is laid out as one row of blocks. Arguments are those of
`llamatrain.model.attention_reference`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamatrain.model.attention_reference import Documents, SavedAttention, each_query_head, pieces

# xformers takes seconds to import and warns on machines without CUDA: it is imported only where it is used.


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    import xformers.ops

    shape = q.shape
    q, k, v, mask = _inputs(q, k, v, documents)
    operator = _operator()
    out: Tensor = xformers.ops.memory_efficient_attention(q, k, v, attn_bias=mask, op=operator)
    return out.view(shape)


def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, SavedAttention]:
    from xformers.ops import fmha

    shape = q.shape
    q, k, v, mask = _inputs(q, k, v, documents)
    operator = _operator()
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, attn_bias=mask, op=None if operator is None else operator[0]
    )
    return out.view(shape), SavedAttention(("xformers",), (lse, None, None))


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: SavedAttention, documents: Documents
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, and of k and v for each query head."""
    from xformers.ops import fmha

    shape, keys = q.shape, k.shape[1]
    q, k, v, mask = _inputs(q, k, v, documents)
    if documents is not None:
        grad_out, out = _as_one_row(grad_out), _as_one_row(out)
    operator = _operator()
    dq, dk, dv = fmha.memory_efficient_attention_backward(
        grad_out, out, saved.tensors[0], q, k, v, attn_bias=mask, op=None if operator is None else operator[1]
    )
    if documents is not None:
        firsts = _first_keys(documents, shape[1], keys)
        dk, dv = _whole_rows(dk, firsts, keys), _whole_rows(dv, firsts, keys)
    return dq.view(shape), dk, dv


def _inputs(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, Tensor, Tensor, Any]:
    heads, mask = q.shape[2], block_mask(q.shape[1], k.shape[1], documents)
    if documents is not None:
        firsts = _first_keys(documents, q.shape[1], k.shape[1])
        q, k, v = _as_one_row(q), _from_first_keys(k, firsts), _from_first_keys(v, firsts)
    # xformers can share key heads among query heads in the forward only: repeat them.
    return q, each_query_head(k, heads), each_query_head(v, heads), mask


def _operator() -> Any:
    """The pair of kernels (forward, backward), or None for xformers to choose."""
    import xformers.ops

    # Flash attention's backward adds in no fixed order; the CUTLASS kernels do when asked to.
    deterministic = torch.are_deterministic_algorithms_enabled()
    return xformers.ops.MemoryEfficientAttentionCutlassOp if deterministic else None


def block_mask(queries: int, keys: int, documents: Documents) -> Any:
    """xformers' form of the mask; with documents, for the batch laid out as one row of the keys that are seen."""
    from xformers.ops import fmha

    if documents is None:
        square = queries == keys
        return fmha.attn_bias.LowerTriangularMask() if square else fmha.attn_bias.LowerTriangularFromBottomRightMask()
    _, asking, asked = zip(*_blocks(documents, queries, keys), strict=True)
    if queries == keys:
        return fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(asked)
    return fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(asking, asked)


def _blocks(documents: Sequence[int], queries: int, keys: int) -> list[tuple[int, int, int]]:
    """Of each document that has queries: its first key in the flattened batch, its queries and its keys."""
    blocks = []
    for begin, end in pieces(documents, keys):
        first_query = begin - begin % keys + keys - queries  # of the row
        if end > first_query:
            blocks.append((begin, end - max(begin, first_query), end - begin))
    return blocks


def _first_keys(documents: Sequence[int], queries: int, keys: int) -> list[int]:
    """In each row, where the first document with queries begins: no query sees the keys before."""
    firsts: dict[int, int] = {}
    for begin, _, _ in _blocks(documents, queries, keys):
        firsts.setdefault(begin // keys, begin % keys)
    return list(firsts.values())


def _as_one_row(x: Tensor) -> Tensor:
    """[B, T, H, K] -> [1, B*T, H, K], which xformers' block masks take."""
    return x.reshape(1, -1, *x.shape[2:])


def _from_first_keys(x: Tensor, firsts: Sequence[int]) -> Tensor:
    """Each row of x [B, T, H, K] from its first key on, as one row."""
    if not any(firsts):
        return _as_one_row(x)
    return torch.cat([row[first:] for row, first in zip(x, firsts, strict=True)])[None]


def _whole_rows(grad: Tensor, firsts: Sequence[int], keys: int) -> Tensor:
    """Undo `_from_first_keys` in the gradient: [B, T, H, K], 0 for keys that no query sees."""
    rows = grad[0].split([keys - first for first in firsts])
    if not any(firsts):
        return grad.view(len(firsts), keys, *grad.shape[2:])
    return torch.stack([F.pad(row, (0, 0, 0, 0, first, 0)) for row, first in zip(rows, firsts, strict=True)])
