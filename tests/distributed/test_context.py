"""Ranks that share sequences against one that has them whole."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llamatrain.config.parallel import ParallelConfig
from llamatrain.distributed import World
from llamatrain.model.attention import Attend
from llamatrain.model.llama import Llama
from llamatrain.parallel.context import ContextParallel, SharedAttend, share_sequences
from llamatrain.parallel.recompute import apply_recompute
from tests.ranks import on_ranks
from tests.test_attention import qkv
from tests.test_model import some_tokens, tiny
from tests.test_recompute import ATTENTION, Operations

RECOMPUTE = ("none", "block_backward", "selective", "full")
LENGTH = 48
DOCUMENTS = [5, 1, 20, 40, 30]  # of two sequences; one crosses from the first into the second
CASES: dict[str, Any] = {
    "plain": ({}, None),
    "documents": ({}, DOCUMENTS),
    "documents, grouped": ({"n_kv_heads": 2}, DOCUMENTS),
    "reference, one key head, tied": ({"n_kv_heads": 1, "attention": "reference", "tied_embeddings": True}, DOCUMENTS),
}
Results = dict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]]  # by case and choice of recompute


def loss_and_gradients(model: Llama, documents: list[int] | None) -> tuple[Tensor, dict[str, Tensor]]:
    tokens, targets = some_tokens(2, LENGTH), some_tokens(2, LENGTH, seed=1)
    targets[0, 30:] = targets[1, :7] = -100  # unequal numbers on the ranks
    loss = model(tokens, targets=targets, doc_lengths=documents)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def built(recompute: str, case: str) -> Llama:
    model = tiny(**CASES[case][0])
    apply_recompute(model, ParallelConfig(recompute=recompute))
    return model


def shared(world: World, size: int) -> Results:
    """What comes of neighbouring ranks sharing sequences; added up over this rank's group."""
    group, _ = dist.new_subgroups(size)
    results = {}
    for case, recompute in product(CASES, RECOMPUTE):
        model = built(recompute, case)
        share_sequences(model, group)
        loss, gradients = loss_and_gradients(model, CASES[case][1])
        for tensor in (loss, *gradients.values()):
            dist.all_reduce(tensor, group=group)
        results[case, recompute] = loss, gradients
    return results


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    return {case: loss_and_gradients(built("none", case), CASES[case][1]) for case in CASES}


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 4), (4, 2)])
def test_loss_and_gradients_are_those_of_whole_sequences(whole: Any, world_size: int, size: int) -> None:
    for results in on_ranks(world_size, shared, size):
        assert len(results) == len(CASES) * len(RECOMPUTE)
        for (case, recompute), (loss, gradients) in results.items():
            expected_loss, expected = whole[case]
            torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0.0)
            assert gradients.keys() == expected.keys()
            for name, gradient in expected.items():
                error = (gradients[name] - gradient).abs().max()
                assert error <= 1e-5 * gradient.abs().max(), (case, recompute, name)


def gradients_of_bf16(world: World) -> tuple[list[torch.dtype], list[Tensor]]:
    """What is added up over the ranks, and the gradients of this rank's q, k and v."""
    added = []

    class Spy(ContextParallel):
        def scatter_sum(self, x: Tensor) -> Tensor:
            added.append(x.dtype)
            return super().scatter_sum(x)

    context = Spy(dist.group.WORLD)
    inputs = [context.own(x).detach().requires_grad_() for x in bf16_inputs()]
    SharedAttend("sdpa", context)(*inputs).sum().backward()
    return added, [x.grad for x in inputs if x.grad is not None]


def bf16_inputs() -> list[Tensor]:
    return [x.bfloat16().detach().requires_grad_() for x in qkv(kv_heads=2)]


def test_in_bf16_gradients_of_keys_are_added_in_fp32() -> None:
    inputs = bf16_inputs()
    Attend("sdpa")(*inputs).sum().backward()
    for rank, (added, found) in enumerate(on_ranks(2, gradients_of_bf16)):
        assert added == [torch.float32]
        for x, gradient in zip(inputs, found, strict=True):
            assert x.grad is not None and gradient.dtype == torch.bfloat16
            chunks = x.grad.chunk(4, dim=1)
            expected = torch.cat((chunks[rank], chunks[-1 - rank]), dim=1)
            assert (gradient - expected).abs().max() <= 0.02 * x.grad.abs().max()


def order_and_balance(world: World) -> tuple[bool, Tensor, Tensor]:
    context = ContextParallel(dist.group.WORLD)
    x = torch.arange(2 * 24 * 3.0).view(2, 24, 3)
    own = context.own(x)
    back = torch.equal(context.gather(own), x) and torch.equal(
        context.own(x.transpose(0, 1), dim=0), own.transpose(0, 1)
    )
    summed = context.scatter_sum(x * 2**world.rank)
    return back, torch.stack((own, summed / 7)), context.own(torch.arange(24), dim=0)


def test_every_rank_has_an_early_chunk_and_a_late_one() -> None:
    results = on_ranks(3, order_and_balance)
    assert all(back for back, _, _ in results)
    assert all(torch.equal(own, summed) for _, (own, summed), _ in results)  # 1 + 2 + 4 times its own tokens
    assert [positions.tolist() for _, _, positions in results] == [
        [0, 1, 2, 3, 20, 21, 22, 23],
        [4, 5, 6, 7, 16, 17, 18, 19],
        [8, 9, 10, 11, 12, 13, 14, 15],
    ]


def attentions_in_backward(world: World) -> dict[str, int]:
    """How often each choice of recompute repeats a chunk's attention, of two layers with two chunks each."""
    counts = {}
    for recompute in RECOMPUTE:
        model = built(recompute, "plain")
        share_sequences(model, dist.group.WORLD)
        loss = model(some_tokens(1, LENGTH), targets=some_tokens(1, LENGTH, seed=1))
        with Operations() as operations:
            loss.backward()
        counts[recompute] = operations.counts[ATTENTION]
    return counts


def test_selective_recompute_keeps_shared_attention() -> None:
    expected = {"none": 0, "block_backward": 0, "selective": 0, "full": 4}
    assert on_ranks(2, attentions_in_backward) == [expected, expected]


def kept_and_refused(world: World) -> list[tuple[int, ...]]:
    """The shapes that the attention keeps for its backward."""
    attend = SharedAttend("sdpa", ContextParallel(dist.group.WORLD))
    q, k, v = (torch.randn(1, 8, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    kept: list[tuple[int, ...]] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attend(q, k, v)
    with pytest.raises(ValueError, match="generate on one rank"):
        attend(q, k, v, query_offset=4)
    with pytest.raises(ValueError, match="18 tokens do not divide into two chunks for each of 2 ranks"):
        attend.context.own(torch.zeros(1, 18))
    return kept


def test_only_own_tokens_are_kept() -> None:
    for kept in on_ranks(2, kept_and_refused):
        assert kept == [(1, 8, 4, 16), (1, 8, 2, 16), (1, 8, 2, 16), (1, 8, 4, 16), (1, 4, 4), (1, 4, 4)]
