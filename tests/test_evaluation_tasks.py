"""Tasks, their files and tables, with scorers whose answers are known. The paper's prompts are written out here."""

import gzip
import io
import json
import math
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llamatrain import evaluate
from llamatrain.checkpoint import store
from llamatrain.config.evaluate import EvaluateConfig, check_evaluate
from llamatrain.distributed import World
from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation.catalogue import built_in, load_suite, load_task, load_tasks
from llamatrain.evaluation.model_scorer import ModelScorer
from llamatrain.evaluation.question_files import read_questions, read_tables
from llamatrain.evaluation.results import TaskResult
from llamatrain.evaluation.runner import available, look_through, metrics_record, note, run_tasks
from llamatrain.evaluation.scoring import Generation, Likelihood, LikelihoodScore, NotFinite, Scorer, cut
from llamatrain.evaluation.statistics import Z95, mean, ratio, share, wilson_interval
from llamatrain.evaluation.tables import markdown, paper_table, published
from llamatrain.evaluation.task import Conditions
from llamatrain.evaluation.tasks.examples import draw
from llamatrain.evaluation.tasks.mmlu import GROUP_OF
from llamatrain.evaluation.tasks.question_answering import is_right, normalised
from llamatrain.tokenizer import Tokenizer
from tests.real_text import REPOSITORY, shared_data
from tests.small_run import small_config, train_in_process
from tests.test_model_scorer import CPU, built


@dataclass
class FakeScorer:
    """Answers by functions, and remembers what it was asked."""

    likelihood: Callable[[Likelihood], float] = lambda request: -1.0
    write: Callable[[Generation], str] = lambda request: ""
    asked: list[Any] = field(default_factory=list)
    shortened: int = 0
    device: str = "cpu"

    def likelihoods(self, requests: Sequence[Likelihood], *, description: str = "") -> list[LikelihoodScore]:
        self.asked += requests
        return [LikelihoodScore(self.likelihood(r), max(1, len(r.continuation.split())), False) for r in requests]

    def document_likelihoods(self, texts: Sequence[str], *, description: str = "") -> list[LikelihoodScore]:
        return [LikelihoodScore(self.likelihood(Likelihood("", t)), len(t.split()), False) for t in texts]

    def generations(self, requests: Sequence[Generation], *, seed: int = 0, description: str = "") -> list[list[str]]:
        self.asked += requests
        return [[self.write(request)] * request.samples for request in requests]


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def result_of(
    name: str, data: Path, scorer: Scorer, conditions: Conditions | None = None, **settings: Any
) -> TaskResult:
    return run_tasks([load_task(name, settings=settings)], scorer, data=data, conditions=conditions)[name]


# What stands in the sets' files, in each format that is taken, and what the model must be asked.
BOOLQ = {"question": "is it wet", "title": "Rain", "answer": True, "passage": "Rain falls."}
PIQA = {"goal": "Boil water.", "sol1": "Heat it.", "sol2": "Cool it."}
SIQA = {"context": "Ann slept.", "question": "How is she?", "answerA": "rested", "answerB": "sad", "answerC": "up"}
SCENE = {"activity_label": "Baking", "ctx_a": "A cook [title] stirs.", "ctx_b": "then she", "ctx": "…", "label": 1}
BLANK = {"sentence": "Tom saw Jim because _ was tall.", "option1": "Tom", "option2": "Jim", "answer": "2"}
LETTERED = [{"text": "sky", "label": "1"}, {"text": "blood", "label": "2"}]
STEM = {"question": {"stem": "What is red?", "choices": LETTERED}, "answerKey": "2"}
HUB = {"choices": {"text": ["sky", "blood"], "label": ["A", "B"]}, "answerKey": "B"}
EXAM = {
    "article": "A long story.",
    "questions": ["Who?", "Why?"],
    "options": [["a", "b", "c", "d"]] * 2,
    "answers": ["C", "A"],
}
FROM_HUB = {"article": "A long story.", "question": "Who?", "options": ["a", "b", "c", "d"], "answer": "C"}
RAIN, RED, SLEPT = (
    "Rain falls.\nQuestion: is it wet?\nAnswer:",
    "Question: What is red?\nAnswer:",
    "Q: Ann slept. How is she?\nA:",
)
PASSAGE = {"query": "Passage: Rain falls.\nQuestion: is it wet?", "choices": ["no", "yes"], "gold": 1}
WRITTEN = {"query": "Question: What is red?", "choices": ["sky", "blood"], "gold": 1}
BROKEN_OFF = {**WRITTEN, "query": "Question: What is red?\n"}  # as llm-foundry's PIQA and ARC-Challenge have it
ENDINGS = [" [step] eats.", "waits. ", "[title]runs", "x  y"]
PROMPTS = [
    ("boolq", "boolq/dev.jsonl", BOOLQ, RAIN, [" no", " yes"], 1),
    (
        "boolq",
        "boolq/val.jsonl",
        {"label": 1, **{k: BOOLQ[k] for k in ("question", "passage")}},
        RAIN,
        [" no", " yes"],
        1,
    ),
    ("boolq", "boolq/boolq.jsonl", PASSAGE, RAIN, [" no", " yes"], 1),
    ("siqa", "siqa/dev.jsonl", {**SIQA, "label": "3"}, SLEPT, [" rested", " sad", " up"], 2),
    (
        "hellaswag",
        "hellaswag/hellaswag_val.jsonl",
        {**SCENE, "endings": ENDINGS},
        "Baking: A cook. stirs. Then she",
        ["  eats.", " waits.", " runs", " x y"],
        1,
    ),
    ("arc_easy", "arc_easy/ARC-Easy-Test.jsonl", STEM, RED, [" sky", " blood"], 1),
    ("arc_challenge", "arc_challenge/test.jsonl", {"question": "What is red?", **HUB}, RED, [" sky", " blood"], 1),
    ("arc_easy", "arc_easy/arc_easy.jsonl", WRITTEN, RED, [" sky", " blood"], 1),
    ("arc_challenge", "arc_challenge/arc_challenge.jsonl", BROKEN_OFF, RED, [" sky", " blood"], 1),
    ("piqa", "piqa/piqa.jsonl", BROKEN_OFF, RED, [" sky", " blood"], 1),
    ("openbookqa", "openbookqa/test.jsonl", STEM, "What is red?", [" sky", " blood"], 1),
    (
        "openbookqa",
        "openbookqa/test.jsonl",
        {"question_stem": "What is red?", **HUB},
        "What is red?",
        [" sky", " blood"],
        1,
    ),
    (
        "race_high",
        "race/high.jsonl",
        FROM_HUB,
        "Article: A long story.\n\nQuestion: Who?\nAnswer:",
        [" a", " b", " c", " d"],
        2,
    ),
]


@pytest.mark.parametrize(("name", "file", "record", "context", "continuations", "gold"), PROMPTS)
def test_a_set_in_each_of_its_formats_is_asked_as_the_paper_asks(
    tmp_path: Path, name: str, file: str, record: dict[str, Any], context: str, continuations: list[str], gold: int
) -> None:
    put(tmp_path / file, lines(record))
    scorer = FakeScorer(lambda request: 0.0 if request.continuation == continuations[gold] else -9.0)
    result = result_of(name, tmp_path, scorer)
    asked = [request for request in scorer.asked if request.context != "Answer:"]
    assert asked == [Likelihood(context, text) for text in continuations]
    assert result.items[0]["gold"] == gold
    assert result.items[0]["log_probabilities"][gold] == 0.0


def test_another_task_on_the_same_questions_is_not_taken_for_the_set(tmp_path: Path) -> None:
    """llm-foundry's SIQA has two answers in the prompt and asks for a letter."""
    lettered = {"query": "Context: …\nChoices:\nA. rested\nB. sad\nAnswer:", "choices": ["A", "B"], "gold": 0}
    put(tmp_path / "siqa" / "siqa.jsonl", lines(lettered))
    with pytest.raises(DataError, match=r"siqa\.jsonl, line 1: of no known format"):
        result_of("siqa", tmp_path, FakeScorer())


def test_labels_in_a_file_of_their_own_are_taken_and_must_be_as_many(tmp_path: Path) -> None:
    put(tmp_path / "piqa" / "valid.jsonl", lines(PIQA, PIQA))
    labels = put(tmp_path / "piqa" / "valid-labels.lst", "1\n0\n")
    scorer = FakeScorer(lambda request: -1.0 if "Cool" in request.continuation else -2.0)
    result = result_of("piqa", tmp_path, scorer)
    assert scorer.asked[:2] == [
        Likelihood("Question: Boil water.\nAnswer:", text) for text in (" Heat it.", " Cool it.")
    ]
    assert [item["right"] for item in result.items] == [True, False]
    labels.write_text("1\n")
    with pytest.raises(DataError, match=r"valid-labels\.lst: 1 labels for the 2 questions of .*valid\.jsonl"):
        result_of("piqa", tmp_path, scorer)


@pytest.mark.parametrize(
    "record",
    [
        BLANK,
        {
            "context_options": ["Tom saw Jim because Tom", "Tom saw Jim because Jim"],
            "continuation": "was tall.",
            "gold": 1,
        },
    ],
)
def test_winogrande_scores_the_rest_of_the_sentence_after_each_name(tmp_path: Path, record: dict[str, Any]) -> None:
    put(tmp_path / "winogrande" / "dev.jsonl", lines(record))
    scorer = FakeScorer(lambda request: -1.0 if request.context.endswith("Jim") else -2.0)
    result = result_of("winogrande", tmp_path, scorer)
    assert scorer.asked == [Likelihood(f"Tom saw Jim because {name}", " was tall.") for name in ("Tom", "Jim")]
    assert result.metrics["accuracy"].value == 1.0


def test_race_articles_are_a_directory_of_files_with_several_questions_each(tmp_path: Path) -> None:
    for number in range(2):
        put(tmp_path / "race" / "test" / "middle" / f"{number}.txt", json.dumps(EXAM))
    scorer = FakeScorer(lambda request: -1.0 if request.continuation == " c" and request.context != "Answer:" else -2.0)
    result = result_of("race_middle", tmp_path, scorer)
    assert [item["gold"] for item in result.items] == [2, 0, 2, 0]
    assert result.metrics["accuracy"].value == 0.5
    assert result.items[1]["prompts"] == ["Article: A long story.\n\nQuestion: Why?\nAnswer:"]


def test_each_normalisation_has_its_own_winner(tmp_path: Path) -> None:
    """Log-likelihoods made so that sum, per character, per word and against "Answer:" choose differently."""
    choices = ["a b", "cccccccccccccccccccc", "d d d d d d", "ee"]
    alone = {" a b": -1.0, " cccccccccccccccccccc": -2.0, " d d d d d d": -3.0, " ee": -40.0}
    full = {" a b": -2.0, " cccccccccccccccccccc": -3.0, " d d d d d d": -4.0, " ee": -8.0}
    put(tmp_path / "boolq" / "boolq.jsonl", lines({"query": "q", "choices": choices, "gold": 3}))
    scorer = FakeScorer(lambda r: alone[r.continuation] if r.context == "Answer:" else full[r.continuation])
    winners = {}
    for gold in range(4):
        put(tmp_path / "boolq" / "boolq.jsonl", lines({"query": "q", "choices": choices, "gold": gold}))
        for name, metric in result_of("boolq", tmp_path, scorer).metrics.items():
            if metric.value == 1:
                winners[name] = gold
    own = {"accuracy_none": 0, "accuracy_characters": 1, "accuracy_tokens": 2, "accuracy_answer_context": 3}
    assert winners == {**own, "accuracy": 3}


def test_characters_are_those_of_the_choice_without_the_space_before_it(tmp_path: Path) -> None:
    """10 characters at -10: 11 are likelier per character down to -11; with the space counted, down to -10.91."""
    put(tmp_path / "piqa" / "piqa.jsonl", lines({"query": "q", "choices": ["ten chars.", "eleven char"], "gold": 1}))
    scorer = FakeScorer(lambda request: -10.0 if "ten" in request.continuation else -10.95)
    assert result_of("piqa", tmp_path, scorer).metrics["accuracy"].value == 1.0
    scorer = FakeScorer(lambda request: -10.0 if "ten" in request.continuation else -11.05)
    assert result_of("piqa", tmp_path, scorer).metrics["accuracy"].value == 0.0


def test_answers_alone_are_scored_once_for_all_questions(tmp_path: Path) -> None:
    put(tmp_path / "boolq" / "dev.jsonl", lines(*[BOOLQ] * 50))
    scorer = FakeScorer()
    result_of("boolq", tmp_path, scorer)
    assert len(scorer.asked) == 50 * 2 + 2


def test_examples_before_a_question_are_solved_others_and_the_same_every_time(tmp_path: Path) -> None:
    records = [{"goal": f"goal {n}", "sol1": f"left {n}", "sol2": f"right {n}", "label": n % 2} for n in range(9)]
    put(tmp_path / "piqa" / "valid.jsonl", lines(*records))
    two, again, three, other = (
        [item["prompts"][0] for item in result_of("piqa", tmp_path, FakeScorer(), conditions, shots=shots).items]
        for shots, conditions in ((2, Conditions()), (2, Conditions()), (3, Conditions()), (2, Conditions(seed=1)))
    )
    assert two == again
    assert two != other
    for number, (few, more) in enumerate(zip(two, three, strict=True)):
        *examples, question = few.split("\n\n")
        assert question == f"Question: goal {number}\nAnswer:"
        solved = {f"Question: goal {n}\nAnswer: {'right' if n % 2 else 'left'} {n}" for n in range(9) if n != number}
        assert len(set(examples)) == 2
        assert set(examples) < solved
        assert more.startswith("\n\n".join(examples))
    train = [{**PIQA, "label": 0}]
    task = load_task("piqa", settings={"shots": 1})
    task.optional_files["examples"] = ["train.jsonl"]
    put(tmp_path / "train.jsonl", lines(*train))
    prompts = run_tasks([task], FakeScorer(), data=tmp_path)["piqa"].items[3]["prompts"]
    assert prompts == ["Question: Boil water.\nAnswer: Heat it.\n\nQuestion: goal 3\nAnswer:"]
    with pytest.raises(ConfigError, match="shots=9: there are but 9 examples"):
        result_of("piqa", tmp_path, FakeScorer(), shots=9)


@given(st.integers(1, 40), st.data())
def test_draws_are_different_places_without_the_question_itself(available_: int, data: st.DataObject) -> None:
    count, itself = data.draw(st.integers(0, available_ - 1)), data.draw(st.integers(0, available_ - 1))
    drawn = draw(available_, count, seed=3, question=itself, excluded=itself)
    assert len(set(drawn)) == count
    assert itself not in drawn
    assert set(drawn) <= set(range(available_))


NQ = [
    {"question": "who wrote the book the origin of species", "answer": ["Charles Darwin"]},
    {"question": "Who sang who wants to be a millionaire in high society?", "answer": ["Frank Sinatra", "Sinatra"]},
]


def test_questions_are_asked_with_the_papers_prompt(tmp_path: Path) -> None:
    """The example of the paper's appendix A."""
    put(tmp_path / "nq_open" / "NQ-open.dev.jsonl", lines(*NQ))
    scorer = FakeScorer(write=lambda request: " the charles darwin")
    result = result_of("natural_questions", tmp_path, scorer, Conditions(max_questions=1), shots=[0, 1])
    question = "Q: Who wrote the book the origin of species?\nA:"
    assert [request.context for request in scorer.asked] == [
        f"Answer these questions:\n{question}",
        "Answer these questions:\nQ: Who sang who wants to be a millionaire in high society?\nA: Frank Sinatra\n"
        + question,
    ]
    assert scorer.asked[0].stop == ("\n", ".", ",")
    assert scorer.asked[0].temperature == 0
    assert {name: metric.value for name, metric in result.metrics.items()} == {
        "exact_match_0_shot": 1.0,
        "exact_match_1_shot": 1.0,
    }


@pytest.mark.parametrize(
    "record",
    [
        {"Question": "Which?", "Answer": {"Value": "Sunset Boulevard", "Aliases": ["Sunset Blvd"]}},
        {"question": "Which?", "answer": {"value": "Sunset Boulevard", "aliases": ["Sunset Blvd"]}},
        {"question": "Which?", "answer": "Sunset Boulevard", "aliases": ["Sunset Blvd"]},
    ],
)
def test_trivia_is_right_by_any_alias(tmp_path: Path, record: dict[str, Any]) -> None:
    put(tmp_path / "triviaqa" / "wikipedia-dev.json", json.dumps({"Data": [record]}))
    result = result_of("triviaqa", tmp_path, FakeScorer(write=lambda request: " sunset blvd, I think"), shots=0)
    assert result.metrics["exact_match_0_shot"].value == 1.0
    assert result.items[0]["gold"] == ["Sunset Boulevard", "Sunset Blvd"]


def test_answers_are_compared_without_case_articles_punctuation_and_spaces() -> None:
    assert cut(" Paris, France. It is", ["\n", ".", ","]) == " Paris"
    assert normalised(" The  U.S.A.,  an Apple-Pie ") == "usa applepie"
    assert is_right("an anthem", ["Anthem"])
    assert not is_right("theatre", ["atre"])
    assert not is_right("", ["Paris"])


def mmlu_tar(path: Path, rows: dict[str, list[list[str]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, table in rows.items():
            content = "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in table).encode()
            member = tarfile.TarInfo(f"data/{name}.csv")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_mmlu_is_asked_as_its_authors_ask_and_averaged_over_questions(tmp_path: Path) -> None:
    dev = [[f"Example {n}?", "w", "x", "y", "z", "ABCDA"[n]] for n in range(5)]
    tables = {
        "dev/college_physics_dev": dev,
        "dev/marketing_dev": dev,
        "test/college_physics_test": [["1, or 2?", "p", "q", "r", "s", "B"]],
        "test/marketing_test": [["Three?", "p", "q", "r", "s", letter] for letter in "BBC"],
    }
    mmlu_tar(tmp_path / "mmlu" / "mmlu.tar", tables)
    scorer = FakeScorer(lambda request: -1.0 if request.continuation == " B" else -2.0)
    result = result_of("mmlu", tmp_path, scorer)
    prompt = scorer.asked[0].context
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about college physics.\n\n"
        "Example 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\nExample 1?\n"
    )
    assert prompt.endswith("\nAnswer: A\n\n1, or 2?\nA. p\nB. q\nC. r\nD. s\nAnswer:")
    values = {name: (metric.value, metric.questions) for name, metric in result.metrics.items()}
    assert values["accuracy"] == (0.75, 4)
    assert values["stem"] == values["subject.college_physics"] == (1.0, 1)
    assert values["other"] == (pytest.approx(2 / 3), 3)
    assert "humanities" not in values
    few = FakeScorer()
    result_of("mmlu", tmp_path, few, shots=1)
    assert few.asked[0].context.count("Example") == few.asked[0].context.count("Example 0?") == 1
    del tables["dev/marketing_dev"]
    mmlu_tar(tmp_path / "mmlu" / "mmlu.tar", tables)
    with pytest.raises(DataError, match=r"shots=5, and marketing_dev\.csv has 0 examples; lower shots"):
        result_of("mmlu", tmp_path, scorer)
    assert result_of("mmlu", tmp_path, scorer, shots=0).metrics["accuracy"].value == 0.75


def test_mmlu_of_the_hub_is_asked_the_same(tmp_path: Path) -> None:
    rows = {"dev": "Example?", "test": "Question?"}
    record = {"choices": ["p", "q", "r", "s"], "answer": 1, "subject": "virology"}
    plain, hub = FakeScorer(), FakeScorer()
    mmlu_tar(tmp_path / "a" / "mmlu.tar", {f"virology_{k}": [[q, "p", "q", "r", "s", "B"]] for k, q in rows.items()})
    for split, question in rows.items():
        put(tmp_path / "b" / "mmlu" / f"{split}.jsonl", lines({"question": question, **record}))
    first = result_of("mmlu", tmp_path / "a", plain, shots=1)
    second = result_of("mmlu", tmp_path / "b", hub, shots=1)
    assert plain.asked == hub.asked
    assert [item["gold"] for item in first.items] == [item["gold"] for item in second.items] == ["B"]


def test_mmlu_has_57_subjects_in_its_authors_groups() -> None:
    groups = list(GROUP_OF.values())
    assert {group: groups.count(group) for group in groups} == {
        "stem": 18, "humanities": 13, "social_sciences": 12, "other": 14,
    }  # fmt: skip
    assert GROUP_OF["anatomy"] == "other"


def test_the_papers_mmlu_averages_are_those_of_all_questions_in_these_groups() -> None:
    """Neither their mean nor groups with anatomy (135 questions) in STEM give them. PaLM's rows are others' numbers."""
    questions = {"Humanities": 4705, "STEM": 3018, "Social Sciences": 3077, "Other": 3242}
    table = published()["mmlu"]
    assert list(table.columns) == [*questions, "Average"]
    for *groups, average in [row for model, row in table.rows.items() if not model.startswith("PaLM")]:
        weighted = sum(n * share for n, share in zip(questions.values(), groups, strict=True))
        assert weighted / sum(questions.values()) == pytest.approx(average, abs=0.1)


def test_perplexity_and_bits_per_byte_are_of_each_source_and_of_all(tmp_path: Path) -> None:
    """A model that gives each byte probability 1/4: two bits a byte."""
    put(tmp_path / "documents" / "a.jsonl", lines({"text": "one two"}, {"text": "thrée"}))
    (tmp_path / "documents" / "b.txt.gz").write_bytes(gzip.compress(b"a b c d"))
    scorer = FakeScorer(lambda request: -len(request.continuation.encode()) * math.log(4))
    metrics = result_of("perplexity", tmp_path, scorer).metrics
    for name in ("bits_per_byte", "bits_per_byte.a", "bits_per_byte.b"):
        assert metrics[name].value == pytest.approx(2.0)
    assert metrics["perplexity.b"].value == pytest.approx(4 ** (7 / 4))
    assert metrics["perplexity.a"].value == pytest.approx(4 ** (13 / 3))
    assert metrics["perplexity"].value == pytest.approx(4 ** (20 / 7))
    low, value, high = metrics["perplexity"].low, metrics["perplexity"].value, metrics["perplexity"].high
    assert low is not None and high is not None and low < value < high


def test_token_shards_are_scored_as_the_texts_they_were_made_of(
    tiny_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    documents = [f"Document {n}: it holds\n{n * n} words, not more." for n in range(40)]
    directory = tiny_dataset("few", documents, tmp_path / "few", validation_fraction=0.3)
    scorer = FakeScorer(lambda request: -float(len(request.continuation.encode())))
    task = load_task("perplexity", files={"documents": str(directory)})
    result = run_tasks([task], scorer, data=tmp_path)["perplexity"]
    manifest = json.loads((directory / "dataset.json").read_text())
    shards = manifest["splits"]["validation"]
    assert len(result.items) == sum(shard["documents"] for shard in shards)
    assert sum(item["bytes"] for item in result.items) == sum(shard["text_bytes"] for shard in shards)


def test_sources_are_called_by_their_links(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    for name in ("books", "c4"):
        texts = [f"{name} {number}, and more. " * 9 for number in range(20)]
        made = tiny_dataset(name, texts, tmp_path / name / "shards", validation_fraction=0.3)
        (documents / name).symlink_to(made)
    found = result_of("perplexity", tmp_path, FakeScorer(lambda request: -1.0)).metrics
    assert {"perplexity.books", "perplexity.c4"} <= set(found)
    put(documents / "books.txt", "one")
    with pytest.raises(DataError, match=r"books and books\.txt are both called books: rename one"):
        result_of("perplexity", tmp_path, FakeScorer())
    tiny_dataset("few", ["one two three. " * 9] * 3, tmp_path / "few")
    task = load_task("perplexity", files={"documents": str(tmp_path / "few")})
    with pytest.raises(DataError, match=r"few: its split validation has no tokens, or there is none; .* are train; "):
        look_through([task], tmp_path, Conditions())


def test_labels_that_are_missing_or_wrong_are_said_to_be(tmp_path: Path) -> None:
    put(tmp_path / "piqa" / "valid.jsonl", lines(PIQA))
    with pytest.raises(DataError, match=r"valid\.jsonl, line 1: there is no field label, and no file of labels"):
        result_of("piqa", tmp_path, FakeScorer())
    put(tmp_path / "piqa" / "valid-labels.lst", "2\n")
    with pytest.raises(DataError, match=r"valid-labels\.lst, line 1: field label is '2', and must be one of 0, 1"):
        result_of("piqa", tmp_path, FakeScorer())


MALFORMED = [
    ("nq_open/NQ-open.dev.jsonl", lines(*NQ) + '{"question": ', r"NQ-open\.dev\.jsonl, line 3: no JSON"),
    ("nq_open/NQ-open.dev.jsonl", lines(NQ[0]) + "[1]\n", r"line 2: no object but \[1\]"),
    ("nq_open/NQ-open.dev.jsonl", lines(NQ[0], {"question": "?"}), r"line 2: there is no field answer; .* question$"),
    (
        "nq_open/NQ-open.dev.jsonl",
        lines({"question": ["a"], "answer": ["b"]}),
        r"line 1: field question is no text but",
    ),
    ("nq_open/NQ-open.dev.jsonl", "\n", r"there is no question in it"),
    ("piqa/valid.jsonl", lines({**PIQA, "label": 0}, {**PIQA, "label": 2}), r"line 2: field label is '2', .* of 0, 1"),
    (
        "piqa/valid.jsonl",
        lines({"goal": "x", "label": 0}),
        r"line 1: of no known format \(its fields are goal, label; known",
    ),
    ("hellaswag/val.jsonl", lines({**SCENE, "endings": "abc"}), r"line 1: field endings is no list of texts but 'abc'"),
    ("winogrande/dev.jsonl", lines({**BLANK, "sentence": "_ and _"}), r"line 1: there is not one blank '_' in"),
    (
        "race/test/middle/1.txt",
        json.dumps({**EXAM, "answers": ["A"]}),
        r"1\.txt: questions, options, answers are not lists",
    ),
]


@pytest.mark.parametrize(("file", "content", "message"), MALFORMED)
def test_a_malformed_file_is_one_message_with_line_and_field(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    put(tmp_path / file, content)
    name = {"nq_open": "natural_questions", "race": "race_middle"}.get(file.split("/")[0], file.split("/")[0])
    with pytest.raises(DataError, match=message):
        result_of(name, tmp_path, FakeScorer())


def test_tables_and_packed_files_are_read_by_their_names(tmp_path: Path) -> None:
    plain = put(tmp_path / "a.csv", 'x,y\n"1\n2",3\n4,5\n')
    rows = read_questions(plain)
    assert [dict(row) for row in rows] == [{"x": "1\n2", "y": "3"}, {"x": "4", "y": "5"}]
    assert rows[1].place.endswith("a.csv, line 4")
    assert read_questions(plain, columns=["y", "x"]) == rows  # its header holds them
    assert len(read_questions(put(tmp_path / "b.csv", "1,2\n3,4\n"), columns=["x", "y"])) == 2
    with pytest.raises(DataError, match=r"b\.csv, line 2: 1 fields, where x, y are 2"):
        read_questions(put(tmp_path / "b.csv", "1,2\n3\n"), columns=["x", "y"])
    assert read_questions(put(tmp_path / "c.tsv", 'x\ty\n"one\ttwo"\n'))[0] == {"x": '"one', "y": 'two"'}
    text = lines(PIQA).encode()
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(text) + zstandard.compress(text))
    assert len(read_questions(tmp_path / "d.jsonl.zst")) == 2
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(text)[:-9])
    with pytest.raises(DataError, match=r"e\.jsonl\.gz: cannot be read"):
        read_questions(tmp_path / "e.jsonl.gz")
    (tmp_path / "f.jsonl").write_bytes(text + b"\xff\n")
    with pytest.raises(DataError, match=r"f\.jsonl, line 2: no UTF-8"):
        read_questions(tmp_path / "f.jsonl")
    with pytest.raises(DataError, match=r"a\.csv: no directory and no \.tar"):
        read_tables(plain)
    with pytest.raises(DataError, match=r"g\.doc: no question file by its name"):
        read_questions(put(tmp_path / "g.doc", "?"))


@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".lst", ".jsonl.gz", ".csv.zst"]))
def test_whatever_stands_in_a_file_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, end: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{end}"
    path.write_bytes(content)
    try:
        found = read_questions(path)
    except DataError as refused:
        message = str(refused)
    else:
        message = found[0].place
    assert path.name in message


def test_what_nests_too_deep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: no JSON"):
        read_questions(put(tmp_path / "a.jsonl", '{"a":' * 100_000))


# Statistics


def test_wilsons_interval_is_that_of_the_textbook() -> None:
    """Eight of ten; Wilson 1927 by hand."""
    assert wilson_interval(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(0, 20)[0] == 0
    assert wilson_interval(20, 20)[1] == 1


@given(st.integers(1, 2000), st.data())
def test_an_interval_holds_its_share_and_narrows_with_questions(total: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, total))
    low, high = wilson_interval(right, total)
    assert 0 <= low <= right / total <= high <= 1
    more_low, more_high = wilson_interval(4 * right, 4 * total)
    assert more_high - more_low < high - low


def test_95_of_100_intervals_hold_the_truth() -> None:
    generator = random.Random(1)
    found = {"share": 0, "mean": 0, "ratio": 0}
    for _ in range(400):
        outcomes = [generator.random() < 0.3 for _ in range(80)]
        sizes = [generator.uniform(1, 9) for _ in range(80)]
        metrics = {
            "share": (share(outcomes), 0.3),
            "mean": (mean([generator.gauss(2, 3) for _ in range(80)]), 2),
            "ratio": (ratio([size * generator.gauss(5, 1) for size in sizes], sizes), 5),
        }
        for name, (metric, truth) in metrics.items():
            assert metric.low is not None and metric.high is not None
            found[name] += metric.low <= truth <= metric.high
    assert all(0.92 < count / 400 < 0.98 for count in found.values()), found


def test_a_mean_has_the_interval_of_its_standard_error() -> None:
    metric = mean([1.0, 2.0, 3.0, 6.0])
    half = Z95 * math.sqrt((4 + 1 + 0 + 9) / 3 / 4)
    assert (metric.value, metric.low, metric.high) == (3.0, pytest.approx(3 - half), pytest.approx(3 + half))
    assert mean([1.0]).low is None


# Descriptions, tables, results


def test_every_description_is_of_a_kind_and_says_where_its_protocol_comes_from() -> None:
    for task in load_tasks(list(built_in("tasks"))):
        assert task.source, task.name
        assert task.files, task.name


def test_the_papers_suite_has_its_tables_and_a_task_for_each_column() -> None:
    suite = load_suite("llama_paper")
    tasks = {task.name: task for task in load_tasks(suite.tasks)}
    tables = published()
    assert suite.tables == list(tables)
    for table in tables.values():
        assert set(table.tasks()) <= set(tasks), table.title
        assert all(len(row) == len(table.columns) for row in table.rows.values()), table.title
    assert set(tasks) == {name for table in tables.values() for name in table.tasks()}
    assert tables["common_sense"].rows["LLaMA 7B"] == [76.5, 79.8, 48.9, 76.1, 70.1, 72.8, 47.6, 57.2]


def test_a_description_of_ones_own_is_a_file_and_its_data_may_lie_beside_it(tmp_path: Path) -> None:
    put(tmp_path / "here" / "mine.jsonl", lines({"q": "2 + 2 =", "a": ["3", "4"], "k": 1}))
    own = put(
        tmp_path / "here" / "sums.yaml",
        "kind: multiple_choice\nfiles: {questions: mine.jsonl}\n"
        "settings: {formats: {own: {context: '{q}', choices: a, gold: k}}}\n",
    )
    task = load_task(str(own))
    result = run_tasks([task], FakeScorer(), data=tmp_path)["sums"]
    assert result.items[0]["prompts"] == ["2 + 2 ="]


REFUSED = [
    (["bolq"], {}, r"task bolq: there is none of that name; did you mean boolq\? there are"),
    (["./nothing.yaml"], {}, r"nothing\.yaml: there is no such file"),
    (["piqa", "piqa"], {}, r"tasks: piqa is there 2 times"),
    (["piqa"], {"settings": {"boolq": {"shots": 1}}}, r"task_settings\.boolq: this task is not asked for"),
    (["piqa"], {"settings": {"piqa": {"shot": 1}}}, r"task piqa: shot: there is no such setting; did you mean shots\?"),
    (["piqa"], {"settings": {"piqa": {"shots": -1}}}, r"task piqa: shots=-1: must not be negative"),
    (["piqa"], {"files": {"piqa": {"question": "x"}}}, r"task_files\.piqa\.question: .* it has questions, labels"),
    (["piqa"], {"settings": {"piqa": {"normalise": "words"}}}, r"normalise=words: choose one of none, characters"),
    (["triviaqa"], {"shots": [5, 5]}, r"shots=\[5, 5\]: each number once"),
]


@pytest.mark.parametrize(("names", "options", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(names: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tasks(names, **options)


def test_shots_are_set_for_all_tasks_that_have_some() -> None:
    piqa, trivia, perplexity = load_tasks(["piqa", "triviaqa", "perplexity"], shots=3)
    assert (piqa.settings.shots, trivia.settings.shots) == (3, 3)
    assert (piqa.changed, perplexity.changed) == ({"shots": 3}, {})


def test_a_task_that_cannot_have_so_many_shots_keeps_its_own(tmp_path: Path) -> None:
    piqa, math_, perplexity = load_tasks(["piqa", "math", "perplexity"], shots=5)
    assert (piqa.settings.shots, math_.settings.shots) == (5, 4)
    assert not piqa.other_shots and not perplexity.other_shots
    assert note(math_, TaskResult({})).endswith(
        "keeps shots=4 (task math: shots=5: must be from 0 to 4, the number of examples)"
    )
    with pytest.raises(ConfigError, match="task math: shots=5: must be from 0 to 4"):
        load_tasks(["math", "perplexity"], shots=5)


def test_a_description_without_sense_is_refused(tmp_path: Path) -> None:
    for text, message in (
        ("kind: chess\n", r"kind='chess' is none; choose one of"),
        ("- a\n", "a description is a mapping"),
        ("kind: [\n", "no YAML"),
        ("kind: multiple_choice\n", "formats: say in which fields"),
        ("kind: mmlu\nfile: x\n", "file: there is no such setting; did you mean files"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_task(str(put(tmp_path / "own.yaml", text)))


def test_a_missing_set_is_named_and_the_others_are_run(tmp_path: Path) -> None:
    put(tmp_path / "boolq" / "dev.jsonl", lines(*[BOOLQ] * 3))
    tasks = load_tasks(["boolq", "piqa"])
    runnable, skipped = available(tasks, tmp_path, Conditions())
    assert [task.name for task in runnable] == ["boolq"]
    assert skipped == {"piqa": f"no file: {tmp_path / 'piqa' / 'valid.jsonl'}"}
    results = run_tasks(runnable, FakeScorer(), data=tmp_path)
    told = {"boolq": results["boolq"].note}
    assert told == {"boolq": "3 of 3,270 questions"}
    results["boolq"].shortened = 2
    assert note(runnable[0], results["boolq"]) == "3 of 3,270 questions, 2 prompts cut to the model's length"
    assert metrics_record(results)["eval/boolq/accuracy"] == 0.0
    text = paper_table(published()["common_sense"], results, skipped, model="mine", notes=told)
    header, *_, row = [line for line in text.splitlines() if line.startswith("|")]
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (header, row)), strict=True))
    assert cells["model"] == "**mine**"
    assert cells["BoolQ"] == "0.0 (0.0–56.1)"
    assert (cells["PIQA"], cells["SIQA"]) == ("not run", "–")
    assert f"- piqa: no file: {tmp_path}" in text
    assert "- boolq: 3 of 3,270 questions" in text
    assert "| LLaMA 65B " in text


def test_markdown_cannot_be_broken_by_what_stands_in_a_cell() -> None:
    assert markdown(["a"], [["x|y\nz"]]).splitlines()[2] == r"| x\|y z |"


# The command


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeScorer:
    """A checkpoint whose model is a fake."""
    scorer = FakeScorer(lambda r: -1.0 if r.continuation == " yes" and r.context != "Answer:" else -2.0)

    @contextmanager
    def open_scorer(checkpoint: str, **options: Any) -> Iterator[SimpleNamespace]:
        step = Path(checkpoint) / "checkpoints" / "step-00000500"
        yield SimpleNamespace(scorer=scorer, step=500, tokens=1_000_000, checkpoint=step, world=World())

    groups = {"model": {"weight": torch.ones(2, 2)}}
    store.write(tmp_path / "run" / "checkpoints", 500, store.Share.of(groups), {"model": {}})
    module = ModuleType("llamatrain.scorer")
    module.open_scorer = open_scorer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llamatrain.scorer", module)
    put(tmp_path / "data" / "boolq" / "dev.jsonl", lines(BOOLQ, {**BOOLQ, "answer": False}, BOOLQ))
    put(tmp_path / "data" / "piqa" / "valid.jsonl", lines({**PIQA, "label": 0}))
    return scorer


def command(tmp_path: Path, **settings: Any) -> EvaluateConfig:
    return EvaluateConfig(checkpoint=str(tmp_path / "run"), data=str(tmp_path / "data"), **settings)


def test_results_are_written_whole_with_every_question_and_shown(
    opened: FakeScorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.run(command(tmp_path, tasks=["boolq", "siqa"], max_questions=2))
    shown = capsys.readouterr()
    assert "not run: siqa (no file: " in shown.err
    assert "| boolq " in shown.out
    folder = tmp_path / "run" / "evaluations" / "step-00000500"
    assert sorted(path.name for path in folder.iterdir()) == ["boolq.items.jsonl", "boolq.json"]
    content = json.loads((folder / "boolq.json").read_text())
    assert (content["step"], content["tokens"], content["max_questions"]) == (500, 1_000_000, 2)
    assert content["tasks"]["boolq"]["accuracy"] == {
        "value": 0.5, "low": pytest.approx(0.0945, abs=1e-4), "high": pytest.approx(0.9055, abs=1e-4), "questions": 2,
    }  # fmt: skip
    assert set(content["versions"]) == {"llamatrain", "torch"}
    items = [json.loads(line) for line in (folder / "boolq.items.jsonl").read_text().splitlines()]
    assert [(item["task"], item["right"]) for item in items] == [("boolq", True), ("boolq", False)]


def test_the_papers_tables_are_printed_with_the_models_row(
    opened: FakeScorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.run(command(tmp_path, suite="llama_paper", label="our 15M"))
    out = capsys.readouterr().out
    for number in (*range(3, 10), *range(11, 15)):
        assert f"**Table {number}: " in out
    assert out.count("**our 15M**") == 11
    assert "66.7 (20.8–93.9)" in out
    assert (tmp_path / "run" / "evaluations" / "step-00000500" / "llama_paper.json").exists()


def test_json_is_one_document_with_the_tables(
    opened: FakeScorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.run(
        command(tmp_path, suite="llama_paper", tasks=["piqa"], format="json", output=str(tmp_path / "elsewhere"))
    )
    content = json.loads(capsys.readouterr().out)
    assert list(content["tasks"]) == ["piqa"]
    assert list(content["tables"]) == ["common_sense"]
    assert content["notes"] == {"piqa": "1 of 1,838 questions"}
    table = content["tables"]["common_sense"]
    assert table["model"]["PIQA"]["value"] == 100.0
    assert table["published"]["LLaMA 7B"][1] == 79.8
    assert (tmp_path / "elsewhere" / "llama_paper.json").exists()


def test_what_is_done_is_on_disk_when_a_later_task_fails(opened: FakeScorer, tmp_path: Path) -> None:
    def fail(request: Likelihood) -> float:
        if "Boil" in request.context:
            raise NotFinite("no finite log-likelihood")
        return -1.0

    opened.likelihood = fail
    with pytest.raises(NotFinite, match="task piqa: no finite log-likelihood"):
        evaluate.run(command(tmp_path, tasks=["boolq", "piqa"], name="mine"))
    content = json.loads((tmp_path / "run" / "evaluations" / "step-00000500" / "mine.json").read_text())
    assert list(content["tasks"]) == ["boolq"]


def test_a_call_that_was_broken_off_goes_on_with_what_was_asked_the_same(
    opened: FakeScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(**settings: Any) -> int:
        opened.asked.clear()
        evaluate.run(command(tmp_path, tasks=["boolq", "piqa"], name="mine", **settings))
        return len(opened.asked)

    boolq, piqa = 3 * 2 + 2, 2
    goals = property(lambda self: sum(request.context.startswith("Question:") for request in self.asked) // 2)
    monkeypatch.setattr(FakeScorer, "shortened", goals)
    both = asked()
    assert both == boolq + piqa
    folder = tmp_path / "run" / "evaluations" / "step-00000500"
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    assert asked() == both
    assert asked(resume=True) == 0
    assert json.loads((folder / "mine.json").read_text())["shortened"] == {"piqa": 1}
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == before
    otherwise: dict[str, Any] = {"task_settings": {"boolq": {"normalise": "none"}}, "resume": True}
    with pytest.raises(ConfigError, match=r"boolq with normalise='answer_context' instead of 'none'\)"):
        asked(**otherwise)
    assert asked(**otherwise, overwrite=True) == boolq - 2
    with pytest.raises(ConfigError, match=r"\(seed 0 instead of 1; boolq with normalise='none' instead of"):
        asked(resume=True, seed=1)
    assert asked(resume=True, seed=1, overwrite=True) == both
    put(tmp_path / "data" / "piqa" / "valid.jsonl", lines({**PIQA, "label": 1}))
    with pytest.raises(ConfigError, match=r"piqa with files of other contents"):
        asked(resume=True, seed=1)
    assert asked(resume=True, seed=1, overwrite=True) == piqa
    for text in ("{}", "{"):
        (folder / "mine.json").write_text(text)
        with pytest.raises(DataError, match=r"mine\.json: no results to go on from .* set overwrite=true"):
            asked(resume=True, seed=1)
    assert asked(resume=True, seed=1, overwrite=True) == both


def test_a_call_that_is_broken_off_loses_nothing_and_says_how_to_go_on(
    opened: FakeScorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(request: Likelihood) -> float:
        raise KeyboardInterrupt

    evaluate.run(command(tmp_path, tasks=["boolq", "piqa"], name="mine"))
    path = tmp_path / "run" / "evaluations" / "step-00000500" / "mine.json"
    before = path.read_text()
    opened.likelihood = interrupt
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(command(tmp_path, tasks=["boolq", "piqa"], name="mine"))
    assert path.read_text() == before
    assert "mine.json has boolq, piqa; resume=true goes on from there" in capsys.readouterr().err


def test_results_in_a_run_that_was_moved_are_its_own(opened: FakeScorer, tmp_path: Path) -> None:
    evaluate.run(command(tmp_path, tasks=["piqa"]))
    path = tmp_path / "run" / "evaluations" / "step-00000500" / "piqa.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "checkpoint": "/elsewhere/step-00000500"}))
    opened.asked.clear()
    evaluate.run(command(tmp_path, tasks=["piqa"], resume=True))
    assert not opened.asked


def test_what_is_wrong_is_said_before_the_model_is_loaded(
    opened: FakeScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llamatrain.scorer", None)
    put(tmp_path / "data" / "openbookqa" / "test.jsonl", "{}\n")
    with pytest.raises(DataError, match="of no known format"):
        evaluate.run(command(tmp_path, tasks=["boolq", "openbookqa"]))
    with pytest.raises(ConfigError, match=r"task piqa: shots=1: there are but 1 examples to draw from"):
        evaluate.run(command(tmp_path, tasks=["piqa"], shots=1))
    with pytest.raises(ConfigError, match=r"checkpoint=.*nowhere: there is no such directory"):
        evaluate.run(replace(command(tmp_path, tasks=["piqa"]), checkpoint=str(tmp_path / "nowhere")))
    assert not opened.asked


def test_what_is_asked_otherwise_is_said_below_the_table(
    opened: FakeScorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "data" / "documents" / "a.jsonl", lines({"text": "one two"}, {"text": "three"}))
    put(tmp_path / "data" / "gsm8k" / "test.jsonl", lines({"question": "?", "answer": "#### 1"}))
    evaluate.run(command(tmp_path, tasks=["boolq", "perplexity", "gsm8k"], max_questions=1, shots=2))
    out = capsys.readouterr().out
    assert "\n- boolq: 1 of 3,270 questions, shots=2\n" in out
    assert "\n- perplexity: max_questions=1\n" in out
    put(tmp_path / "data" / "boolq" / "dev.jsonl", lines(*[BOOLQ] * 12))
    evaluate.run(command(tmp_path, tasks=["boolq", "gsm8k"], shots=9))
    shown = capsys.readouterr()
    kept = "gsm8k: {}keeps shots=8 (task gsm8k: shots=9: must be from 0 to 8"
    assert kept.format("") in shown.err and kept.format("1 of 1,319 questions, ") in shown.out


def test_results_that_were_asked_otherwise_are_not_lost_unasked(
    opened: FakeScorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tasks_of(**settings: Any) -> list[str]:
        evaluate.run(command(tmp_path, **settings))
        folder = tmp_path / "run" / "evaluations" / "step-00000500"
        content = json.loads((folder / f"{settings.get('suite', 'piqa')}.json").read_text())
        assert set(content["tasks"]) == set(content["settings"]) == set(content["files"])
        items = (folder / f"{settings.get('suite', 'piqa')}.items.jsonl").read_text().split("\n")[:-1]
        assert {json.loads(line)["task"] for line in items} == set(content["tasks"])
        return list(content["tasks"])

    put(
        tmp_path / "data" / "boolq" / "dev.jsonl", json.dumps({**BOOLQ, "passage": "a\u2028b\x85c"}, ensure_ascii=False)
    )
    assert tasks_of(suite="llama_paper", tasks=["boolq"]) == ["boolq"]
    with pytest.raises(ConfigError, match=r"llama_paper\.json: .*boolq: not asked for now \(resume=true keeps"):
        tasks_of(suite="llama_paper", tasks=["piqa"])
    capsys.readouterr()
    assert tasks_of(suite="llama_paper", tasks=["piqa"], resume=True) == ["boolq", "piqa"]
    shown = capsys.readouterr()
    assert "llama_paper.json: boolq\n" in shown.err
    assert "- boolq: 1 of 3,270 questions\n- piqa: " in shown.out
    assert tasks_of(suite="llama_paper", tasks=["piqa"], overwrite=True) == ["piqa"]
    for _ in range(2):
        assert tasks_of(tasks=["piqa"]) == ["piqa"]
    for other, told in (
        ({"max_questions": 5}, r"max_questions None instead of 5\)"),
        ({"precision": "bf16"}, r"precision auto instead of bf16\)"),
        ({"task_settings": {"piqa": {"normalise": "none"}}}, r"piqa with normalise='characters' instead of 'none'\)"),
    ):
        with pytest.raises(ConfigError, match=told):
            tasks_of(tasks=["piqa"], **other)


def test_a_file_of_many_tasks_has_a_name_of_its_own() -> None:
    names = sorted(built_in("tasks"))
    found = [evaluate._name(EvaluateConfig(), load_tasks(some)) for some in (names, names[:-1], names[:2])]
    assert found[2] == "arc_challenge_arc_easy"
    assert len(set(found)) == 3 and all(len(name) <= 60 for name in found)


def test_no_set_at_all_or_a_strict_run_is_an_error(opened: FakeScorer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="siqa: no file: "):
        evaluate.run(command(tmp_path, tasks=["siqa"]))
    with pytest.raises(DataError, match="siqa: no file: "):
        evaluate.run(command(tmp_path, tasks=["siqa", "boolq"], strict=True))
    with pytest.raises(DataError, match=r"data=.*nowhere: there is no such directory"):
        evaluate.run(EvaluateConfig(checkpoint="x", data=str(tmp_path / "nowhere"), tasks=["piqa"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": None}, "no checkpoint to evaluate"),
        ({"tasks": []}, "nothing to evaluate on"),
        ({"data": None}, "give data=DIRECTORY"),
        ({"max_questions": 0}, "max_questions=0: must be at least 1"),
        ({"format": "html"}, "format=html: choose one of markdown, json"),
        ({"name": "../x"}, r"name=\.\./x: must be a file's name"),
        ({"tp": 0}, "tp=0: must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_evaluate(EvaluateConfig(**{"checkpoint": "x", "data": "y", "tasks": ["piqa"], **settings}))


@pytest.mark.slow
def test_the_command_finds_the_same_on_two_ranks_as_alone(sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path / "run", sources, train={"steps": 4}))
    put(tmp_path / "data" / "boolq" / "dev.jsonl", lines(*[{**BOOLQ, "question": f"is {n} wet"} for n in range(7)]))
    put(tmp_path / "data" / "nq_open" / "NQ-open.dev.jsonl", lines(*NQ))
    put(tmp_path / "data" / "documents" / "a.jsonl", lines({"text": "one two"}, {"text": "thrée" * 40}))
    arguments = [f"checkpoint={tmp_path / 'run'}", f"data={tmp_path / 'data'}", "shots=1", "name=all", "device=cpu"]
    arguments += ["tasks=[boolq,natural_questions,perplexity,piqa]"]
    found = []
    for ranks in ([], ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]):
        output = tmp_path / f"of-{len(ranks)}"
        command = [sys.executable, "-m", *ranks, "llamatrain.evaluate", *arguments, f"output={output}"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("not run: piqa (no file: ") == 1
        assert done.stdout.count("| natural_questions |") == 1
        found.append([(output / name).read_text() for name in ("all.json", "all.items.jsonl")])
    assert found[0] == found[1]
    assert list(json.loads(found[0][0])["tasks"]) == ["boolq", "natural_questions", "perplexity"]


# The real sets

REAL = {"arc_easy": (2376, 0.25), "boolq": (3270, 0.5), "hellaswag": (1000, 0.25), "openbookqa": (500, 0.25)}
REAL |= {"piqa": (1838, 0.5), "mmlu": (1707, 0.25)}


@pytest.fixture(scope="module")
def real_sets() -> Path:
    data = shared_data()
    if data is None or not (data / "eval").is_dir():
        pytest.skip("the real evaluation sets are not at hand (LLAMATRAIN_DATA)")
    return data / "eval"


@pytest.mark.parametrize("name", REAL)
def test_a_model_that_guesses_is_at_chance_on_the_real_sets(name: str, real_sets: Path) -> None:
    generator = random.Random(7)
    result = result_of(name, real_sets, FakeScorer(lambda request: generator.uniform(-9, -1)), shots=0)
    questions, chance = REAL[name]
    metric = result.metrics["accuracy_none" if name != "mmlu" else "accuracy"]
    assert metric.questions == questions
    assert metric.low is not None and metric.high is not None
    assert metric.low - 0.01 <= chance <= metric.high + 0.01  # one in twenty is outside by its nature
    assert all(0 <= item["gold"] < 4 for item in result.items if name != "mmlu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_easy", "piqa", "hellaswag"])
def test_random_weights_are_at_chance_within_their_interval(name: str, real_sets: Path, tiny_tokenizer: Path) -> None:
    """Per token: per character two of the sets leave the interval (docs/evaluation.md)."""
    scorer = ModelScorer(built(max_seq_len=128), Tokenizer(tiny_tokenizer), device=CPU)
    metric = result_of(name, real_sets, scorer, Conditions(max_questions=500)).metrics["accuracy_tokens"]
    assert metric.questions == 500
    low, high = wilson_interval(metric.value * 500, 500, z=2.394)  # of three sets all are in theirs 95 times of 100
    assert low <= REAL[name][1] <= high, metric


def test_the_real_questions_are_all_read_and_answerable(real_sets: Path) -> None:
    """Answered are those with an answer of one piece: a full stop or comma ends an answer (appendix A)."""
    known = {}
    for line in (real_sets / "nq_open" / "NQ-open.dev.jsonl").read_text().splitlines():
        record = json.loads(line)
        known[record["question"]] = next((a for a in record["answer"] if not {",", "."} & set(a)), "")

    def knows(request: Generation) -> str:
        question = request.context.rpartition("Q: ")[2].removesuffix("?\nA:")
        return f" The {known.get(question[0].lower() + question[1:]) or known.get(question, '')}"

    metric = result_of("natural_questions", real_sets, FakeScorer(write=knows), shots=[1]).metrics["exact_match_1_shot"]
    answerable = sum(bool(answer) for answer in known.values())
    assert metric.questions == len(known) == 3610
    assert round(metric.value * 3610) == answerable > 3250
