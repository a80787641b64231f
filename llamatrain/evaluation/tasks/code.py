"""Programs from descriptions (HumanEval, MBPP): a program is right if it passes its tests, which are run in a sandbox.

pass@k is the chance that at least one of k programs passes. Of n drawn, c passed; the estimator without bias is
1 - C(n-c, k) / C(n, k) (Chen et al. 2021, equation 1), which the paper uses: pass@1 at temperature 0.1, pass@100 and
pass@80 at 0.8.

HumanEval's prompt is the function's head; its example tests stand in the docstring. MBPP's is that of its authors
(Austin et al. 2021): the task, its tests, and three solved tasks before it.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation import sandbox
from llamatrain.evaluation.question_files import Question, read_questions
from llamatrain.evaluation.results import Metric, TaskResult
from llamatrain.evaluation.sandbox import Limits, Sandboxes, Verdict
from llamatrain.evaluation.scoring import Generation, Scorer, cut
from llamatrain.evaluation.statistics import wilson_interval
from llamatrain.evaluation.task import Conditions, Kind

FORMATS = ("humaneval", "mbpp")


@dataclass
class Sampling:
    """Programs drawn for each task, and the k of pass@k that are estimated from them."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    k: list[int] = field(default_factory=lambda: [1])


@dataclass
class Settings:
    format: str = "humaneval"  # humaneval | mbpp
    sampling: dict[str, Sampling] = field(default_factory=lambda: {"greedy": Sampling()})
    stop: list[str] = field(default_factory=list)
    max_new_tokens: int = 512
    shots: int = 0
    examples: list[int] = field(default_factory=list)  # task_id of the solved tasks, in their order
    first: int = 0  # task_id of the first and
    last: int = 10**9  # the last task that is asked, where records have numbers
    preamble: str = ""
    prompt: str = "{prompt}"  # template: {prompt}, {tests}
    solved: str = "{code}"  # of an example, after its prompt
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Asked:
    description: str
    before: str  # the program's beginning, which the model goes on with (HumanEval)
    setup: str  # what stands before the tests' subject (MBPP's imports)
    tests: str
    solution: str
    number: int | None
    place: str

    def program(self, written: str) -> str:
        """What is run: it comes to its end only if all tests pass."""
        return "\n".join(part for part in (self.setup, self.before + written, self.tests) if part) + "\n"


def check(settings: Settings) -> None:
    """Raises ConfigError."""
    if settings.format not in FORMATS:
        raise ConfigError(f"format={settings.format}: choose one of {', '.join(FORMATS)}")
    if not settings.sampling:
        raise ConfigError("sampling: say how programs are drawn, like sampling.greedy.samples=1")
    seen: dict[int, str] = {}
    for name, drawn in settings.sampling.items():
        if not drawn.k or min(drawn.k) < 1 or max(drawn.k) > drawn.samples:
            raise ConfigError(
                f"sampling.{name}.k={drawn.k}: each must be from 1 to sampling.{name}.samples={drawn.samples}"
            )
        if drawn.temperature < 0 or not 0 < drawn.top_p <= 1:
            raise ConfigError(f"sampling.{name}: temperature must not be negative, and top_p lie above 0 and up to 1")
        for k in drawn.k:
            if k in seen:
                raise ConfigError(f"sampling.{name}.k={drawn.k}: pass@{k} comes from sampling.{seen[k]} already")
            seen[k] = name
    if settings.shots > len(settings.examples) or settings.shots < 0:
        raise ConfigError(f"shots={settings.shots}: must be from 0 to {len(settings.examples)}, the number of examples")


def refusal(settings: Settings, conditions: Conditions) -> str | None:
    """Why it is not run here, or None."""
    if not conditions.allow_code_execution:
        return "it runs programs that the model has written; if that is wanted, say allow_code_execution=true"
    return sandbox.refusal()


def score(settings: Settings, files: dict[str, Path], scorer: Scorer, conditions: Conditions) -> TaskResult:
    """Metrics `pass@<k>`. Only the leading rank runs programs; elsewhere none has passed.

    Raises ConfigError without conditions.allow_code_execution, and where no sandbox can be made.
    """
    if not conditions.allow_code_execution:
        raise ConfigError(str(refusal(settings, conditions)))
    tasks = load(settings, files["questions"])
    examples = load(settings, files["examples"]) if "examples" in files else tasks
    head = settings.preamble + "".join(_solved(settings, examples, n) for n in settings.examples[: settings.shots])
    asked = [task for task in tasks if task.number is None or settings.first <= task.number <= settings.last]
    asked = asked[: conditions.max_questions]
    if not asked:
        raise DataError(f"{files['questions']}: no task has a task_id from {settings.first} to {settings.last}")
    prompts = [head + _prompt(settings, task) for task in asked]
    metrics: dict[str, Metric] = {}
    items = []
    written = [_write(settings, drawn, prompts, scorer, conditions) for drawn in settings.sampling.values()]
    every = [of_task for of_sampling in written for of_task in of_sampling]
    judged = judge(settings, asked * len(written), every) if conditions.leads else _none_passed(every)
    for number, (name, drawn) in enumerate(settings.sampling.items()):
        verdicts = judged[number * len(asked) : (number + 1) * len(asked)]
        passed = [[verdict.passed for verdict in of_task] for of_task in verdicts]
        metrics |= {f"pass@{k}": estimate(passed, k) for k in drawn.k}
        for task, prompt, texts, found in zip(asked, prompts, written[number], verdicts, strict=True):
            items.append(_item(task, prompt, name, drawn, texts, found))
    return TaskResult(metrics, items)


def _write(
    settings: Settings, drawn: Sampling, prompts: list[str], scorer: Scorer, conditions: Conditions
) -> list[list[str]]:
    """The programs of each task, cut where they end."""
    requests = [
        Generation(prompt, settings.max_new_tokens, tuple(settings.stop), drawn.temperature, drawn.top_p, drawn.samples)
        for prompt in prompts
    ]
    texts = scorer.generations(requests, seed=conditions.seed, description=f"programs, temperature {drawn.temperature}")
    return [[cut(text, settings.stop) for text in of_task] for of_task in texts]


def judge(settings: Settings, asked: list[Asked], written: list[list[str]]) -> list[list[Verdict]]:
    """Run all; each different program once."""
    programs = [[task.program(text) for text in texts] for task, texts in zip(asked, written, strict=True)]
    different = list(dict.fromkeys(program for of_task in programs for program in of_task))
    with Sandboxes(settings.limits) as sandboxes:
        verdicts = dict(zip(different, sandboxes.run_all(different), strict=True))
    return [[verdicts[program] for program in of_task] for of_task in programs]


def _none_passed(written: list[list[str]]) -> list[list[Verdict]]:
    nothing = Verdict(passed=False, reason="not run on this rank", limit=None, output="", seconds=0.0)
    return [[nothing] * len(texts) for texts in written]


def pass_at_k(drawn: int, passed: int, k: int) -> float:
    """1 - C(drawn - passed, k) / C(drawn, k), as a product that stays small."""
    if drawn - passed < k:
        return 1.0
    none_passes = 1.0
    for n in range(drawn - passed + 1, drawn + 1):
        none_passes *= 1.0 - k / n
    return 1.0 - none_passes


def estimate(passed: list[list[bool]], k: int) -> Metric:
    """pass@k over some tasks: the mean of its estimates.

    The interval is Wilson's, as for shares: estimates within 0 and 1 vary no more than zeros and ones of that mean do.
    """
    estimates = [pass_at_k(len(of_task), sum(of_task), k) for of_task in passed]
    low, high = wilson_interval(math.fsum(estimates), len(estimates))
    return Metric(math.fsum(estimates) / len(estimates), low, high, len(estimates))


def load(settings: Settings, path: Path) -> list[Asked]:
    """The tasks of a file. Raises DataError naming line and field."""
    read = _human_eval if settings.format == "humaneval" else _mbpp
    return [read(record) for record in read_questions(path)]


def _human_eval(record: Question) -> Asked:
    prompt = record.text("prompt")
    return Asked(
        description=prompt,
        before=prompt,
        setup="",
        tests=f"{record.text('test')}\ncheck({record.text('entry_point')})",
        solution=record.text("canonical_solution"),
        number=None,
        place=record.place,
    )


def _mbpp(record: Question) -> Asked:
    """The whole set (text, test_setup_code) or the sanitized one (prompt, test_imports)."""
    number = record.field("task_id")
    if isinstance(number, bool) or not isinstance(number, int):
        raise DataError(f"{record.place}: field task_id is {number!r}, and must be a number")
    setup = record.text("test_setup_code") if record.has("test_setup_code") else ""
    if record.has("test_imports"):
        setup = "\n".join(map(str, record.field("test_imports")))
    return Asked(
        description=record.text("text" if record.has("text") else "prompt"),
        before="",
        setup=setup,
        tests="\n".join(record.texts("test_list")),
        solution=record.text("code").replace("\r\n", "\n"),
        number=number,
        place=record.place,
    )


def _prompt(settings: Settings, task: Asked) -> str:
    return settings.prompt.replace("{tests}", task.tests).replace("{prompt}", task.description)


def _solved(settings: Settings, examples: list[Asked], number: int) -> str:
    found = next((task for task in examples if task.number == number), None)
    if found is None:
        raise DataError(
            f"{examples[0].place}: there is no task_id {number} for an example; see settings examples, shots"
        )
    return _prompt(settings, found) + settings.solved.replace("{code}", found.solution)


def _item(
    task: Asked, prompt: str, name: str, drawn: Sampling, texts: list[str], verdicts: list[Verdict]
) -> dict[str, Any]:
    return {
        "question": task.place,
        "sampling": name,
        "temperature": drawn.temperature,
        "prompt": prompt,
        "passed": sum(verdict.passed for verdict in verdicts),
        "programs": [
            {"written": text, "verdict": verdict.reason} for text, verdict in zip(texts, verdicts, strict=True)
        ],
    }


KIND = Kind(Settings, score, check, refusal)
