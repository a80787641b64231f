"""Which tasks there are: kinds from `tasks/`, descriptions from conf/evaluation/tasks, suites of them. No torch.

A description is YAML: `kind`, `source` (of the protocol), `questions` (how many the whole set has), `files` and
`optional_files` (by role, each the paths it may lie at under the data directory, official names first), `settings` of
the kind. A task of one's own is such a file, given by its path.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from llamatrain.config.build import build
from llamatrain.errors import ConfigError
from llamatrain.evaluation.task import Kind, Task
from llamatrain.evaluation.tasks import (
    code,
    crows_pairs,
    mathematics,
    mmlu,
    multiple_choice,
    perplexity,
    question_answering,
    toxicity,
    truthful_qa,
    winogender,
)

KINDS: dict[str, Kind] = {
    "multiple_choice": multiple_choice.KIND,
    "question_answering": question_answering.KIND,
    "mmlu": mmlu.KIND,
    "perplexity": perplexity.KIND,
    "mathematics": mathematics.KIND,
    "code": code.KIND,
    "crows_pairs": crows_pairs.KIND,
    "winogender": winogender.KIND,
    "truthful_qa": truthful_qa.KIND,
    "toxicity": toxicity.KIND,
}


@dataclass
class Description:
    """The schema of a task's YAML."""

    kind: str = ""
    source: str = ""
    questions: int | None = None  # of the whole set, to tell when a part of it is at hand
    files: dict[str, str | list[str]] = field(default_factory=dict)
    optional_files: dict[str, str | list[str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Suite:
    """The schema of a suite's YAML."""

    tasks: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)  # of evaluation/published.yaml, to print the results in


def built_in(folder: str) -> dict[str, Path]:
    """The YAML files of conf/evaluation/<folder>, by name."""
    package = Path(str(files("llamatrain")))
    conf = package / "conf" if (package / "conf").is_dir() else package.parent / "conf"
    return {path.stem: path for path in sorted((conf / "evaluation" / folder).glob("*.yaml"))}


def load_suite(name: str) -> Suite:
    """A suite by its name or the path of its YAML. Raises ConfigError."""
    return build(Suite, _read(_path(name, "suites", "suite"), f"suite={name}"))


def load_task(
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    shots: int | list[int] | None = None,
) -> Task:
    """A task by its name, or by the path of its YAML; then it is called by that file's name.

    `settings` and `files` replace what the description says; `shots` does if the kind has shots at all.

    Raises ConfigError.
    """
    path = _path(name, "tasks", "task")
    described = build(Description, _read(path, name))
    if described.kind not in KINDS:
        raise ConfigError(f"{path}: kind={described.kind!r} is none; choose one of {', '.join(KINDS)}")
    kind = KINDS[described.kind]
    values = _merged(described.settings, settings or {})
    if shots is not None and any(entry.name == "shots" for entry in fields(kind.settings)):
        values["shots"] = shots
    try:
        built: Any = build(kind.settings, values)
        kind.check(built)
    except ConfigError as error:
        raise ConfigError(f"task {path.stem}: {error}") from None
    needed, optional = _paths(described.files), _paths(described.optional_files)
    for role, place in (files or {}).items():
        if role not in needed and role not in optional:
            raise ConfigError(
                f"task_files.{path.stem}.{role}: no file of this task; it has {', '.join({**needed, **optional})}"
            )
        (needed if role in needed else optional)[role] = [place]
    return Task(
        path.stem,
        kind,
        built,
        needed,
        optional,
        folder=path.parent if path not in built_in("tasks").values() else None,
        source=described.source,
        questions=described.questions,
        changed={key: value for key, value in values.items() if value != described.settings.get(key)},
    )


def _merged(described: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """What is described with what is changed; of groups (`sampling.warm.samples=5`) the rest stays, null drops one."""
    values = {**described, **changed}
    for key, value in changed.items():
        before = described.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            values[key] = {name: entry for name, entry in _merged(before, value).items() if entry is not None}
    return values


def load_tasks(
    names: Sequence[str],
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    files: Mapping[str, Mapping[str, str]] | None = None,
    shots: int | list[int] | None = None,
) -> list[Task]:
    """Some tasks; `settings` and `files` by a task's name. A task that cannot have `shots` keeps its own.

    Raises ConfigError, also for two of one name, and for shots that none of the tasks can have.
    """
    tasks = []
    refused: list[ConfigError] = []
    for name in names:
        stem = Path(name).stem
        own = partial(load_task, name, settings=(settings or {}).get(stem), files=(files or {}).get(stem))
        try:
            tasks.append(own(shots=shots))
        except ConfigError as error:
            task = own()
            refused.append(error)
            tasks.append(replace(task, other_shots=f"keeps shots={task.settings.shots} ({error})"))
    if refused and len(refused) == sum(hasattr(task.settings, "shots") for task in tasks):
        raise refused[0]
    called = [task.name for task in tasks]
    for name in called:
        if called.count(name) > 1:
            raise ConfigError(f"tasks: {name} is there {called.count(name)} times; results are kept by name")
    for option, given in (("task_settings", settings), ("task_files", files)):
        for name in given or {}:
            if name not in called:
                raise ConfigError(f"{option}.{name}: this task is not asked for; tasks are {', '.join(called)}")
    return tasks


def _paths(described: Mapping[str, str | list[str]]) -> dict[str, list[str]]:
    return {role: [places] if isinstance(places, str) else places for role, places in described.items()}


def _path(name: str, folder: str, what: str) -> Path:
    """Where the description of that name lies; a name with a slash or .yaml at its end is a path."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"{what} {name}: there is no such file")
        return Path(name)
    known = built_in(folder)
    if name not in known:
        nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ConfigError(
            f"{what} {name}: there is none of that name; {hint}there are {', '.join(known)}, or give a file's path"
        )
    return known[name]


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a description is a mapping")
    return values
