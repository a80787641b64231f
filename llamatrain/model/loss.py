"""The training loss: a sum over tokens, so that any micro-batching or sharding adds up to the same number.

The caller divides by the number of valid targets in the global batch.

Logits are the largest tensor of a step: a vocabulary of 32,000 makes 128 KB of fp32 of every token. So head and loss
are one function here, which goes over the tokens in chunks and keeps no logits. With p = softmax(h W^T) and e the
unit vector of the target, a token's loss is -log p[target], and the gradient of its logits p - e needs nothing from
the backward but a factor. So each chunk's share of the gradients of h and W is made while its logits are there; the
backward multiplies by the factor and takes no matrix product. In all it is as many products as without chunks.

Vocabulary-parallel (Megatron, arXiv 1909.08053, section 3): each rank has some rows of W, and the logits of these
only. The ranks exchange, per token, a maximum and two sums.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamatrain.memory import tokens_per_chunk

IGNORE_INDEX = -100  # targets with this value carry no loss


LossAndGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class VocabularyShards:
    """How the rows of the head's weight are spread: this rank has those from `first` on."""

    group: dist.ProcessGroup
    first: int
    vocab_size: int  # rows on all ranks of the group together


def linear_cross_entropy_sum(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    shards: VocabularyShards | None = None,
    chunk_tokens: int | None = None,
    compiled: LossAndGradient | None = None,
) -> Tensor:
    """Sum of -log p(target) in nats over the targets that are not `ignore_index`, p = softmax(h W^T); no target: 0.
    An fp32 scalar, fp64 if h is; the logits are never whole in memory.

    h [B, T, D] or [N, D], weight [V, D] of h's dtype, targets int64 [B, T] or [N]. Logits are rounded to h's dtype,
    the loss is fp32; the gradient of the weight is added up over chunks in fp32 and rounded once. There is no second
    derivative. chunk_tokens: tokens at a time, at most; by default as `tokens_per_chunk` has it. compiled: what makes
    losses and gradients of a chunk's logits, as `elementwise.cross_entropy`; not with `shards`.

    With `shards`, weight [rows, D] is this rank's part of the vocabulary (rows may differ between ranks, or be none),
    and all ranks of the group call with the same h, targets and chunk_tokens. The loss is whole, the same on every
    rank. The gradient of the weight is whole for this rank's rows. That of h is a PARTIAL sum, over this rank's rows:
    the caller adds it up over the group.
    Raises ValueError if shapes or dtypes do not fit.
    """
    _check(h, weight, targets, shards)
    tokens, targets = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
    if chunk_tokens is None:
        # of a number that all ranks know: they must make the same chunks
        rows = len(weight) if shards is None else math.ceil(shards.vocab_size / shards.group.size())
        chunk_tokens = tokens_per_chunk(len(tokens), width=h.shape[-1], vocab_rows=rows)
    if chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy_sum: chunk_tokens={chunk_tokens}")
    loss: Tensor = _LinearCrossEntropySum.apply(
        tokens, weight, targets, ignore_index, shards, chunk_tokens, torch.is_grad_enabled(), compiled
    )
    return loss


def _check(h: Tensor, weight: Tensor, targets: Tensor, shards: VocabularyShards | None) -> None:
    if weight.dim() != 2 or h.shape != (*targets.shape, weight.shape[1]):
        shapes = ", ".join(str(list(x.shape)) for x in (h, weight, targets))
        raise ValueError(f"linear_cross_entropy_sum: shapes {shapes} of h, weight and targets do not fit")
    if h.dtype != weight.dtype:
        raise ValueError(f"linear_cross_entropy_sum: h is {h.dtype}, weight {weight.dtype}; cast the weight")
    if shards is not None and not 0 <= shards.first <= shards.vocab_size - len(weight):
        raise ValueError(
            f"linear_cross_entropy_sum: no {len(weight)} rows from {shards.first} on in a vocabulary of "
            f"{shards.vocab_size}"
        )


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        shards: VocabularyShards | None,
        chunk_tokens: int,
        recorded: bool,  # needs_input_grad does not know of no_grad
        compiled: LossAndGradient | None,
    ) -> Tensor:
        needs_h, needs_weight = (recorded and needed for needed in ctx.needs_input_grad[:2])
        full, count, rows = torch.promote_types(h.dtype, torch.float32), len(h), len(weight)
        most = min(count, chunk_tokens)
        logits_memory = h.new_empty(most, rows)
        exps_memory = logits_memory if compiled or full == h.dtype else torch.empty_like(logits_memory, dtype=full)
        losses = h.new_empty(count, dtype=full)
        dh = torch.empty_like(h) if needs_h else None
        one_chunk = count <= most and count > 0
        dweight = torch.zeros_like(weight, dtype=h.dtype if count <= most else full) if needs_weight else None
        product = torch.empty_like(weight) if dweight is not None and dweight.dtype != h.dtype else None
        for start in range(0, count, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, count))
            target = _find(targets[chunk], rows, ignore_index, shards)
            logits = torch.mm(h[chunk], weight.t(), out=logits_memory[: chunk.stop - start])  # [n, V]
            if compiled is not None:
                loss, dlogits = compiled(logits, target.row, target.valid)
                losses[chunk] = loss[:, 0]
            else:
                exps = logits if full == h.dtype else exps_memory[: len(logits)].copy_(logits)
                losses[chunk], total = _exponentials(exps, target, shards)
                if needs_h or needs_weight:
                    dlogits = logits.copy_(_gradient(exps, total, target))  # not copied where it is the same tensor
            if dh is not None:
                torch.mm(dlogits, weight, out=dh[chunk])
            if dweight is not None and one_chunk:
                torch.mm(dlogits.t(), h, out=dweight)
            elif dweight is not None:
                _add_product(dweight, dlogits.t(), h[chunk], memory=product)
        ctx.save_for_backward(dh, dweight)
        ctx.dtype = h.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dweight = (None if x is None else _scaled(x, grad, ctx.dtype) for x in ctx.saved_tensors)
        return dh, dweight, None, None, None, None, None, None


class _Target(NamedTuple):
    """The targets of a chunk."""

    valid: Tensor  # bool [n, 1]
    own: Tensor  # bool [n, 1]: valid, and its row of the weight is here; [n, 0] on a rank without rows
    row: Tensor  # int64, as `own`: which row; 0 if it is not own


def _find(targets: Tensor, rows: int, ignore_index: int, shards: VocabularyShards | None) -> _Target:
    targets = targets[:, None]
    valid = targets != ignore_index
    if shards is None:
        return _Target(valid, valid, targets.masked_fill(~valid, 0))
    row = targets - shards.first
    own = valid & (row >= 0) & (row < rows)
    elsewhere = ~valid | ((targets >= 0) & (targets < shards.vocab_size) & ~own)
    row = row.masked_fill(elsewhere, 0)  # what is not in the vocabulary stays as it is, and is refused as an index
    return _Target(valid, own[:, :rows], row[:, :rows])


def _exponentials(logits: Tensor, target: _Target, shards: VocabularyShards | None) -> tuple[Tensor, Tensor]:
    """Make fp32 logits [n, V] their exponentials, less the highest. -log p(target) [n], and the sums [n, 1]."""
    rows = logits.shape[1]
    highest = logits.amax(1, keepdim=True) if rows else logits.new_full((len(logits), 1), -math.inf)
    if shards is not None:
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=shards.group)
    logits -= highest
    at_target = logits.gather(1, target.row).where(target.own, 0).sum(1, keepdim=True)
    total = logits.exp_().sum(1, keepdim=True)
    if shards is not None:
        both = torch.stack((total, at_target))
        dist.all_reduce(both, group=shards.group)
        total, at_target = both
    return (total.log() - at_target).where(target.valid, 0).squeeze(1), total


def _gradient(exps: Tensor, total: Tensor, target: _Target) -> Tensor:
    """Make the exponentials p - e, with e the unit vector of the target; 0 where there is none."""
    exps *= total.reciprocal().where(target.valid, 0)
    return exps.scatter_add_(1, target.row, -target.own.to(exps.dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, memory: Tensor | None) -> None:
    """total += a b; with `memory` for the product, where total has another dtype."""
    if memory is None:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out=memory)


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor, rounded once, without a copy of x in between; x stays, since backward may come again."""
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))
