"""Makes the update of a step, unless the step is bad; and lets the host know a step later, without waiting for it.

The device compares the step's loss and gradient norm, which are the same on all ranks, with the limits, and tells the
optimizer by a number (torch's `found_inf`, meant for loss scaling) to leave weights, moments and its own count of
updates as they are. The three numbers are copied to the host beside the work that follows, and read when the next
step's update is due; by then its forwards and backwards are queued, so the device does not run dry. Where the host
waits for the step anyway (to log, to save) they are read at once.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from llamatrain.resilience.guard import Guard, Limits, Numbers, Spike, for_journal
from llamatrain.run_directory import RunDirectory

log = logging.getLogger("llamatrain")

Samples = tuple[int, int]  # [first, end)


class BadSteps:
    """Every step's update, and what was seen of the last one."""

    def __init__(
        self, guard: Guard, optimizer: torch.optim.Optimizer, directory: RunDirectory, device: torch.device
    ) -> None:
        self.guard = guard
        self.spike: Spike | None = None  # to be rolled back from
        self.last: Numbers | None = None  # read
        self._optimizer: Any = optimizer  # torch's classes do not declare `found_inf`
        self._directory = directory
        self._host = Host(device)
        self._unread: tuple[int, Samples] | None = None  # a step, and its samples

    @torch.no_grad()
    def update(self, step: int, loss: Tensor, grad_norm: Tensor, samples: Samples) -> None:
        """The optimizer's step, or none if `step` is bad; gradients are gone in either case."""
        self.settle()
        skip = self.apply(loss, grad_norm)
        self._host.send(torch.stack([loss, grad_norm, skip]))
        self._unread = step, samples

    @torch.no_grad()
    def apply(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """`update`, of which the host is told nothing: 1 if the step was skipped, else 0, an fp32 scalar."""
        limits = self.guard.update_limits()
        good = (loss.abs() <= limits.loss) & (grad_norm <= limits.grad_norm)  # nan is not, nor is infinity
        skip = 1 - good.float()
        self._optimizer.found_inf = skip
        self._optimizer.step()
        self._optimizer.zero_grad()
        return skip

    def settle(self) -> None:
        """Read the numbers of the last step, if that is not done."""
        if self._unread is None:
            return
        (step, samples), self._unread = self._unread, None
        loss, grad_norm, skip = self._host.receive()
        numbers = Numbers(step, loss, grad_norm, bool(skip), samples)
        limits = self.guard.limits()
        spike = self.guard.note(numbers)
        if numbers.skipped:
            self._tell("skipped", numbers, limits, f"no update; {self.guard.in_a_row} in a row")
        elif spike and self.guard.settings.spike_action == "rollback":
            self.spike = self.spike or Spike(numbers, limits)
        elif spike:
            self._tell("spike", numbers, limits, "far above the steps before")
        self.last = numbers

    def forget(self) -> None:
        """What was seen of steps that are now undone."""
        self._unread = self.spike = self.last = None

    def _tell(self, event: str, numbers: Numbers, limits: Limits, what: str) -> None:
        told = f" (limits {limits.loss:.6g}, {limits.grad_norm:.6g})" if numbers.finite else ""
        log.warning("%s%s: %s", numbers.describe(), told, what)
        self._directory.record(event, **for_journal(numbers, limits))


class Host:
    """Three numbers on their way from the device."""

    def __init__(self, device: torch.device) -> None:
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        self._memory = torch.empty(3, dtype=torch.float32, pin_memory=self._arrived is not None)

    def send(self, numbers: Tensor) -> None:
        """Begin to copy fp32 [3]; what was sent before must have been received."""
        self._memory.copy_(numbers, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def receive(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._memory.tolist()
