"""Checkpoints written beside training: a copy in host memory, and a thread that writes it.

Training waits for the copy (staging) and goes on; the files, their hashes and the commit come in a thread of each
rank, whose agreements have a process group of their own. One save is under way at a time: the next one, or the end of
the run, waits for it. That is also where all ranks learn at the same step what became of it.
"""

import logging
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llamatrain.checkpoint.store import Share
from llamatrain.errors import CheckpointError

log = logging.getLogger("llamatrain")

RETRY_AFTER_S = 1.0  # doubled with every try


class Staging:
    """Host memory into which a rank's share is copied; kept from one save to the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[tuple[str, str, int], Tensor] = {}

    def copy(self, share: Share) -> Share:
        """The share as it is now, whatever becomes of the tensors; until the next copy."""
        boxes = {
            group: {
                name: [(self._kept((group, name, n), box), offset) for n, (box, offset) in enumerate(parts)]
                for name, parts in own.items()
            }
            for group, own in share.boxes.items()
        }
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return Share(boxes, share.entries)

    def _kept(self, key: tuple[str, str, int], box: Tensor) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or memory.shape != box.shape or memory.dtype != box.dtype:
            pinned = self._device.type == "cuda"  # else the copy is several times slower
            memory = self._memory[key] = torch.empty(box.shape, dtype=box.dtype, pin_memory=pinned)
        return memory.copy_(box, non_blocking=True)


class Background:
    """One job at a time in a thread of its own.

    A thread that outlives its process' last step is waited for where the process is alone; of many, a rank that fails
    must not wait for others that are gone.
    """

    def __init__(self, *, daemon: bool) -> None:
        self._daemon = daemon
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin `job`; the one before must have been waited for."""
        assert self._thread is None, "a job is under way"

        def work() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=self._daemon)
        self._thread.start()

    def wait(self) -> bool:
        """Until the job is done; whether there was one. Raises what it raised."""
        if self._thread is None:
            return False
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error
        return True


def retried(write: Callable[[], None], *, retries: int, told: Callable[[CheckpointError], None]) -> None:
    """`write`, and again after a while if it fails, so often; each failure is `told`. Raises the last CheckpointError.

    All ranks fail together, so they come back together.
    """
    pause = RETRY_AFTER_S
    for left in range(retries, -1, -1):
        try:
            return write()
        except CheckpointError as error:
            told(error)
            if not left:
                raise
            log.warning("trying again in %.0f s, %d more time(s)", pause, left)
            time.sleep(pause)
            pause *= 2
