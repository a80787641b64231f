"""The scorer on ranks that share a model in every way, against one that has it alone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatrain.checkpoint.interchange.conversion import convert
from llamatrain.config.convert import ConvertConfig
from llamatrain.config.model import ModelConfig
from llamatrain.config.parallel import Layout, ParallelConfig, layout
from llamatrain.distributed import World
from llamatrain.errors import ConfigError
from llamatrain.evaluation.lockstep import Interrupted
from llamatrain.evaluation.model_scorer import ModelScorer
from llamatrain.evaluation.scoring import Generation, LikelihoodScore
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from llamatrain.parallel.answering import answering
from llamatrain.parallel.composition import build_spread
from llamatrain.scorer import check_divides, mesh_of, open_on
from llamatrain.tokenizer import Tokenizer
from tests.ranks import on_ranks
from tests.small_run import GLOBAL_BATCH, SEQ_LEN, small_config, train_in_process
from tests.test_model_scorer import CONFIG, PROMPTS, QUESTIONS

EVEN = dataclasses.replace(CONFIG, vocab_size=CONFIG.vocab_size + 1)
WRITTEN = [Generation(text, 3 + 5 * place, samples=2, temperature=1.0) for place, text in enumerate(PROMPTS)]
WRITTEN += [Generation(text, 12) for text in PROMPTS]
TEXTS = ["import os\n" * 40, "x"]
Answers = tuple[list[LikelihoodScore], list[LikelihoodScore], list[list[str]]]


def answers(scorer: ModelScorer) -> Answers:
    return (
        scorer.likelihoods(QUESTIONS),
        scorer.document_likelihoods(TEXTS),
        scorer.generations(WRITTEN, seed=3),
    )


def filled(model: Llama, config: ModelConfig) -> Llama:
    init_weights(model, config, seed=5)
    return model


def alone(tokenizer: Path, config: ModelConfig = EVEN) -> Answers:
    model = filled(Llama(config), config)
    with answering(model):
        return answers(ModelScorer(model, Tokenizer(tokenizer), device=torch.device("cpu"), max_batch_tokens=300))


def spread(world: World, parallel: ParallelConfig, config: ModelConfig) -> tuple[Llama, Layout]:
    ranks = layout(parallel, world.size)
    model = build_spread(config, parallel, ranks, torch.device("cpu"), compute_dtype=torch.float32)
    return filled(model, config), ranks


def together(world: World, tokenizer: Path, parallel: ParallelConfig, config: ModelConfig) -> Answers:
    model, ranks = spread(world, parallel, config)
    with answering(model):
        scorer = ModelScorer(
            model,
            Tokenizer(tokenizer),
            device=torch.device("cpu"),
            world=world,
            layout=ranks,
            max_batch_tokens=300 if world.rank else 305,  # they agree on the smallest
        )
        found = answers(scorer)
    tokens = torch.arange(64).reshape(2, 32)
    loss = model.train()(tokens, targets=tokens)  # and the model can be trained again
    loss.backward()
    return found


def check(one: Answers, other: Answers, *, exactly: bool) -> None:
    for some, same in zip(one[:2], other[:2], strict=True):
        for score, expected in zip(some, same, strict=True):
            tolerance: dict[str, Any] = {"rel": 0, "abs": 0} if exactly else {"rel": 1e-5, "abs": 1e-4}
            assert score.log_probability == pytest.approx(expected.log_probability, **tolerance)
            assert (score.tokens, score.greedy) == (expected.tokens, expected.greedy)
    assert one[2] == other[2]


TIED = dataclasses.replace(EVEN, tied_embeddings=True)


@pytest.mark.parametrize(
    ("ranks", "parallel", "config", "exactly"),
    [
        (2, {}, EVEN, True),
        pytest.param(4, {}, TIED, True, marks=pytest.mark.slow),
        pytest.param(4, {"dp_replicate": 2}, EVEN, True, marks=pytest.mark.slow),
        pytest.param(2, {"dp_shard": 1, "dp_replicate": 2}, EVEN, True, marks=pytest.mark.slow),
        pytest.param(2, {"cp": 2}, EVEN, True, marks=pytest.mark.slow),
        pytest.param(2, {"tp": 2}, EVEN, False, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "cp": 2}, TIED, False, marks=pytest.mark.slow),
    ],
)
def test_neither_the_number_of_ranks_nor_their_layout_changes_an_answer(
    tiny_tokenizer: Path, ranks: int, parallel: dict[str, Any], config: ModelConfig, exactly: bool
) -> None:
    """Bit for bit where ranks have whole layers: a batch is the same wherever it is computed."""
    expected = alone(tiny_tokenizer, config)
    for found in on_ranks(ranks, together, tiny_tokenizer, ParallelConfig(**parallel), config):
        check(found, expected, exactly=exactly)


def opened_answers(world: World, run_dir: Path, settings: dict[str, Any]) -> tuple[Answers, int, int]:
    opened = open_on(world, run_dir, device="cpu", max_batch_tokens=300, **settings)
    with answering(opened.model):
        return answers(opened.scorer), opened.step, opened.tokens


@pytest.fixture(scope="module")
def trained(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    config = small_config(
        tmp_path_factory.mktemp("runs") / "run",
        sources,
        model={"n_heads": 4, "n_kv_heads": 2, "max_seq_len": 96},
        train={"steps": 4},
        evaluation={"every_steps": 0},
    )
    train_in_process(config)
    return Path(config.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings", "exactly"),
    [(2, {}, True), (4, {"dp_shard": 1, "tp": 2}, False)],
)
def test_a_checkpoint_is_opened_on_any_number_of_ranks(
    trained: Path, ranks: int, settings: dict[str, Any], exactly: bool
) -> None:
    expected, step, tokens = opened_answers(World(), trained, {})
    assert (step, tokens) == (4, 4 * GLOBAL_BATCH * SEQ_LEN)
    for found, *place in on_ranks(ranks, opened_answers, trained, settings):
        check(found, expected, exactly=exactly)
        assert place == [step, tokens]


def test_a_checkpoint_that_was_set_aside_can_be_asked_too(trained: Path) -> None:
    aside = trained / "checkpoints" / "refused-step-00000004"
    aside.symlink_to("step-00000004")
    assert open_on(World(), aside, device="cpu").step == 4


def test_an_import_from_hugging_face_answers_as_what_was_exported(trained: Path, tmp_path: Path) -> None:
    convert(ConvertConfig(input=str(trained), output=str(tmp_path / "there"), to="huggingface"))
    convert(ConvertConfig(input=str(tmp_path / "there"), output=str(tmp_path / "back"), to="llamatrain"))
    found = [opened_answers(World(), path, {})[0] for path in (trained, tmp_path / "back")]
    check(found[1], found[0], exactly=True)


def test_meshes_that_do_not_fit_are_refused_by_name(trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"dp_shard=2 x tp=1 makes 2 ranks .* 1 ranks are no multiple"):
        opened_answers(World(), trained, {"dp_shard": 2})
    with pytest.raises(ConfigError, match="tp=2"):
        opened_answers(World(), trained, {"tp": 2})
    assert mesh_of(ParallelConfig(dp_shard=2, tp=2), 16) == Layout(dp_replicate=4, dp_shard=2, tp=2)
    with pytest.raises(ConfigError, match="tp=3: the model's n_heads, 4, does not divide"):
        check_divides(EVEN, 3)


def broken_off(world: World, tokenizer: Path) -> tuple[int, str]:
    model, ranks = spread(world, ParallelConfig(), EVEN)
    asked = 0

    def keep_going() -> bool:
        nonlocal asked
        asked += 1
        return sum(world.gather(asked)) < 3 * world.size

    with answering(model):
        scorer = ModelScorer(
            model,
            Tokenizer(tokenizer),
            device=torch.device("cpu"),
            world=world,
            layout=ranks,
            max_batch_tokens=300,
            keep_going=keep_going,
        )
        try:
            scorer.generations([Generation("import", 3), Generation("import x", 80)])
        except Interrupted:
            return asked, "interrupted"
    return asked, "done"


def test_ranks_of_different_work_are_asked_and_stop_together(tiny_tokenizer: Path) -> None:
    assert on_ranks(2, broken_off, tiny_tokenizer) == [(3, "interrupted")] * 2


def out_of_step(world: World, tokenizer: Path) -> Answers:
    model, ranks = spread(world, ParallelConfig(), EVEN)
    with answering(model):
        scorer = ModelScorer(model, Tokenizer(tokenizer), device=torch.device("cpu"), world=world, layout=ranks)
        scorer.max_batch_tokens = 1000
        return answers(scorer)


@pytest.mark.slow
def test_more_ranks_than_batches(tiny_tokenizer: Path) -> None:
    results = on_ranks(4, out_of_step, tiny_tokenizer)
    assert results[0] == results[1] == results[2] == results[3]
