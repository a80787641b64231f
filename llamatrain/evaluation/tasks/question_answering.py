"""Questions with a short written answer (Natural Questions, TriviaQA): greedy, right if equal to an accepted answer.

The prompt is the paper's (appendix A): "Answer these questions:", the examples, the question, each as "Q: …" and
"A: …". The answer ends at the first line break, full stop or comma. It is compared after normalisation: lower case, no
punctuation, no articles, single spaces (section 3.2). Examples are drawn for each question by itself from the training
set if there is one, else from the other questions of the set.
"""

import re
import string
from dataclasses import dataclass, field
from pathlib import Path

from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation.question_files import Question, read_questions
from llamatrain.evaluation.results import Metric, TaskResult
from llamatrain.evaluation.scoring import Generation, Scorer, cut
from llamatrain.evaluation.statistics import share
from llamatrain.evaluation.task import Conditions, Kind
from llamatrain.evaluation.tasks.examples import draw


@dataclass
class Settings:
    questions: list[str] = field(default_factory=lambda: ["question"])  # paths; the first that a record has is taken
    answers: list[str] = field(default_factory=lambda: ["answer"])  # likewise; texts, or lists of accepted ones
    shots: int | list[int] = 0  # a metric for each
    preamble: str = "Answer these questions:\n"
    question: str = "Q: {question}\nA:"
    as_sentence: bool = True  # a question begins with a capital letter and ends with a question mark
    answer: str = " {answer}\n"  # of an example
    stop: list[str] = field(default_factory=lambda: ["\n", ".", ","])
    max_new_tokens: int = 32


@dataclass(frozen=True)
class Asked:
    question: str
    answers: list[str]  # all that are right; the first is an example's
    place: str


def check(settings: Settings) -> None:
    """Raises ConfigError."""
    numbers = shots_of(settings)
    if not numbers or min(numbers) < 0:
        raise ConfigError(f"shots={settings.shots}: must be one or more numbers that are not negative, like [0,5]")
    if len(set(numbers)) != len(numbers):
        raise ConfigError(f"shots={settings.shots}: each number once")
    if settings.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={settings.max_new_tokens}: must be at least 1")
    if "{question}" not in settings.question or "{answer}" not in settings.answer:
        raise ConfigError("question and answer are templates: {question} and {answer} must stand in them")


def shots_of(settings: Settings) -> list[int]:
    return settings.shots if isinstance(settings.shots, list) else [settings.shots]


def score(settings: Settings, files: dict[str, Path], scorer: Scorer, conditions: Conditions) -> TaskResult:
    """A metric `exact_match_<n>_shot` for each number of shots."""
    asked = load(settings, files["questions"])
    examples = load(settings, files["examples"]) if "examples" in files else None
    metrics: dict[str, Metric] = {}
    items = []
    for shots in shots_of(settings):
        questions = asked[: conditions.max_questions]
        prompts = [
            prompt(settings, asked, place, examples=examples, shots=shots, seed=conditions.seed)
            for place in range(len(questions))
        ]
        stop = tuple(settings.stop)
        requests = [Generation(text, settings.max_new_tokens, stop=stop) for text in prompts]
        answers = scorer.generations(requests, seed=conditions.seed, description=f"{shots} shots")
        right = []
        for question, text, (answer, *_) in zip(questions, prompts, answers, strict=True):
            right.append(is_right(cut(answer, settings.stop), question.answers))
            item = {"question": question.place, "shots": shots, "prompt": text, "gold": question.answers}
            items.append({**item, "answer": answer, "right": right[-1]})
        metrics[f"exact_match_{shots}_shot"] = share(right)
    return TaskResult(metrics, items)


def prompt(
    settings: Settings, asked: list[Asked], place: int, *, examples: list[Asked] | None, shots: int, seed: int
) -> str:
    """What the model is given for a question."""
    pool = asked if examples is None else examples
    drawn = draw(len(pool), shots, seed=seed, question=place, excluded=place if examples is None else None)
    solved = [
        _put(settings.question, question=pool[n].question) + _put(settings.answer, answer=pool[n].answers[0])
        for n in drawn
    ]
    return settings.preamble + "".join(solved) + _put(settings.question, question=asked[place].question)


def _put(template: str, **values: str) -> str:
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", value)
    return template


def normalised(answer: str) -> str:
    """Lower case, without punctuation, articles and double spaces."""
    answer = "".join(char for char in answer.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def is_right(answer: str, accepted: list[str]) -> bool:
    """Whether it is one of the accepted ones, all normalised."""
    return normalised(answer) in {normalised(text) for text in accepted}


def load(settings: Settings, path: Path) -> list[Asked]:
    """The questions of a file. Raises DataError naming line and field."""
    return [_asked(settings, record) for record in read_questions(path)]


def _asked(settings: Settings, record: Question) -> Asked:
    question = next((name for name in settings.questions if record.has(name)), settings.questions[0])
    found = [record.field(name) for name in settings.answers if record.has(name)] or [record.field(settings.answers[0])]
    answers = [text for value in found for text in (value if isinstance(value, list) else [value])]
    answers = list(dict.fromkeys(str(text) for text in answers if isinstance(text, str | int | float)))
    if not answers:
        raise DataError(f"{record.place}: field {settings.answers[0]} holds no answer")
    text = record.text(question)
    return Asked(sentence(text) if settings.as_sentence else text, answers, record.place)


def sentence(question: str) -> str:
    """As the paper prints them, where Natural Questions has neither capitals nor question marks."""
    question = question.strip()
    return question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")


KIND = Kind(Settings, score, check)
