"""How far a piece of work is, told from deep inside it to whoever shows it.

Readers and stages know nothing of bars and pools: they call `advance` with the bytes they have read, or `advance_share`
with the part they have done. Whoever wants to hear of it says so with `watched`, and how much there is with `metered`;
meters nest (a file of a unit), and what is told is never more than a meter holds, and all of it at its end. Nothing of
this reaches a result.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

BUFFER_BYTES = 1 << 16

Tell = Callable[[float], object]


class _Meter:
    def __init__(self, total: float, tell: Tell) -> None:
        self.total, self._tell, self._done = total, tell, 0.0

    def advance(self, amount: float) -> None:
        step = min(amount, self.total - self._done)
        if step > 0:
            self._done += step
            self._tell(step)


_METER: ContextVar[_Meter | None] = ContextVar("meter", default=None)


def advance(amount: float) -> None:
    """So many bytes more are done."""
    if (meter := _METER.get()) is not None:
        meter.advance(amount)


def advance_share(share: float) -> None:
    """So large a part (0 to 1) of the whole is done besides."""
    if (meter := _METER.get()) is not None:
        meter.advance(share * meter.total)


@contextmanager
def watched(total: float, tell: Tell) -> Iterator[None]:
    """Tell of what is done inside: `total` in all, in steps."""
    meter = _Meter(total, tell)
    token = _METER.set(meter)
    try:
        yield
    finally:
        _METER.reset(token)
        meter.advance(total)


@contextmanager
def metered(total: float) -> Iterator[None]:
    """Work inside of other: all of it counts as `total` there, once it is over, however much was told."""
    outer = _METER.get()
    with nullcontext() if outer is None else watched(total, outer.advance):
        yield


@contextmanager
def opened(path: Path, *, share: float = 1.0) -> Iterator[IO[bytes]]:
    """The file to read, that tells of the bytes read. `share`: what reading it is of the work with it."""
    with io.BufferedReader(_Watched(path, share), BUFFER_BYTES) as file:
        yield file


class _Watched(io.FileIO):
    def __init__(self, path: Path, share: float) -> None:
        super().__init__(path, "rb")
        self._share = share
        self._furthest = 0  # what is read a second time is not done a second time

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        if count and (position := self.tell()) > self._furthest:
            advance(self._share * (position - self._furthest))
            self._furthest = position
        return count
