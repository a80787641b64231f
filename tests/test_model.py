"""The model against Hugging Face's, and its parts against plainer ways to write them."""

import dataclasses

import pytest
import torch
from torch import Tensor

from llamatrain.arithmetic import parameter_count, parameter_shapes
from llamatrain.config.model import ModelConfig
from llamatrain.model.elementwise import apply_rope
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama, RMSNorm
from llamatrain.model.loss import IGNORE_INDEX
from llamatrain.model.rope import rope_tables
from tests import hugging_face as hugging_face_layout
from tests.hugging_face import from_hugging_face, to_hugging_face
from tests.test_arithmetic import COUNTS, preset
from tests.test_loss import loss_by_formula

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
    loss_by_formula(our_logits, targets).backward()
    loss_by_formula(their_logits, targets).backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    back = from_hugging_face(their_gradients, ours.config)
    gradients = [relative(p.grad - back[name], back[name]) for name, p in ours.named_parameters()]
    return logits, max(gradients)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"tied_embeddings": True}])
def test_logits_and_gradients_are_those_of_hugging_face(changes, backend):
    ours = tiny(attention=backend, **changes)
    logits, gradients = parity(ours, to_hugging_face(ours.state_dict(), ours.config))
    assert logits <= 1e-5
    assert gradients <= 1e-5


def test_without_the_rotary_permutation_parity_is_lost(monkeypatch):
    ours = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(hugging_face_layout, "pairs_to_halves", lambda name, tensor, config: tensor)
        wrong = to_hugging_face(ours.state_dict(), ours.config)
    assert parity(ours, wrong)[0] > 1e-2


def test_constants_that_parity_rests_on_matter():
    """Were theta or epsilon ignored, the parity tests would have to fail: they move the logits visibly."""
    tokens, base = some_tokens(1, 40), tiny()
    for changes in ({"rope_theta": 10000.0}, {"norm_eps": 1e-6}):
        other = tiny(**changes)
        assert (other(tokens) - base(tokens)).abs().max() > 1e-3 * base(tokens).abs().max()


def test_attention_of_the_test_model_is_far_from_uniform():
    seen, model = [], tiny()

    def spy(q, k, v, **options):
        scores = torch.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        seen.append(scores.masked_fill(~mask, -torch.inf).softmax(-1)[:, :, -1].max(-1).values.mean())
        return attend(q, k, v, **options)

    for block in model.layers.values():
        attend, block.attention.attend = block.attention.attend, spy
    model(some_tokens(2, 40))
    assert min(seen) > 5 / 40


@pytest.mark.parametrize("changes", [{"n_kv_heads": 2}, {"tied_embeddings": True}])
def test_hugging_face_names_and_back_is_the_identity(changes):
    model = tiny(**changes)
    state = model.state_dict()
    theirs = to_hugging_face(state, model.config)
    back = from_hugging_face(theirs, model.config)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


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
    losses = [model(tokens, targets=targets) for model in (full, half)]
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
    model, tokens = tiny(), some_tokens(2, 5)
    targets = torch.tensor([[3, -100, 0, 10, -100], [-100, 1, 2, 3, 4]])
    log_p = model(tokens).double().log_softmax(-1)
    expected = -sum(log_p[b, t, targets[b, t]] for b in range(2) for t in range(5) if targets[b, t] != IGNORE_INDEX)
    assert model(tokens, targets=targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert model(tokens, targets=torch.full_like(targets, IGNORE_INDEX)).item() == 0.0


def test_micro_batches_add_up_to_the_batch():
    model, tokens, targets = tiny(), some_tokens(4, 16), some_tokens(4, 16, seed=1)
    targets[0, :9] = IGNORE_INDEX
    whole = model(tokens, targets=targets)
    parts = sum(model(tokens[i : i + 1], targets=targets[i : i + 1]) for i in range(4))
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
