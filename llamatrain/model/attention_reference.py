"""Causal attention by its formula, with the whole matrix of scores: the other backends are tested against it.

In fp32, or fp64 where the inputs are. Whatever the backend, what it is given here has its last query at its last key,
[B, Tq, H, K] queries over [B, Tk, Hkv, K] keys and values, and documents whose lengths add up to B*Tk.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from llamatrain.model.elementwise import at_least_fp32

Documents = Sequence[int] | None


class SavedAttention(NamedTuple):
    """What the backward of one attention, or of several in turn, needs beside q, k, v and the output."""

    kernels: tuple[str, ...]  # those that ran: each backward must be the same one's
    # Of each: lse [B, H, Tq] fp32, the log of each softmax's denominator, in the layout (and padding) of the kernel;
    # and a few bytes of random state, in two tensors, which CUDA kernels keep even without dropout.
    tensors: tuple[Tensor | None, ...]

    def of_call(self, number: int) -> "SavedAttention":
        return SavedAttention(self.kernels[number : number + 1], self.tensors[3 * number : 3 * number + 3])


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    k, v = each_query_head(k, q.shape[2]), each_query_head(v, q.shape[2])
    weights = _scores(q.float(), k.float(), documents).softmax(dim=-1)  # [B, H, Tq, Tk]
    return torch.einsum("bhqs,bshk->bqhk", weights, v.float()).to(q.dtype)


def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, SavedAttention]:
    k, v = each_query_head(k, q.shape[2]), each_query_head(v, q.shape[2])
    scores = _scores(at_least_fp32(q), at_least_fp32(k), documents)
    out = torch.einsum("bhqs,bshk->bqhk", scores.softmax(dim=-1), at_least_fp32(v)).to(q.dtype)
    return out, SavedAttention(("formula",), (scores.logsumexp(dim=-1), None, None))


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: SavedAttention, documents: Documents
) -> tuple[Tensor, Tensor, Tensor]:
    """With P = softmax(S): dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q.

    dK and dV are those of each query head.
    """
    dtype, heads = q.dtype, q.shape[2]
    grad_out, q, k, v = (at_least_fp32(x) for x in (grad_out, q, each_query_head(k, heads), each_query_head(v, heads)))
    weights = _scores(q, k, documents).softmax(dim=-1)  # [B, H, Tq, Tk]; exp(S - lse) would round where S is large
    dv = torch.einsum("bhqs,bqhk->bshk", weights, grad_out)
    grad = torch.einsum("bqhk,bshk->bhqs", grad_out, v)
    grad = weights * (grad - (weights * grad).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    dq = torch.einsum("bhqs,bshk->bqhk", grad, k)
    dk = torch.einsum("bhqs,bqhk->bshk", grad, q)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _scores(q: Tensor, k: Tensor, documents: Documents) -> Tensor:
    """q k^T / sqrt(K), -inf where a query does not see the key: [B, H, Tq, Tk]."""
    visible = visible_keys(q.shape[0], q.shape[1], k.shape[1], documents, q.device)
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5
    return scores.masked_fill(~visible, float("-inf"))


# Shared by the backends


def visible_keys(batch: int, queries: int, keys: int, documents: Documents, device: torch.device) -> Tensor:
    """Which keys each query sees: bool [Tq, Tk], or [B, 1, Tq, Tk] for packed documents."""
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if documents is None:
        return causal
    on_cuda = device.type == "cuda"  # from pinned memory the host need not wait for the copy
    lengths = torch.tensor(documents, pin_memory=on_cuda).to(device, non_blocking=on_cuda)
    numbers = torch.arange(len(documents), device=device)
    document = numbers.repeat_interleave(lengths, output_size=batch * keys).view(batch, 1, keys)
    return causal & (document[..., keys - queries :, None] == document[..., None, :])


def pieces(documents: Sequence[int], row: int) -> list[tuple[int, int]]:
    """Where the documents begin and end, those that cross the end of a row of `row` tokens cut there."""
    ends = list(accumulate(documents))
    return list(pairwise(sorted({0, *ends, *range(row, ends[-1], row)})))


def each_query_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, T, Hkv, K] repeated for the query heads that share them: [B, T, H, K]."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)
