"""Requests to stop or to save, agreed by all ranks.

A request reaches one rank, by a signal or by the end of its launcher, or rank 0, by a file in the run directory. At
the end of every step each rank takes what all had posted one step before and posts its own anew: an all-reduce of two
numbers over the control group, which runs beside the step. So what is asked during step t takes effect on every rank
at the end of step t+1; what is asked before the first step, at its end. A process alone acts at once.
"""

import math
import os
import time

import torch
import torch.distributed as dist
from torch import Tensor

from llamatrain.distributed import World
from llamatrain.resilience.control import FILE_REASON, SAVE_FILE, STOP_FILE, STOP_SIGNALS, StopRequest
from llamatrain.run_directory import RunDirectory

ORPHANED = "the launcher is gone"
# the same on all ranks, which agree on the highest position
REASONS = ("", *(number.name for number in STOP_SIGNALS), FILE_REASON, ORPHANED)
LOOK_EVERY_S = 0.2  # a look at the files is a question to a file system that others use too


class Agreement:
    """What all ranks have agreed to do; `stop_reason` and `save_requested` are the same everywhere."""

    def __init__(
        self, stop: StopRequest, directory: RunDirectory, world: World, *, save_every_s: float = math.inf
    ) -> None:
        self.stop_reason: str | None = None
        self.save_requested = False
        self._stop, self._directory, self._world = stop, directory, world
        self._posted: tuple[dist.Work, Tensor] | None = None
        self._looked_at = -LOOK_EVERY_S
        self._stop_file = self._save_file = False
        self._launcher = os.getppid()
        self._save_every_s, self._saved_at = save_every_s, time.monotonic()

    def post(self) -> None:
        """Tell the others what is asked of this rank."""
        requests = self._own_requests()
        if self._world.control is None:
            self._take(requests)
            return
        work = dist.all_reduce(requests, dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        self._posted = work, requests

    def step_ended(self) -> None:
        """Take what was posted before, and post anew."""
        self._receive()
        self.post()

    def look_now(self) -> None:
        """Agree at once; for long work outside the steps, such as validation."""
        self._receive()
        self.post()
        self._receive()

    def close(self) -> None:
        """Wait for what is under way, so that no rank leaves in the middle of it."""
        self._receive()

    def save_begun(self) -> None:
        """What was asked for happens; the clock of checkpoint.every_minutes starts anew."""
        self.save_requested, self._saved_at = False, time.monotonic()

    def honoured(self, file: str) -> None:
        """Remove the control file that has been acted on; who asks again makes it again."""
        self._directory.clear_request(file)
        if file == SAVE_FILE:
            self._save_file = False

    def _receive(self) -> None:
        if self._posted is None:
            return
        work, requests = self._posted
        self._posted = None
        work.wait()
        self._take(requests)

    def _take(self, requests: Tensor) -> None:
        stop, save = requests.tolist()
        if stop:
            self.stop_reason = REASONS[stop]
        self.save_requested = self.save_requested or bool(save)

    def _own_requests(self) -> Tensor:
        if time.monotonic() - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._stop_file = self._directory.requests(STOP_FILE)
            seen, self._save_file = self._save_file, self._directory.requests(SAVE_FILE)
            save = self._save_file and not seen  # asked once, however long the file takes to go
        else:
            save = False
        if self._world.leads and time.monotonic() - self._saved_at >= self._save_every_s:
            save, self._saved_at = True, time.monotonic()  # asked once, though it happens a step later
        reason = self._stop.reason or (FILE_REASON if self._stop_file else "")
        if not reason and self._world.size > 1 and os.getppid() != self._launcher:
            reason = ORPHANED  # nobody would restart these ranks, end them, or know of them
        return torch.tensor([REASONS.index(reason), int(save)])
