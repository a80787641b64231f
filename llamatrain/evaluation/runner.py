"""Tasks one after the other. No torch."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation.results import TaskResult
from llamatrain.evaluation.scoring import NotFinite, Scorer
from llamatrain.evaluation.task import Conditions, Task

NO_FILE = "no file"


def available(tasks: Sequence[Task], data: Path, conditions: Conditions) -> tuple[list[Task], dict[str, str]]:
    """The tasks that can be run, and why not the others: "no file: PATH", or what the kind says."""
    runnable, skipped = [], {}
    for task in tasks:
        _, missing = task.find(data)
        reason = task.kind.refusal(task.settings, conditions)
        if missing:
            skipped[task.name] = f"{NO_FILE}: {', '.join(map(str, missing))}"
        elif reason:
            skipped[task.name] = reason
        else:
            runnable.append(task)
    return runnable, skipped


def run_tasks(
    tasks: Sequence[Task],
    scorer: Scorer,
    *,
    data: Path,
    conditions: Conditions | None = None,
    done: Callable[[str, TaskResult], None] = lambda name, result: None,
    unscored: Callable[[str], None] | None = None,
) -> dict[str, TaskResult]:
    """The results by task; every rank calls it. `done` is told each result as soon as it is there.

    Raises DataError for a missing or malformed file, NotFinite for a model whose answers are no numbers; with
    `unscored`, that is told and the task left out.
    """
    conditions = conditions or Conditions()
    results = {}
    with tqdm(tasks, desc="tasks", unit="task", disable=None if conditions.leads else True, leave=False) as bar:
        for task in bar:
            bar.set_postfix_str(task.name)
            files, missing = task.find(data)
            if missing:
                raise DataError(f"task {task.name}: there is no file {missing[0]}")
            before = scorer.shortened
            try:
                results[task.name] = task.kind.score(task.settings, files, scorer, conditions)
            except NotFinite as error:
                told = f"task {task.name}: {error}"
                if unscored is None:
                    raise NotFinite(told) from None
                unscored(told)
                continue
            result = results[task.name]
            result.shortened = scorer.shortened - before
            result.note = note(task, result, max_questions=conditions.max_questions)
            done(task.name, result)
    return results


class _Asked(Exception):
    """A task has come as far as its first question."""


class _NoModel:
    """A scorer that is asked only once."""

    shortened = 0

    def likelihoods(self, requests: object, **_: object) -> NoReturn:
        raise _Asked

    def document_likelihoods(self, texts: object, **_: object) -> NoReturn:
        raise _Asked

    def generations(self, requests: object, **_: object) -> NoReturn:
        raise _Asked


def look_through(tasks: Sequence[Task], data: Path, conditions: Conditions) -> None:
    """Read the tasks' files and put their first questions, for what is wrong with them to be known without a model.

    Raises ConfigError and DataError as `run_tasks` does.
    """
    for task in tasks:
        with suppress(_Asked):
            try:
                task.kind.score(task.settings, task.find(data)[0], _NoModel(), replace(conditions, max_questions=1))
            except ConfigError as error:
                raise ConfigError(f"task {task.name}: {error}") from None


def note(task: Task, result: TaskResult, *, max_questions: int | None = None) -> str:
    """How a result came about otherwise than the task's description says: fewer questions, other settings, prompts
    that the model has no room for."""
    asked = next((metric.questions for metric in result.metrics.values()), task.questions)
    said = [f"{asked:,} of {task.questions:,} questions"] if task.questions and asked != task.questions else []
    said += [f"max_questions={max_questions}"] if max_questions and not task.questions else []
    said += [f"{key}={value}" for key, value in task.changed.items()]
    said += [task.other_shots] if task.other_shots else []
    if result.shortened:
        said.append(f"{result.shortened:,} prompts cut to the model's length")
    return ", ".join(said)


def metrics_record(results: Mapping[str, TaskResult]) -> dict[str, float]:
    """`eval/<task>/<metric>` of each, for a line of metrics."""
    return {
        f"eval/{task}/{name}": metric.value
        for task, result in results.items()
        for name, metric in result.metrics.items()
    }
