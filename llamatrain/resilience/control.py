"""Requests to stop: their names, and those by signal. No torch, which takes seconds to import: handlers come before.

A signal sets a flag; `agreement.py` makes all ranks act on it at the same step. One that comes while torch is still
loading is therefore kept, and honoured after the first step.
"""

import os
import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
STOP_FILE, SAVE_FILE = "stop", "save"  # in the run directory's control/
FILE_REASON = f"control/{STOP_FILE}"
SAME_PRESS_S = 1.0  # torchrun hands a Ctrl-C on to workers that had it from the terminal already


class StopRequest:
    """Remembers that somebody asked this process to stop; `announce` says so on stderr."""

    def __init__(self, *, announce: bool = True) -> None:
        self.reason: str | None = None
        self._announce = announce
        self._asked_at = 0.0

    def install(self) -> None:
        """Take over SIGTERM, SIGUSR1, SIGHUP (unless under nohup) and SIGINT; a second Ctrl-C interrupts at once."""
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.reason is not None and time.monotonic() - self._asked_at > SAME_PRESS_S
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if self.reason is None:
            self._asked_at = time.monotonic()
            self.reason = signal.Signals(number).name
            if self._announce:
                again_told = b"; Ctrl-C again interrupts at once" if number == signal.SIGINT else b""
                os.write(2, b"\nstopping after this step" + again_told + b"\n")
