"""Questions with a few answers to choose from: the likeliest one is the model's, by a normalised likelihood.

The paper (section 3) divides a completion's log-likelihood by its number of characters, as Gao et al. (2021) do; for
OpenBookQA and BoolQ it divides P(completion | context) by P(completion | "Answer:"), as Brown et al. (2020) do. All
normalisations that cost nothing more are reported besides the task's own, which is called `accuracy`.

WinoGrande is scored partially (Trinh and Le 2018): the choice is put in the sentence's blank, and what is compared is
the likelihood of the rest of the sentence.

A set may come in several formats. Each says of which fields context, choices and gold are made; the first whose fields
the file's first record has is taken.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation.question_files import Question, read_questions
from llamatrain.evaluation.results import TaskResult
from llamatrain.evaluation.scoring import Likelihood, LikelihoodScore, Scorer
from llamatrain.evaluation.statistics import share
from llamatrain.evaluation.task import Conditions, Kind
from llamatrain.evaluation.tasks.examples import draw

NORMALISATIONS = ("none", "characters", "tokens", "answer_context")


@dataclass
class Format:
    """Where a record has its parts. A path may lead into a list: `question.choices[].text`."""

    context: str = ""  # template with {field}
    choices: str | list[str] = ""  # the path of a list of texts, or a template for each
    gold: str = ""  # path
    gold_names: str | list[str] = field(default_factory=list)  # gold's value for each choice, or a path; []: a number
    gold_first: int = 0  # the number of the first choice
    each: list[str] = field(default_factory=list)  # fields with an entry for each question of the record
    contexts: str = ""  # path of a context for each choice, where choices stand there; `choices`: what follows all


@dataclass
class Settings:
    formats: dict[str, Format] = field(default_factory=dict)
    normalise: str = "characters"  # what `accuracy` is by: none | characters | tokens | answer_context
    answer_context: str = "Answer:"
    blank: str = ""  # partial scoring: the choice stands here in the context, and what follows is scored
    delimiter: str = " "  # before a choice
    shots: int = 0
    separator: str = "\n\n"  # between examples
    preamble: str = ""
    clean: list[list[str]] = field(default_factory=list)  # expressions and what replaces them, in stripped texts


@dataclass(frozen=True)
class Asked:
    """A question as the model meets it."""

    contexts: list[str]  # one for all, or one for each choice
    continuations: list[str]
    choices: list[str]
    gold: int
    place: str

    def requests(self, before: str) -> list[Likelihood]:
        contexts = self.contexts if len(self.contexts) > 1 else self.contexts * len(self.continuations)
        return [Likelihood(before + c, text) for c, text in zip(contexts, self.continuations, strict=True)]

    def solved(self) -> str:
        """With its answer, as an example."""
        return self.contexts[self.gold if len(self.contexts) > 1 else 0] + self.continuations[self.gold]


def check(settings: Settings) -> None:
    """Raises ConfigError."""
    if settings.normalise not in NORMALISATIONS:
        raise ConfigError(f"normalise={settings.normalise}: choose one of {', '.join(NORMALISATIONS)}")
    if settings.shots < 0:
        raise ConfigError(f"shots={settings.shots}: must not be negative")
    if not settings.formats:
        raise ConfigError("formats: say in which fields a record has context, choices and gold")
    for name, form in settings.formats.items():
        if not form.choices or not form.gold:
            raise ConfigError(f"formats.{name}: must give choices and gold")
    for pair in settings.clean:
        if len(pair) != 2:
            raise ConfigError(f"clean={pair}: must be an expression and what replaces it")
        try:
            re.compile(pair[0])
        except re.error as error:
            raise ConfigError(f"clean={pair[0]}: no regular expression ({error})") from None


def score(settings: Settings, files: dict[str, Path], scorer: Scorer, conditions: Conditions) -> TaskResult:
    """Metrics `accuracy`, and one for each other normalisation: `accuracy_none`, `accuracy_characters` …"""
    asked = load(settings, files["questions"], files.get("labels"))
    examples = load(settings, files["examples"], files.get("example_labels")) if "examples" in files else None
    questions = asked[: conditions.max_questions]
    pool = asked if examples is None else examples
    befores = [
        _before(settings, pool, place, conditions.seed, itself=examples is None) for place in range(len(questions))
    ]
    requests = [
        request for question, before in zip(questions, befores, strict=True) for request in question.requests(before)
    ]
    alone: dict[str, LikelihoodScore] = {}
    if settings.normalise == "answer_context":
        texts = list(dict.fromkeys(request.continuation for request in requests))
        scores = scorer.likelihoods(
            [Likelihood(settings.answer_context, text) for text in texts], description="answers"
        )
        alone = dict(zip(texts, scores, strict=True))
    answers = iter(scorer.likelihoods(requests, description="questions"))
    right: dict[str, list[bool]] = {}
    items = []
    for question, before in zip(questions, befores, strict=True):
        scores = [next(answers) for _ in question.continuations]
        chosen = choose(question, scores, alone)
        for name, choice in chosen.items():
            right.setdefault(name, []).append(choice == question.gold)
        items.append(_item(question, before, scores, chosen[settings.normalise]))
    metrics = {"accuracy": share(right[settings.normalise])}
    metrics |= {f"accuracy_{name}": share(outcomes) for name, outcomes in right.items()}
    return TaskResult(metrics, items)


def choose(question: Asked, scores: list[LikelihoodScore], alone: dict[str, LikelihoodScore]) -> dict[str, int]:
    """The choice by each normalisation; the first of equals."""
    by_name = {
        "none": [s.log_probability for s in scores],
        "characters": [s.log_probability / max(1, len(c)) for s, c in zip(scores, question.choices, strict=True)],
        "tokens": [s.log_probability / max(1, s.tokens) for s in scores],
    }
    if alone:
        by_name["answer_context"] = [
            s.log_probability - alone[text].log_probability
            for s, text in zip(scores, question.continuations, strict=True)
        ]
    return {name: max(range(len(values)), key=values.__getitem__) for name, values in by_name.items()}


def _item(question: Asked, before: str, scores: list[LikelihoodScore], answer: int) -> dict[str, Any]:
    return {
        "question": question.place,
        "prompts": [before + context for context in question.contexts],
        "choices": question.choices,
        "log_probabilities": [s.log_probability for s in scores],
        "gold": question.gold,
        "answer": answer,
        "right": answer == question.gold,
    }


def _before(settings: Settings, pool: list[Asked], place: int, seed: int, *, itself: bool) -> str:
    """What stands before a question: preamble and examples."""
    places = draw(len(pool), settings.shots, seed=seed, question=place, excluded=place if itself else None)
    return settings.preamble + "".join(pool[example].solved() + settings.separator for example in places)


def load(settings: Settings, path: Path, labels: Path | None = None) -> list[Asked]:
    """The questions of a file. Raises DataError naming line and field."""
    records = read_questions(path)
    if labels is not None and "label" not in records[0]:
        records = _labelled(records, read_questions(labels), path, labels)
    form = _format(settings, records[0])
    records = [single for record in records for single in _singles(record, form)]
    return [_asked(settings, form, record) for record in records]


def _labelled(records: list[Question], labels: list[Question], path: Path, labels_path: Path) -> list[Question]:
    if len(labels) != len(records):
        raise DataError(f"{labels_path}: {len(labels)} labels for the {len(records)} questions of {path}")
    return [
        Question({**record, "label": label.text("label")}, record.place, label_place=label.place)
        for record, label in zip(records, labels, strict=True)
    ]


def _format(settings: Settings, record: Question) -> Format:
    """The first format whose fields the record has."""
    for form in settings.formats.values():
        if record.has(*form_fields(form)):
            return form
    labelled = Question({**record, "label": ""}, record.place)
    if any(form.gold == "label" and labelled.has(*form_fields(form)) for form in settings.formats.values()):
        raise DataError(
            f"{record.place}: there is no field label, and no file of labels at the places of the task's description: "
            "put it there, or say task_files.TASK.labels=FILE"
        )
    wanted = "; or ".join(f"{name}: {', '.join(form_fields(form))}" for name, form in settings.formats.items())
    raise DataError(f"{record.place}: of no known format (its fields are {', '.join(record)}; known are {wanted})")


def form_fields(form: Format) -> list[str]:
    """The fields that a format speaks of."""
    templates = [form.context, *(form.choices if isinstance(form.choices, list) else [])]
    found = [name for template in templates for name in re.findall(r"\{([A-Za-z_][\w.]*)(?::\w+)?\}", template)]
    paths = [form.gold, form.contexts, *([form.choices] if isinstance(form.choices, str) else [])]
    if isinstance(form.gold_names, str):
        paths.append(form.gold_names)
    return list(dict.fromkeys([*found, *filter(None, paths), *form.each]))


def _singles(record: Question, form: Format) -> list[Question]:
    """A record for each question in it."""
    if not form.each:
        return [record]
    lists = {name: record.field(name) for name in form.each}
    if any(not isinstance(entries, list) for entries in lists.values()) or len(set(map(len, lists.values()))) != 1:
        raise DataError(f"{record.place}: {', '.join(form.each)} are not lists of one length")
    count = len(next(iter(lists.values())))
    return [
        Question(
            {**record, **{name: entries[n] for name, entries in lists.items()}}, f"{record.place}, question {n + 1}"
        )
        for n in range(count)
    ]


def _asked(settings: Settings, form: Format, record: Question) -> Asked:
    if isinstance(form.choices, str):
        choices = record.texts(form.choices)
    else:
        choices = [record.fill(template) for template in form.choices]
    choices = [_clean(settings, choice) for choice in choices]
    if form.contexts:
        contexts = [_clean(settings, context) for context in record.texts(form.contexts)]
        continuations = [settings.delimiter + choices[0]] * len(contexts)
        return Asked(contexts, continuations, contexts, _gold(form, record, len(contexts)), record.place)
    gold = _gold(form, record, len(choices))
    context = _clean(settings, record.fill(form.context))
    if not settings.blank:
        return Asked([context], [settings.delimiter + choice for choice in choices], choices, gold, record.place)
    if context.count(settings.blank) != 1:
        raise DataError(f"{record.place}: there is not one blank {settings.blank!r} in {context!r}")
    start, rest = context.split(settings.blank)
    continuation = settings.delimiter + rest.strip()
    return Asked([start + choice for choice in choices], [continuation] * len(choices), choices, gold, record.place)


def _gold(form: Format, record: Question, choices: int) -> int:
    value = record.field(form.gold)
    value = str(int(value) if isinstance(value, bool) else value).strip()
    if isinstance(form.gold_names, str):
        names = record.texts(form.gold_names)
    else:
        names = form.gold_names or [str(number) for number in range(form.gold_first, form.gold_first + choices)]
    if value not in names[:choices]:
        wanted = ", ".join(names[:choices])
        place = record.label_place if form.gold == "label" else record.place
        raise DataError(f"{place}: field {form.gold} is {value!r}, and must be one of {wanted}")
    return names.index(value)


def _clean(settings: Settings, text: str) -> str:
    if settings.clean:
        text = text.strip()
    for expression, replacement in settings.clean:
        text = re.sub(expression, replacement, text)
    return text


KIND = Kind(Settings, score, check)
