"""Attention's forward and backward by hand: against autograd, and as CUDA's kernels and xformers would be called."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend

from llamatrain.model import attention_sdpa
from llamatrain.model.attention import Attend
from tests.test_attention import CASES, qkv

aten = torch.ops.aten


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_autograd(inputs: Sequence[Tensor], grad: Tensor, backend: str, **options: Any) -> list[Tensor]:
    q, k, v = inputs
    out = Attend(backend)(q, k, v, **options)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@torch.no_grad()
def by_hand(inputs: Sequence[Tensor], grad: Tensor, backend: str, **options: Any) -> list[Tensor]:
    q, k, v = inputs
    out, saved = Attend(backend).forward(q, k, v, **options)
    return [out, *Attend(backend).backward(grad, q, k, v, out, saved, **options)]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        scale = other.abs().max().clamp(min=0.1)  # of one key the gradient is 0 up to rounding
        assert (one - other).abs().max() <= tolerance * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_attention_forward_and_backward_are_those_of_autograd(case: str, backend: str, dtype: torch.dtype) -> None:
    shape, options = CASES[case]
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(**shape)]
    grad = numbers(*inputs[0].shape, seed=1, dtype=dtype)
    expected = by_autograd(inputs, grad, backend=backend, **options)
    found = by_hand(inputs, grad, backend=backend, **options)
    assert torch.equal(found[0], expected[0])
    assert_near(found, expected, 1e-6 if dtype == torch.float32 else 1e-2)
    if backend == "sdpa":  # the same kernels, called twice
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_lse_is_the_log_of_the_softmax_denominator(backend: str) -> None:
    q, k, v = (x.detach() for x in qkv())
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5
    expected = scores.masked_fill(~torch.ones(24, 24, dtype=torch.bool).tril(), -torch.inf).logsumexp(-1)
    lse = Attend(backend).forward(q, k, v)[1].tensors[0]
    assert lse is not None and lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected)


# CUDA's kernels cannot run here: stand-ins that read their arguments by the names of the kernels' own schemas


def arguments(operator: str, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names of the operator's schema. As in the dispatcher, a tensor may be undefined."""
    schema = getattr(aten, operator).default._schema
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found |= dict(zip([a.name for a in schema.arguments if not a.kwarg_only], given, strict=False)) | named
    assert found.keys() == {a.name for a in schema.arguments}
    for argument in schema.arguments:
        value, kind = found[argument.name], str(argument.type)
        if kind in ("Tensor", "Optional[Tensor]"):
            assert value is None or isinstance(value, Tensor)
        elif value is not None:
            kinds = {"float": float, "bool": bool, "int": int, "SymInt": int, "List[bool]": list}
            assert isinstance(value, kinds[kind.removeprefix("Optional[").removesuffix("]") if "Opt" in kind else kind])
    return found


class StandIn:
    """One of CUDA's kernel pairs: called as its schemas say, computing with the CPU's kernel."""

    def __init__(self, name: str, bias_name: str | None, outputs: Sequence[str], grads: int) -> None:
        self.name, self.bias_name, self.outputs, self.grads = name, bias_name, outputs, grads
        self.lengths = 0, 0

    def forward(self, *given: Any, **named: Any) -> tuple[Any, ...]:
        a = arguments(self.name, given, named)
        if "compute_log_sumexp" in a:
            assert a["compute_log_sumexp"]
        self.lengths = a["query"].shape[2], a["key"].shape[2]
        places = (a["query"], a["key"], a["value"], a["dropout_p"])
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*places, **self.mask(a), scale=a["scale"])
        values = {"out": out, "lse": lse, "length": 0, "seed": torch.tensor(3), "offset": torch.tensor(4)}
        returns = getattr(aten, self.name).default._schema.returns
        assert len(returns) == len(self.outputs)
        return tuple(values.get(output) for output in self.outputs)

    def backward(self, *given: Any, **named: Any) -> tuple[Any, ...]:
        a = arguments(f"{self.name}_backward", given, named)
        assert (a["philox_seed"].item(), a["philox_offset"].item()) == (3, 4)
        if "max_q" in a:
            assert (a["cum_seq_q"], a["cum_seq_k"], a["max_q"], a["max_k"]) == (None, None, *self.lengths)
        grad = a["grad_out_"] if "grad_out_" in a else a["grad_out"]
        places = (grad, a["query"], a["key"], a["value"], a["out"], a["logsumexp"], a["dropout_p"])
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*places, **self.mask(a), scale=a["scale"])
        return (*grads, *[None] * (self.grads - 3))

    def mask(self, a: dict[str, Any]) -> dict[str, Any]:
        """What the CPU's kernel is to be told of the mask. Flash attention's causal one ends at the last key."""
        queries, keys = self.lengths
        if not a["is_causal"] or queries == keys:
            return {"is_causal": a["is_causal"], "attn_mask": self.bias(a)}
        assert self.name.endswith("flash_attention"), "the others' begin at the first key"
        visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        return {"is_causal": False, "attn_mask": torch.zeros(queries, keys).masked_fill(~visible, -torch.inf)}

    def bias(self, a: dict[str, Any]) -> Tensor | None:
        bias: Tensor | None = a[self.bias_name] if self.bias_name else None
        if bias is not None:
            assert bias.dtype == a["query"].dtype and a["is_causal"] is False
        if self.name.endswith("efficient_attention"):
            assert a["key"].shape[:2] == a["query"].shape[:2]
            if bias is not None:
                assert bias.shape == (*a["query"].shape[:3], a["key"].shape[2])
                assert all(stride % 8 == 0 for stride in bias.stride()[:-1]) and bias.stride(-1) == 1
        return bias


FLASH_OUTPUTS = ("out", "lse", "", "", "length", "length", "seed", "offset", "")
STAND_INS = {
    "flash": StandIn("_scaled_dot_product_flash_attention", None, FLASH_OUTPUTS, 3),
    "cudnn": StandIn("_scaled_dot_product_cudnn_attention", "attn_bias", FLASH_OUTPUTS, 3),
    "efficient": StandIn("_scaled_dot_product_efficient_attention", "attn_bias", ("out", "lse", "seed", "offset"), 4),
}


# torch never chooses flash attention for a mask
STAND_IN_CASES = [(k, c) for k in STAND_INS for c in CASES if not (k == "flash" and "doc_lengths" in CASES[c][1])]


@pytest.mark.parametrize(("kernel", "case"), STAND_IN_CASES)
def test_cuda_kernels_are_called_as_their_schemas_say(kernel: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, options = CASES[case]
    stand_in = STAND_INS[kernel]
    operators = {stand_in.name: stand_in.forward, f"{stand_in.name}_backward": stand_in.backward}
    inputs = qkv(**shape)
    grad = numbers(*inputs[0].shape, seed=1)
    expected = by_autograd(inputs, grad, backend="sdpa", **options)
    monkeypatch.setattr(attention_sdpa, "aten", SimpleNamespace(**operators))
    monkeypatch.setattr(attention_sdpa, "_choice_of_torch", lambda *inputs: kernel)
    monkeypatch.setattr(attention_sdpa, "_flash_attention_serves", lambda *inputs: kernel == "flash")
    assert_near(by_hand(inputs, grad, backend="sdpa", **options), expected, 1e-5)


@pytest.mark.parametrize("kernel", STAND_INS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cuda_kernels_take_the_call_on_tensors_without_memory(
    kernel: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    number = choice.get(kernel, SDPBackend.EFFICIENT_ATTENTION).value
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *inputs, **options: number)
    monkeypatch.setattr(attention_sdpa, "can_use_flash_attention", lambda params: True)
    q, k, v = (torch.empty(2, 24, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, kv_heads, kv_heads))
    attend = Attend("sdpa")
    for doc_lengths in (None,) if kernel == "flash" else (None, [5, 19, 24]):
        for offset in (0, 16):
            asked, options = q[:, offset:].contiguous(), {"doc_lengths": doc_lengths, "query_offset": offset}
            out, saved = attend.forward(asked, k, v, **options)
            grads = attend.backward(torch.empty_like(out), asked, k, v, out, saved, **options)
            past_torch = offset and doc_lengths is None  # fewer queries than keys, and no mask
            assert saved.kernels == ("flash" if past_torch else kernel,) and saved.tensors[0].dtype == torch.float32
            assert out.shape == asked.shape and out.is_contiguous()  # so that wo's input is a view
            assert [grad.shape for grad in grads] == [asked.shape, k.shape, v.shape]


def test_sdpa_takes_the_kernel_that_torch_would(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = (torch.empty(2, 4, 24, width, device="meta") for width in (16, 12))
    for choice, kernel in (
        (SDPBackend.FLASH_ATTENTION, "flash"),
        (SDPBackend.EFFICIENT_ATTENTION, "efficient"),
        (SDPBackend.CUDNN_ATTENTION, "cudnn"),
        (SDPBackend.MATH, "formula"),
    ):
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *i, choice=choice, **o: choice.value)
        assert attention_sdpa._choice_of_torch(wide, wide, wide, None) == kernel
        assert attention_sdpa._choice_of_torch(narrow, narrow, narrow, None) == "formula"


def test_where_torch_has_no_kernel_the_formula_serves() -> None:
    inputs = qkv(kv_heads=2)
    grad = numbers(*inputs[0].shape, seed=1)
    expected = by_autograd(inputs, grad, backend="sdpa")
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        assert Attend("sdpa").forward(*inputs)[1].kernels == ("formula",)
        assert_near(by_hand(inputs, grad, backend="sdpa"), expected, 1e-5)


@contextmanager
def xformers_stand_ins(*, deterministic: bool = False) -> Iterator[None]:
    """xformers has no CPU operator; stand-ins bound to its signatures do the sum from the mask they get."""
    import xformers.ops
    from xformers.ops import fmha

    pair = xformers.ops.MemoryEfficientAttentionCutlassOp if deterministic else (None, None)

    def bound(function: Callable[..., Any], operator: Any, given: Any, named: Any) -> SimpleNamespace:
        call = inspect.signature(function).bind(*given, **named)
        call.apply_defaults()
        a = SimpleNamespace(**call.arguments)
        assert a.op is operator and a.p == 0.0 and a.scale is None and a.key.shape == a.value.shape
        assert a.query.shape[2:] == a.key.shape[2:]
        a.places = [x.transpose(1, 2) for x in (a.query, a.key, a.value)]
        a.bias = a.attn_bias.materialize((a.query.shape[1], a.key.shape[1]))
        return a

    forward, backward = fmha.memory_efficient_attention_forward_requires_grad, fmha.memory_efficient_attention_backward

    def stand_in_forward(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        a = bound(forward, pair[0], given, named)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*a.places, attn_mask=a.bias)
        return out.transpose(1, 2), lse

    def stand_in_backward(*given: Any, **named: Any) -> tuple[Tensor, ...]:
        a = bound(backward, pair[1], given, named)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            a.grad.transpose(1, 2), *a.places, a.output.transpose(1, 2), a.lse, 0.0, False, attn_mask=a.bias
        )
        return tuple(grad.transpose(1, 2).contiguous() for grad in grads)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fmha, "memory_efficient_attention_forward_requires_grad", stand_in_forward)
        monkeypatch.setattr(fmha, "memory_efficient_attention_backward", stand_in_backward)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
        yield


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_xformers_pair_is_called_with_what_makes_the_reference(case: str, deterministic: bool) -> None:
    shape, options = CASES[case]
    inputs = qkv(**shape)
    grad = numbers(*inputs[0].shape, seed=1)
    expected = by_autograd(inputs, grad, backend="reference", **options)
    with xformers_stand_ins(deterministic=deterministic):
        assert_near(by_hand(inputs, grad, backend="xformers", **options), expected, 1e-5)


# Fewer queries than keys


@pytest.mark.parametrize("backend", ["reference", "sdpa", "xformers"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), row=st.integers(1, 12), kv_heads=st.sampled_from([1, 2, 4]))
def test_some_queries_are_those_of_whole_rows(backend: str, data: Any, batch: int, row: int, kv_heads: int) -> None:
    offset = data.draw(st.integers(0, row - 1))
    end = data.draw(st.integers(offset + 1, row))
    ends = data.draw(st.none() | st.sets(st.integers(1, batch * row - 1)) if batch * row > 1 else st.none())
    options: dict[str, Any] = {}
    if ends is not None:
        options["doc_lengths"] = [b - a for a, b in pairwise([0, *sorted(ends), batch * row])]
    q, k, v = qkv(batch=batch, queries=row, keys=row, kv_heads=kv_heads)
    grad = torch.zeros_like(q)
    grad[:, offset:end] = numbers(batch, end - offset, *q.shape[2:], seed=1)
    out, dq, dk, dv = by_autograd((q, k, v), grad, backend="reference", **options)
    expected = [out[:, offset:end], dq[:, offset:end], dk, dv]
    asked = (q[:, offset:end], k, v)
    with xformers_stand_ins():
        found = by_hand(asked, grad[:, offset:end], backend=backend, query_offset=offset, **options)
    assert_near(found, expected, 1e-4)
    if backend != "xformers":
        assert_near(
            by_autograd(asked, grad[:, offset:end], backend=backend, query_offset=offset, **options), expected, 1e-4
        )


class ByHand(torch.autograd.Function):
    """An `Attend`'s forward and backward, so that torch can compare them with differences."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attend: Attend, options: dict[str, Any]) -> Tensor:
        out, ctx.saved = attend.forward(q, k, v, **options)
        ctx.inputs, ctx.attend, ctx.options = (q, k, v, out), attend, options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *ctx.attend.backward(grad, *ctx.inputs, ctx.saved, **ctx.options), None, None


@pytest.mark.parametrize("doc_lengths", [None, [2, 7, 1, 4]])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradients_at_an_offset_are_differences(backend: str, doc_lengths: list[int] | None) -> None:
    options = {"doc_lengths": doc_lengths, "query_offset": 3}
    inputs = [x.detach().double().requires_grad_() for x in qkv(queries=3, keys=7, heads=4, kv_heads=2, width=4)]
    assert torch.autograd.gradcheck(lambda *qkv: ByHand.apply(*qkv, Attend(backend), options), inputs)
