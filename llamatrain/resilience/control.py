"""Requests to stop, by signal. No torch: handlers must be there before torch, which takes seconds, is imported.

A signal sets a flag; `agreement.py` makes all ranks act on it at the same step. One that comes while torch is still
loading is therefore kept, and honoured after the first step.
"""

import os
import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
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
