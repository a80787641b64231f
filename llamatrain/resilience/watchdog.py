"""A rank's side of the watchdog: it beats, and prepares what a rank that stands still can no longer do.

Beside every rank runs a small process, its watchman (`watchman.py`), that looks whether the rank still beats. What it
needs of a rank that hangs is laid ready before: a signal handler in C that writes the stacks of all threads without
Python's lock, into memory and not to a disk that may be what hangs; and a thread that sleeps until the watchman asks
for the last collectives, which torch's flight recorder keeps (`TORCH_FR_BUFFER_SIZE`).
"""

import faulthandler
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import llamatrain
from llamatrain.config import ResilienceConfig
from llamatrain.process import Process
from llamatrain.resilience.control import STOP_SIGNALS
from llamatrain.resilience.hang import own_line
from llamatrain.resilience.pulse import Pulse
from llamatrain.resilience.watchman import ASK, END, STANDSTILL, Post

log = logging.getLogger("llamatrain")

STACK_SIGNAL = signal.SIGUSR2
COLLECTIVES_TOLD = 64  # of each process group
TIMED_OUT = ("Timed out waiting", "timed out", "Timeout")  # in what gloo and NCCL raise


class Watchdog:
    """Watches this rank from `__enter__` to `__exit__`; with both limits 0 it does nothing.

    `hang` names the folder of the run directory for the ranks' reports, the same on all of them.
    """

    def __init__(self, settings: ResilienceConfig, run_dir: Path, process: Process, *, hang: str, attempt: str) -> None:
        self.on = bool(settings.hang_timeout_s or settings.hang_timeout_at_start_s)
        self._settings, self._run_dir, self._process = settings, run_dir, process
        self._hang, self._attempt = hang, attempt

    def __enter__(self) -> Self:
        if self.on and not hasattr(os, "memfd_create"):
            log.warning("the watchdog needs Linux: a hang would not be noticed")
            self.on = False
        if not self.on:
            return self
        self._pulse = Pulse()
        self._stacks, self._answers = os.memfd_create("llamatrain-stacks"), os.memfd_create("llamatrain-answers")
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        self._watchman = self._start_watchman()
        self._thread = threading.Thread(target=self._answer, name="llamatrain-watchdog", daemon=True)
        self._thread.start()
        return self

    def _start_watchman(self) -> subprocess.Popen[bytes]:
        """It inherits a mask that keeps signals meant for the rank away, and the console for its last words."""
        post = Post(
            rank=self._process.rank,
            world_size=self._process.world_size,
            pid=os.getpid(),
            run_dir=os.path.abspath(self._run_dir),
            hang=self._hang,
            attempt=self._attempt,
            limit_s=self._settings.hang_timeout_s,
            start_limit_s=self._settings.hang_timeout_at_start_s,
            stack_signal=int(STACK_SIGNAL),
            descriptors=(self._pulse.descriptor, self._stacks, self._answers),
        )
        package = str(Path(llamatrain.__file__).parent.parent)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, STACK_SIGNAL})
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-S", "-m", "llamatrain.resilience.watchman", json.dumps(asdict(post))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=post.descriptors,
                env={**os.environ, "PYTHONPATH": package},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def beat(self, step: int, phase: str) -> None:
        """Say that this rank has come to `step`, and at what it is."""
        if self.on:
            self._pulse.beat(step, phase)

    def report_if_timed_out(self, error: BaseException) -> None:
        """A collective that ran out of time is a hang too: the watchman reports it, and ends this process."""
        if not self.on or not timed_out(error):
            return
        line = " ".join(str(error).split())[:300]
        with suppress(OSError):
            self._tell(f"{STANDSTILL} {line}")
            self._watchman.wait(timeout=120)  # it does not come to that

    def _tell(self, line: str) -> None:
        assert self._watchman.stdin is not None
        os.write(self._watchman.stdin.fileno(), f"{line}\n".encode())

    def _answer(self) -> None:
        """Sleep until the watchman asks for the collectives."""
        assert self._watchman.stdout is not None
        for question in iter(self._watchman.stdout.readline, b""):
            if question.strip() == ASK:
                answer = json.dumps(last_collectives()).encode()
                os.pwrite(self._answers, answer, 0)
                self._tell(f"{ASK.decode()} {len(answer)}")
        if self.on:
            log.warning("the process that watches this rank has ended: a hang would not be noticed here")

    def __exit__(self, *_: object) -> None:
        if not self.on:
            return
        self.on = False
        with suppress(OSError):
            self._tell(END)
        self._watchman.wait()
        self._thread.join()
        for pipe in (self._watchman.stdin, self._watchman.stdout):
            if pipe is not None:
                pipe.close()
        faulthandler.unregister(STACK_SIGNAL)
        self._pulse.close()
        os.close(self._stacks)
        os.close(self._answers)


def timed_out(error: BaseException) -> bool:
    """Whether this is a collective's own time-out, gloo's or NCCL's."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in TIMED_OUT)


def last_collectives(keep: int = COLLECTIVES_TOLD) -> list[dict[str, Any]]:
    """What the flight recorder holds of each process group's last ones, oldest first; of messages between two, none.

    Fields: group, number, op, elements, dtype, done, line, and whether a thread beside training (a save) called it.
    """
    import torch  # in the thread that answers: the rank has it

    recorder = torch._C._distributed_c10d
    others = set(threading.enumerate()) - {threading.main_thread()}
    beside = {str(thread.ident) for thread in others if not isinstance(thread, threading._DummyThread)}  # autograd's
    found: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):  # gloo's, and NCCL's on builds that have it
        dump: Callable[[bool, bool, bool], bytes] | None = getattr(recorder, name, None)
        if dump is None:
            continue
        try:
            entries = pickle.loads(dump(True, True, False)).get("entries", [])
        except (IndexError, RuntimeError):  # nothing was recorded
            continue
        found += [_collective(entry, beside) for entry in entries if not entry.get("is_p2p")]
    kept: list[dict[str, Any]] = []
    for group in dict.fromkeys(entry["group"] for entry in found):
        kept += [entry for entry in found if entry["group"] == group][-keep:]
    return kept


def _collective(entry: dict[str, Any], beside: set[str]) -> dict[str, Any]:
    elements = 0
    for shape in entry.get("input_sizes") or []:
        count = 1
        for size in shape:
            count *= size
        elements += count
    frames = [(frame["filename"], frame["line"], frame["name"]) for frame in entry.get("frames") or []]
    return {
        "group": entry["process_group"][0],
        "number": entry["collective_seq_id"],
        "op": entry["profiling_name"].rpartition(":")[2],
        "elements": elements,
        "dtype": ", ".join(entry.get("input_dtypes") or []),
        "done": bool(entry.get("retired")) or entry.get("state") == "completed",
        "line": own_line(frames),
        "beside": str(entry.get("thread_id")) in beside,
    }


def hang_name() -> str:
    """Of the folder for a launch's reports."""
    return time.strftime("hang-%Y%m%d-%H%M%S")
