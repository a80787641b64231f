"""Tasks of lm-evaluation-harness (extra `eval`), scored by it on a model of ours.

It finds its sets on the Hugging Face hub or in its cache, or by task files of one's own in local files
(docs/evaluation.md). Code that a model wrote is not run: its tasks for that are refused by it.
"""

import contextlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation.model_scorer import ModelScorer
from llamatrain.evaluation.statistics import Z95

Found = dict[str, dict[str, dict[str, Any]]]  # by task and metric: value, low, high, questions


def run_harness(
    tasks: Sequence[str],
    scorer: ModelScorer,
    *,
    include_path: str | Path | None = None,
    max_questions: int | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> Found:
    """What the harness finds, by task and metric: value, low, high, questions; the same on all ranks.

    include_path: a directory with task files of one's own; then the harness's are not looked through, unless one of
    `tasks` is not there. A metric of a filter other than `none` is called METRIC.FILTER.
    Raises ConfigError where the harness is not installed or has no such task, DataError where its data are missing.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from llamatrain.evaluation.harness_model import HarnessModel
    except ImportError as error:
        raise ConfigError(
            f"harness={list(tasks)} needs lm-evaluation-harness ({error}): pip install 'llamatrain[eval]'"
        ) from None
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"harness_tasks={include_path}: there is no such directory")
    manager = TaskManager(include_path=str(include_path), include_defaults=False) if include_path else None
    if manager is None or any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"harness={','.join(unknown)}: lm-evaluation-harness has no such task; lm-eval ls tasks lists them"
        )
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = simple_evaluate(
                HarnessModel(scorer, seed=seed),
                tasks=list(tasks),
                num_fewshot=shots,
                limit=max_questions,
                log_samples=False,
                task_manager=manager,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                fewshot_random_seed=seed,
            )
        except (FileNotFoundError, ConnectionError) as error:
            raise DataError(f"harness={','.join(tasks)}: its data cannot be had ({error})") from None
    return scorer.world.decide(lambda: _metrics(found))


def _metrics(found: dict[str, Any]) -> Found:
    """What the harness says, in our words; without its names, versions and standard errors."""
    told: Found = {}
    for task, values in found["results"].items():
        questions = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        told[task] = {}
        for key, value in values.items():
            name, comma, method = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{method}")
            known = isinstance(error, int | float) and math.isfinite(error)
            told[task][name if method == "none" else f"{name}.{method}"] = {
                "value": float(value),
                "low": value - Z95 * error if known else None,
                "high": value + Z95 * error if known else None,
                "questions": questions,
            }
    return told
