"""Tasks here and the same of lm-evaluation-harness, on one model and the same prompts: the same answers.

The sets are the real ones where shared data is at hand ($LLAMATRAIN_DATA), else a few made-up questions.
"""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamatrain.errors import ConfigError
from llamatrain.evaluation.catalogue import load_task
from llamatrain.evaluation.harness import run_harness
from llamatrain.evaluation.model_scorer import ModelScorer
from llamatrain.evaluation.runner import run_tasks
from llamatrain.evaluation.task import Conditions
from llamatrain.evaluation.tasks import multiple_choice
from llamatrain.tokenizer import Tokenizer
from tests.real_text import shared_data
from tests.test_model_scorer import CPU, built

SETS = ("arc_easy", "piqa", "hellaswag")
QUESTIONS = 300
MADE_UP = [
    {
        "query": f"Question: what is {word}?",
        "choices": [f"{word} is a word", "a number", " two  spaces"],
        "gold": at % 3,
    }
    for at, word in enumerate(("wrap", "mean", "median", "json", "parser", "list", "tuple", "dict", "set", "float"))
]


@pytest.fixture(scope="module")
def scorer(tiny_tokenizer: Path) -> ModelScorer:
    return ModelScorer(built(max_seq_len=256), Tokenizer(tiny_tokenizer), device=CPU)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def data_for(name: str, directory: Path) -> Path:
    """A directory with the set; without shared data, made-up questions in its place."""
    data = shared_data()
    if data is not None and load_task(name).find(data / "eval")[1] == []:
        return data / "eval"
    place = directory / load_task(name).files["questions"][-1]
    place.parent.mkdir(parents=True)
    place.write_text("".join(json.dumps(question) + "\n" for question in MADE_UP))
    return directory


def write_harness_task(name: str, prompts: list[dict[str, Any]], directory: Path, **settings: Any) -> None:
    """A task of the harness on prompts, called own_NAME."""
    directory.mkdir(exist_ok=True)
    questions = directory / f"{name}.jsonl"
    questions.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    task = {
        "task": f"own_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "doc_to_text": "{{context}}",
        **settings,
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_both_choose_the_same_answer_to_every_question(
    name: str, scorer: ModelScorer, tmp_path: Path, offline: None
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from llamatrain.evaluation.harness_model import HarnessModel

    task, data = load_task(name), data_for(name, tmp_path / "data")
    files, _ = task.find(data)
    asked = multiple_choice.load(task.settings, files["questions"], files.get("labels"))[:QUESTIONS]
    prompts = [{"context": one.contexts[0], "choices": one.choices, "gold": one.gold} for one in asked]
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    settings = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    write_harness_task(name, prompts, tmp_path / "tasks", metric_list=metrics, **settings)

    ours = run_tasks([task], scorer, data=data, conditions=Conditions(max_questions=QUESTIONS))[name]
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    theirs = simple_evaluate(HarnessModel(scorer), tasks=[f"own_{name}"], task_manager=manager, bootstrap_iters=0)
    scores = theirs["results"][f"own_{name}"]
    assert scores["acc,none"] == pytest.approx(ours.metrics["accuracy_none"].value, abs=1e-12)
    assert scores["acc_norm,none"] == pytest.approx(ours.metrics["accuracy_characters"].value, abs=1e-12)
    samples = sorted(theirs["samples"][f"own_{name}"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ours.items) == len(asked)
    for sample, item in zip(samples, ours.items, strict=True):
        assert [context for context, _ in sample["arguments"]] == item["prompts"] * len(item["choices"])
        log_probabilities = [response[0] for response in sample["filtered_resps"]]
        assert log_probabilities == pytest.approx(item["log_probabilities"], abs=1e-4)
        assert bool(sample["acc_norm"]) == item["right"]


# Sets in the hub's form, which both read: the harness by its own definitions, under lm_eval/tasks.
SIDES = {"choices": {"text": ["sky", "blood"], "label": ["A", "B"]}, "answerKey": "B"}
BLANK = {"sentence": "Tom saw Jim because _ was  tall.", "option1": "Tom", "option2": "Jim", "answer": "2"}
SCENE = {"activity_label": "Baking", "ctx_a": "A cook [title] stirs.", "ctx_b": "then She", "label": "1"}
SLEPT = {"context": "Ann slept.", "question": "How is she?", "answerA": "rested", "answerB": "sad", "answerC": "up"}
LETTERS = [{"question": f"Is {n} even?", "subject": "anatomy", "choices": list("abcd"), "answer": n} for n in range(4)]
TRUTH = {
    "question": "Is it?",
    "mc1_targets": {"choices": ["Yes.", "No.", "Never."], "labels": [1, 0, 0]},
    "mc2_targets": {"choices": ["Yes.", "Sure.", "No."], "labels": [1, 1, 0]},
}
RAIN = {"passage": "It rains.", "question": "is it wet", "label": 1}
BOIL = {"goal": "Boil it. ", "sol1": "Heat it. ", "sol2": "Cool", "label": 0}
ENDINGS = [" [step] eats.", "waits. ", "x  y"]
OWN_DEFINITIONS = [
    ("boolq", "super_glue/boolq/default.yaml", "boolq/val.jsonl", [RAIN]),
    ("piqa", "piqa/piqa.yaml", "piqa/validation.jsonl", [BOIL]),
    ("siqa", "siqa/siqa.yaml", "siqa/validation.jsonl", [{**SLEPT, "label": "3"}]),
    ("hellaswag", "hellaswag/hellaswag.yaml", "hellaswag/val.jsonl", [{**SCENE, "endings": ENDINGS}]),
    ("winogrande", "winogrande/default.yaml", "winogrande/validation.jsonl", [BLANK, {**BLANK, "answer": "1"}]),
    ("arc_easy", "arc/arc_easy.yaml", "arc_easy/test.jsonl", [{"question": "What is red?", **SIDES}]),
    ("openbookqa", "openbookqa/openbookqa.yaml", "openbookqa/test.jsonl", [{"question_stem": "Red is", **SIDES}]),
    ("truthful_qa", "truthfulqa/truthfulqa_mc1.yaml", "truthfulqa/validation.jsonl", [TRUTH]),
    ("truthful_qa", "truthfulqa/truthfulqa_mc2.yaml", "truthfulqa/validation.jsonl", [TRUTH]),
    ("mmlu", "mmlu/default/mmlu_anatomy.yaml", "mmlu/test.jsonl", LETTERS),
    ("gsm8k", "gsm8k/gsm8k-cot.yaml", "gsm8k/test.jsonl", [{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}]),
]
# what a metric of the harness's is called here
CALLED = {
    "acc,none": "accuracy_none", "acc_norm,none": "accuracy_characters", "exact_match,strict-match": "exact_match",
    "truthfulqa_mc1": "mc1", "truthfulqa_mc2": "mc2", "mmlu_anatomy": "accuracy",
}  # fmt: skip


class Noting:
    """A scorer that notes what it is asked."""

    def __init__(self, scorer: ModelScorer) -> None:
        self.scorer, self.shortened = scorer, 0
        self.asked: list[tuple[str, str]] = []

    def likelihoods(self, requests: Any, *, description: str = "") -> Any:
        self.asked += [(request.context, request.continuation) for request in requests if request.context != "Answer:"]
        return self.scorer.likelihoods(requests)

    def generations(self, requests: Any, **settings: Any) -> Any:
        self.asked += [(request.context, request.stop[0]) for request in requests]
        return self.scorer.generations(requests, **settings)

    def document_likelihoods(self, texts: Any, *, description: str = "") -> Any:
        raise NotImplementedError


def asked_by_the_harness(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Context and continuation, or first stop, of all requests; of a question with several metrics once."""
    arguments = {sample["doc_id"]: sample["arguments"] for sample in found["samples"]["own"]}
    pairs = [pair for of_question in arguments.values() for pair in of_question]
    return [(first, second if isinstance(second, str) else second["until"][0]) for first, second in pairs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "definition", "file", "records"), OWN_DEFINITIONS, ids=[case[1] for case in OWN_DEFINITIONS]
)
def test_the_harnesss_own_definitions_ask_and_score_the_same(
    name: str,
    definition: str,
    file: str,
    records: list[dict[str, Any]],
    scorer: ModelScorer,
    tmp_path: Path,
    offline: None,
) -> None:
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from llamatrain.evaluation.harness_model import HarnessModel

    questions = tmp_path / "sets" / file
    questions.parent.mkdir(parents=True)
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    splits = dict.fromkeys(("train", "validation", "test"), str(questions))
    path = Path(lm_eval.tasks.__file__).parent / definition
    own = {"include": str(path), "task": "own", "dataset_path": "json", "dataset_name": None}
    if name == "mmlu":
        splits["dev"] = str(questions.with_name("dev.jsonl"))
        examples = [{**record, "question": f"Example {n}?"} for n, record in enumerate([*records, records[0]])]
        Path(splits["dev"]).write_text("".join(json.dumps(example) + "\n" for example in examples))
        own |= {"num_fewshot": 5}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(yaml.safe_dump({**own, "dataset_kwargs": {"data_files": splits}}))

    noting = Noting(scorer)
    task = load_task(name, settings={"majority": {"samples": 0}} if name == "gsm8k" else {})
    ours = run_tasks([task], noting, data=tmp_path / "sets")[name]
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    theirs = simple_evaluate(HarnessModel(scorer), tasks=["own"], task_manager=manager, bootstrap_iters=0)
    if name == "truthful_qa":  # two tasks there, one here
        assert set(asked_by_the_harness(theirs)) < set(noting.asked)
    else:
        assert asked_by_the_harness(theirs) == noting.asked
    scores = {key: value for key, value in theirs["results"]["own"].items() if key in CALLED}
    assert scores
    for key, value in scores.items():
        called = CALLED[path.stem] if path.stem in CALLED else CALLED[key]
        assert ours.metrics[called].value == pytest.approx(value, abs=1e-6)


@pytest.mark.slow
def test_the_harness_generates_and_measures_perplexity_too(scorer: ModelScorer, tmp_path: Path, offline: None) -> None:
    prompts = [{"context": f"def {name}(", "answer": ")"} for name in ("one", "two", "three")]
    exact = {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    write_harness_task(
        "writing",
        prompts,
        tmp_path / "tasks",
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs=settings,
        **exact,
    )
    write_harness_task(
        "rolling",
        prompts,
        tmp_path / "tasks",
        output_type="loglikelihood_rolling",
        doc_to_target="{{context}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    found = run_harness(["own_writing", "own_rolling"], scorer, include_path=tmp_path / "tasks", max_questions=2)
    assert found["own_writing"]["exact_match"]["questions"] == 2
    scores = scorer.document_likelihoods([prompt["context"] for prompt in prompts[:2]])
    bits = -sum(score.log_probability for score in scores) / 0.6931471805599453
    text_bytes = sum(len(prompt["context"].encode()) for prompt in prompts[:2])
    assert found["own_rolling"]["bits_per_byte"]["value"] == pytest.approx(bits / text_bytes, rel=1e-6)


@pytest.mark.slow
def test_a_task_that_the_harness_does_not_have_is_told(scorer: ModelScorer, tmp_path: Path, offline: None) -> None:
    with pytest.raises(ConfigError, match="harness=no_such_task"):
        run_harness(["no_such_task"], scorer)
    with pytest.raises(ConfigError, match="harness_tasks="):
        run_harness(["piqa"], scorer, include_path=tmp_path / "nowhere")


def test_without_the_harness_the_extra_is_named(scorer: ModelScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'llamatrain\[eval\]'"):
        run_harness(["piqa"], scorer)
