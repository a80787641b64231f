"""The blocks' own backward against autograd: values, gradients, and the memory between forward and backward."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from llamatrain.model import block_backward
from llamatrain.model.attention import Attend
from llamatrain.model.block_backward import attention_half, feed_forward_half, own_backward
from llamatrain.model.elementwise import apply_rope, rope, rope_backward
from llamatrain.model.llama import Block, KVCache, Llama
from llamatrain.model.rope import rope_tables
from tests.test_loss import loss_by_formula
from tests.test_model import TINY, relative, some_tokens, tiny


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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
        settings: dict[str, Any] = {"eps": 1e-2, "head_dim": HEAD_DIM, "attend": Attend(backend)}
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


def test_rotation_turns_back_and_keeps_the_dtype() -> None:
    q, k = numbers(2, 10, 3, 8), numbers(2, 10, 1, 8, seed=1)
    cos, sin = rope_tables(8, max_seq_len=10, theta=300.0)
    turned = rope(q, k, cos, sin)
    assert torch.equal(turned[0], apply_rope(q, cos, sin)) and torch.equal(turned[1], apply_rope(k, cos, sin))
    for found, expected in zip(rope_backward(*turned, cos, sin), (q, k), strict=True):
        torch.testing.assert_close(found, expected)
    for dtype in (torch.bfloat16, torch.float64):
        assert apply_rope(q.to(dtype), cos, sin).dtype == dtype


# The whole model


def with_own_backward(model: Llama, chosen: bool = True) -> Llama:
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.training_forward = own_backward if chosen else None
    return model


def logits_and_gradients(model: Llama, doc_lengths: list[int] | None = None) -> tuple[Tensor, dict[str, Any]]:
    logits = model(some_tokens(3, 40), doc_lengths=doc_lengths)
    loss_by_formula(logits, some_tokens(3, 40, seed=1)).backward()
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
