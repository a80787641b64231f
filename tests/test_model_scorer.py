"""The scorer against the simplest one: each request alone, in one forward without a cache."""

import dataclasses
import math
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatrain.config.model import ModelConfig
from llamatrain.config.parallel import Layout
from llamatrain.errors import ConfigError
from llamatrain.evaluation import lockstep, model_scorer
from llamatrain.evaluation.model_scorer import ModelScorer
from llamatrain.evaluation.prefixes import KEPT_TOKENS, Piece, distinct_rows, group_bounds, plan
from llamatrain.evaluation.scoring import Generation, Likelihood, LikelihoodScore, NotFinite
from llamatrain.evaluation.tokens import Ending, encode_pair, pieces_of, room_for
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from llamatrain.tokenizer import Tokenizer
from tests.conftest import TINY_VOCAB

CPU = torch.device("cpu")
LENGTH = 96
CONFIG = ModelConfig(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=TINY_VOCAB + 3,  # ids that the tokenizer does not have
    ffn_multiple_of=16,
    max_seq_len=LENGTH,
    init_std=0.25,
    attention="sdpa",
)
EXAMPLES = "def one(self, value):\n    return value\n\n" * 2
QUESTIONS = [
    Likelihood(f"{shots}Question: what does {name} do?\nAnswer:", f" {choice}")
    for shots in ("", EXAMPLES)
    for name in ("add_argument", "wrap", "mean")
    for choice in ("it returns a list of the lines", "nothing", "it", "it returns", "the arithmetic mean of the data")
]
REQUESTS = [*QUESTIONS, Likelihood("", "import os"), Likelihood("", "import os, sys"), Likelihood("a re", "turn")]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer)


def built(**changes: object) -> Llama:
    config = dataclasses.replace(CONFIG, **changes)
    model = Llama(config)
    init_weights(model, config, seed=5)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Llama:
    return built()


def scorer_of(model: Llama, tokenizer: Tokenizer, **settings: object) -> ModelScorer:
    return ModelScorer(model, tokenizer, device=CPU, **{"max_batch_tokens": 300, **settings})


@torch.no_grad()
def scored_alone(model: Llama, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    inputs = [*context, *continuation[:-1]][-model.config.max_seq_len :]
    log_probabilities = model(torch.tensor([inputs]))[0, -len(continuation) :].double().log_softmax(-1)
    targets = torch.tensor(continuation)
    likeliest = log_probabilities[:, :TINY_VOCAB].argmax(1)
    return float(log_probabilities.gather(1, targets[:, None]).sum()), bool((likeliest == targets).all())


def assert_close(scores: list[LikelihoodScore], expected: list[tuple[float, bool]]) -> None:
    assert len(scores) == len(expected)
    for score, (log_probability, greedy) in zip(scores, expected, strict=True):
        assert score.log_probability == pytest.approx(log_probability, rel=1e-5, abs=1e-4)
        assert score.greedy == greedy


# ---------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("max_batch_tokens", [1, 150, 300, 100_000])
def test_scores_are_those_of_each_request_alone(model: Llama, tokenizer: Tokenizer, max_batch_tokens: int) -> None:
    requests = random.Random(3).sample(REQUESTS, len(REQUESTS))
    pairs = [encode_pair(tokenizer, request.context, request.continuation) for request in requests]
    scores = scorer_of(model, tokenizer, max_batch_tokens=max_batch_tokens).likelihoods(requests)
    assert_close(scores, [scored_alone(model, pair.context, pair.continuation) for pair in pairs])
    assert [score.tokens for score in scores] == [len(pair.continuation) for pair in pairs]


@pytest.mark.parametrize("changes", [{"tied_embeddings": True}, {"n_kv_heads": None, "attention": "reference"}])
def test_other_models_are_scored_too(tokenizer: Tokenizer, changes: dict) -> None:
    other = built(**changes)
    pairs = [encode_pair(tokenizer, request.context, request.continuation) for request in REQUESTS]
    scores = scorer_of(other, tokenizer).likelihoods(REQUESTS)
    assert_close(scores, [scored_alone(other, pair.context, pair.continuation) for pair in pairs])


def test_a_greedy_continuation_is_called_so(model: Llama, tokenizer: Tokenizer) -> None:
    scorer = scorer_of(model, tokenizer)
    prompt, tokens = [tokenizer.bos_id, 300, 301], []
    for _ in range(6):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([prompt + tokens]))[0, -1, :TINY_VOCAB].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % TINY_VOCAB]
    first, second, shorter = scorer.token_likelihoods([(prompt, tokens), (prompt, other), (prompt, tokens[:3])])
    assert (first.greedy, second.greedy, shorter.greedy) == (True, False, True)
    assert first.log_probability > second.log_probability


def test_ids_that_the_tokenizer_does_not_have_are_never_the_likeliest(
    model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = scorer_of(model, tokenizer).generations([Generation("import", 8)])[0]

    def forward(*arguments: object, **more: object) -> torch.Tensor:
        logits = Llama.forward(model, *arguments, **more)  # type: ignore[arg-type]
        logits[..., TINY_VOCAB:] += 1e3
        return logits

    monkeypatch.setattr(model, "forward", forward)
    scorer = scorer_of(model, tokenizer)
    assert scorer.generations([Generation("import", 8)]) == [[text]]
    tokens = tokenizer.encode("import", bos=True)
    assert any(score.greedy for score in scorer.token_likelihoods([(tokens, [token]) for token in range(TINY_VOCAB)]))


def test_what_is_shared_is_computed_once(model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def forward(tokens: torch.Tensor, **more: object) -> torch.Tensor:
        computed.append(tokens.numel())
        return Llama.forward(model, tokens, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", forward)
    context = [1, *range(300, 360)]
    scorer = scorer_of(model, tokenizer, max_batch_tokens=4000)
    scorer.token_likelihoods([(context, [400 + choice]) for choice in range(4)])
    assert computed == [len(context)]  # four answers of one token: one row
    computed.clear()
    scorer.token_likelihoods([(context, [400 + choice, 9, 9]) for choice in range(4)])
    assert sum(computed) == 60 + 4 * 3
    computed.clear()
    questions = [([*context, *range(number, number + 5)], [answer]) for number in range(20) for answer in (7, 8)]
    scorer.token_likelihoods(questions)  # the same examples before 20 questions
    assert sum(computed) < len(context) + 20 * 12


def test_a_long_context_loses_its_front_and_a_long_continuation_is_scored_in_windows(
    model: Llama, tokenizer: Tokenizer
) -> None:
    generator = random.Random(1)
    context = [1, *(generator.randrange(3, 500) for _ in range(200))]
    continuation = [generator.randrange(3, 500) for _ in range(250)]
    scorer = scorer_of(model, tokenizer)
    short, long = scorer.token_likelihoods([(context, continuation[:9]), (context, continuation)])
    assert_close([short], [scored_alone(model, context, continuation[:9])])
    # as lm-evaluation-harness has it: windows follow each other, the last one reaches back
    expected = scored_alone(model, context[-1:], continuation[:LENGTH])[0]
    expected += scored_alone(model, continuation[LENGTH - 1 : LENGTH], continuation[LENGTH : 2 * LENGTH])[0]
    rest = 250 - 2 * LENGTH
    expected += scored_alone(model, continuation[250 - LENGTH - 1 : 2 * LENGTH], continuation[-rest:])[0]
    assert long.log_probability == pytest.approx(expected, rel=1e-5)
    assert long.tokens == 250


def test_each_token_of_a_document_is_scored_once(model: Llama, tokenizer: Tokenizer) -> None:
    texts = ["import os\n", "", "def f(x):\n    return x + 1\n" * 30]
    scores = scorer_of(model, tokenizer).document_likelihoods(texts)
    assert [score.tokens for score in scores] == [len(tokenizer.encode(text)) for text in texts]
    assert scores[2].tokens > 2 * LENGTH
    assert_close(scores[:2], [scored_alone(model, [1], tokenizer.encode(texts[0])), (0.0, True)])


@given(
    context=st.lists(st.integers(0, 99), min_size=1, max_size=30),
    continuation=st.lists(st.integers(100, 199), max_size=70, unique=True),
    most=st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_pieces_have_each_target_once_after_what_precedes_it(
    context: list[int], continuation: list[int], most: int
) -> None:
    pieces = pieces_of(context, continuation, most=most)
    assert [target for piece in pieces for target in piece.targets] == continuation
    text = [*context, *continuation]
    for piece in pieces:
        assert 1 <= len(piece.inputs) <= most
        end = text.index(piece.targets[-1], len(context))
        assert tuple(text[end - len(piece.inputs) : end]) == piece.inputs


# ---------------------------------------------------------------------- planning

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=24).map(tuple)


@st.composite
def some_pieces(draw: st.DrawFn) -> list[Piece]:
    """Pieces of which many begin alike."""
    beginnings = draw(st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=30).map(tuple), min_size=1, max_size=4))
    pieces = []
    for inputs in draw(st.lists(tokens, min_size=1, max_size=30)):
        inputs = draw(st.sampled_from([(), *beginnings])) + inputs
        pieces.append(Piece(inputs, (7,) * draw(st.integers(1, min(6, len(inputs))))))
    return pieces


@given(pieces=some_pieces(), max_tokens=st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_a_plan_has_every_piece_once_within_the_bound(pieces: list[Piece], max_tokens: int) -> None:
    batches = plan(pieces, max_tokens=max_tokens)
    answered = [number for batch in batches for row in batch.rows for number in row.pieces]
    assert sorted(answered) == list(range(len(pieces)))
    for batch in batches:
        fits = max(batch.forwards) <= max_tokens and batch.tokens <= KEPT_TOKENS * max_tokens
        assert fits or len(batch.rows) == 1
        assert len(batch.rows) == len(batch.beginning_of) or not batch.shared
        for place, row in enumerate(batch.rows):
            if batch.shared:
                assert row.inputs[: batch.shared] == batch.beginnings[batch.beginning_of[place]]
            for number in row.pieces:
                assert row.inputs[: len(pieces[number].inputs)] == pieces[number].inputs
                assert pieces[number].first >= batch.shared  # none of its logits is left out
    assert [batch.tokens for batch in batches] == sorted((batch.tokens for batch in batches), reverse=True)


@given(pieces=some_pieces())
@settings(max_examples=40, deadline=None)
def test_no_other_cut_into_groups_saves_more(pieces: list[Piece]) -> None:
    rows = distinct_rows(pieces)[:9]

    def saved(bounds: Sequence[tuple[int, int]]) -> int:
        total = 0
        for begin, end in bounds:
            if end - begin > 1:
                shared = min(row.first for row in rows[begin:end])
                while any(row.inputs[:shared] != rows[begin].inputs[:shared] for row in rows[begin:end]):
                    shared -= 1
                total += (end - begin - 1) * (shared if shared >= 8 else 0)
        return total

    best = 0
    for cuts in range(2 ** (len(rows) - 1)):
        edges = [0, *(place + 1 for place in range(len(rows) - 1) if cuts >> place & 1), len(rows)]
        best = max(best, saved(list(pairwise(edges))))
    assert saved([(begin, end) for begin, end, _ in group_bounds(rows)]) == best


def test_what_rides_on_a_longer_row_keeps_its_targets() -> None:
    beginning = tuple(range(100))
    rider, row, other = Piece(beginning, (9,) * 20), Piece((*beginning, 3), (9,)), Piece((*beginning, 4), (9,))
    (batch,) = plan([rider, row, other], max_tokens=500)
    assert sorted(row.pieces for row in batch.rows) == [[0, 1], [2]]
    assert batch.shared == rider.first == 80


def test_batches_do_not_depend_on_the_order_of_requests() -> None:
    generator = random.Random(0)
    pieces = [Piece((1, *(generator.randrange(3) for _ in range(30))), (5, 6)) for _ in range(60)]
    one, other = (plan(some, max_tokens=200) for some in (pieces, pieces[::-1]))
    assert [[row.inputs for row in batch.rows] for batch in one] == [[row.inputs for row in b.rows] for b in other]


# ---------------------------------------------------------------------- tokens


def test_a_continuation_begins_where_its_context_ends(tokenizer: Tokenizer) -> None:
    pair = encode_pair(tokenizer, "Answer:", " yes")
    assert tokenizer.decode(pair.context) == "Answer:"
    assert pair.context == [tokenizer.bos_id, *tokenizer.encode("Answer:")]
    assert not pair.merged
    merged = encode_pair(tokenizer, "a re", "turn")
    assert merged.merged
    assert merged.context + merged.continuation == tokenizer.encode("a return", bos=True)
    assert encode_pair(tokenizer, "", "yes") == ([tokenizer.bos_id], tokenizer.encode("yes"), False)


def test_an_empty_continuation_has_a_token_at_least(tokenizer: Tokenizer) -> None:
    pair = encode_pair(tokenizer, "Answer:", "")
    assert pair.context + pair.continuation == tokenizer.encode("Answer:", bos=True)
    assert (len(pair.continuation), pair.merged) == (1, True)


def test_merged_continuations_are_counted(model: Llama, tokenizer: Tokenizer) -> None:
    scorer = scorer_of(model, tokenizer)
    scorer.likelihoods([Likelihood("a re", "turn"), Likelihood("x", " y")])
    assert scorer.merged == 1


def test_contexts_that_lose_their_front_are_counted(model: Llama, tokenizer: Tokenizer) -> None:
    scorer, long = scorer_of(model, tokenizer), "x = 1\n" * 200
    scorer.likelihoods([Likelihood(long, " y"), Likelihood(long, " z"), Likelihood("x", " y"), Likelihood("x", long)])
    scorer.document_likelihoods([long])
    assert scorer.shortened == 1
    scorer.generations([Generation(long, 5), Generation("x", 5)])
    assert scorer.shortened == 2


def test_writing_takes_at_most_half_of_a_models_length_from_a_context() -> None:
    context = list(range(30))
    assert room_for(context, 10, most=96) == (context, 10)
    assert room_for(context, 500, most=96) == (context, 66)
    assert room_for(context, 10, most=32) == (context[-22:], 10)
    assert room_for(context, 500, most=32) == (context[-16:], 16)


@pytest.mark.parametrize(
    ("stop", "text"),
    [(["\n\n"], "one two, é"), ([", ", " t"], "one"), (["é"], "one two, "), ([], None), ([""], None)],
)
def test_a_text_ends_before_its_first_stop(tokenizer: Tokenizer, stop: list[str], text: str | None) -> None:
    written = "one two, é\n\nthree"
    context = tokenizer.encode("say:", bos=True)
    tokens = tokenizer.encode("say: " + written)[len(context) - 1 :]
    ending = Ending(tokenizer, context, stop)
    assert ending.text(tokens) == " " + (written if text is None else text)
    reached = [ending.reached(tokens[:count]) for count in range(1, len(tokens) + 1)]
    if any(stop):
        first = reached.index(True)
        assert any(mark in ending._decoded(tokens[: first + 1]) for mark in stop)
        assert not any(mark in ending._decoded(tokens[:first]) for mark in stop)
    else:
        assert not any(reached)
    assert ending.reached([*tokens[:2], tokenizer.eos_id])


# ---------------------------------------------------------------------- generations

PROMPTS = [EXAMPLES + "def two", "import", "", EXAMPLES + "def three(x)", "x = ["]


def test_texts_do_not_depend_on_what_is_beside_them(model: Llama, tokenizer: Tokenizer) -> None:
    for temperature in (0.0, 1.0):
        requests = [Generation(text, 20, temperature=temperature, samples=2) for text in PROMPTS]
        together = scorer_of(model, tokenizer, max_batch_tokens=2000).generations(requests, seed=4)
        assert scorer_of(model, tokenizer, max_batch_tokens=1).generations(requests, seed=4) == together
        assert [len(texts) for texts in together] == [2] * len(PROMPTS)
        assert (together[1][0] == together[1][1]) == (temperature == 0)


def test_the_seed_and_the_place_decide_what_is_drawn(model: Llama, tokenizer: Tokenizer) -> None:
    scorer = scorer_of(model, tokenizer)
    requests = [Generation("import", 20, temperature=1.0, top_p=0.95)] * 2
    one, other = scorer.generations(requests, seed=1), scorer.generations(requests, seed=2)
    assert one == scorer.generations(requests, seed=1)
    assert len({text for texts in one + other for text in texts}) == 4


def test_greedy_text_is_that_of_single_forwards(model: Llama, tokenizer: Tokenizer) -> None:
    (text,) = scorer_of(model, tokenizer).generations([Generation("import", 12)])[0]
    tokens = tokenizer.encode("import", bos=True)
    for _ in range(12):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1, :TINY_VOCAB].argmax()))
    assert "import" + text == tokenizer.decode(tokens)


def test_a_text_ends_with_a_stop_and_costs_no_more_forwards(
    model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(model, tokenizer)
    (whole,) = scorer.generations([Generation("import", 40)])[0]
    stop = whole[5:8]
    calls = []
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(1) or Llama.forward(model, *a, **k))
    assert scorer.generations([Generation("import", 40, stop=(stop,))]) == [[whole[: whole.index(stop)]]]
    assert len(calls) <= 10


def test_requests_without_end_are_cut_to_the_models_length(
    model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(1) or Llama.forward(model, *a, **k))
    scorer_of(model, tokenizer).generations([Generation("x = 1\n" * 200, 10_000)])
    assert len(calls) == LENGTH // 2


def test_nothing_is_asked_and_nothing_answered(model: Llama, tokenizer: Tokenizer) -> None:
    scorer = scorer_of(model, tokenizer)
    assert scorer.likelihoods([]) == scorer.generations([]) == scorer.document_likelihoods([]) == []


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_have_no_score(tokenizer: Tokenizer, value: float) -> None:
    scorer = scorer_of(broken := built(), tokenizer)
    with torch.no_grad():
        broken.norm.weight.fill_(value)
    with pytest.raises(
        NotFinite, match=r"no finite log-likelihood .*Answer: it returns a list of the lines'.* weights"
    ):
        scorer.likelihoods(QUESTIONS)
    with pytest.raises(NotFinite, match="no finite log-likelihood"):
        scorer.document_likelihoods(["one two"])
    for temperature in (0.0, 1.0):
        with pytest.raises(NotFinite, match=r"no finite logits after 'a re': the model's weights are not finite"):
            scorer.generations([Generation("a re", 5, temperature=temperature, samples=2)])


def test_a_pipeline_is_refused(model: Llama, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="pipeline"):
        scorer_of(model, tokenizer, layout=Layout(pp=2))


def test_a_call_is_broken_off_where_the_ranks_agree_to(model: Llama, tokenizer: Tokenizer) -> None:
    answers = iter([True, True, False])
    scorer = scorer_of(model, tokenizer, keep_going=lambda: next(answers))
    with pytest.raises(lockstep.Interrupted):
        scorer.generations([Generation("import", 60)])
    assert next(answers, None) is None


def test_too_large_batches_are_told_by_their_setting(
    model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ConfigError, match="max_batch_tokens=300"):
        scorer_of(model, tokenizer).likelihoods(QUESTIONS)


def test_a_device_gets_batches_that_fit(model: Llama) -> None:
    assert model_scorer.good_batch_tokens(model, CPU) == model_scorer.CPU_BATCH_TOKENS
