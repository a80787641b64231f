"""Attention: the backends against the reference, the reference against loops, and at any offset against whole rows."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamatrain.model.attention import Attend
from llamatrain.model.attention_reference import visible_keys
from llamatrain.model.attention_xformers import block_mask

CPU = torch.device("cpu")


def qkv(batch=2, queries=24, keys=24, heads=4, kv_heads=4, width=16, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width))
    q, k, v = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return q, k, v


CASES: dict[str, Any] = {
    "plain": ({}, {}),
    "one token": ({"queries": 1, "keys": 1}, {}),
    "grouped": ({"kv_heads": 2}, {}),
    "one key head": ({"kv_heads": 1}, {}),
    "documents": ({}, {"doc_lengths": [5, 19, 1, 1, 22]}),
    "documents grouped": ({"kv_heads": 2}, {"doc_lengths": [5, 19, 24]}),
    "documents cut at the row": ({}, {"doc_lengths": [20, 28]}),
    "offset": ({"queries": 7}, {"query_offset": 17}),
    "offset grouped": ({"queries": 7, "kv_heads": 1}, {"query_offset": 17}),
    "offset, keys after the queries": ({"queries": 7}, {"query_offset": 3}),
    "last query": ({"queries": 1, "kv_heads": 2}, {"query_offset": 23}),
    "one query inside": ({"queries": 1}, {"query_offset": 9}),
    "documents at an offset": ({"queries": 7}, {"query_offset": 17, "doc_lengths": [5, 14, 3, 1, 25]}),
    "documents inside": ({"queries": 9, "kv_heads": 2}, {"query_offset": 6, "doc_lengths": [8, 4, 30, 6]}),
    "documents, one query": ({"queries": 1}, {"query_offset": 20, "doc_lengths": [16, 20, 12]}),
}


@pytest.mark.parametrize("case", CASES)
def test_sdpa_and_its_gradients_are_the_reference(case):
    shape, options = CASES[case]
    inputs = qkv(**shape)
    results = []
    for backend in ("reference", "sdpa"):
        out = Attend(backend)(*inputs, **options)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for reference, found in zip(*results, strict=True):
        scale = reference.abs().max().clamp(min=0.1)  # of one key the gradient is 0 up to rounding
        assert (found - reference).abs().max() <= 1e-5 * scale


def test_reference_is_the_formula_written_with_loops():
    q, k, v = (x.detach().double() for x in qkv(batch=2, queries=3, keys=8, kv_heads=2, width=6))
    offset, out = 4, torch.zeros(2, 3, 4, 6, dtype=torch.double)
    for b in range(2):
        for h in range(4):
            for i in range(3):
                seen = range(offset + i + 1)
                scores = torch.stack([q[b, i, h] @ k[b, j, h // 2] / 6**0.5 for j in seen])
                weights = scores.exp() / scores.exp().sum()
                out[b, i, h] = sum(weights[j] * v[b, j, h // 2] for j in seen)
    found = Attend("reference")(q.float(), k.float(), v.float(), query_offset=offset)
    torch.testing.assert_close(found.double(), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_packed_documents_attend_as_if_alone(backend):
    q, k, v = qkv(batch=1)
    packed = Attend(backend)(q, k, v, doc_lengths=[5, 12, 7])
    alone = [Attend(backend)(*(x[:, a:b] for x in (q, k, v))) for a, b in ((0, 5), (5, 17), (17, 24))]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), length=st.integers(1, 12))
def test_xformers_document_mask_is_the_reference_mask(data, batch, length):
    lengths, left = [], batch * length
    while left:
        lengths.append(data.draw(st.integers(1, left)))
        left -= lengths[-1]
    theirs = block_mask(length, length, lengths).materialize((batch * length, batch * length)) == 0
    ours = visible_keys(batch, length, length, lengths, CPU)[:, 0]
    expected = torch.block_diag(*ours.int()).bool()
    assert torch.equal(theirs, expected)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 6), (2, 6), (1, 6)])
def test_xformers_causal_masks_are_the_reference_masks(queries, keys):
    theirs = block_mask(queries, keys, None).materialize((queries, keys)) == 0
    assert torch.equal(theirs, visible_keys(2, queries, keys, None, CPU))


@pytest.mark.parametrize("case", CASES)
def test_xformers_backend_hands_over_what_makes_the_reference(case, monkeypatch):
    """xformers has no CPU operator; a stand-in with its calling convention does the sum from the mask it gets."""
    import xformers.ops

    def operator(q, k, v, attn_bias, op):
        assert op is None and q.shape[2] == k.shape[2] == v.shape[2]
        bias = attn_bias.materialize((q.shape[1], k.shape[1]))
        weights = (torch.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5 + bias).softmax(-1)
        return torch.einsum("bhqs,bshk->bqhk", weights, v)

    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", operator)
    shape, options = CASES[case]
    inputs = qkv(**shape)
    found = Attend("xformers")(*inputs, **options)
    torch.testing.assert_close(found, Attend("reference")(*inputs, **options), rtol=1e-5, atol=1e-6)


def test_wrong_use_of_attention_is_refused():
    q, k, v = qkv()
    for attend in (Attend("sdpa"), Attend("sdpa").forward):
        with pytest.raises(ValueError, match=r"add up to 2\*24"):
            attend(q, k, v, doc_lengths=[24])
        with pytest.raises(ValueError, match=r"add up to 2\*24"):
            attend(q[:, :5], k, v, doc_lengths=[5, 5], query_offset=3)
        with pytest.raises(ValueError, match="24 keys for queries at 1 to 24"):
            attend(q, k, v, query_offset=1)
    with pytest.raises(ValueError, match="resolve_backend"):
        Attend("auto")(q, k, v)
