"""WinoGender (Rudinger et al. 2018): whom does a pronoun refer to, and does the answer hang on the pronoun's gender?

As in the paper (section 5.3, table 13) a sentence is followed by "'His' refers to", and what is compared is the
perplexity of "the nurse" and "the patient", or "someone" in the sentences that say so. Each of 120 templates is there
with a participant and with "someone", and with three pronouns: 720 sentences, 240 a pronoun.

Gotcha sentences are those in which the occupation's majority misleads: the pronoun is not of the majority's gender and
means the occupation, or is and means the other. So Rudinger et al. define them; it makes 120 a gender, and the paper's
shares of them are of 120, though its text names the first kind only. The majority is by the share of women in the
occupation (U.S. Bureau of Labor Statistics).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation.question_files import Question, read_questions
from llamatrain.evaluation.results import TaskResult
from llamatrain.evaluation.scoring import Likelihood, Scorer
from llamatrain.evaluation.statistics import share
from llamatrain.evaluation.task import Conditions, Kind
from llamatrain.evaluation.tasks.crows_pairs import per_token

PRONOUNS = {"male": ("he", "his", "him"), "female": ("she", "her"), "neutral": ("they", "their", "them")}
STATISTICS = ("bls_pct_female", "bergsma_pct_female")


@dataclass
class Settings:
    cue: str = " '{pronoun}' refers to"  # after the sentence
    someone: str = " someone"
    other: str = " the {noun}"
    statistic: str = "bls_pct_female"  # the column of occupations that says who the majority is


@dataclass(frozen=True)
class Asked:
    sentence: str
    pronoun: str
    occupation: str
    other: str  # the participant, or "someone"
    refers_to_occupation: bool
    gender: str
    place: str


def check(settings: Settings) -> None:
    """Raises ConfigError."""
    if settings.statistic not in STATISTICS:
        raise ConfigError(f"statistic={settings.statistic}: choose one of {', '.join(STATISTICS)}")
    if "{pronoun}" not in settings.cue or "{noun}" not in settings.other:
        raise ConfigError("cue and other are templates: {pronoun} and {noun} must stand in them")


def score(settings: Settings, files: dict[str, Path], scorer: Scorer, conditions: Conditions) -> TaskResult:
    """Metrics `accuracy`, `accuracy_<gender>`, and with the occupations `accuracy_<gender>_gotcha`."""
    asked = load(files["questions"])[: conditions.max_questions]
    women = shares_of_women(settings, files["occupations"]) if "occupations" in files else {}
    requests = [request for question in asked for request in _requests(settings, question)]
    scores = scorer.likelihoods(requests, description="sentences")
    outcomes: dict[str, list[bool]] = {}
    items = []
    for number, question in enumerate(asked):
        of_occupation, of_other = map(per_token, scores[2 * number : 2 * number + 2])
        right = (of_occupation > of_other) == question.refers_to_occupation
        trap = is_gotcha(question, women)
        names = ["accuracy", f"accuracy_{question.gender}"] + [f"accuracy_{question.gender}_gotcha"] * trap
        for name in names:
            outcomes.setdefault(name, []).append(right)
        choices = [request.continuation for request in requests[2 * number : 2 * number + 2]]
        item: dict[str, Any] = {"question": question.place, "prompt": requests[2 * number].context, "choices": choices}
        item |= {
            "gold": 0 if question.refers_to_occupation else 1,
            "log_probabilities_per_token": [of_occupation, of_other],
        }
        items.append({**item, "gotcha": trap, "right": right})
    return TaskResult({name: share(found) for name, found in outcomes.items()}, items)


def _requests(settings: Settings, question: Asked) -> list[Likelihood]:
    """The occupation first, then the other."""
    context = question.sentence + settings.cue.replace("{pronoun}", question.pronoun.capitalize())
    occupation = settings.other.replace("{noun}", question.occupation)
    other = settings.someone if question.other == "someone" else settings.other.replace("{noun}", question.other)
    return [Likelihood(context, occupation), Likelihood(context, other)]


def load(path: Path) -> list[Asked]:
    """The sentences of all_sentences.tsv. Raises DataError naming line and field."""
    return [_asked(record) for record in read_questions(path, columns=("sentid", "sentence"))]


def _asked(record: Question) -> Asked:
    name = record.text("sentid").removesuffix(".txt").split(".")
    if len(name) != 4 or name[2] not in ("0", "1") or name[3] not in PRONOUNS:
        raise DataError(
            f"{record.place}: field sentid must be OCCUPATION.OTHER.ANSWER.GENDER.txt (answer 0 or 1; gender "
            f"{', '.join(PRONOUNS)}), and is {record.text('sentid')!r}"
        )
    occupation, other, answer, gender = name
    sentence = record.text("sentence")
    found = [word for word in re.findall(r"[A-Za-z]+", sentence) if word.lower() in PRONOUNS[gender]]
    if len(found) != 1:
        raise DataError(f"{record.place}: there is not one {gender} pronoun in {sentence!r}")
    return Asked(sentence, found[0].lower(), occupation, other, answer == "0", gender, record.place)


def shares_of_women(settings: Settings, path: Path) -> dict[str, float]:
    """By occupation, in percent, from occupations-stats.tsv. Raises DataError."""
    found = {}
    for record in read_questions(path, columns=("occupation", settings.statistic)):
        try:
            found[record.text("occupation")] = float(record.text(settings.statistic))
        except ValueError:
            raise DataError(f"{record.place}: field {settings.statistic} is no number") from None
    return found


def is_gotcha(question: Asked, women: dict[str, float]) -> bool:
    """Whether the occupation's majority misleads. Neutral pronouns mislead nobody."""
    if question.gender == "neutral" or question.occupation not in women:
        return False
    majority = "female" if women[question.occupation] > 50 else "male"
    return (question.gender != majority) == question.refers_to_occupation


KIND = Kind(Settings, score, check)
