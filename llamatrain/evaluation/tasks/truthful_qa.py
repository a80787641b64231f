"""TruthfulQA (Lin et al. 2021), as multiple choice: does the model prefer what is true to what many people believe?

The paper (section 5.4, table 14) had answers written and judged by two GPT-3 models that were trained for it and are no
longer served, so its columns, truthful and truthful and informative, cannot be had any more. In their place stand the
authors' own measures without a judge, after their prompt of six questions: `mc1`, how often the best answer is
likelier than every false one; `mc2`, the true answers' share of the probability of all answers. They are not on the
paper's scale.

Read are the authors' mc_task.json, the same with lists of choices and labels, and their TruthfulQA.csv.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from llamatrain.errors import DataError
from llamatrain.evaluation.question_files import Question, read_questions
from llamatrain.evaluation.results import TaskResult
from llamatrain.evaluation.scoring import Likelihood, Scorer
from llamatrain.evaluation.statistics import mean, share
from llamatrain.evaluation.task import Conditions, Kind


@dataclass
class Settings:
    preamble: str = ""  # the six questions, each followed by an empty line
    question: str = "Q: {question}\nA:"
    delimiter: str = " "  # before an answer


@dataclass(frozen=True)
class Asked:
    question: str
    single: dict[str, bool]  # mc1: one is true
    several: dict[str, bool]  # mc2
    place: str


def score(settings: Settings, files: dict[str, Path], scorer: Scorer, conditions: Conditions) -> TaskResult:
    """Metrics `mc1` and `mc2`."""
    asked = [_asked(record) for record in read_questions(files["questions"])][: conditions.max_questions]
    requests = []
    for question in asked:
        prompt = settings.preamble + settings.question.replace("{question}", question.question)
        answers = {**question.single, **question.several}
        requests += [Likelihood(prompt, settings.delimiter + answer) for answer in answers]
    scores = iter(scorer.likelihoods(requests, description="answers"))
    first, mass, items = [], [], []
    for question in asked:
        value = {answer: next(scores).log_probability for answer in {**question.single, **question.several}}
        best = max(question.single, key=value.__getitem__)
        first.append(question.single[best])
        mass.append(true_mass({answer: value[answer] for answer in question.several}, question.several))
        item = {"question": question.place, "text": question.question, "log_probabilities": value}
        items.append({**item, "chosen": best, "mc1": first[-1], "mc2": mass[-1]})
    return TaskResult({"mc1": share(first), "mc2": mean(mass)}, items)


def true_mass(log_probabilities: dict[str, float], true: dict[str, bool]) -> float:
    """The true answers' share of the probability of all."""
    highest = max(log_probabilities.values())
    weights = {answer: math.exp(value - highest) for answer, value in log_probabilities.items()}
    return math.fsum(w for answer, w in weights.items() if true[answer]) / math.fsum(weights.values())


def _asked(record: Question) -> Asked:
    if record.has("Best Answer"):
        return _from_table(record)
    single, several = _choices(record, "mc1_targets"), _choices(record, "mc2_targets")
    if sum(single.values()) != 1:
        raise DataError(f"{record.place}: field mc1_targets must have one true answer, and has {sum(single.values())}")
    return Asked(record.text("question"), single, several, record.place)


def _choices(record: Question, name: str) -> dict[str, bool]:
    """{answer: 0 or 1}, or {choices: […], labels: […]}."""
    value = record.field(name)
    if isinstance(value, dict) and set(value) == {"choices", "labels"}:
        choices, labels = value["choices"], value["labels"]
        fits = isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels)
        value = dict(zip(choices, labels, strict=True)) if fits else None
    if (
        not isinstance(value, dict)
        or not set(value.values()) == {0, 1}
        or not all(isinstance(key, str) for key in value)
    ):
        raise DataError(f"{record.place}: field {name} must hold answers, each with 1 (true) or 0, and some of either")
    return {answer: bool(label) for answer, label in value.items()}


def _from_table(record: Question) -> Asked:
    """Of TruthfulQA.csv: answers stand between semicolons, and get a full stop."""
    best = _sentences(record.text("Best Answer"))
    true, false = _sentences(record.text("Correct Answers")), _sentences(record.text("Incorrect Answers"))
    if len(best) != 1 or not true or not false:
        raise DataError(f"{record.place}: there must be one Best Answer, and Correct and Incorrect Answers")
    wrong = dict.fromkeys(false, False)
    return Asked(
        record.text("Question").strip(),
        {**wrong, best[0]: True},
        {**wrong, **dict.fromkeys([*best, *true], True)},
        record.place,
    )


def _sentences(answers: str) -> list[str]:
    found = [answer.strip() for answer in answers.split(";")]
    return [answer if answer.endswith(".") else f"{answer}." for answer in found if answer]


KIND = Kind(Settings, score)
