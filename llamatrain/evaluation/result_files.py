"""Results on disk: NAME.json with every metric, NAME.items.jsonl with every question. No torch.

The JSON says what the numbers were made of: checkpoint, step and tokens, versions, seed, each task's settings, the
hashes of its files. So a later call can tell which of them it need not make again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation.results import Metric, TaskResult
from llamatrain.evaluation.task import Task
from llamatrain.files import sha256_of_file, sha256_of_json, write_bytes_atomically, write_json_atomically

VERSION = 1
HARNESS = "harness."  # before the name of a task of lm-evaluation-harness
# what must be equal to take results over, and of a task; and what makes other results
OF_ALL = ("version", "checkpoint_sha256", "step", "versions", "device", "precision", "seed", "max_questions")
OF_A_TASK = ("settings", "files")
ASKED = ("checkpoint_sha256", "precision", "seed", "max_questions")


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
    """The JSON form: `facts` (step, tokens, versions …); tasks → metric → value, low, high, questions; and how many
    prompts of a task were shortened."""
    tasks = {
        task: {name: _plain(metric) for name, metric in result.metrics.items()} for task, result in results.items()
    }
    shortened = {task: result.shortened for task, result in results.items() if result.shortened}
    told = {task: result.note for task, result in results.items() if result.note}
    return {"version": VERSION, **facts, "tasks": tasks, "shortened": shortened, "notes": told}


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


def take_over(
    folder: Path, name: str, facts: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> tuple[dict[str, TaskResult], dict[str, Any]]:
    """The results of earlier calls that stay, and `facts` with their settings and files.

    They are those that were asked the same of the same checkpoint; with `resume`, of tasks that are not asked now too.
    Raises ConfigError if others would be lost than those that come again, unless `overwrite`.
    """
    path = folder / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        differing = _differing(content, facts)
        alike = [task for task in content["tasks"] if task not in differing] if _same(content, facts) else []
        kept = [task for task in alike if resume or _is_asked(task, facts)]
        told = [f"{what} {how}" for what, how in differing.items()]
        others = [task for task in content["tasks"] if not _is_asked(task, facts) and task not in kept]
        way = " (resume=true keeps what was)" if not differing else ""
        told += [f"{', '.join(others)}: not asked for now{way}"] if others else []
        results = _results(content, kept, path) if kept else {}
        more = {key: {task: content[key][task] for task in kept if task in content[key]} for key in OF_A_TASK}
    except (FileNotFoundError, NotADirectoryError):
        return {}, dict(facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if overwrite:
            return {}, dict(facts)
        what = "go on from" if resume else "overwrite"
        raise DataError(f"{path}: no results to {what} ({error!r}); remove it, or set overwrite=true") from None
    if told and not overwrite:
        raise ConfigError(
            f"{path}: it has other results ({'; '.join(told)}); set name=… for those of this call, or overwrite=true"
        )
    return results, {**facts, **{key: {**more[key], **facts[key]} for key in OF_A_TASK}}


def _same(content: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    found = {"version": VERSION, **facts}
    return all(content.get(key) == _json(found[key]) for key in OF_ALL)


def _differing(content: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """What was asked otherwise: by setting or task, how."""
    found = {
        key: f"{content.get(key)} instead of {facts[key]}" for key in ASKED if content.get(key) != _json(facts[key])
    }
    for task in content["tasks"]:
        if task in facts["settings"]:
            before, now = _flat(content["settings"].get(task, {})), _flat(_json(facts["settings"][task]))
            keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            if keys:
                found[task] = ", ".join(f"with {key}={before.get(key)!r} instead of {now.get(key)!r}" for key in keys)
            elif _hashes(content["files"].get(task, {})) != _hashes(facts["files"][task]):
                found[task] = "with files of other contents"
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def _hashes(files: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {role: file["sha256"] for role, file in files.items()}


def _is_asked(task: str, facts: Mapping[str, Any]) -> bool:
    """Also of a group of the harness, whose parts have results."""
    parts = task.startswith(HARNESS) and any(asked.startswith(HARNESS) for asked in facts["settings"])
    return parts or task in facts["settings"]


def _results(content: dict[str, Any], tasks: Sequence[str], path: Path) -> dict[str, TaskResult]:
    # what json writes has no line break but these; texts may have others, U+2028 say
    lines = _items_path(path).read_text(encoding="utf-8").split("\n")
    items = [json.loads(line) for line in lines if line]
    return {task: _result(content, task, [item for item in items if item["task"] == task]) for task in tasks}


def _json(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def _result(content: dict[str, Any], task: str, items: list[dict[str, Any]]) -> TaskResult:
    found = {
        name: Metric(**{**entry, "value": math.nan if entry["value"] is None else entry["value"]})
        for name, entry in content["tasks"][task].items()
    }
    own = [{key: value for key, value in item.items() if key != "task"} for item in items]
    shortened, note = content.get("shortened", {}).get(task, 0), content.get("notes", {}).get(task, "")
    return TaskResult(found, own, shortened=shortened, note=note)
