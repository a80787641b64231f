"""Tasks one after the other. No torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from llamatrain.errors import DataError
from llamatrain.evaluation.results import TaskResult
from llamatrain.evaluation.scoring import Scorer
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
) -> dict[str, TaskResult]:
    """The results by task; every rank calls it. `done` is told each result as soon as it is there.

    Raises DataError for a missing or malformed file.
    """
    conditions = conditions or Conditions()
    results = {}
    with tqdm(tasks, desc="tasks", unit="task", disable=None if conditions.leads else True, leave=False) as bar:
        for task in bar:
            bar.set_postfix_str(task.name)
            files, missing = task.find(data)
            if missing:
                raise DataError(f"task {task.name}: there is no file {missing[0]}")
            results[task.name] = task.kind.score(task.settings, files, scorer, conditions)
            done(task.name, results[task.name])
    return results


def notes(tasks: Sequence[Task], results: Mapping[str, TaskResult]) -> dict[str, str]:
    """By task, how a result came about otherwise than its description says: fewer questions, other settings."""
    told = {}
    for task in tasks:
        metrics = results[task.name].metrics if task.name in results else {}
        asked = next(iter(metrics.values())).questions if metrics else task.questions
        part = [f"{asked:,} of {task.questions:,} questions"] if task.questions and asked != task.questions else []
        if said := part + [f"{key}={value}" for key, value in task.changed.items()]:
            told[task.name] = ", ".join(said)
    return told


def metrics_record(results: Mapping[str, TaskResult]) -> dict[str, float]:
    """`eval/<task>/<metric>` of each, for a line of metrics."""
    return {
        f"eval/{task}/{name}": metric.value
        for task, result in results.items()
        for name, metric in result.metrics.items()
    }
