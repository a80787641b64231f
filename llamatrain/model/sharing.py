"""How ranks that share a layer's weights pass activations on: tensor parallelism with sequence parallelism.

A rank has some rows of wq, wk, wv, w1, w3 and of the vocabulary, and some columns of wo and w2 (Shoeybi et al., arXiv
1909.08053, section 3). Between those products, where norms and sums work on each token alone, it has some tokens of
every sequence (Korthikanti et al., arXiv 2205.05198, section 4.2.2). So tokens are gathered before the first product
of each half of a block, and after its last product partial sums are added up and scattered to whose tokens they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from llamatrain.distributed import all_gather_single, reduce_scatter_single
from llamatrain.model.loss import VocabularyShards


class Alone:
    """A rank that has its layers to itself."""

    size: int = 1

    def gather(self, x: Tensor) -> Tensor:
        """All tokens [B, T, D] of what the ranks have of each sequence, [B, T/n, D]. Its gradient is `scatter`'s."""
        return x

    def scatter(self, x: Tensor) -> Tensor:
        """This rank's tokens [B, T/n, D] of the sum of all ranks' x [B, T, D]. Its gradient is `gather`'s."""
        return x

    def embed(self, tokens: Tensor, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Rows of the embedding, this rank's tokens of them: [B, T/n, D] in `dtype`, of tokens [B, T]."""
        return F.embedding(tokens, weight).to(dtype)

    def vocabulary(self, weight: Tensor) -> VocabularyShards | None:
        """Of which rows of the head `weight` is, where ranks share them."""
        return None

    def logits(self, x: Tensor) -> Tensor:
        """What is to be returned of logits [..., V/n] of this rank's part of the vocabulary."""
        return x


@dataclass(frozen=True)
class TensorParallel(Alone):
    """One of the ranks of a group that share their layers."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def gather(self, x: Tensor) -> Tensor:
        out: Tensor = _Exchange.apply(x, self, _all_tokens, _own_tokens_of_sum)
        return out

    def scatter(self, x: Tensor) -> Tensor:
        out: Tensor = _Exchange.apply(x, self, _own_tokens_of_sum, _all_tokens)
        return out

    def embed(self, tokens: Tensor, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
        places = tokens - self.rank * weight.shape[0]
        here = (places >= 0) & (places < weight.shape[0])
        rows = F.embedding(places.where(here, 0), weight).to(dtype)
        return self.scatter(rows * here[..., None])  # of each sum all terms but one are 0: exact in any dtype

    def vocabulary(self, weight: Tensor) -> VocabularyShards | None:
        rows = weight.shape[0]
        return VocabularyShards(self.group, first=self.rank * rows, vocab_size=self.size * rows)


@dataclass(frozen=True)
class WholeTokens(TensorParallel):
    """The same ranks where each has all tokens and all logits, of sequences of any length; for inference."""

    def gather(self, x: Tensor) -> Tensor:
        return x

    def scatter(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def logits(self, x: Tensor) -> Tensor:
        parts = x.new_empty(self.size, *x.shape)
        all_gather_single(parts.flatten(0, 1), x.contiguous(), group=self.group)
        return parts.movedim(0, -2).flatten(-2)


ALONE = Alone()
Exchange = Callable[[Tensor, TensorParallel], Tensor]


def on_this_rank(weight: Tensor) -> Tensor:
    """What a rank has of a weight, as a plain tensor. Of one that all have whole, gradients are parts of a sum."""
    if not isinstance(weight, DTensor):
        return weight
    placements = [Partial() if placement.is_replicate() else placement for placement in weight.placements]
    return weight.to_local(grad_placements=placements)


class _Exchange(torch.autograd.Function):
    """One of the two exchanges below; its gradient is the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorParallel, there: Exchange, back: Exchange) -> Tensor:
        ctx.ranks, ctx.back = ranks, back
        return there(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.ranks), None, None, None


def _all_tokens(x: Tensor, ranks: TensorParallel) -> Tensor:
    batch, own, width = x.shape
    parts = x.new_empty(ranks.size * batch, own, width)
    all_gather_single(parts, x.contiguous(), group=ranks.group)
    return parts.view(ranks.size, batch, own, width).transpose(0, 1).reshape(batch, ranks.size * own, width)


def _own_tokens_of_sum(x: Tensor, ranks: TensorParallel) -> Tensor:
    batch, tokens, width = x.shape
    parts = x.unflatten(1, (ranks.size, -1)).transpose(0, 1).flatten(0, 1).contiguous()  # [n*B, T/n, D]
    own = x.new_empty(batch, tokens // ranks.size, width)
    reduce_scatter_single(own, parts, group=ranks.group)
    return own
