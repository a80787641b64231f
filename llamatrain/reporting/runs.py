"""What a run's directory holds, as one value. Nothing is written, and a run at work may go on meanwhile.

What is half written (the last line of a file) is left out; what is no record, or lacks a field that all have, is
refused by its name.
"""

import json
import os
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamatrain.arithmetic import board_watts, peak_flops
from llamatrain.config.resume import flatten
from llamatrain.errors import ConfigError, DataError
from llamatrain.observe.goodput import Attempt, Ledger
from llamatrain.run_directory import RUNNING, read_status

Record = dict[str, Any]

LOSS, VALIDATION_LOSS = "train/loss", "eval/validation/loss"

NUMBER = (int, float)
FIELDS: dict[str, dict[str, Any]] = {  # that every record has, and of what type
    "status.json": {"state": str, "step": int, "heartbeat": NUMBER},
    "journal.jsonl": {"event": str},
    "metrics.jsonl": {"step": int, "tokens": NUMBER, "time": NUMBER},
    "samples.jsonl": {"step": int, "tokens": NUMBER, "samples": list},
    "a sample": {"prompt": str, "continuation": str},
}


@dataclass(frozen=True)
class Evaluation:
    """A metric of a task at one checkpoint, as `llamatrain.evaluate` has left it."""

    tokens: int
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Run:
    """Everything that is known of a run."""

    path: Path
    name: str
    status: Record
    records: list[Record]  # of metrics.jsonl
    samples: list[Record]  # of samples.jsonl
    evaluations: list[Evaluation]
    profiles: list[Record]  # the summaries
    journal: list[Record]
    ledger: Ledger
    config: Record  # of the last start
    environment: Record

    @property
    def attempts(self) -> list[Attempt]:
        return self.ledger.attempts

    @property
    def settings(self) -> Record:
        """The configuration, with dotted keys."""
        return flatten(self.config)

    @property
    def training(self) -> list[Record]:
        return [record for record in self.records if LOSS in record]

    @property
    def tokens(self) -> int:
        """Tokens seen, as far as it is told."""
        return max((record["tokens"] for record in self.records), default=0)

    @property
    def step(self) -> int:
        step: int = self.status["step"]
        return step

    @property
    def total_steps(self) -> int | None:
        train = self.config.get("train", {})
        if train.get("steps") is not None or not train.get("tokens"):
            return train.get("steps")
        return -(-int(train["tokens"]) // int(train["global_batch_tokens"]))

    @property
    def device(self) -> str:
        return str(self.environment.get("device", "unknown"))

    @property
    def trained(self) -> list[Attempt]:
        """The attempts that came to train."""
        return [attempt for attempt in self.attempts if attempt.started is not None and not attempt.is_idle]

    @property
    def restarts(self) -> list[Attempt]:
        """What was launched after the first attempt that trained, but for those that found the run done."""
        first = next((place for place, one in enumerate(self.attempts) if one.started is not None), len(self.attempts))
        return [attempt for attempt in self.attempts[first + 1 :] if not attempt.is_idle]

    @property
    def devices(self) -> int:
        """How many the last attempt had that trained."""
        return (self.trained or self.attempts)[-1].world_size if self.attempts else 1

    def devices_at(self, times: Sequence[float]) -> list[int]:
        """How many trained at each of these times."""
        trained = self.trained
        launched = [attempt.launched for attempt in trained]
        return [trained[max(0, bisect(launched, at) - 1)].world_size if trained else self.devices for at in times]

    @property
    def device_hours(self) -> float | None:
        return sum(attempt.device_hours for attempt in self.attempts) if self.attempts else None

    @property
    def goodput(self) -> float | None:
        return self.ledger.goodput if self.ledger.wall_s else None

    @property
    def watts(self) -> float | None:
        """What one of its devices may draw."""
        return board_watts(self.device)

    @property
    def peak_is_known(self) -> bool:
        return peak_flops(self.device) is not None


def read_runs(directories: Sequence[str]) -> list[Run]:
    """Each run, under names that tell them apart. Raises ConfigError for a folder in which nothing ran."""
    if len(directories) == 1 and "," in directories[0] and not Path(directories[0]).exists():
        told = f"run={directories[0]}: there is no such directory; several are given as 'run=[{directories[0]}]'"
        raise ConfigError(told)
    runs = [read_run(directory) for directory in directories]
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    paths = [run.path.absolute().parts for run in runs]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"run=[{','.join(directories)}]: the same run twice")
    shared = next(n for n in range(len(paths[0]) + 1) if len({parts[: n + 1] for parts in paths}) > 1)
    return [_named(run, "/".join(parts[shared:]) or run.name) for run, parts in zip(runs, paths, strict=True)]


def _named(run: Run, name: str) -> Run:
    return Run(**{**run.__dict__, "name": name})


def read_run(directory: str | Path) -> Run:
    """Raises ConfigError if nothing ran there, DataError naming what cannot be read."""
    path = Path(directory)
    status, journal, ledger = read_clock(path)
    starts = [entry for entry in journal if entry["event"] == "start"]
    config = (starts[-1].get("config") if starts else None) or _yaml(path / "config.yaml")
    return Run(
        path=path,
        name=str(config.get("name", path.name)),
        status=status,
        records=list(lines_of(path / "metrics.jsonl")),
        samples=list(lines_of(path / "samples.jsonl")),
        evaluations=[one for file in sorted(path.glob("evaluations/step-*/*.json")) for one in evaluations_of(file)],
        profiles=[_json(file) for file in sorted(path.glob("profile/step-*/summary.json"))],
        journal=journal,
        ledger=ledger,
        config=config,
        environment=starts[-1].get("environment") or {} if starts else {},
    )


def read_clock(path: Path) -> tuple[Record, list[Record], Ledger]:
    """Status, journal, and where the time went: of a run at work, up to its last heartbeat. Raises as `read_run`."""
    status = read_status(path)
    if status is None or not (path / "journal.jsonl").exists():
        raise ConfigError(f"{path}: nothing ever ran there; give the directory of a run, which has status.json")
    _check(status, os.fspath(path / "status.json"), FIELDS["status.json"])
    journal = list(lines_of(path / "journal.jsonl"))
    ledger = Ledger(journal)
    if status["state"] == RUNNING:
        ledger.at_work(status["heartbeat"], step=status["step"])
    return status, journal, ledger


def lines_of(path: Path) -> Iterator[Record]:
    """The records of a JSON-lines file of a run, none if there is none; a last line without its end is left out."""
    if not path.exists():
        return
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith("\n"):
                    where = f"{path}, line {number}"
                    record = _check(_record(line, where), where, FIELDS[path.name])
                    for sample in record["samples"] if path.name == "samples.jsonl" else ():
                        _check(sample, f"{where}, a sample", FIELDS["a sample"])
                    yield record
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _record(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    return _check(record, where, {})


def _check(record: Any, where: str, fields: Mapping[str, Any]) -> Record:
    """The record, if it is one and has these fields."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: not a record; repair the line or remove it")
    lacking = [name for name, kind in fields.items() if not isinstance(record.get(name), kind)]
    if lacking:
        raise DataError(
            f"{where}: lacks {', '.join(lacking)}, which every such record has; repair the line or remove it"
        )
    return record


def evaluations_of(path: Path) -> Iterator[Evaluation]:
    """Of one file of llamatrain.evaluate."""
    content = _json(path)
    try:
        for task, metrics in content["tasks"].items():
            for metric, found in metrics.items():
                if found["value"] is None:  # was not finite
                    continue
                yield Evaluation(
                    tokens=int(content["tokens"]),
                    task=str(task),
                    metric=str(metric),
                    value=float(found["value"]),
                    low=found.get("low"),
                    high=found.get("high"),
                )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not what llamatrain.evaluate writes ({told}); remove it, or evaluate again") from None


def _json(path: Path) -> Record:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    return _record(text, os.fspath(path))


def _yaml(path: Path) -> Record:
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
