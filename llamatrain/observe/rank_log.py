"""What each rank has to say: rank 0 on the console and in its log file, the others in their log files alone.

The others' stdout and stderr go there whole, so that neither a library's warning nor a progress bar is printed once
a rank. Who fails first gets the console back for its last words.
"""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self, TextIO

from llamatrain.process import Process, attempt_id

CONSOLE_FORMAT = "%(message)s"
FILE_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class RankLog:
    """Sets logging up for one rank; a context manager that undoes it."""

    def __init__(self, directory: Path, process: Process) -> None:
        self._console: tuple[int, int] | None = None
        directory.mkdir(exist_ok=True)
        self._file = open(directory / f"rank{process.rank:05d}.log", "a", encoding="utf-8")  # noqa: SIM115
        handler = _Quietly(self._file)
        handler.setFormatter(logging.Formatter(FILE_FORMAT))
        self._handler = handler
        root = logging.getLogger()
        if not process.leads:
            sys.stdout.flush()
            sys.stderr.flush()
            self._console = os.dup(1), os.dup(2)
            os.dup2(self._file.fileno(), 1)
            os.dup2(self._file.fileno(), 2)
            for other in list(root.handlers):
                root.removeHandler(other)
        root.addHandler(handler)
        self.write(f"--- {attempt_id()}: rank {process.rank} of {process.world_size}, pid {os.getpid()}")

    def give_console_back(self) -> None:
        """Print to the console again, whatever the rank."""
        if self._console is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, saved in enumerate(self._console, start=1):
                os.dup2(saved, number)
                os.close(saved)
            self._console = None

    def write(self, text: str) -> None:
        """Add text to the file as it is; what a full disk does not take is kept for the next time."""
        with suppress(OSError):
            self._file.write(text + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._handler)
        self.give_console_back()
        with suppress(OSError):
            self._file.close()


class _Quietly(logging.StreamHandler[TextIO]):
    """A disk that does not take a line is told by those who need it, not with a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
