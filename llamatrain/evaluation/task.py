"""What a task is: a kind, settings of that kind, and files; and under which conditions it is scored. No torch.

A kind is a module of `evaluation.tasks`: a dataclass of settings (made from YAML by `config.build`), a check of them,
and `score`. Its requests all go to the scorer in a few calls, since the scorer batches what it gets in one. On several
ranks each runs the same lines and the scorer gives all the same answers; what has effects outside (running generated
code) is done only where `conditions.leads`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llamatrain.evaluation.results import TaskResult
from llamatrain.evaluation.scoring import Scorer


@dataclass(frozen=True)
class Conditions:
    max_questions: int | None = None  # the first so many; of a set in parts (MMLU's subjects, sources), of each
    seed: int = 0  # of samples, and of which examples precede a question
    allow_code_execution: bool = False  # run programs that the model has written, in a sandbox
    leads: bool = True  # this is rank 0; elsewhere what has effects outside may be left out


class Score(Protocol):
    def __call__(
        self, settings: Any, files: dict[str, Path], scorer: Scorer, conditions: Conditions, /
    ) -> TaskResult: ...


def _nothing_to_check(settings: Any) -> None:
    pass


def _never_refuses(settings: Any, conditions: Conditions) -> str | None:
    return None


@dataclass(frozen=True)
class Kind:
    settings: type  # dataclass; a field `shots` is what the command's shots= sets
    score: Score
    check: Callable[[Any], None] = _nothing_to_check  # raises ConfigError that names the setting
    refusal: Callable[[Any, Conditions], str | None] = _never_refuses  # why it is not run, or None


@dataclass(frozen=True)
class Task:
    name: str
    kind: Kind
    settings: Any  # an instance of kind.settings
    files: dict[str, list[str]]  # by role, each with the paths it is looked for at
    optional_files: dict[str, list[str]] = field(default_factory=dict)
    folder: Path | None = None  # of a description that is not built in: relative paths are tried there too
    source: str = ""  # of the protocol
    questions: int | None = None  # of the whole set, if that is known
    changed: dict[str, Any] = field(default_factory=dict)  # settings that are not the description's
    other_shots: str = ""  # why it has not the shots that all tasks were to have

    def find(self, data: Path) -> tuple[dict[str, Path], list[Path]]:
        """The files by role, packed (.gz, .zst) or not; and the first place of each that is needed and not there."""
        found, missing = {}, []
        for role, names in {**self.optional_files, **self.files}.items():
            places = [root / name for name in names for root in (data, self.folder) if root is not None]
            packed = [place.with_name(place.name + end) for place in places for end in ("", ".gz", ".zst")]
            path = next((place for place in packed if place.exists()), None)
            if path is not None:
                found[role] = path
            elif role in self.files:
                missing.append(places[0])
        return found, missing
