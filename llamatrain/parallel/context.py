"""Context parallelism: ranks share each sequence, so that attention to long ones fits and is spread.

A sequence of T tokens is cut into 2 n chunks, and rank r of n has chunks r and 2n-1-r: an early one, which sees few
keys, and a late one, which sees many, so under the causal mask all ranks have the same work. Keys and values are
gathered for each attention, whole and in order, and every rank attends with its own queries; the gradients of keys
and values are added up over the ranks on their way back (Llama 3, arXiv 2407.21783, section 3.3.2). Whatever the
mask, documents included, attention stays that of one rank, and with n_kv_heads < n_heads little is gathered.

All else in the model works on each token alone. All ranks of a group are given the same samples, whole.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamatrain.distributed import all_gather_single, reduce_scatter_single
from llamatrain.model.attention import Attend
from llamatrain.model.attention_reference import Documents, SavedAttention
from llamatrain.model.elementwise import at_least_fp32
from llamatrain.model.llama import Attention, Llama


class ContextParallel:
    """One of the ranks of a group that share their sequences."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def own(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """Of something whole along `dim`, T of it, this rank's T/n, in order. T divides by 2n."""
        if x.shape[dim] % (2 * self.size):
            raise ValueError(f"{x.shape[dim]} tokens do not divide into two chunks for each of {self.size} ranks")
        chunks = x.chunk(2 * self.size, dim)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim)

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x [P, T/n, ...], whole and in order: [P, T, ...]."""
        parts = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        all_gather_single(parts, x.contiguous(), group=self.group)
        early, late = parts.unflatten(0, (self.size, -1)).movedim(0, 1).chunk(2, dim=2)  # [P, n, T/2n, ...] each
        return torch.cat((early, late.flip(1)), dim=1).flatten(1, 2)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """This rank's part [P, T/n, ...] of the sum of all ranks' x [P, T, ...]."""
        early, late = x.unflatten(1, (2, self.size, -1)).unbind(1)  # [P, n, T/2n, ...] each
        parts = torch.cat((early, late.flip(1)), dim=2).movedim(1, 0).flatten(0, 1)  # [n*P, T/n, ...]
        own = x.new_empty(x.shape[0], *parts.shape[1:])
        reduce_scatter_single(own, parts, group=self.group)
        return own


class SharedAttend(Attend):
    """Causal attention of ranks that share each sequence: q, k, v and the output are of a rank's own tokens.

    doc_lengths are those of the whole sequences, the same on all ranks. Between forward and backward nothing is kept
    but own tokens: keys and values are gathered again. Their gradients are added up in fp32.
    """

    def __init__(self, backend: str, context: ContextParallel) -> None:
        super().__init__(backend)
        self.context = context

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, doc_lengths: Documents = None, query_offset: int = 0
    ) -> Tensor:
        if query_offset:
            raise ValueError("attention: ranks that share sequences hold no earlier keys; generate on one rank")
        out: Tensor = _SharedAttention.apply(q, k, v, self, doc_lengths)
        return out

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, doc_lengths: Documents = None, query_offset: int = 0
    ) -> tuple[Tensor, SavedAttention]:
        keys, values = self._gathered(k, v)
        outs, saved = [], SavedAttention((), ())
        for part, first in zip(_halves(q), self._firsts(q), strict=True):
            out, (kernels, tensors) = super().forward(part, keys, values, doc_lengths=doc_lengths, query_offset=first)
            outs.append(out)
            saved = SavedAttention(saved.kernels + kernels, saved.tensors + tensors)
        return torch.cat(outs, dim=1), saved

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
        keys, values = self._gathered(k, v)
        dqs, sums = [], torch.zeros(2, *keys.shape, dtype=at_least_fp32(k[:0]).dtype, device=k.device)
        halves = zip(*map(_halves, (grad_out, q, out)), self._firsts(q), strict=True)
        for number, (grad, part, out_part, first) in enumerate(halves):
            places = (grad, part, keys, values, out_part, saved.of_call(number))
            dq, dk, dv = super().backward(*places, doc_lengths=doc_lengths, query_offset=first)
            dqs.append(dq)
            sums[0] += dk
            sums[1] += dv
        dk, dv = self.context.scatter_sum(sums.flatten(0, 1)).to(k.dtype).chunk(2)
        return torch.cat(dqs, dim=1), dk, dv

    def _gathered(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values [B, T, Hkv, K], in one collective."""
        keys, values = self.context.gather(torch.cat((k, v))).chunk(2)
        return keys, values

    def _firsts(self, q: Tensor) -> tuple[int, int]:
        """Where in the sequence this rank's two chunks begin."""
        chunk, context = q.shape[1] // 2, self.context
        return context.rank * chunk, (2 * context.size - 1 - context.rank) * chunk


class _SharedAttention(torch.autograd.Function):
    """`SharedAttend`'s forward and backward, for autograd."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attend: SharedAttend, doc_lengths: Documents) -> Tensor:
        out, saved = attend.forward(q, k, v, doc_lengths=doc_lengths)
        ctx.save_for_backward(q, k, v, out, *saved.tensors)
        ctx.kernels, ctx.attend, ctx.doc_lengths = saved.kernels, attend, doc_lengths
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *tensors = ctx.saved_tensors
        saved = SavedAttention(ctx.kernels, tuple(tensors))
        return *ctx.attend.backward(grad, q, k, v, out, saved, doc_lengths=ctx.doc_lengths), None, None


def _halves(x: Tensor) -> list[Tensor]:
    """The two chunks that a rank has of each sequence, [B, T/2n, ...] each, laid out for any kernel."""
    return [half.contiguous() for half in x.chunk(2, dim=1)]


def share_sequences(model: Llama, group: dist.ProcessGroup) -> None:
    """Let the ranks of a group share the sequences that a model is given."""
    model.context = context = ContextParallel(group)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = SharedAttend(module.attend.backend, context)
