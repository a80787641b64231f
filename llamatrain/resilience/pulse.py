"""How far a rank has come, in memory that another process reads while the rank stands still. No torch.

A beat is a few stores into shared memory: no system call, no lock, nothing that could itself hang. The reader may see
one beat's step beside the next one's time; it decides by whether the count changes, which is one word.
"""

import mmap
import os
import time
from typing import NamedTuple

from llamatrain.run_directory import STARTING

BEATS, STEP, STEPS_DONE, TIME_NS = range(4)  # words of 64 bits, then the phase as text
TEXT_AT, SIZE = 64, 128


class Beat(NamedTuple):
    """The last sign of life of a rank."""

    beats: int
    step: int
    steps_done: int  # since the start of the process
    time: float  # seconds since 1970
    phase: str


class Pulse:
    """The rank's end: `beat` at every step and at every change of what the run is doing."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("llamatrain-pulse")
        os.ftruncate(self.descriptor, SIZE)
        self._memory = mmap.mmap(self.descriptor, SIZE)
        self._words = memoryview(self._memory)[:TEXT_AT].cast("q")
        self._step, self._phase = 0, ""

    def beat(self, step: int, phase: str) -> None:
        """Say that the rank has come to `step`, and at what it is."""
        words = self._words
        if step > self._step and self._phase not in ("", STARTING):
            words[STEPS_DONE] += 1
        self._step = words[STEP] = step
        words[TIME_NS] = time.time_ns()
        if phase != self._phase:
            self._phase = phase
            self._memory[TEXT_AT:SIZE] = phase.encode()[: SIZE - TEXT_AT].ljust(SIZE - TEXT_AT, b"\0")
        words[BEATS] += 1

    def close(self) -> None:
        self._words.release()
        self._memory.close()
        os.close(self.descriptor)


def read_beat(memory: mmap.mmap) -> Beat:
    """The last beat, from the other end."""
    words = memoryview(memory)[:TEXT_AT].cast("q")
    phase = memory[TEXT_AT:SIZE].rstrip(b"\0").decode(errors="replace")
    return Beat(words[BEATS], words[STEP], words[STEPS_DONE], words[TIME_NS] / 1e9, phase)
