"""Tasks put to a model while it is trained."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from llamatrain.config import EvaluationConfig, ParallelConfig, validate
from llamatrain.config.evaluation import check_evaluation
from llamatrain.distributed import World
from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation.lockstep import Interrupted
from llamatrain.evaluation.model_scorer import ModelScorer
from llamatrain.evaluation.scoring import NotFinite
from llamatrain.parallel.answering import answering
from llamatrain.resilience.control import StopRequest
from llamatrain.session import run, run_on
from llamatrain.trainer import Trainer
from tests.distributed.test_fairscale import fairscale_trainer
from tests.ranks import on_ranks
from tests.small_run import (
    SEQ_LEN,
    assert_same_run,
    metrics,
    reproducible,
    saved_tensors,
    small_config,
    status,
    train_in_process,
    trainer_for,
)

QUESTIONS = [
    {
        "query": f"Question: what is {name}?\nAnswer:",
        "choices": ["a function", "a module of functions", "it"],
        "gold": gold,
    }
    for gold, name in enumerate(("wrap", "textwrap", "dedent"))
] * 3


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory with questions, and with tasks of its own."""
    folder = tmp_path / "sets" / "arc_easy"
    folder.mkdir(parents=True)
    (folder / "arc_easy.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "nq.jsonl").write_text(json.dumps({"question": "what is wrap", "answer": ["a function"]}) + "\n")
    return tmp_path / "sets"


def with_tasks(directory: Path, sources: dict[str, Path], data: Path, **changes: Any):
    evaluation = {"tasks": ["arc_easy"], "tasks_every_steps": 3, "data": str(data), "every_steps": 0}
    groups = {"train": {"steps": 6}, "checkpoint": {"every_steps": 6}, "evaluation": evaluation, **changes}
    return small_config(directory, sources, **groups)


def answered(run_dir: str | Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run_dir) if "eval/arc_easy/accuracy" in record]


def without_tasks(run_dir: str | Path) -> list[dict[str, Any]]:
    return [record for record in reproducible(metrics(run_dir)) if "eval/arc_easy/accuracy" not in record]


def test_scores_are_metrics_against_tokens_and_training_is_the_same_bit_for_bit(
    sources: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    config = with_tasks(tmp_path / "with", sources, data)
    train_in_process(config)
    records = answered(config.run_dir)
    assert [(record["step"], record["tokens"]) for record in records] == [
        (step, step * config.global_batch * SEQ_LEN) for step in (0, 3, 6)
    ]
    assert all(0 <= record["eval/arc_easy/accuracy"] <= 1 for record in records)
    plain = with_tasks(tmp_path / "without", sources, data, evaluation={"every_steps": 0})
    train_in_process(plain)
    one, other = saved_tensors(config.run_dir, 6), saved_tensors(plain.run_dir, 6)
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    assert without_tasks(config.run_dir) == without_tasks(plain.run_dir)
    assert status(config.run_dir)["state"] == "done"


def test_a_stop_breaks_tasks_off_and_the_resumed_run_begins_with_them(
    sources: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = with_tasks(tmp_path / "whole", sources, data)
    train_in_process(whole)
    config, stop = with_tasks(tmp_path / "stopped", sources, data), StopRequest()

    def asked(self: ModelScorer, requests: list, **_: Any) -> list:
        stop.reason = "SIGTERM"
        assert not self._keep_going()
        raise Interrupted

    def three_steps(trainer: Trainer) -> None:
        monkeypatch.setattr(ModelScorer, "likelihoods", asked if trainer.step == 3 else likelihoods)

    likelihoods, step = ModelScorer.likelihoods, Trainer.train_step

    def train_step(self: Trainer, batch: Any) -> Any:
        done = step(self, batch)
        three_steps(self)
        return done

    monkeypatch.setattr(Trainer, "train_step", train_step)
    run(config, stop)
    assert [record["step"] for record in answered(config.run_dir)] == [0]
    assert status(config.run_dir)["step"] == 3
    monkeypatch.undo()
    train_in_process(config)
    assert [record["step"] for record in answered(config.run_dir)] == [0, 3, 6]
    assert_same_run(whole.run_dir, config.run_dir, step=6)


def trained(world: World, config: Any) -> None:
    run_on(world, config, StopRequest())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"cp": 2}])
def test_ranks_that_share_a_model_find_the_same_scores(
    sources: dict[str, Path], data: Path, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    task = data / "nq.yaml"
    task.write_text(
        "kind: question_answering\nfiles: {questions: arc_easy/nq.jsonl}\nsettings: {shots: 0, max_new_tokens: 8}\n"
    )
    evaluation = {"tasks": ["arc_easy", str(task)], "tasks_every_steps": 3, "data": str(data), "every_steps": 3}
    groups = {"train": {"steps": 6, "micro_batch": 1}, "evaluation": evaluation}
    alone = with_tasks(tmp_path / "1", sources, data, **groups)
    train_in_process(alone)
    config = with_tasks(tmp_path / "2", sources, data, **groups, parallel=parallel)
    on_ranks(2, trained, config)
    found, expected = answered(config.run_dir), answered(alone.run_dir)
    scores = [{key: value for key, value in record.items() if key.startswith("eval/")} for record in found]
    assert scores == [{key: value for key, value in r.items() if key.startswith("eval/")} for r in expected]
    assert "eval/nq/exact_match_0_shot" in found[0]
    plain = with_tasks(tmp_path / "3", sources, data, **{**groups, "evaluation": {"every_steps": 3}}, parallel=parallel)
    on_ranks(2, trained, plain)
    one, other = saved_tensors(config.run_dir, 6), saved_tensors(plain.run_dir, 6)
    assert all((one[name] == other[name]).all() for name in one)


def test_what_has_no_score_is_left_out_and_training_goes_on(
    sources: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As of weights that are no numbers; PIQA's are."""
    (data / "piqa").mkdir()
    (data / "piqa" / "piqa.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS[:2]))

    def unfit(self: ModelScorer, requests: list, **options: Any) -> list:
        if len(requests) > 2 * 3:
            raise NotFinite("no finite log-likelihood")
        return likelihoods(self, requests, **options)

    def nothing(self: ModelScorer, requests: list, **options: Any) -> list:
        raise NotFinite("no finite logits")

    likelihoods = ModelScorer.likelihoods
    monkeypatch.setattr(ModelScorer, "likelihoods", unfit)
    monkeypatch.setattr(ModelScorer, "generations", nothing)
    asked = {"tasks": ["arc_easy", "piqa"], "tasks_every_steps": 3, "data": str(data)}
    asked |= {"samples": ["one"], "sample_tokens": 4}
    config = with_tasks(tmp_path / "run", sources, data, evaluation={**asked, "every_steps": 3})
    train_in_process(config)
    told = capsys.readouterr().err
    assert status(config.run_dir)["state"] == "done"
    assert not answered(config.run_dir)
    assert [record["step"] for record in metrics(config.run_dir) if "eval/piqa/accuracy" in record] == [0, 3, 6]
    assert told.count("task arc_easy: no finite log-likelihood; such scores are left out of metrics.jsonl") == 1
    assert "evaluation.samples: no finite logits; nothing was written" in told


def test_tasks_are_not_begun_where_validation_is_broken_off(
    sources: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    with ExitStack() as resources:
        config = with_tasks(tmp_path / "run", sources, data)
        config.evaluation.every_steps = 3
        trainer = trainer_for(config, resources)
        monkeypatch.setattr(trainer.evaluator.tasks, "scores", lambda *_, **__: asked.append(1))
        monkeypatch.setattr(trainer.evaluator.validation, "evaluate", lambda *_, **__: None)
        records: Any = None
        trainer.evaluator.evaluate(trainer.model, records, {"step": 3}, records, keep_going=lambda: False)
        assert not asked
        assert trainer.evaluator.due(3)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tasks_every_steps": -1}, "tasks_every_steps=-1"),
        ({"tasks_every_steps": 5}, "without tasks"),
        ({"tasks": ["piqa"]}, "set evaluation.tasks_every_steps"),
        ({"tasks": ["piqa"], "tasks_every_steps": 5}, "evaluation.data=DIRECTORY"),
        ({"max_questions": 0}, "max_questions=0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_evaluation(EvaluationConfig(**settings))


def test_what_a_run_could_not_answer_later_is_refused_at_its_start(
    sources: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    config = with_tasks(tmp_path / "run", sources, data)
    config.evaluation.tasks = ["piqa"]
    with pytest.raises(DataError, match=r"evaluation.tasks: piqa: no file"):
        train_in_process(config)
    config.evaluation.tasks = ["piqqa"]
    with pytest.raises(ConfigError, match="did you mean piqa"):
        train_in_process(config)
    (data / "humaneval").mkdir()
    (data / "humaneval" / "HumanEval.jsonl").write_text("{}\n")
    config.evaluation.tasks = ["human_eval"]
    with pytest.raises(ConfigError, match=r"human_eval runs programs .* which training does not; ask the checkpoints"):
        train_in_process(config)
    config.evaluation.tasks = ["arc_easy"]
    config.parallel = ParallelConfig(pp=2)
    with pytest.raises(ConfigError, match=r"parallel\.pp=2: a pipeline cannot answer"):
        validate(config, world_size=2)


def scores_at_the_start(world: World, config: Any, by_fairscale: bool) -> Any:
    with ExitStack() as resources:
        if by_fairscale:
            trainer, _ = resources.enter_context(fairscale_trainer(config, world))
        else:
            trainer = trainer_for(config, resources, world)
        with answering(trainer.model):
            return trainer.evaluator.tasks.scores(trainer.model)


@pytest.mark.slow
def test_fairscale_answers_too(sources: dict[str, Path], data: Path, tmp_path: Path) -> None:
    alone = scores_at_the_start(World(), with_tasks(tmp_path / "1", sources, data), by_fairscale=False)
    config = with_tasks(tmp_path / "2", sources, data)
    assert on_ranks(2, scores_at_the_start, config, True) == [alone, alone]
