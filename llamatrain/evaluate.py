"""How good a checkpoint is: the benchmarks of the paper, perplexity, and tasks of one's own, from local files.

python -m llamatrain.evaluate checkpoint=RUN_OR_STEP_DIRECTORY suite=llama_paper data=DIRECTORY
python -m llamatrain.evaluate checkpoint=… data=… tasks=[boolq,piqa] max_questions=200
python -m llamatrain.evaluate checkpoint=… data=… tasks=[triviaqa] shots=5
torchrun --nproc-per-node=8 -m llamatrain.evaluate checkpoint=… …

Results are written to RUN/evaluations/step-…/NAME.json, every question's to NAME.items.jsonl beside it.
docs/evaluation.md describes the tasks and where their files lie.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamatrain.cli import run_command
from llamatrain.config.evaluate import EvaluateConfig, check_evaluate
from llamatrain.errors import ConfigError, DataError
from llamatrain.version import VERSION

if TYPE_CHECKING:
    from llamatrain.evaluation.results import TaskResult
    from llamatrain.evaluation.task import Conditions, Task
    from llamatrain.scorer import Opened

SHORT_NAME = 60  # characters of a file's name made of tasks
SHORT_HASH = 8  # of them, where there are more, are of its SHA-256


def run(settings: EvaluateConfig) -> None:
    """Evaluate, write the results, print them."""
    check_evaluate(settings)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("llamatrain").setLevel(logging.INFO)
    from llamatrain.checkpoint.commit import find_checkpoint
    from llamatrain.evaluation.catalogue import load_suite, load_tasks
    from llamatrain.evaluation.result_files import results_content
    from llamatrain.evaluation.runner import available, look_through
    from llamatrain.evaluation.tables import choose, paper_table, plain_table, table_content
    from llamatrain.evaluation.task import Conditions
    from llamatrain.process import this_process

    suite = load_suite(settings.suite) if settings.suite else None
    tables = choose(suite.tables if suite else [])
    tasks = load_tasks(
        settings.tasks or (suite.tasks if suite else []),
        settings=settings.task_settings,
        files=settings.task_files,
        shots=settings.shots,
    )
    conditions = Conditions(
        max_questions=settings.max_questions,
        seed=settings.seed,
        allow_code_execution=settings.allow_code_execution,
        leads=this_process().leads,
    )
    data = Path(settings.data or ".")
    if tasks and not data.is_dir():
        raise DataError(f"data={data}: there is no such directory")
    runnable = list(tasks)
    skipped: dict[str, str] = {}
    if conditions.leads:
        runnable, skipped = available(tasks, data, conditions)
        if skipped and (settings.strict or not (runnable or settings.harness)):
            raise DataError("; ".join(f"{task}: {reason}" for task, reason in skipped.items()))
        for task, reason in skipped.items():
            print(f"not run: {task} ({reason})", file=sys.stderr)
        for one in runnable:
            if one.other_shots:
                print(f"{one.name}: {one.other_shots}", file=sys.stderr)
        find_checkpoint(Path(str(settings.checkpoint)))  # what is wrong is said before the model is loaded
        look_through(runnable, data, conditions)
    facts, results = evaluate(settings, runnable, data, conditions)
    if not conditions.leads:
        return
    told = {task: result.note for task, result in results.items() if result.note}
    shown = {name: table for name, table in tables.items() if set(table.tasks()) & {task.name for task in tasks}}
    if settings.format == "json":
        content = results_content(results, {**facts, "skipped": skipped})
        content["tables"] = {name: table_content(table, results) for name, table in shown.items()}
        print(json.dumps(content, indent=1, ensure_ascii=False))
        return
    for table in shown.values():
        print(paper_table(table, results, skipped, model=facts["label"], notes=told))
    named = {task for table in shown.values() for task in table.tasks()}
    elsewhere = ({task: said for task, said in about.items() if task not in named} for about in (skipped, told))
    print(plain_table(results, *elsewhere))


def evaluate(
    settings: EvaluateConfig, tasks: "Sequence[Task]", data: Path, conditions: "Conditions"
) -> "tuple[dict[str, Any], dict[str, TaskResult]]":
    """Facts of the evaluation, and the results of the tasks (those that rank 0 names), on disk when this returns.

    They are written after each task too: with resume=true, a call that was broken off goes on from there.
    """
    from llamatrain.evaluation.result_files import take_over, write_results
    from llamatrain.evaluation.runner import run_tasks
    from llamatrain.scorer import open_scorer

    assert settings.checkpoint is not None  # checked
    with open_scorer(
        settings.checkpoint,
        device=settings.device,
        precision=settings.precision,
        tp=settings.tp,
        dp_shard=settings.dp_shard,
        max_batch_tokens=settings.max_batch_tokens,
    ) as opened:
        named = opened.world.decide(lambda: [task.name for task in tasks])
        tasks = [task for task in tasks if task.name in named]
        facts = opened.world.decide(lambda: _facts(settings, tasks, data, opened))
        run_directory = opened.checkpoint.parent.parent
        folder = Path(settings.output) if settings.output else run_directory / "evaluations" / opened.checkpoint.name
        name = settings.name or _name(settings, tasks)
        earlier, facts = opened.world.decide(
            lambda: take_over(folder, name, facts, resume=settings.resume, overwrite=settings.overwrite)
        )
        results = dict(earlier)  # those asked again stay until they are there anew
        if earlier and settings.resume and conditions.leads:
            print(f"taken over from {folder / name}.json: {', '.join(earlier)}", file=sys.stderr)

        def keep(task: str, result: "TaskResult") -> None:
            results[task] = result
            if conditions.leads:
                write_results(folder, name, results, facts)

        if settings.harness:  # first, as it may not be installed
            for task, result in _of_harness(settings, opened.scorer).items():
                keep(task, result)
        left = [task for task in tasks if not (settings.resume and task.name in earlier)]
        try:
            run_tasks(left, opened.scorer, data=data, conditions=conditions, done=keep)
        except KeyboardInterrupt:
            if results and conditions.leads:
                print(f"{folder / name}.json has {', '.join(results)}; resume=true goes on from there", file=sys.stderr)
            raise
        if conditions.leads:
            print(f"results: {folder / name}.json", file=sys.stderr)
    return facts, {task: results[task] for task in [*named, *(other for other in results if other not in named)]}


def _facts(settings: EvaluateConfig, tasks: "Sequence[Task]", data: Path, opened: "Opened") -> dict[str, Any]:
    """What the results are made of."""
    from llamatrain.checkpoint.commit import manifest_hash
    from llamatrain.evaluation.result_files import HARNESS, files_of

    harness = {f"{HARNESS}{task}": {"shots": settings.shots} for task in settings.harness}
    return {
        "step": opened.step,
        "tokens": opened.tokens,
        "checkpoint": str(opened.checkpoint),
        "checkpoint_sha256": manifest_hash(opened.checkpoint),
        "label": settings.label or f"{opened.checkpoint.parent.parent.name}, step {opened.step:,}",
        "versions": _versions(),
        "device": str(opened.scorer.device),
        "precision": settings.precision,
        "seed": settings.seed,
        "max_questions": settings.max_questions,
        "settings": {**{task.name: asdict(task.settings) for task in tasks}, **harness},
        "files": {**files_of(tasks, data), **{task: {} for task in harness}},
    }


def _of_harness(settings: EvaluateConfig, scorer: Any) -> "dict[str, TaskResult]":
    """Results of lm-evaluation-harness's tasks, called `harness.<task>`."""
    from llamatrain.evaluation.harness import run_harness
    from llamatrain.evaluation.results import Metric, TaskResult

    shots = settings.shots
    if isinstance(shots, list):
        raise ConfigError(f"shots={shots}: the harness takes one number")
    found = run_harness(
        settings.harness,
        scorer,
        include_path=settings.harness_tasks,
        max_questions=settings.max_questions,
        shots=shots,
        seed=settings.seed,
    )
    return {
        f"harness.{task}": TaskResult({name: Metric(**values) for name, values in metrics.items()})
        for task, metrics in found.items()
    }


def _name(settings: EvaluateConfig, tasks: "Sequence[Task]") -> str:
    """Of the results' files."""
    if settings.suite:
        return Path(settings.suite).stem
    name = "_".join([*(task.name for task in tasks), *(f"harness.{Path(task).stem}" for task in settings.harness)])
    if len(name) <= SHORT_NAME:
        return name
    return f"{name[: SHORT_NAME - SHORT_HASH - 1]}-{sha256(name.encode()).hexdigest()[:SHORT_HASH]}"


def _versions() -> dict[str, str]:
    import torch

    return {"llamatrain": VERSION, "torch": torch.__version__}


def main() -> None:
    run_command(EvaluateConfig, "commands/evaluate", run, help_text=__doc__)


if __name__ == "__main__":
    main()
