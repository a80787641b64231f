"""Which rank is slow: each rank's own compute time, gathered at log steps without stopping the device.

All ranks of a step end together, for each waits in its collectives until the slowest is there: step times tell nothing.
What a rank needs for itself is measured where nobody can make it wait:

- on the host, from the moment it has its batch until its first collective;
- on the device, in each block's forward of the step's first micro-batch, from when the weights have been gathered to
  when the block is done (on CUDA by events, which are read once they have passed; on the CPU the host's clock).

Their sum is `perf/compute_ms`, the mean over the steps since the last log line. It is a part of the step, the same on
every rank, not the whole: backward and the optimizer are left out, and what slows only them is not seen. With tp or cp
the ranks of a group wait for one another within a block and share what one of them loses: the group's node is named
rightly, the rank perhaps not. Time waited for data stands apart.

At the end of the step before a log line every rank sends its two numbers to rank 0, beside the step; the log line has
what came.
"""

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamatrain.distributed import World
from llamatrain.model.llama import Block
from llamatrain.observe.records import Record

log = logging.getLogger(__name__)

PATIENCE = 5  # log lines in a row with the same slow rank, before it is told
TELL_EVERY = 100  # log lines between two warnings of it
LEAST_MS = 2.0  # less is the noise of any machine


class Stragglers:
    """This rank's part of the measuring; on rank 0 also the judge. Alone, it does nothing."""

    def __init__(
        self, model: nn.Module, *, world: World, device: torch.device, nodes: Sequence[str], factor: float
    ) -> None:
        """`nodes` by rank; `factor`: how many times the median's time is slow, 0 for never."""
        self._world, self._judge = world, Judge(nodes, factor)
        self._on_cuda = device.type == "cuda"
        self._blocks = [module for module in model.modules() if isinstance(module, Block)] if world.size > 1 else []
        self._to_measure = 0  # blocks of this step's first micro-batch
        self._began = 0.0
        self._host_ms = 0.0
        self._marks: list[tuple[Any, Any]] = []  # of this step's blocks: when each began and ended
        self._under_way: deque[tuple[float, list[tuple[Any, Any]]]] = deque()  # steps the device may not have done
        self._compute_ms: list[float] = []  # of the steps since the last sending
        self._wait_ms: list[float] = []
        self._sent: tuple[dist.Work, list[Tensor] | None] | None = None
        for block in self._blocks:  # FSDP's hooks gather before the one and free after the other
            block.register_forward_pre_hook(self._block_begins)
            block.register_forward_hook(self._block_ends, prepend=True)

    def step_begins(self, *, data_wait_s: float) -> None:
        """The batch is there."""
        self._began = time.perf_counter()
        if self._blocks:  # or nobody would ever take it
            self._wait_ms.append(data_wait_s * 1e3)

    def first_collective(self) -> None:
        """From here on others can make this rank wait."""
        self._host_ms = (time.perf_counter() - self._began) * 1e3
        self._to_measure, self._marks = len(self._blocks), []

    def step_ended(self, *, send: bool) -> None:
        """`send`: the next step is logged."""
        if not self._blocks:
            return
        self._under_way.append((self._host_ms, self._marks))
        while self._under_way and self._is_done(self._under_way[0][1]):
            host_ms, marks = self._under_way.popleft()
            self._compute_ms.append(host_ms + sum(self._between(*mark) for mark in marks))
        if send:
            self._send()

    def record(self) -> Record:
        """The `perf/` fields, on rank 0; all ranks call it at the same log steps."""
        if self._sent is None:
            return {}
        received = self._receive()
        return {} if received is None else self._judge.record([tuple(numbers.tolist()) for numbers in received])

    def close(self) -> None:
        """Wait for what is under way, so that no rank leaves in the middle of it."""
        if self._sent is not None:
            self._receive()

    def _block_begins(self, block: nn.Module, args: Any) -> None:
        if self._to_measure:
            self._marks.append((self._mark(), None))

    def _block_ends(self, block: nn.Module, args: Any, out: Any) -> None:
        if self._to_measure:
            self._to_measure -= 1
            self._marks[-1] = (self._marks[-1][0], self._mark())

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _is_done(self, marks: list[tuple[Any, Any]]) -> bool:
        return not self._on_cuda or not marks or bool(marks[-1][1].query())

    def _between(self, begin: Any, end: Any) -> float:
        """Milliseconds."""
        return float(begin.elapsed_time(end)) if self._on_cuda else (end - begin) * 1e3

    def _send(self) -> None:
        self.close()  # a rollback may have come between sending and logging
        means = [statistics.fmean(values) if values else math.nan for values in (self._compute_ms, self._wait_ms)]
        self._compute_ms, self._wait_ms = [], []
        own = torch.tensor(means, dtype=torch.float64)
        into = [torch.empty_like(own) for _ in range(self._world.size)] if self._world.leads else None
        work = dist.gather(own, into, dst=0, group=self._world.control, async_op=True)
        assert work is not None
        self._sent = work, into

    def _receive(self) -> list[Tensor] | None:
        assert self._sent is not None
        work, received = self._sent
        self._sent = None
        work.wait()
        return received


class Judge:
    """Finds the slow one in what the ranks sent, and tells of one that stays slow."""

    def __init__(self, nodes: Sequence[str], factor: float) -> None:
        self._nodes, self._factor = nodes, factor
        self._suspect, self._times = -1, 0  # the rank that was slow in the last log lines, and in how many

    def record(self, sent: Sequence[tuple[float, ...]]) -> Record:
        """Fields for the log line from (compute, data wait) of each rank, in ms; NaN where a rank had none yet."""
        compute = {rank: numbers[0] for rank, numbers in enumerate(sent) if math.isfinite(numbers[0])}
        waits = {rank: numbers[1] for rank, numbers in enumerate(sent) if math.isfinite(numbers[1])}
        fields: Record = {}
        if compute:
            slowest = max(compute, key=compute.__getitem__)
            self._watch(slowest, compute[slowest], statistics.median_low(compute.values()))
            fields |= {
                "perf/compute_ms_min": min(compute.values()),
                "perf/compute_ms_mean": statistics.fmean(compute.values()),
                "perf/compute_ms_max": compute[slowest],
                "perf/slowest_rank": slowest,
                "perf/slowest_node": self._nodes[slowest],
            }
        if waits:
            longest = max(waits, key=waits.__getitem__)
            fields |= {"perf/data_wait_ms_max": waits[longest], "perf/data_wait_slowest_rank": longest}
        return fields

    def _watch(self, rank: int, its_ms: float, median_ms: float) -> None:
        slow = self._factor > 0 and its_ms >= self._factor * median_ms and its_ms - median_ms >= LEAST_MS
        self._times = (self._times + 1 if rank == self._suspect else 1) if slow else 0
        self._suspect = rank
        if self._times >= PATIENCE and (self._times - PATIENCE) % TELL_EVERY == 0:
            log.warning(
                "rank %d on %s is slow: %.1f ms for what takes the median rank %.1f ms, in the last %d log lines too "
                "(logging.straggler_factor=%g)",
                rank,
                self._nodes[rank],
                its_ms,
                median_ms,
                self._times,
                self._factor,
            )
