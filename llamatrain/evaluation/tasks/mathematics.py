"""Word problems and competition mathematics (GSM8K, MATH): a chain of thought, and whether its last answer is right.

Both follow Minerva (Lewkowycz et al. 2022), as the paper's section 3.4 does: eight examples of Wei et al. (2022) for
GSM8K, Minerva's own four for MATH. The greedy answer gives `exact_match`; the one that most of k samples agree on gives
`majority_vote`, the paper's maj1@k (k=100 for GSM8K, 256 for MATH; temperature and top_p of the samples are Minerva's,
the paper names none). An answer without the closing phrase that the examples end with counts as none.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation import latex_answers
from llamatrain.evaluation.question_files import Question, read_questions, read_tables
from llamatrain.evaluation.results import Metric, TaskResult
from llamatrain.evaluation.scoring import Generation, Scorer, cut
from llamatrain.evaluation.statistics import share
from llamatrain.evaluation.task import Conditions, Kind

FORMATS = ("gsm8k", "math")


@dataclass
class Example:
    problem: str = ""
    solution: str = ""  # with the closing phrase


@dataclass
class Majority:
    """Samples that vote; 0: no vote."""

    samples: int = 0
    temperature: float = 0.6
    top_p: float = 0.95


@dataclass
class Settings:
    format: str = "gsm8k"  # where a record has problem and answer, and how answers are compared
    question: str = "Q: {problem}\nA:"
    solved: str = " {solution}\n\n"  # of an example, after its question
    examples: list[Example] = field(default_factory=list)
    shots: int = 8  # the first so many of the examples
    answer: str = r"[Tt]he answer is \$?(-?[0-9][0-9,]*(?:\.[0-9]+)?)"  # a group finds the answer in what was written
    stop: list[str] = field(default_factory=list)
    max_new_tokens: int = 256
    majority: Majority = field(default_factory=Majority)
    split: str = "test"  # of a folder or archive with several
    by_group: bool = True  # MATH: a metric for each subject and level


@dataclass(frozen=True)
class Asked:
    problem: str
    gold: str
    groups: list[str]  # metrics it counts to
    place: str


def check(settings: Settings) -> None:
    """Raises ConfigError."""
    if settings.format not in FORMATS:
        raise ConfigError(f"format={settings.format}: choose one of {', '.join(FORMATS)}")
    if not 0 <= settings.shots <= len(settings.examples):
        raise ConfigError(f"shots={settings.shots}: must be from 0 to {len(settings.examples)}, the number of examples")
    if "{problem}" not in settings.question or "{solution}" not in settings.solved:
        raise ConfigError("question and solved are templates: {problem} and {solution} must stand in them")
    if settings.majority.samples < 0 or settings.majority.temperature <= 0 or not 0 < settings.majority.top_p <= 1:
        raise ConfigError("majority: samples must not be negative, temperature above 0, top_p above 0 and up to 1")
    try:
        groups = re.compile(settings.answer).groups
    except re.error as error:
        raise ConfigError(f"answer={settings.answer}: no regular expression ({error})") from None
    if groups != 1:
        raise ConfigError(f"answer={settings.answer}: must have one group, and has {groups}")


def score(settings: Settings, files: dict[str, Path], scorer: Scorer, conditions: Conditions) -> TaskResult:
    """Metrics `exact_match`, `majority_vote` if there is a vote, and of MATH `subject.<name>` and `level.<n>`."""
    asked = load(settings, files["questions"])[: conditions.max_questions]
    prompts = [prompt(settings, question.problem) for question in asked]
    stop, tokens = tuple(settings.stop), settings.max_new_tokens
    greedy = [Generation(text, tokens, stop) for text in prompts]
    written = [texts[0] for texts in scorer.generations(greedy, seed=conditions.seed, description="greedy")]
    answers = [extract(settings, text) for text in written]
    right = [same(settings, answer, question.gold) for answer, question in zip(answers, asked, strict=True)]
    metrics = {"exact_match": share(right)}
    items = [
        {"question": q.place, "prompt": p, "written": w, "gold": q.gold, "answer": a, "right": r}
        for q, p, w, a, r in zip(asked, prompts, written, answers, right, strict=True)
    ]
    vote = settings.majority
    if vote.samples:
        drawn = [Generation(text, tokens, stop, vote.temperature, vote.top_p, vote.samples) for text in prompts]
        ballots = scorer.generations(drawn, seed=conditions.seed, description=f"{vote.samples} samples")
        metrics["majority_vote"] = _vote(settings, asked, ballots, items)
    for group in dict.fromkeys(group for question in asked for group in question.groups):
        metrics[group] = share([r for r, question in zip(right, asked, strict=True) if group in question.groups])
    return TaskResult(metrics, items)


def _vote(settings: Settings, asked: list[Asked], ballots: list[list[str]], items: list[dict[str, Any]]) -> Metric:
    """maj1@k, and what was voted into the items."""
    right = []
    for question, texts, item in zip(asked, ballots, items, strict=True):
        votes = [extract(settings, text) for text in texts]
        forms = [canonical(settings, vote) for vote in votes]
        chosen = most_frequent(forms)
        right.append(chosen is not None and chosen == canonical(settings, question.gold))
        majority = None if chosen is None else votes[forms.index(chosen)]
        item |= {"votes": votes, "majority": majority, "majority_right": right[-1]}
    return share(right)


def prompt(settings: Settings, problem: str) -> str:
    """What the model is given."""
    solved = [
        settings.question.replace("{problem}", example.problem)
        + settings.solved.replace("{solution}", example.solution)
        for example in settings.examples[: settings.shots]
    ]
    return "".join(solved) + settings.question.replace("{problem}", problem)


def extract(settings: Settings, text: str) -> str | None:
    """The answer in what the model has written up to the first stop, or None."""
    found = re.search(settings.answer, cut(text, settings.stop))
    if found is None:
        return None
    return found[1].strip() or None


def most_frequent(answers: list[str | None]) -> str | None:
    """What most of them agree on, the earliest of equals; those without an answer do not vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def canonical(settings: Settings, answer: str | None) -> str | None:
    """The same text for equal answers; None if there is none, or no number where one is asked for."""
    if answer is None or settings.format == "math":
        return latex_answers.canonical(answer) or None if answer else None
    value = _decimal(answer)
    return None if value is None else f"{value.normalize():f}"


def same(settings: Settings, one: str | None, other: str | None) -> bool:
    """Whether two answers are equal; none is equal to nothing."""
    left = canonical(settings, one)
    return left is not None and left == canonical(settings, other)


def _decimal(text: str) -> Decimal | None:
    try:
        value = Decimal(re.sub(r"[,$%\s]", "", text).rstrip("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def load(settings: Settings, path: Path) -> list[Asked]:
    """The questions of a file, folder or archive. Raises DataError naming file, line and field."""
    if path.is_dir() or ".tar" in path.name:
        tables = read_tables(path)
        of_split = {name: table for name, table in tables.items() if settings.split in name.split("/")[:-1]}
        records = [record for table in (of_split or tables).values() for record in table]
    else:
        records = read_questions(path)
    return [(_gsm8k if settings.format == "gsm8k" else _math)(settings, record) for record in records]


def _gsm8k(settings: Settings, record: Question) -> Asked:
    gold = record.text("answer").rpartition("####")[2].strip()
    if _decimal(gold) is None:
        raise DataError(f"{record.place}: field answer has no number after ####, but {gold[:60]!r}")
    return Asked(record.text("question"), gold, [], record.place)


def _math(settings: Settings, record: Question) -> Asked:
    gold = latex_answers.boxed(record.text("solution"))
    if gold is None:
        raise DataError(f"{record.place}: field solution has no \\boxed answer")
    groups = []
    if settings.by_group and record.has("type"):
        groups.append("subject." + re.sub(r"\W+", "_", record.text("type").lower()))
    if settings.by_group and record.has("level"):
        groups.append("level." + re.sub(r"\D", "", record.text("level")))
    return Asked(record.text("problem"), gold, [group for group in groups if not group.endswith(".")], record.place)


KIND = Kind(Settings, score, check)
