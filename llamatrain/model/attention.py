"""Causal attention: three backends that agree, and the object by which a model's layers call one of them.

- reference: the formula in fp32 with its whole matrix of scores; the others are tested against it.
- sdpa: torch's scaled_dot_product_attention, on CPU and CUDA.
- xformers: memory_efficient_attention, the paper's choice; CUDA only.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from llamatrain.model import attention_reference, attention_sdpa, attention_xformers
from llamatrain.model.attention_reference import Documents, SavedAttention, pieces


class Backend(Protocol):
    """A module that computes attention; the arguments are described in `llamatrain.model.attention_reference`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, SavedAttention]: ...

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: SavedAttention,
        documents: Documents,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


BACKENDS: dict[str, Backend] = {
    "reference": attention_reference,
    "sdpa": attention_sdpa,
    "xformers": attention_xformers,
}


class Attend:
    """Causal attention by one backend, of a rank that has all tokens of its samples.

    Called, it is differentiated by autograd. Its `forward` and `backward` are the same kernels for a backward written
    by hand, which decides itself what stays in memory between the two. Where ranks share each sequence, layers hold
    another one (`llamatrain.parallel.context`).

    It computes softmax(q k^T / sqrt(K)) v, each query seeing itself and what is before it. Arguments:
    q [B, Tq, H, K]; k, v [B, Tk, Hkv, K], where Hkv divides H and query head h reads key head h // (H / Hkv).
    query_offset: the position of each row's first query among its keys (a KV cache holds earlier keys).
    doc_lengths: lengths of packed documents over the flattened batch of keys, adding up to B*Tk; a query sees its
    own document only, and a document that crosses the end of a row is cut there.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, doc_lengths: Documents = None, query_offset: int = 0
    ) -> Tensor:
        """The output, [B, Tq, H, K] in q's dtype."""
        k, v, documents = _keys_before_the_end(q, k, v, doc_lengths, query_offset)
        return self._kernels.attend(q, k, v, documents)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, doc_lengths: Documents = None, query_offset: int = 0
    ) -> tuple[Tensor, SavedAttention]:
        """The output, and what its backward needs. Not differentiable.

        Unlike the call it keeps fp64 where the kernel does: so that gradients can be checked by differences.
        """
        k, v, documents = _keys_before_the_end(q, k, v, doc_lengths, query_offset)
        return self._kernels.forward(q, k, v, documents)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: SavedAttention,
        *,
        doc_lengths: Documents = None,
        query_offset: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v from that of `out`; arguments and results of `forward`."""
        row, kv_heads = k.shape[1], k.shape[2]
        k, v, documents = _keys_before_the_end(q, k, v, doc_lengths, query_offset)
        dq, dk, dv = self._kernels.backward(grad_out, q, k, v, out, saved, documents)
        dk, dv = (_of_all_keys(_sum_of_query_heads(grad, kv_heads), row) for grad in (dk, dv))
        return dq, dk, dv

    @property
    def _kernels(self) -> Backend:
        if self.backend not in BACKENDS:
            raise ValueError(f"attention: no backend {self.backend!r}; resolve_backend gives one")
        return BACKENDS[self.backend]


def _keys_before_the_end(
    q: Tensor, k: Tensor, v: Tensor, doc_lengths: Documents, query_offset: int
) -> tuple[Tensor, Tensor, Documents]:
    """k, v and the documents up to the last query, which then stands at the last key. Raises ValueError."""
    batch, row, keys = k.shape[0], k.shape[1], query_offset + q.shape[1]
    if row < keys:
        raise ValueError(f"attention: {row} keys for queries at {query_offset} to {keys - 1}")
    if doc_lengths is not None:
        if sum(doc_lengths) != batch * row or min(doc_lengths) < 1:
            raise ValueError(f"attention: doc_lengths must be positive and add up to {batch}*{row}")
        if keys < row:
            seen = (min(end, begin - begin % row + keys) - begin for begin, end in pieces(doc_lengths, row))
            doc_lengths = [length for length in seen if length > 0]
    return k[:, :keys], v[:, :keys], doc_lengths


def _sum_of_query_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """Of gradients of each query head's keys [B, T, H, K], those of the shared ones [B, T, Hkv, K], added in fp32."""
    return grad if grad.shape[2] == kv_heads else grad.unflatten(2, (kv_heads, -1)).sum(3)


def _of_all_keys(grad: Tensor, row: int) -> Tensor:
    """The gradient [B, T, Hkv, K] of whole rows: 0 for keys after the last query."""
    return grad if grad.shape[1] == row else F.pad(grad, (0, 0, 0, 0, 0, row - grad.shape[1]))
