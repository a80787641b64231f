"""The blocks' own backward against autograd: values, gradients, and the memory between forward and backward."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend

from llamatrain.model import attention as attention_module
from llamatrain.model import block_backward
from llamatrain.model.attention import attention, attention_backward, attention_forward
from llamatrain.model.block_backward import attention_half, feed_forward_half, own_backward, rotate
from llamatrain.model.llama import Block, KVCache, Llama
from llamatrain.model.loss import cross_entropy_sum
from llamatrain.model.rope import apply_rope, rope_tables
from tests.test_model import CASES, TINY, qkv, relative, some_tokens, tiny

aten = torch.ops.aten
ALL_CASES: dict[str, Any] = CASES
TRAINING_CASES = {name: case for name, case in ALL_CASES.items() if "query_offset" not in case[1]}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Attention's two halves


def by_autograd(inputs: Sequence[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    q, k, v = inputs
    out = attention(q, k, v, **options)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@torch.no_grad()
def by_hand(inputs: Sequence[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    q, k, v = inputs
    out, saved = attention_forward(q, k, v, **options)
    return [out, *attention_backward(grad, q, k, v, out, saved, **options)]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        scale = other.abs().max().clamp(min=0.1)  # of one key the gradient is 0 up to rounding
        assert (one - other).abs().max() <= tolerance * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("case", TRAINING_CASES)
def test_attention_forward_and_backward_are_those_of_autograd(case: str, backend: str, dtype: torch.dtype) -> None:
    shape, options = TRAINING_CASES[case]
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
    _, saved = attention_forward(q, k, v, backend=backend)
    assert saved.lse.dtype == torch.float32
    torch.testing.assert_close(saved.lse, expected)


def test_attention_forward_refuses_what_it_cannot_differentiate() -> None:
    q, k, v = qkv(queries=7)
    with pytest.raises(ValueError, match="24 keys for 7 queries"):
        attention_forward(q, k, v, backend="sdpa")
    with pytest.raises(ValueError, match=r"add up to 2\*24"):
        attention_forward(*qkv(), backend="sdpa", doc_lengths=[24])
    with pytest.raises(ValueError, match="resolve_backend"):
        attention_forward(*qkv(), backend="auto")


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
        self.length = 0

    def forward(self, *given: Any, **named: Any) -> tuple[Any, ...]:
        a = arguments(self.name, given, named)
        if "compute_log_sumexp" in a:
            assert a["compute_log_sumexp"]
        self.length = a["query"].shape[2]
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            a["query"], a["key"], a["value"], a["dropout_p"], a["is_causal"], attn_mask=self.bias(a), scale=a["scale"]
        )
        values = {"out": out, "lse": lse, "length": self.length, "seed": torch.tensor(3), "offset": torch.tensor(4)}
        returns = getattr(aten, self.name).default._schema.returns
        assert len(returns) == len(self.outputs)
        return tuple(values.get(output) for output in self.outputs)

    def backward(self, *given: Any, **named: Any) -> tuple[Any, ...]:
        a = arguments(f"{self.name}_backward", given, named)
        assert (a["philox_seed"].item(), a["philox_offset"].item()) == (3, 4)
        if "max_q" in a:
            assert (a["cum_seq_q"], a["cum_seq_k"], a["max_q"], a["max_k"]) == (None, None, self.length, self.length)
        grad = a["grad_out_"] if "grad_out_" in a else a["grad_out"]
        places = (grad, a["query"], a["key"], a["value"], a["out"], a["logsumexp"], a["dropout_p"], a["is_causal"])
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *places, attn_mask=self.bias(a), scale=a["scale"]
        )
        return (*grads, *[None] * (self.grads - 3))

    def bias(self, a: dict[str, Any]) -> Tensor | None:
        bias: Tensor | None = a[self.bias_name] if self.bias_name else None
        if bias is not None:
            assert bias.dtype == a["query"].dtype and a["is_causal"] is False
        if self.name.endswith("efficient_attention"):
            assert a["key"].shape == a["query"].shape
            if bias is not None:
                assert bias.shape == (*a["query"].shape[:3], self.length)
                assert all(stride % 8 == 0 for stride in bias.stride()[:-1]) and bias.stride(-1) == 1
        return bias


FLASH_OUTPUTS = ("out", "lse", "", "", "length", "length", "seed", "offset", "")
STAND_INS = {
    "flash": StandIn("_scaled_dot_product_flash_attention", None, FLASH_OUTPUTS, 3),
    "cudnn": StandIn("_scaled_dot_product_cudnn_attention", "attn_bias", FLASH_OUTPUTS, 3),
    "efficient": StandIn("_scaled_dot_product_efficient_attention", "attn_bias", ("out", "lse", "seed", "offset"), 4),
}


# torch never chooses flash attention for a mask
STAND_IN_CASES = [(k, c) for k in STAND_INS for c in TRAINING_CASES if not (k == "flash" and TRAINING_CASES[c][1])]


@pytest.mark.parametrize(("kernel", "case"), STAND_IN_CASES)
def test_cuda_kernels_are_called_as_their_schemas_say(kernel: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, options = TRAINING_CASES[case]
    stand_in = STAND_INS[kernel]
    operators = {stand_in.name: stand_in.forward, f"{stand_in.name}_backward": stand_in.backward}
    inputs = qkv(**shape)
    grad = numbers(*inputs[0].shape, seed=1)
    expected = by_autograd(inputs, grad, backend="sdpa", **options)
    monkeypatch.setattr(attention_module, "aten", SimpleNamespace(**operators))
    monkeypatch.setattr(attention_module, "_sdpa_kernel", lambda *inputs: kernel)
    assert_near(by_hand(inputs, grad, backend="sdpa", **options), expected, 1e-5)


@pytest.mark.parametrize("kernel", STAND_INS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cuda_kernels_take_the_call_on_tensors_without_memory(
    kernel: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    number = choice.get(kernel, SDPBackend.EFFICIENT_ATTENTION).value
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *inputs, **options: number)
    q, k, v = (torch.empty(2, 24, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, kv_heads, kv_heads))
    for doc_lengths in (None,) if kernel == "flash" else (None, [5, 19, 24]):
        out, saved = attention_forward(q, k, v, backend="sdpa", doc_lengths=doc_lengths)
        grads = attention_backward(torch.empty_like(out), q, k, v, out, saved, backend="sdpa", doc_lengths=doc_lengths)
        assert saved.kernel == kernel and saved.lse.dtype == torch.float32
        assert out.shape == q.shape and out.is_contiguous()  # so that wo's input is a view
        assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def test_sdpa_takes_the_kernel_that_torch_would(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = (torch.empty(2, 4, 24, width, device="meta") for width in (16, 12))
    for choice, kernel in (
        (SDPBackend.FLASH_ATTENTION, "flash"),
        (SDPBackend.EFFICIENT_ATTENTION, "efficient"),
        (SDPBackend.CUDNN_ATTENTION, "cudnn"),
        (SDPBackend.MATH, "formula"),
    ):
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *i, choice=choice, **o: choice.value)
        assert attention_module._sdpa_kernel(wide, wide, wide, None) == kernel
        assert attention_module._sdpa_kernel(narrow, narrow, narrow, None) == "formula"


def test_where_torch_has_no_kernel_the_formula_serves() -> None:
    inputs = qkv(kv_heads=2)
    grad = numbers(*inputs[0].shape, seed=1)
    expected = by_autograd(inputs, grad, backend="sdpa")
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        assert attention_forward(*inputs, backend="sdpa")[1].kernel == "formula"
        assert_near(by_hand(inputs, grad, backend="sdpa"), expected, 1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", TRAINING_CASES)
def test_xformers_pair_is_called_with_what_makes_the_reference(
    case: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """xformers has no CPU operator; stand-ins bound to its signatures do the sum from the mask they get."""
    import xformers.ops
    from xformers.ops import fmha

    pair = xformers.ops.MemoryEfficientAttentionCutlassOp if deterministic else (None, None)

    def bound(function: Callable[..., Any], operator: Any, given: Any, named: Any) -> SimpleNamespace:
        call = inspect.signature(function).bind(*given, **named)
        call.apply_defaults()
        a = SimpleNamespace(**call.arguments)
        assert a.op is operator and a.p == 0.0 and a.scale is None and a.query.shape == a.key.shape == a.value.shape
        a.places = [x.transpose(1, 2) for x in (a.query, a.key, a.value)]
        a.bias = a.attn_bias.materialize((a.query.shape[1], a.query.shape[1]))
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

    shape, options = TRAINING_CASES[case]
    inputs = qkv(**shape)
    grad = numbers(*inputs[0].shape, seed=1)
    expected = by_autograd(inputs, grad, backend="reference", **options)
    monkeypatch.setattr(fmha, "memory_efficient_attention_forward_requires_grad", stand_in_forward)
    monkeypatch.setattr(fmha, "memory_efficient_attention_backward", stand_in_backward)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert_near(by_hand(inputs, grad, backend="xformers", **options), expected, 1e-5)


# The halves


BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM, FFN_WIDTH = 2, 5, 6, 4, 4, 7


def half_inputs(shapes: dict[str, tuple[int, ...]]) -> list[Tensor]:
    return [numbers(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes.values())]


@pytest.mark.parametrize("doc_lengths", [None, [2, 5, 3]])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradients_of_the_attention_half_are_its_differences(
    backend: str, kv_heads: int, doc_lengths: list[int] | None
) -> None:
    q_width, kv_width = HEADS * HEAD_DIM, kv_heads * HEAD_DIM
    inputs = half_inputs(
        {
            "x": (BATCH, LENGTH, WIDTH),
            "norm": (WIDTH,),
            "wq": (q_width, WIDTH),
            "wk": (kv_width, WIDTH),
            "wv": (kv_width, WIDTH),
            "wo": (WIDTH, q_width),
        }
    )
    cos, sin = rope_tables(HEAD_DIM, max_seq_len=LENGTH, theta=10.0)

    def half(*tensors: Tensor) -> Tensor:
        x, norm, wq, wk, wv, wo = tensors
        settings: dict[str, Any] = {"eps": 1e-2, "head_dim": HEAD_DIM, "backend": backend}
        return attention_half(x, norm, wq, wk, wv, wo, cos, sin, doc_lengths=doc_lengths, **settings)

    assert half(*inputs).dtype == torch.float64
    assert torch.autograd.gradcheck(half, inputs)


def test_gradients_of_the_feed_forward_half_are_its_differences() -> None:
    inputs = half_inputs(
        {
            "h": (BATCH, LENGTH, WIDTH),
            "norm": (WIDTH,),
            "w1": (FFN_WIDTH, WIDTH),
            "w2": (WIDTH, FFN_WIDTH),
            "w3": (FFN_WIDTH, WIDTH),
        }
    )
    assert torch.autograd.gradcheck(lambda *tensors: feed_forward_half(*tensors, eps=1e-2), inputs)


def test_rotation_is_that_of_rope_and_its_inverse() -> None:
    x = numbers(2, 10, 3, 8)
    cos, sin = rope_tables(8, max_seq_len=10, theta=300.0)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(rotate(x.to(dtype), cos, sin), apply_rope(x.to(dtype), cos, sin))
    torch.testing.assert_close(rotate(rotate(x, cos, sin), cos, -sin), x)


# The whole model


def with_own_backward(model: Llama, chosen: bool = True) -> Llama:
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.training_forward = own_backward if chosen else None
    return model


def logits_and_gradients(model: Llama, doc_lengths: list[int] | None = None) -> tuple[Tensor, dict[str, Any]]:
    logits = model(some_tokens(3, 40), doc_lengths=doc_lengths)
    cross_entropy_sum(logits, some_tokens(3, 40, seed=1)).backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}


CHANGES = [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"tied_embeddings": True}]
DOCUMENTS = [5, 35, 41, 39]


@pytest.mark.parametrize("doc_lengths", [None, DOCUMENTS])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("changes", CHANGES)
def test_own_backward_gives_autograds_gradients(
    changes: dict[str, Any], backend: str, doc_lengths: list[int] | None
) -> None:
    logits, expected = logits_and_gradients(tiny(attention=backend, **changes), doc_lengths)
    own_logits, found = logits_and_gradients(with_own_backward(tiny(attention=backend, **changes)), doc_lengths)
    assert torch.equal(own_logits, logits)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("doc_lengths", [None, DOCUMENTS])
@pytest.mark.parametrize("changes", CHANGES)
def test_in_bf16_own_backward_is_no_noisier_than_autograd(
    changes: dict[str, Any], doc_lengths: list[int] | None
) -> None:
    changes = {"init_std": 0.1, **changes}
    _, exact = logits_and_gradients(tiny(**changes), doc_lengths)
    plain_logits, plain = logits_and_gradients(tiny(torch.bfloat16, **changes), doc_lengths)
    logits, own = logits_and_gradients(with_own_backward(tiny(torch.bfloat16, **changes)), doc_lengths)
    assert torch.equal(logits, plain_logits)
    for name, gradient in exact.items():
        assert own[name].dtype == torch.float32
        noise = relative(plain[name] - gradient, gradient)  # of autograd in bf16: up to 0.035
        assert relative(own[name] - gradient, gradient) <= 1.2 * noise, name
        assert relative(own[name] - plain[name], gradient) <= 0.6 * noise, name


def test_only_gradients_that_are_needed_are_computed() -> None:
    frozen = ["layers.0.attention.wk.weight", "layers.1.feed_forward.w3.weight", "layers.1.attention_norm.weight"]
    _, expected = logits_and_gradients(with_own_backward(tiny()))
    model = with_own_backward(tiny())
    for name in frozen:
        model.get_parameter(name).requires_grad = False
    _, found = logits_and_gradients(model)
    for name, gradient in expected.items():
        if name in frozen:
            assert found[name] is None
        else:
            assert torch.equal(found[name], gradient), name


def test_first_block_alone_learns_below_a_frozen_input() -> None:
    model = with_own_backward(tiny(n_layers=1))
    model.tok_embeddings.weight.requires_grad = False
    _, found = logits_and_gradients(model)
    _, expected = logits_and_gradients(with_own_backward(tiny(n_layers=1)))
    assert found.pop("tok_embeddings.weight") is None
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_own_backward_is_for_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = with_own_backward(tiny()), some_tokens(1, 8)
    expected = model(tokens)

    def forbidden(*inputs: Any, **options: Any) -> Tensor:
        raise AssertionError("called")

    monkeypatch.setattr(block_backward, "attention_half", forbidden)
    with pytest.raises(AssertionError, match="called"):
        model(tokens)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)
        cache = KVCache(model.config, batch=1, max_len=8, dtype=torch.float32, device=tokens.device)
    with torch.inference_mode():
        model(tokens, cache=cache)
    assert cache.length == 8


# Memory


def kept_bytes(layers: int, *, by_hand: bool, kv_heads: int, tokens: Tensor) -> int:
    """Bytes of all storages kept for the backward of a bf16 model, without parameters and rotary tables."""
    config = dataclasses.replace(
        TINY, dim=512, n_heads=8, n_kv_heads=kv_heads, n_layers=layers, max_seq_len=512, ffn_multiple_of=32
    )
    model = with_own_backward(Llama(config, compute_dtype=torch.bfloat16), by_hand).bfloat16()
    model.rebuild_rope_tables()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    known = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:  # what is kept is alive, so no two storages have one address
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        logits = model(tokens)
    assert logits.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_layer_keeps_what_the_formula_says(kv_heads: int, record_property: Callable[[str, Any], None]) -> None:
    tokens, heads, width, ffn_width = some_tokens(2, 512), 8, 512, 1376
    per_token = {}
    for chosen in (False, True):
        four, two = (kept_bytes(layers, by_hand=chosen, kv_heads=kv_heads, tokens=tokens) for layers in (4, 2))
        per_token[chosen] = (four - two) / 2 / tokens.numel()
    shared = heads // kv_heads
    expected = (8 + 4 / shared) * width + 4 * ffn_width + 4 * heads + 8
    record_property("bytes per token and layer: autograd, own backward, formula", [*per_token.values(), expected])
    assert per_token[True] == pytest.approx(expected, rel=0.01)
    assert per_token[True] < 0.6 * per_token[False]
