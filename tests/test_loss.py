"""The loss without whole logits, and with the vocabulary spread over ranks, against the formula."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamatrain import memory
from llamatrain.distributed import World
from llamatrain.model.elementwise import cross_entropy
from llamatrain.model.loss import (
    IGNORE_INDEX,
    VocabularyShards,
    linear_cross_entropy_sum,
)
from tests.ranks import on_ranks


def loss_by_formula(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the losses of all targets, from whole logits [..., V]; fp32, or fp64 of fp64."""
    full = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(full.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


class Case(NamedTuple):
    h: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]


class Result(NamedTuple):
    loss: Tensor
    dh: Tensor
    dweight: Tensor


def some_case(
    tokens: int, width: int, vocabulary: int, *, masked: float = 0.25, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Case:
    random = torch.Generator().manual_seed(seed)
    h, weight = torch.randn(tokens, width, generator=random), torch.randn(vocabulary, width, generator=random)
    targets = torch.randint(vocabulary, (tokens,), generator=random)
    targets[torch.rand(tokens, generator=random) < masked] = IGNORE_INDEX
    return Case(h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets)


def gradients(case: Case, loss: Tensor, *, factor: float) -> Result:
    return Result(loss.detach(), *torch.autograd.grad(loss * factor, (case.h, case.weight)))


def by_formula(case: Case, *, factor: float = 0.125) -> Result:
    logits = F.linear(case.h, case.weight)
    return gradients(case, loss_by_formula(logits, case.targets), factor=factor)


def by_chunks(case: Case, chunk_tokens: int | None = None, *, factor: float = 0.125, **options: Any) -> Result:
    loss = linear_cross_entropy_sum(*case, chunk_tokens=chunk_tokens, **options)
    return gradients(case, loss, factor=factor)


def check_same(found: Result, expected: Result, *, tolerance: float) -> None:
    """Loss, and each entry of a gradient relative to the largest."""
    assert found.loss.dtype == expected.loss.dtype
    for name, a, b in zip(Result._fields, found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        largest = b.abs().max() if b.numel() else torch.tensor(0.0)
        assert ((a - b).abs() <= tolerance * largest).all(), name


@pytest.mark.parametrize("compiled", [False, True], ids=["as it stands", "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_the_function_to_compile_gives_the_formula(
    chunk_tokens: int | None, dtype: torch.dtype, tolerance: float, compiled: bool
) -> None:
    function = torch.compile(cross_entropy, dynamic=False, fullgraph=True) if compiled else cross_entropy
    case = some_case(20, 16, 37, dtype=dtype)
    check_same(by_chunks(case, chunk_tokens, compiled=function), by_formula(case), tolerance=tolerance)
    masked = Case(case.h, case.weight, torch.full_like(case.targets, IGNORE_INDEX))
    assert by_chunks(masked, compiled=function).loss == 0
    assert not by_chunks(masked, compiled=function).dh.any()


@pytest.mark.parametrize("row", [37, -1])
def test_the_function_to_compile_has_no_loss_for_what_is_no_token(row: int) -> None:
    case = some_case(5, 16, 37)
    case.targets[2] = row
    assert by_chunks(case, compiled=cross_entropy).loss.isnan()


# ---------------------------------------------------------------------- on one rank

cases = st.builds(
    some_case,
    tokens=st.integers(0, 40),
    width=st.integers(1, 24),
    vocabulary=st.integers(1, 90),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=150, deadline=None)
@given(case=cases, chunk_tokens=st.none() | st.integers(1, 45))
def test_loss_and_gradients_are_those_of_the_formula(case: Case, chunk_tokens: int | None) -> None:
    check_same(by_chunks(case, chunk_tokens), by_formula(case), tolerance=1e-5)


@settings(max_examples=100, deadline=None)
@given(case=cases, chunk_tokens=st.none() | st.integers(1, 45))
def test_in_bf16_they_are_the_formulas_up_to_rounding(case: Case, chunk_tokens: int | None) -> None:
    half = Case(case.h.detach().bfloat16().requires_grad_(), case.weight.detach().bfloat16().requires_grad_(), case[2])
    found, expected = by_chunks(half, chunk_tokens), by_formula(half)
    assert found.loss.dtype == torch.float32 and found.dh.dtype == found.dweight.dtype == torch.bfloat16
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-3, atol=2e-2)
    check_same(found._replace(loss=expected.loss), expected, tolerance=3e-2)


def test_batch_and_sequence_may_be_two_dimensions() -> None:
    case = some_case(30, 8, 17)
    square = Case(case.h.detach().view(5, 6, 8).requires_grad_(), case.weight, case.targets.view(5, 6))
    found, expected = by_chunks(square, 7), by_formula(case)
    check_same(found._replace(dh=found.dh.view(30, 8)), expected, tolerance=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 9])
def test_gradients_are_those_of_differences(chunk_tokens: int) -> None:
    case = some_case(9, 5, 11, dtype=torch.float64)

    def function(h: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy_sum(h, weight, case.targets, chunk_tokens=chunk_tokens)

    assert function(case.h, case.weight).dtype == torch.float64
    assert torch.autograd.gradcheck(function, (case.h, case.weight))
    assert torch.autograd.gradcheck(function, (case.h, case.weight.detach()))
    assert torch.autograd.gradcheck(function, (case.h.detach(), case.weight))


def test_without_a_valid_target_all_is_zero() -> None:
    found = by_chunks(some_case(20, 6, 13, masked=1.0), 6)
    assert found.loss == 0 and not found.dh.any() and not found.dweight.any()


def test_another_index_may_be_the_ignored_one() -> None:
    case = some_case(20, 6, 13)
    renamed = case._replace(targets=case.targets.masked_fill(case.targets == IGNORE_INDEX, 40))
    check_same(by_chunks(renamed, 6, ignore_index=40), by_chunks(case, 6), tolerance=0.0)


def test_a_target_beyond_the_vocabulary_is_refused() -> None:
    case = some_case(20, 6, 13, masked=0.0)
    case.targets[7] = 13
    with pytest.raises((IndexError, RuntimeError), match="13 is out of bounds"):
        linear_cross_entropy_sum(*case)


def test_large_logits_stay_finite() -> None:
    case = some_case(12, 8, 30, masked=0.0)
    large = Case((1e4 * case.h.detach()).requires_grad_(), case.weight, case.targets)
    found = by_chunks(large, 5)
    assert all(x.isfinite().all() for x in found)
    check_same(found, by_formula(large), tolerance=1e-5)


def test_a_gradient_near_zero_is_not_lost_where_the_model_is_nearly_sure() -> None:
    """p - 1 is taken before rounding to bf16, in which p would be 1."""
    h = torch.tensor([[1.0]]).bfloat16().requires_grad_()
    weight = torch.tensor([[8.0], [0.0]]).bfloat16().requires_grad_()
    result = by_chunks(Case(h, weight, torch.tensor([0])), factor=1.0)
    sure = 1 / (1 + torch.tensor(8.0).exp())
    assert result.dweight.flatten().tolist() == pytest.approx([-sure.item(), sure.item()], rel=1e-2)


def test_in_bf16_the_gradient_of_the_weight_is_added_up_in_fp32() -> None:
    """A thousand chunks of equal shares: a sum in bf16 stands still at 256 of them."""
    h, targets = torch.ones(1000, 2, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.int64)
    weight = torch.zeros(2, 2, dtype=torch.bfloat16).requires_grad_()
    linear_cross_entropy_sum(h, weight, targets, chunk_tokens=1).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[-500.0, -500.0], [500.0, 500.0]]


def test_backward_may_come_again_with_another_factor() -> None:
    case = some_case(20, 6, 13)
    loss = linear_cross_entropy_sum(*case, chunk_tokens=6)
    first = torch.autograd.grad(loss, (case.h, case.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (case.h, case.weight), torch.tensor(0.5))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(0.5 * a, b) and a.any()


def test_there_is_no_second_derivative() -> None:
    case = some_case(20, 6, 13)
    (dh,) = torch.autograd.grad(linear_cross_entropy_sum(*case).square(), case.h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dh.sum().backward()


def test_what_does_not_fit_is_refused() -> None:
    h, weight, targets = some_case(12, 6, 13)
    with pytest.raises(ValueError, match=r"\[12, 6\], \[13, 6\], \[11\]"):
        linear_cross_entropy_sum(h, weight, targets[:11])
    with pytest.raises(ValueError, match=r"\[12, 6\], \[13, 5\], \[12\]"):
        linear_cross_entropy_sum(h, weight[:, :5], targets)
    with pytest.raises(ValueError, match=r"bfloat16.*cast the weight"):
        linear_cross_entropy_sum(h.bfloat16(), weight, targets)
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        linear_cross_entropy_sum(h, weight, targets, chunk_tokens=0)


# ---------------------------------------------------------------------- memory and work


class Births(TorchDispatchMode):
    """Notes how many elements the largest tensor made has, and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        self.largest = max(self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunks_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LOGITS_BYTES", 4 * 100 * 300)
    case = some_case(1000, 16, 300, dtype=dtype)
    with Births() as births:
        by_chunks(case)
    assert births.largest == 100 * 300


@pytest.mark.parametrize(("needs", "products"), [((True, True), 15), ((True, False), 10), ((False, True), 10), ((), 5)])
def test_no_product_is_taken_for_a_gradient_that_nobody_wants(needs: Sequence[bool], products: int) -> None:
    h, weight, targets = some_case(50, 8, 20)
    for x, needed in zip((h, weight), needs, strict=False):
        x.requires_grad_(needed)
    with Births() as births, torch.set_grad_enabled(bool(needs)):  # without `needs`: both require a gradient
        loss = linear_cross_entropy_sum(h, weight, targets, chunk_tokens=10)
        if needs:
            loss.backward()
    assert births.products == products
    assert loss.requires_grad == bool(needs)
    assert [x.grad is not None for x in (h, weight)] == list(needs or (False, False))


def test_the_host_reads_no_number_of_the_device() -> None:
    """On the meta device there is none to read."""
    case = Case(*(x.detach().to("meta") for x in some_case(20, 6, 13, dtype=torch.bfloat16)))
    case.h.requires_grad_()
    linear_cross_entropy_sum(*case, chunk_tokens=6).backward()
    assert case.h.grad is not None and case.h.grad.is_meta


@given(tokens=st.integers(0, 1 << 20), width=st.integers(1, 8192), vocab_rows=st.integers(0, 200_000))
def test_chunks_are_few_and_of_nearly_the_same_size(tokens: int, width: int, vocab_rows: int) -> None:
    size = memory.tokens_per_chunk(tokens, width=width, vocab_rows=vocab_rows)
    most = max(width, memory.LOGITS_BYTES // (4 * max(1, vocab_rows)))
    assert 1 <= size <= most
    chunks = -(-tokens // size)
    assert chunks == -(-tokens // most)  # not more than it takes
    assert size * chunks - tokens < max(1, chunks)  # so that the last is smaller by less than one token for each other


def test_small_logits_are_one_chunk() -> None:
    assert memory.tokens_per_chunk(4096, width=512, vocab_rows=1024) == 4096
    assert memory.tokens_per_chunk(2048, width=512, vocab_rows=32000) == 1024


# ---------------------------------------------------------------------- vocabulary-parallel

VOCABULARY = 331


def own_part(case: Case, bounds: Sequence[int], rank: int) -> Case:
    """The case as a rank has it, with rows [bounds[rank], bounds[rank + 1]) of the weight."""
    rows = case.weight.detach()[bounds[rank] : bounds[rank + 1]].clone()
    return Case(case.h.detach().requires_grad_(), rows.requires_grad_(), case.targets)


def spread(world: World, bounds: Sequence[int], dtype: torch.dtype, chunkings: Sequence[int | None]) -> list[Result]:
    assert dist.group.WORLD is not None
    memory.LOGITS_BYTES = 4 * 120 * 16  # 16 tokens for a third of the vocabulary, more on ranks with fewer rows
    shards = VocabularyShards(dist.group.WORLD, first=bounds[world.rank], vocab_size=VOCABULARY)
    results = []
    for number, chunk_tokens in enumerate(chunkings):
        case = own_part(some_case(70, 12, VOCABULARY, seed=number, dtype=dtype), bounds, world.rank)
        results.append(by_chunks(case, chunk_tokens, shards=shards))
        with torch.no_grad():
            assert linear_cross_entropy_sum(*case, chunk_tokens=chunk_tokens, shards=shards) == results[-1].loss
    return results


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("bounds", [(0, 166, 331), (0, 331, 331), (0, 111, 222, 331), (0, 17, 17, 331)])
def test_a_vocabulary_spread_over_ranks_gives_the_same(
    bounds: Sequence[int], dtype: torch.dtype, tolerance: float
) -> None:
    chunkings = [None, 70, 11]
    ranks = on_ranks(len(bounds) - 1, spread, bounds, dtype, chunkings)
    for number in range(len(chunkings)):
        case = some_case(70, 12, VOCABULARY, seed=number, dtype=dtype)
        parts: list[Result] = [results[number] for results in ranks]
        assert all(torch.equal(part.loss, parts[0].loss) for part in parts)
        whole = Result(
            parts[0].loss,
            sum((part.dh for part in parts), torch.zeros_like(case.h)),
            torch.cat([part.dweight for part in parts]),
        )
        expected = by_formula(case) if dtype != torch.float64 else by_chunks(case)
        check_same(whole, expected, tolerance=tolerance)


def refusals(world: World) -> list[str]:
    assert dist.group.WORLD is not None
    case = some_case(20, 6, 13, masked=0.0)
    found = []
    for wrong in (13, 40, -1):
        case.targets[7] = wrong
        own = own_part(case, (0, 7, 13), world.rank)
        with pytest.raises((IndexError, RuntimeError), match="out of bounds") as refusal:
            linear_cross_entropy_sum(*own, shards=VocabularyShards(dist.group.WORLD, 7 * world.rank, 13))
        found.append(str(refusal.value))
    with pytest.raises(ValueError, match="no 7 rows from 7 on in a vocabulary of 13"):
        linear_cross_entropy_sum(*own_part(case, (0, 7), 0), shards=VocabularyShards(dist.group.WORLD, 7, 13))
    return found


def test_a_target_on_no_rank_is_refused_on_all() -> None:
    assert [len(found) for found in on_ranks(2, refusals)] == [3, 3]
