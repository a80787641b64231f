"""metrics.jsonl: a line per logged step, the source of truth that every other sink repeats; samples.jsonl beside it."""

import errno
import json
import logging
import math
import os
import threading
from pathlib import Path
from typing import Any

from llamatrain.run_directory import cut_lines

Record = dict[str, Any]

log = logging.getLogger("llamatrain")


class MetricsLog:
    """Appends records; opening it cuts what lies after `resumed_step`, so that each step stands there once.

    Raises UnhealthyRun if a line of it is no record.
    """

    def __init__(self, path: Path, *, resumed_step: int | None) -> None:
        self._path = path
        self._cut(resumed_step)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open until close
        self._pending = b""
        self._lock = threading.Lock()  # a checkpoint's thread syncs

    def _cut(self, last_step: int | None) -> None:
        self.validated_step: int | None = None  # the last step with a validation record
        self.tested_step: int | None = None  # the last step with a record of tasks

        def keep(record: Record) -> bool:
            kept: bool = last_step is not None and record["step"] <= last_step
            if kept:
                self._note(record)
            return kept

        cut_lines(self._path, keep)

    def back_to(self, step: int) -> None:
        """Cut what lies after `step`: the steps from there are done again. Raises OSError."""
        with self._lock:
            self._write_pending()
            self._cut(step)

    def write(self, record: Record) -> None:
        """Append a record; what a full disk does not take is kept, and written with the next.

        Of a number that is not finite, for which JSON has no word, null is left.
        """
        self._note(record)
        record = {key: None if _endless(value) else value for key, value in record.items()}
        with self._lock:
            behind = bool(self._pending)
            self._pending += json.dumps(record).encode() + b"\n"
            try:
                self._write_pending()
            except OSError as error:
                if not behind:
                    log.warning("%s: cannot be written (%s); its records are kept until it can", self._file.name, error)

    def _write_pending(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def _note(self, record: Record) -> None:
        if "eval/validation/loss" in record:
            self.validated_step = record["step"]
        elif any(key.startswith("eval/") for key in record):
            self.tested_step = record["step"]

    def sync(self) -> None:
        """Put every record on disk; done before a checkpoint is committed, which relies on them. Raises OSError."""
        with self._lock:
            self._write_pending()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class SampleLog:
    """samples.jsonl, on rank 0. Lines after the last validation that the run has kept are cut: they come again."""

    def __init__(self, path: Path, *, validated_step: int | None) -> None:
        self._path = path
        self.back_to(validated_step)

    def back_to(self, validated_step: int | None) -> None:
        """Raises UnhealthyRun if a line is no record."""
        cut_lines(self._path, lambda record: validated_step is not None and record["step"] <= validated_step)

    def write(self, record: Record) -> None:
        """Append a line, on disk when this returns; a disk that does not take it, loses it."""
        line = json.dumps(record).encode() + b"\n"
        try:
            with open(self._path, "ab", buffering=0) as file:
                end = file.tell()
                try:
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._path, end)
                    raise
        except OSError as error:
            log.warning("%s: the samples cannot be written (%s)", self._path, error)


def _endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
