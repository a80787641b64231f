"""metrics.jsonl: one line per logged step, the source of truth that every other sink repeats."""

import json
import os
from pathlib import Path
from typing import Any

from llamatrain.run_directory import cut_lines

Record = dict[str, Any]


class MetricsLog:
    """Appends records; opening it cuts what lies after `resumed_step`, so that each step stands there once.

    Raises UnhealthyRun if a line of it is no record.
    """

    def __init__(self, path: Path, *, resumed_step: int | None) -> None:
        self.validated_step: int | None = None  # the last step with a validation record

        def keep(record: Record) -> bool:
            kept: bool = resumed_step is not None and record["step"] <= resumed_step
            if kept:
                self._note(record)
            return kept

        cut_lines(path, keep)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open until close

    def write(self, record: Record) -> None:
        self._note(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _note(self, record: Record) -> None:
        if "eval/validation/loss" in record:
            self.validated_step = record["step"]

    def sync(self) -> None:
        """Put every record on disk; done before a checkpoint is committed, which relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
