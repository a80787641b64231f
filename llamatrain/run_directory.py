"""The folder of a run: who works in it, what happened to it, how it stands. No torch.

config.yaml     the resolved configuration of the run's first start
journal.jsonl   one line per event: start, resume, checkpoint, stop, done (append only)
status.json     how the run stands now; launch scripts decide from it
metrics.jsonl   one line per logged step
checkpoints/    step-00001234/ …
lock            held by the process that works here
"""

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from llamatrain.errors import ConfigError, UnhealthyRun
from llamatrain.files import fsync_path, write_json_atomically

STATUS_VERSION = 1
RUNNING, DONE, PREEMPTED, UNHEALTHY, BAD_INPUT = "running", "done", "preempted", "unhealthy", "bad_input"
HEARTBEAT_S = 10.0
PROCESS_ID = uuid.uuid4().hex[:12]


def attempt_id() -> str:
    """What tells one launch from the next.

    (SLURM job, restart count); or LLAMATRAIN_ATTEMPT, which a launcher that restarts workers sets once; or an id of
    this process.
    """
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"slurm-{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return os.environ.get("LLAMATRAIN_ATTEMPT") or f"process-{PROCESS_ID}"


class RunDirectory:
    """Opens (and makes) the folder and locks it. Raises ConfigError if another process works there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a")  # noqa: SIM115 - held until close
        except OSError as error:
            raise ConfigError(f"run_dir={path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            worker = read_status(self.path) or {"pid": "?", "host": "?"}
            raise ConfigError(
                f"run_dir={path}: another process trains there (pid {worker['pid']} on {worker['host']}, if its status "
                "is current); stop it, or choose another name= or run_dir="
            ) from None
        self.attempt = attempt_id()
        self._last_heartbeat = 0.0
        earlier = read_status(self.path)
        self.was_done = earlier is not None and earlier["state"] == DONE
        self._step = earlier["step"] if earlier else 0
        self._journal = self._open_journal()

    @property
    def _journal_path(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    def close(self) -> None:
        self._journal.close()
        self._lock.close()

    def _open_journal(self) -> TextIO:
        try:
            cut_lines(self._journal_path, lambda record: "event" in record)
            return open(self._journal_path, "a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{self._journal_path}: cannot be written ({error.strerror})") from None

    def record(self, event: str, **fields: Any) -> None:
        """Append one event to the journal; it is on disk when this returns."""
        line = {"event": event, "time": time.time(), "attempt": self.attempt, **fields}
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def events(self, event: str) -> list[dict[str, Any]]:
        """All journal entries of one kind, oldest first."""
        lines = self._journal_path.read_text(encoding="utf-8").splitlines()
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def set_status(self, state: str, *, step: int | None = None, reason: str | None = None) -> None:
        """Write status.json, atomically."""
        self._step = self._step if step is None else step
        self._last_heartbeat = time.monotonic()
        status = {
            "version": STATUS_VERSION,
            "state": state,
            "step": self._step,
            "reason": reason,
            "attempt": self.attempt,
            "heartbeat": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        write_json_atomically(self.path / "status.json", status)

    def heartbeat(self, step: int) -> None:
        """Say that the run is alive and at `step`; writes at most every HEARTBEAT_S seconds."""
        self._step = step
        if time.monotonic() - self._last_heartbeat >= HEARTBEAT_S:
            self.set_status(RUNNING)

    def refuse(self, reason: str) -> None:
        """Set the status to bad_input; a run that is done stays done, whatever was typed after it."""
        if not self.was_done:
            self.set_status(BAD_INPUT, reason=reason)


def read_status(path: str | Path) -> dict[str, Any] | None:
    """The status of the run in a folder, or None if nothing ever ran there."""
    file = Path(path) / "status.json"
    try:
        status: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UnhealthyRun(f"{file}: cannot be read ({error}); look what happened there, then remove it") from None
    return status


def refuse_same_attempt(path: str | Path) -> None:
    """Raises UnhealthyRun if this very attempt was already found to need a person.

    A launcher that restarts whatever failed would otherwise repeat it for ever; a new attempt starts afresh.
    """
    status = read_status(path)
    if status and status["state"] in (UNHEALTHY, BAD_INPUT) and status["attempt"] == attempt_id():
        raise UnhealthyRun(f"{path}: this attempt ended as {status['state']} ({status['reason']}); start a new one")


def note_refusal(path: str | Path, reason: str) -> None:
    """Set the status of a run that exists, and in which nobody works, to bad_input."""
    if read_status(path) is not None:
        directory = RunDirectory(path)
        directory.refuse(reason)
        directory.close()


def cut_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the leading records of a JSON-lines file for which `keep` holds; a torn last line is dropped too.

    The file is cut, not rewritten: a crash leaves the old length or the new one. Raises UnhealthyRun for a whole
    line that is no record, which no crash of a run leaves behind.
    """
    if not path.exists():
        return
    length = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                kept = keep(dict(json.loads(line)))
            except (ValueError, TypeError, KeyError):
                raise UnhealthyRun(f"{path}, line {number}: not a record; repair or remove the line") from None
            if not kept:
                break
            length += len(line)
    if length != path.stat().st_size:
        os.truncate(path, length)
        fsync_path(path)
