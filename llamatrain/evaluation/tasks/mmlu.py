"""MMLU (Hendrycks et al. 2020): four choices as letters, five examples of the same subject before the question.

Prompt and averages are those of the authors: "The following are multiple choice questions (with answers) about
<subject>.", the letter's likelihood after "Answer:", shares over all questions of a group of subjects and over all
questions. So are the paper's (table 9): its averages are those of its groups, each weighted by its questions.
"""

from dataclasses import dataclass
from pathlib import Path

from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation.question_files import Question, read_tables
from llamatrain.evaluation.results import TaskResult
from llamatrain.evaluation.scoring import Likelihood, Scorer
from llamatrain.evaluation.statistics import share
from llamatrain.evaluation.task import Conditions, Kind

LETTERS = "ABCD"
COLUMNS = ("question", *LETTERS, "answer")

GROUPS = {
    "stem": """abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""",
    "social_sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "other": """anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management
        marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
}
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects.split()}


@dataclass
class Settings:
    shots: int = 5
    split: str = "test"
    examples_split: str = "dev"
    per_subject: bool = True  # a metric for each subject too


def check(settings: Settings) -> None:
    """Raises ConfigError."""
    if settings.shots < 0:
        raise ConfigError(f"shots={settings.shots}: must not be negative")


def score(settings: Settings, files: dict[str, Path], scorer: Scorer, conditions: Conditions) -> TaskResult:
    """Metrics `accuracy`, `humanities`, `stem`, `social_sciences`, `other`, and `subject.<name>`."""
    tables = read_tables(files["questions"], columns=COLUMNS)
    subjects = of_split(tables, settings.split)
    examples = of_split(tables, settings.examples_split)
    if not subjects:
        raise DataError(f"{files['questions']}: there is no table <subject>_{settings.split}.csv in it")
    requests, golds, places = [], [], []
    for subject, questions in subjects.items():
        before = header(subject) + "".join(
            solved(q) for q in _examples(settings, examples, subject, files["questions"])
        )
        for question in questions[: conditions.max_questions]:
            prompt = before + unsolved(question)
            requests += [Likelihood(prompt, f" {letter}") for letter in LETTERS]
            golds.append(LETTERS.index(_letter(question)))
            places.append((subject, question.place))
    scores = scorer.likelihoods(requests, description="questions")
    outcomes: dict[str, list[bool]] = {"accuracy": [], **{group: [] for group in GROUPS}}
    items = []
    for number, (gold, (subject, place)) in enumerate(zip(golds, places, strict=True)):
        values = [answer.log_probability for answer in scores[number * len(LETTERS) : (number + 1) * len(LETTERS)]]
        answer = max(range(len(LETTERS)), key=values.__getitem__)
        for name in (
            "accuracy",
            GROUP_OF.get(subject, "other"),
            *([f"subject.{subject}"] if settings.per_subject else []),
        ):
            outcomes.setdefault(name, []).append(answer == gold)
        prompt = requests[number * len(LETTERS)].context
        item = {"question": place, "subject": subject, "prompt": prompt, "log_probabilities": values}
        items.append({**item, "gold": LETTERS[gold], "answer": LETTERS[answer], "right": answer == gold})
    return TaskResult({name: share(found) for name, found in outcomes.items() if found}, items)


def of_split(tables: dict[str, list[Question]], split: str) -> dict[str, list[Question]]:
    """The tables of a split by subject, in the subjects' order: `test/abstract_algebra_test`, or the hub's `test`."""
    found: dict[str, list[Question]] = {}
    for path, table in tables.items():
        name = Path(path).name
        if name.endswith(f"_{split}"):
            found[name.removesuffix(f"_{split}")] = table
        elif name == split:
            for question in table:
                found.setdefault(question.text("subject"), []).append(_of_hub(question))
    return dict(sorted(found.items()))


def _of_hub(question: Question) -> Question:
    """A record {question, subject, choices, answer: 0 to 3} as the authors' tables have it."""
    choices, answer = question.texts("choices"), question.field("answer")
    if len(choices) != len(LETTERS) or answer not in range(len(LETTERS)):
        raise DataError(
            f"{question.place}: {len(choices)} choices and the answer {answer!r}, where four and 0 to 3 must be"
        )
    named = dict(zip(LETTERS, choices, strict=True))
    return Question({"question": question.text("question"), **named, "answer": LETTERS[answer]}, question.place)


def _examples(settings: Settings, examples: dict[str, list[Question]], subject: str, path: Path) -> list[Question]:
    found = examples.get(subject, [])
    if len(found) < settings.shots:
        wanted = f"{subject}_{settings.examples_split}.csv"
        raise DataError(f"{path}: shots={settings.shots}, and {wanted} has {len(found)} examples; lower shots")
    return found[: settings.shots]


def header(subject: str) -> str:
    """Before the examples."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def unsolved(question: Question) -> str:
    """A question up to its answer."""
    choices = "".join(f"\n{letter}. {question.text(letter)}" for letter in LETTERS)
    return f"{question.text('question')}{choices}\nAnswer:"


def solved(question: Question) -> str:
    return f"{unsolved(question)} {_letter(question)}\n\n"


def _letter(question: Question) -> str:
    letter = question.text("answer").strip()
    if letter not in LETTERS or len(letter) != 1:
        raise DataError(f"{question.place}: field answer is {letter!r}, and must be one of {', '.join(LETTERS)}")
    return letter


KIND = Kind(Settings, score, check)
