"""Sampling: the cache changes nothing, rows do not disturb each other, and the settings do what they say."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatrain.config.generate import GenerateConfig, check_generate
from llamatrain.config.model import ModelConfig
from llamatrain.errors import ConfigError, UnhealthyRun
from llamatrain.model.generation import generate, keep_top_p, next_tokens, uniform
from llamatrain.model.init import init_weights
from llamatrain.model.llama import KVCache, Llama

TINY = ModelConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=101,
    ffn_multiple_of=8,
    max_seq_len=48,
    init_std=0.3,
    attention="sdpa",
)
PROMPTS = [[1, 5, 9, 30, 2, 8, 77], [1, 60], [1, 4, 4, 100], [7]]
MARGIN = 1e-4  # where the two likeliest tokens are nearer than this, rounding may choose


def built(**changes) -> Llama:
    config = dataclasses.replace(TINY, **changes)
    model = Llama(config)
    init_weights(model, config, seed=11)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Llama:
    return built()


def assert_greedy(model: Llama, prompt: list[int], continuation: list[int]) -> None:
    """Each token is the likeliest of a forward without cache, unless two are too near to tell."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + continuation]))[0]
    for i, token in enumerate(continuation, start=len(prompt)):
        best, second = logits[i - 1].topk(2).values
        assert best - second <= MARGIN or token == logits[i - 1].argmax(), f"token {i}"


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": None}, {"tied_embeddings": True}])
def test_greedy_output_is_that_of_the_forward_without_cache(changes, backend):
    model = built(attention=backend, **changes)
    rows = generate(model, PROMPTS, max_new_tokens=20, temperature=0)
    assert [len(row) for row in rows] == [20] * 4
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert_greedy(model, prompt, row)


def test_cached_logits_are_the_uncached_in_any_portions(model):
    tokens = torch.randint(TINY.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens)
        for portions in ([20], [5, 15], [1] * 20, [7, 1, 1, 8, 3]):
            cache = KVCache(model.config, batch=3, max_len=20, dtype=torch.float32, device=torch.device("cpu"))
            pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split(portions, 1)], 1)
            assert cache.length == 20
            assert (pieces - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_a_row_of_a_batch_is_the_prompt_alone(model):
    together = generate(model, PROMPTS, max_new_tokens=15, temperature=0)
    alone = [generate(model, [prompt], max_new_tokens=15, temperature=0)[0] for prompt in PROMPTS]
    assert together == alone


def test_a_row_ends_with_its_first_eos_and_others_go_on(model):
    free = generate(model, PROMPTS, max_new_tokens=15, temperature=0)
    eos = free[1][4]
    for row, stopped in zip(free, generate(model, PROMPTS, max_new_tokens=15, temperature=0, eos_id=eos), strict=True):
        assert stopped == (row[: row.index(eos) + 1] if eos in row else row)


def test_eos_inside_a_prompt_does_not_stop_it(model):
    prompts = [[1], [1, 9, 9, 9]]
    free = generate(model, prompts, max_new_tokens=6, temperature=0)
    assert 9 not in free[0] + free[1]
    assert generate(model, prompts, max_new_tokens=6, temperature=0, eos_id=9) == free


def test_generation_stops_early_when_every_row_has_ended(model, monkeypatch):
    first = generate(model, [[1, 2]], max_new_tokens=1, temperature=0)[0][0]
    calls = []
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(1) or Llama.forward(model, *a, **k))
    assert generate(model, [[1, 2]], max_new_tokens=30, temperature=0, eos_id=first) == [[first]]
    assert len(calls) == 1


def test_seed_decides_what_is_drawn(model):
    def draw(seed: int) -> list[list[int]]:
        return generate(model, PROMPTS, max_new_tokens=12, temperature=1.5, top_p=1.0, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_what_is_drawn_for_a_prompt_does_not_depend_on_those_after_it(model):
    def draw(prompts: list[list[int]]) -> list[list[int]]:
        return generate(model, prompts, max_new_tokens=8, temperature=1.0, seed=3)

    assert draw(PROMPTS)[:2] == draw(PROMPTS[:2])
    same = draw([PROMPTS[0]] * 3)
    assert len({tuple(row) for row in same}) == 3


def test_the_ends_of_a_draw_are_tokens_of_some_probability():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    for top_p in (1.0, 0.9):
        assert next_tokens(logits, temperature=1.0, top_p=top_p, draws=[0.0, 0.5, 1 - 2**-53]).tolist() == [1, 3, 3]


def test_a_tiny_top_p_is_greedy(model):
    greedy = generate(model, PROMPTS, max_new_tokens=10, temperature=0)
    assert generate(model, PROMPTS, max_new_tokens=10, temperature=1.0, top_p=1e-6, seed=5) == greedy


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=30), top_p=st.floats(0.01, 0.999), seed=st.integers()
)
def test_top_p_keeps_the_fewest_likeliest_tokens(weights, top_p, seed):
    probabilities = torch.tensor([weights], dtype=torch.float64)
    probabilities /= probabilities.sum()
    kept = keep_top_p(probabilities, top_p)[0]
    stay = kept > 0
    assert torch.equal(kept[stay], probabilities[0][stay])
    assert kept.sum() >= top_p - 1e-9  # enough
    assert kept.sum() - kept[stay].min() < top_p + 1e-9  # and no fewer would do
    if not stay.all():
        assert kept[stay].min() >= probabilities[0][~stay].max()


def test_tokens_are_drawn_by_their_probability():
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0]).log_softmax(-1)
    n = 40000
    draws = [uniform(0, row) for row in range(n)]
    drawn = next_tokens(logits.expand(n, 4), temperature=2.0, top_p=1.0, draws=draws)
    shares = drawn.bincount(minlength=4) / n
    expected = (logits / 2).softmax(-1)
    assert ((shares - expected).abs() < 4 * (expected / n).sqrt()).all()
    cut = next_tokens(logits.expand(n, 4), temperature=1.0, top_p=0.8, draws=draws)
    assert set(cut.tolist()) == {0, 1}  # 0.64 + 0.24


def test_what_does_not_fit_is_refused_with_the_fix(model):
    with pytest.raises(ConfigError, match=r"7 tokens and max_new_tokens=42 .*max_seq_len=48: set max_new_tokens=41"):
        generate(model, PROMPTS, max_new_tokens=42)
    with pytest.raises(ConfigError, match="shorten the prompt"):
        generate(model, [[1] * 48], max_new_tokens=1)
    with pytest.raises(ConfigError, match="at least one token"):
        generate(model, [[1], []], max_new_tokens=1)
    assert len(generate(model, PROMPTS, max_new_tokens=41, temperature=0)[0]) == 41


def test_bf16_model_generates():
    model = Llama(TINY, compute_dtype=torch.bfloat16)
    init_weights(model, TINY, seed=11)
    assert [len(row) for row in generate(model, PROMPTS, max_new_tokens=5, temperature=0)] == [5] * 4


# The command


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": None}, "checkpoint="),
        ({"prompt": []}, "prompt="),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"device": "tpu"}, "device=tpu"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        check_generate(dataclasses.replace(GenerateConfig(checkpoint="runs/x"), **change))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_no_numbers_write_nothing(temperature: float) -> None:
    broken = built()
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    with pytest.raises(UnhealthyRun, match="no finite logits"):
        generate(broken, PROMPTS, max_new_tokens=3, temperature=temperature)
