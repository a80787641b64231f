"""The folder of a run: who works in it, what happened to it, how it stands. No torch.

config.yaml     the resolved configuration of the run's first start, or of its last structural change
journal.jsonl   one line per event: start, checkpoint, account, stop, done … (append only)
status.json     how the run stands now; launch scripts decide from it
metrics.jsonl   one line per logged step
samples.jsonl   what the model wrote after evaluation.samples, one line per validation
control/        a file `stop` or `save` put there asks for that
logs/           what each rank had to say
launch/         of launch.slurm: the setup file, the jobs' output, what ended a chain
hang-…/         what was found out when the ranks came no further
profile/        where the time of some steps went, if logging.profile_steps asked for it
report/         the page that llamatrain.report made of it
evaluations/    scores by llamatrain.evaluate
checkpoints/    step-00001234/ …
lock            held by the process that works here
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from llamatrain.errors import ConfigError, UnhealthyRun
from llamatrain.files import fsync_path, write_json_atomically
from llamatrain.process import attempt_id

log = logging.getLogger("llamatrain")

STATUS_VERSION = 1
RUNNING, DONE, PREEMPTED, UNHEALTHY, BAD_INPUT = "running", "done", "preempted", "unhealthy", "bad_input"
CRASH = "crash"  # the journal's word; the status of a run that crashed is still `running`, with a reason
STARTING, TRAINING, VALIDATING, SAVING = "starting", "training", "validating", "saving"
HEARTBEAT_S = 10.0


class RunDirectory:
    """Opens (and makes) the folder and locks it. Raises ConfigError if another process works there.

    One process writes there. For the other ranks of its run, `leads=False`: they find their way in the folder, and
    what they would write is left to rank 0; only a failure they note themselves, as rank 0 may not come to do it.
    """

    def __init__(self, path: str | Path, *, leads: bool = True, attempt: str | None = None) -> None:
        self.path = Path(path)
        self.leads = leads
        self.attempt = attempt or attempt_id()
        self._last_heartbeat = 0.0
        self._phase: str | None = None
        self._journal: BinaryIO | None = None
        self._journal_torn_at: int | None = None  # where a line begins that a full disk took a part of
        self.on_beat: Callable[[int, str], None] = lambda step, phase: None  # told each sign of life, on every rank
        self._unwritten = False  # the last heartbeat
        self._journal_lock = threading.Lock()  # checkpoints are committed by a thread of their own
        if leads:
            self._lock = self._take_lock()
        elif not self.path.is_dir():
            raise ConfigError(
                f"run_dir={path}: not to be seen on {socket.gethostname()}; it must lie where all nodes can write"
            )
        earlier = read_status(self.path)
        self.was_done = earlier is not None and earlier["state"] == DONE
        self._step = earlier["step"] if earlier else 0
        self.last_heartbeat: float | None = earlier.get("heartbeat") if earlier else None  # of the process before
        if leads:
            self._journal = self._open_journal()
            self._tidy()

    def _take_lock(self) -> TextIO:
        try:
            (self.path / "control").mkdir(parents=True, exist_ok=True)
            lock = open(self.path / "lock", "a")  # noqa: SIM115 - held until close
        except OSError as error:
            raise ConfigError(f"run_dir={self.path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            worker = read_status(self.path) or {"pid": "?", "host": "?"}
            raise ConfigError(
                f"run_dir={self.path}: another process trains there (pid {worker['pid']} on {worker['host']}, if its "
                "status is current); stop it, or choose another name= or run_dir="
            ) from None
        return lock

    def _tidy(self) -> None:
        """Remove what a launch that is over has left: half-written files, its launcher's requests. The lock is ours."""
        try:
            for left in self.path.glob(".*.tmp"):
                left.unlink(missing_ok=True)
            for request in (self.path / "control").iterdir():
                if _asked_by(request) not in ("", self.attempt, None):
                    request.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"run_dir={self.path}: cannot be written ({error.strerror})") from None

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
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._lock.close()

    def _open_journal(self) -> BinaryIO:
        try:
            cut_lines(self._journal_path, lambda record: "event" in record)
            return open(self._journal_path, "ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"{self._journal_path}: cannot be written ({error.strerror})") from None

    def record(self, event: str, **fields: Any) -> None:
        """Append one event to the journal; it is on disk when this returns, whole. Raises OSError: then none is."""
        if self._journal is None:
            return
        line = {"event": event, "time": time.time(), "attempt": self.attempt, **fields}
        with self._journal_lock:
            self._append(self._journal, json.dumps(line).encode() + b"\n")

    def _append(self, journal: BinaryIO, line: bytes) -> None:
        if self._journal_torn_at is not None:
            os.ftruncate(journal.fileno(), self._journal_torn_at)
        self._journal_torn_at = os.fstat(journal.fileno()).st_size
        try:
            while line:
                line = line[journal.write(line) :]
            os.fsync(journal.fileno())
        except OSError:
            with suppress(OSError):
                os.ftruncate(journal.fileno(), self._journal_torn_at)
                self._journal_torn_at = None
            raise
        self._journal_torn_at = None

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """All journal entries of these kinds, oldest first."""
        lines = self._journal_path.read_text(encoding="utf-8").splitlines()
        return [entry for entry in map(json.loads, lines) if entry["event"] in kinds]

    def starts_without_progress(self) -> int:
        """How many launches in a row came to no checkpoint, no ordered end, and nothing that a person has to mend."""
        count = 0
        for entry in self.events("launch", "checkpoint", "stop", "done", BAD_INPUT, UNHEALTHY):
            count = count + 1 if entry["event"] == "launch" else 0
        return count

    def set_status(
        self, state: str, *, step: int | None = None, reason: str | None = None, phase: str | None = None
    ) -> None:
        """Write status.json, atomically; `phase` is what a running run is doing."""
        self._step = self._step if step is None else step
        self._phase = phase
        self._last_heartbeat = time.monotonic()
        self.on_beat(self._step, phase or state)
        if self.leads:
            self._write_status(state, reason)

    def _write_status(self, state: str, reason: str | None) -> None:
        status = {
            "version": STATUS_VERSION,
            "state": state,
            "phase": self._phase if state == RUNNING else None,
            "step": self._step,
            "reason": reason,
            "attempt": self.attempt,
            "heartbeat": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        write_json_atomically(self.path / "status.json", status)

    def heartbeat(self, step: int, *, phase: str = TRAINING) -> None:
        """Say that the run is alive, where, and at what; written when the phase changes, else every HEARTBEAT_S.

        A disk that does not take it does not end the run.
        """
        self._step = step
        self.on_beat(step, phase)
        if phase != self._phase or time.monotonic() - self._last_heartbeat >= HEARTBEAT_S:
            try:
                self.set_status(RUNNING, phase=phase)
            except OSError as error:
                if not self._unwritten:
                    log.warning("%s: the heartbeat cannot be written (%s)", self.path, error)
                self._unwritten = True
            else:
                self._unwritten = False

    def note_failure(self, state: str, reason: str, **more: Any) -> None:
        """Journal a failure and set the status, from whichever rank. A crash's state is `running`.

        A run that is done stays done, whatever was typed after it. A disk that takes neither does not hide the failure.
        """
        with self._disk_may_refuse("the failure"):
            self.record(CRASH if state == RUNNING else state, reason=reason, **more)
        if not (self.was_done and state == BAD_INPUT):
            with self._disk_may_refuse("the status"):
                self._write_status(state, reason)

    @contextmanager
    def _disk_may_refuse(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("%s: %s cannot be written (%s)", self.path, what, error)

    def note_hang(self, step: int, reason: str) -> None:
        """Journal that the run hangs and set the status: from outside, as the process that leads stands still."""
        self._journal = self._journal or self._open_journal()
        self._step = step
        self.note_failure(UNHEALTHY, reason)

    def requests(self, name: str) -> bool:
        """Whether control/<name> is there for this run; only rank 0 looks.

        An empty file is a person's. A launcher writes its attempt into it, so that one whose own run was refused,
        because another works here, does not stop that one.
        """
        return self.leads and _asked_by(self.path / "control" / name) in ("", self.attempt)

    def clear_request(self, name: str) -> None:
        if self.leads:
            (self.path / "control" / name).unlink(missing_ok=True)


def _asked_by(request: Path) -> str | None:
    """The attempt that a control file names, "" for a person's; None if there is no such file."""
    try:
        return request.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


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
        directory.note_failure(BAD_INPUT, reason, last_heartbeat=directory.last_heartbeat)
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
