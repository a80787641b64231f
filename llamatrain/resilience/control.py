"""Requests from outside to stop a run in order. No torch: handlers must be there before torch is imported.

A signal sets a flag; the loop looks at it at the end of every step, saves and leaves. A signal that comes while
torch is still loading is therefore kept, and honoured after the first step.
"""

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers that somebody asked the run to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def install(self) -> None:
        """Take over SIGTERM and SIGINT; a second SIGINT interrupts at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        if self.reason is None:
            os.write(2, b"\nstopping at the end of this step; Ctrl-C again interrupts at once\n")
        self.reason = signal.Signals(number).name
