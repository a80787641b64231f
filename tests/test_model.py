"""The model against Hugging Face's, and its parts against plainer ways to write them."""

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamatrain.arithmetic import parameter_count, parameter_shapes
from llamatrain.checkpoint import interop
from llamatrain.checkpoint.interop import from_hf_state_dict, to_hf_state_dict
from llamatrain.config.model import ModelConfig
from llamatrain.errors import CheckpointError, ConfigError
from llamatrain.model import attention as attention_module
from llamatrain.model.attention import attention, resolve_backend, xformers_mask
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama, RMSNorm
from llamatrain.model.loss import IGNORE_INDEX, cross_entropy_sum
from llamatrain.model.rope import apply_rope, rope_tables
from tests.test_arithmetic import COUNTS, preset

CPU = torch.device("cpu")
TINY = ModelConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    vocab_size=101,
    ffn_multiple_of=8,
    max_seq_len=64,
    rope_theta=500.0,
    norm_eps=1e-3,
    init_std=0.3,  # large: attention must be far from uniform for its errors to show
    init_depth_scaled=False,
    attention="sdpa",
)


def tiny(compute_dtype: torch.dtype = torch.float32, **changes) -> Llama:
    config = dataclasses.replace(TINY, **changes)
    model = Llama(config, compute_dtype=compute_dtype)
    init_weights(model, config, seed=3)
    with torch.no_grad():  # norms of 1 would hide a norm that forgets its weight
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter += 0.5 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def some_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


# Shapes and counts


@pytest.mark.parametrize("name", COUNTS)
def test_preset_builds_with_exactly_its_parameters(name):
    config = preset(name)
    with torch.device("meta"):
        model = Llama(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == parameter_shapes(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name] == parameter_count(config)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_state_holds_the_parameters_and_nothing_else():
    assert list(tiny(n_kv_heads=2).state_dict()) == list(parameter_shapes(dataclasses.replace(TINY, n_kv_heads=2)))
    assert "output.weight" not in tiny(tied_embeddings=True).state_dict()


# Parity with Hugging Face


def hugging_face(config: ModelConfig, state: dict[str, Tensor]):
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tied_embeddings,
            attn_implementation="eager",
        )
    )
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert unexpected == [] and missing == (["lm_head.weight"] if config.tied_embeddings else [])
    theirs.tie_weights()
    return theirs


def relative(difference: Tensor, scale: Tensor) -> float:
    return (difference.norm() / scale.norm()).item()


def parity(ours: Llama, state: dict[str, Tensor]) -> tuple[float, float]:
    """Largest relative difference of the logits, and of any parameter's gradient, from those of Hugging Face."""
    theirs = hugging_face(ours.config, state)
    tokens, targets = some_tokens(3, 40), some_tokens(3, 40, seed=1)
    our_logits, their_logits = ours(tokens), theirs(tokens).logits
    logits = ((our_logits - their_logits).abs().max() / their_logits.abs().max()).item()
    cross_entropy_sum(our_logits, targets).backward()
    cross_entropy_sum(their_logits, targets).backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    back = from_hf_state_dict(their_gradients, ours.config)
    gradients = [relative(p.grad - back[name], back[name]) for name, p in ours.named_parameters()]
    return logits, max(gradients)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"tied_embeddings": True}])
def test_logits_and_gradients_are_those_of_hugging_face(changes, backend):
    ours = tiny(attention=backend, **changes)
    logits, gradients = parity(ours, to_hf_state_dict(ours.state_dict(), ours.config))
    assert logits <= 1e-5
    assert gradients <= 1e-5


def test_without_the_rotary_permutation_parity_is_lost(monkeypatch):
    ours = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(interop, "_pairs_to_halves", lambda name, tensor, config: tensor)
        wrong = to_hf_state_dict(ours.state_dict(), ours.config)
    assert parity(ours, wrong)[0] > 1e-2


def test_constants_that_parity_rests_on_matter():
    """Were theta or epsilon ignored, the parity tests would have to fail: they move the logits visibly."""
    tokens, base = some_tokens(1, 40), tiny()
    for changes in ({"rope_theta": 10000.0}, {"norm_eps": 1e-6}):
        other = tiny(**changes)
        assert (other(tokens) - base(tokens)).abs().max() > 1e-3 * base(tokens).abs().max()


def test_attention_of_the_test_model_is_far_from_uniform(monkeypatch):
    seen = []

    def spy(q, k, v, **options):
        scores = torch.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        seen.append(scores.masked_fill(~mask, -torch.inf).softmax(-1)[:, :, -1].max(-1).values.mean())
        return attention(q, k, v, **options)

    monkeypatch.setattr("llamatrain.model.llama.attention", spy)
    tiny()(some_tokens(2, 40))
    assert min(seen) > 5 / 40


@pytest.mark.parametrize("changes", [{"n_kv_heads": 2}, {"tied_embeddings": True}])
def test_hugging_face_names_and_back_is_the_identity(changes):
    model = tiny(**changes)
    state = model.state_dict()
    theirs = to_hf_state_dict(state, model.config)
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # in files of older versions
    back = from_hf_state_dict(theirs, model.config)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_weights_of_another_model_are_refused_by_name():
    state = dict(tiny().state_dict())
    theirs = to_hf_state_dict(state, TINY)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \(5, 64\)"):
        from_hf_state_dict({**theirs, "lm_head.weight": torch.zeros(5, 64)}, TINY)
    with pytest.raises(CheckpointError, match=r"has model\.layers\.0\.self_attn\.q_proj\.bias"):
        from_hf_state_dict({**theirs, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, TINY)
    del state["norm.weight"]
    with pytest.raises(CheckpointError, match=r"lacks norm\.weight"):
        to_hf_state_dict(state, TINY)


# Attention


def qkv(batch=2, queries=24, keys=24, heads=4, kv_heads=4, width=16, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width))
    q, k, v = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return q, k, v


CASES = {
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
}


@pytest.mark.parametrize("case", CASES)
def test_sdpa_and_its_gradients_are_the_reference(case):
    shape, options = CASES[case]
    inputs = qkv(**shape)
    results = []
    for backend in ("reference", "sdpa"):
        out = attention(*inputs, backend=backend, **options)
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
    found = attention(q.float(), k.float(), v.float(), backend="reference", query_offset=offset)
    torch.testing.assert_close(found.double(), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_packed_documents_attend_as_if_alone(backend):
    q, k, v = qkv(batch=1)
    packed = attention(q, k, v, backend=backend, doc_lengths=[5, 12, 7])
    alone = [attention(*(x[:, a:b] for x in (q, k, v)), backend=backend) for a, b in ((0, 5), (5, 17), (17, 24))]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), length=st.integers(1, 12))
def test_xformers_document_mask_is_the_reference_mask(data, batch, length):
    lengths, left = [], batch * length
    while left:
        lengths.append(data.draw(st.integers(1, left)))
        left -= lengths[-1]
    theirs = xformers_mask(batch, length, length, lengths).materialize((batch * length, batch * length)) == 0
    ours = attention_module._visible(batch, length, length, lengths, CPU)[:, 0]
    expected = torch.block_diag(*ours.int()).bool()
    assert torch.equal(theirs, expected)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 6), (2, 6), (1, 6)])
def test_xformers_causal_masks_are_the_reference_masks(queries, keys):
    theirs = xformers_mask(2, queries, keys, None).materialize((queries, keys)) == 0
    assert torch.equal(theirs, attention_module._visible(2, queries, keys, None, CPU))


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
    found = attention(*inputs, backend="xformers", **options)
    torch.testing.assert_close(found, attention(*inputs, backend="reference", **options), rtol=1e-5, atol=1e-6)


def test_wrong_use_of_attention_is_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="add up to"):
        attention(q, k, v, backend="sdpa", doc_lengths=[24])
    with pytest.raises(ValueError, match="query_offset=0"):
        attention(q[:, :5], k, v, backend="sdpa", doc_lengths=[24, 24], query_offset=3)
    with pytest.raises(ValueError, match="24 keys"):
        attention(q, k, v, backend="sdpa", query_offset=1)
    with pytest.raises(ValueError, match="resolve_backend"):
        attention(q, k, v, backend="auto")


def test_backend_on_the_cpu():
    assert resolve_backend("auto", CPU) == "sdpa"
    assert resolve_backend("reference", CPU) == "reference"
    with pytest.raises(ConfigError, match=r"no operator for the CPU; set model\.attention=sdpa"):
        resolve_backend("xformers", CPU)
    with pytest.raises(ConfigError, match="choose one of"):
        resolve_backend("flash", CPU)


def test_auto_on_cuda_falls_back_once_and_says_why(monkeypatch, caplog):
    attention_module._automatic_backend.cache_clear()
    monkeypatch.setattr(attention_module, "_xformers_failure", lambda device: "ImportError: no xformers")
    with caplog.at_level(logging.WARNING):
        assert [resolve_backend("auto", torch.device("cuda")) for _ in range(2)] == ["sdpa", "sdpa"]
    assert len(caplog.records) == 1 and "no xformers" in caplog.text
    attention_module._automatic_backend.cache_clear()
    monkeypatch.setattr(attention_module, "_xformers_failure", lambda device: None)
    assert resolve_backend("auto", torch.device("cuda")) == "xformers"
    attention_module._automatic_backend.cache_clear()


# The rest of the model


def test_rope_is_the_released_complex_product():
    x = torch.randn(2, 10, 3, 8, generator=torch.Generator().manual_seed(0))
    frequencies = 1.0 / (300.0 ** (torch.arange(0, 8, 2).float() / 8))
    turns = torch.polar(torch.ones(10, 4), torch.outer(torch.arange(10).float(), frequencies))
    expected = torch.view_as_real(torch.view_as_complex(x.view(2, 10, 3, 4, 2)) * turns[:, None]).flatten(3)
    cos, sin = rope_tables(8, max_seq_len=10, theta=300.0)
    torch.testing.assert_close(apply_rope(x, cos, sin), expected)
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_norm_computes_in_fp32():
    norm = RMSNorm(512, eps=1e-6)
    x = torch.full((1, 512), 200.0, dtype=torch.float16)  # squares overflow fp16
    assert torch.equal(norm(x), torch.ones(1, 512, dtype=torch.float16))


def test_packed_documents_equal_separate_forwards():
    model, tokens = tiny(n_kv_heads=2), some_tokens(2, 30)
    lengths = [4, 26, 17, 13]
    packed = model(tokens, doc_lengths=lengths).flatten(0, 1)
    pieces = tokens.flatten().split(lengths)
    alone = torch.cat([model(piece[None])[0] for piece in pieces])
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_no_token_sees_a_later_one():
    model, tokens = tiny(), some_tokens(1, 20)
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % TINY.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12], after[:, 12])


def test_bf16_stays_near_fp32_and_leaves_weights_in_fp32():
    full, half = tiny(init_std=0.1), tiny(torch.bfloat16, init_std=0.1)
    tokens, targets = some_tokens(3, 40), some_tokens(3, 40, seed=1)
    logits = half(tokens)
    assert logits.dtype == torch.bfloat16
    losses = [cross_entropy_sum(model(tokens), targets) for model in (full, half)]
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-3)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(full.named_parameters(), half.parameters(), strict=True):
        assert q.dtype == q.grad.dtype == torch.float32
        assert relative(q.grad - p.grad, p.grad) < 0.05, name


def test_more_tokens_than_the_model_has_positions_are_refused():
    with pytest.raises(ValueError, match=r"65 tokens.*model\.max_seq_len=64"):
        tiny()(some_tokens(1, 65))


def test_loss_is_the_sum_over_valid_targets():
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[3, -100, 0, 10, -100], [-100, 1, 2, 3, 4]])
    expected = sum(
        -logits[b, t].double().log_softmax(-1)[targets[b, t]]
        for b in range(2)
        for t in range(5)
        if targets[b, t] != IGNORE_INDEX
    )
    assert cross_entropy_sum(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert cross_entropy_sum(logits, torch.full_like(targets, IGNORE_INDEX)).item() == 0.0
    half = cross_entropy_sum(logits.bfloat16(), targets)
    assert half == F.cross_entropy(logits.bfloat16().float().flatten(0, 1), targets.flatten(), reduction="sum")


def test_micro_batches_add_up_to_the_batch():
    model, tokens, targets = tiny(), some_tokens(4, 16), some_tokens(4, 16, seed=1)
    targets[0, :9] = IGNORE_INDEX
    whole = cross_entropy_sum(model(tokens), targets)
    parts = sum(cross_entropy_sum(model(tokens[i : i + 1]), targets[i : i + 1]) for i in range(4))
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)


def test_the_torch_free_ground_stays_torch_free():
    code = "import sys, llamatrain.arithmetic, llamatrain.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
