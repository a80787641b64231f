"""Results on disk: NAME.json with every metric, NAME.items.jsonl with every question. No torch.

The JSON says what the numbers were made of: checkpoint, step and tokens, versions, seed, each task's settings, the
hashes of its files. So a later call can tell which of them it need not make again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamatrain.errors import DataError
from llamatrain.evaluation.results import Metric, TaskResult
from llamatrain.evaluation.task import Task
from llamatrain.files import sha256_of_file, sha256_of_json, write_bytes_atomically, write_json_atomically

VERSION = 1
# what must be equal to take results over, and of a task
OF_ALL = ("version", "checkpoint", "step", "versions", "device", "precision", "seed", "max_questions")
OF_A_TASK = ("settings", "files")


def files_of(tasks: Sequence[Task], data: Path) -> dict[str, dict[str, dict[str, str]]]:
    """By task and role the path and SHA-256 of its files; of a directory, that of its files' names and hashes."""
    return {
        task.name: {
            role: {"path": str(path), "sha256": _hash(path)} for role, path in sorted(task.find(data)[0].items())
        }
        for task in tasks
    }


def _hash(path: Path) -> str:
    try:
        if path.is_dir():
            found = sorted(entry for entry in path.rglob("*") if entry.is_file())
            return sha256_of_json({entry.relative_to(path).as_posix(): sha256_of_file(entry) for entry in found})
        return sha256_of_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def results_content(results: Mapping[str, TaskResult], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON form: `facts` (step, tokens, versions …), and tasks → metric → value, low, high, questions."""
    tasks = {
        task: {name: _plain(metric) for name, metric in result.metrics.items()} for task, result in results.items()
    }
    return {"version": VERSION, **facts, "tasks": tasks}


def _plain(metric: Metric) -> dict[str, float | int | None]:
    """JSON has no NaN."""
    return {key: None if value is None or math.isnan(value) else value for key, value in vars(metric).items()}


def write_results(folder: Path, name: str, results: Mapping[str, TaskResult], facts: Mapping[str, Any]) -> Path:
    """Write both files, each whole or not at all; returns the path of the JSON, which comes last. Raises DataError."""
    lines = [
        json.dumps({"task": task, **item}, ensure_ascii=False, default=str) + "\n"
        for task, result in results.items()
        for item in result.items
    ]
    path = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(_items_path(path), "".join(lines).encode("utf-8", "backslashreplace"))
        write_json_atomically(path, results_content(results, facts))
    except OSError as error:
        raise DataError(f"{path}: the results cannot be written ({error.strerror})") from None
    return path


def _items_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.items.jsonl")


def read_results(folder: Path, name: str, facts: Mapping[str, Any]) -> dict[str, TaskResult]:
    """The tasks of an earlier call that were asked the same of the same checkpoint; none if there was no call."""
    path = folder / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lines = _items_path(path).read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines]
        if any(content.get(key) != value for key, value in _comparable(facts).items()):
            return {}
        asked = [
            task
            for task in content["tasks"]
            if task in facts["settings"] and all(content[key][task] == _json(facts[key][task]) for key in OF_A_TASK)
        ]
        return {
            task: _result(content["tasks"][task], [item for item in items if item["task"] == task]) for task in asked
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no results to go on from ({error}); remove it, or set resume=false") from None


def _comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    found = {"version": VERSION, **facts}
    return {key: _json(found[key]) for key in OF_ALL}


def _json(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def _result(metrics: dict[str, Any], items: list[dict[str, Any]]) -> TaskResult:
    found = {
        name: Metric(**{**entry, "value": math.nan if entry["value"] is None else entry["value"]})
        for name, entry in metrics.items()
    }
    return TaskResult(found, [{key: value for key, value in item.items() if key != "task"} for item in items])
