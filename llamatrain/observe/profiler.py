"""A profile of a few steps, summarised: how much of their time is compute, exposed communication, data wait, host gaps.

torch's profiler records `logging.profile_steps` steps on every rank, after `logging.profile_after_steps` of this start
in which memory is allocated for the first time and whatever compiles has compiled. Each rank sorts its record into
the parts of `intervals`, rank 0 writes those of all ranks to `profile/step-XXXXXXXX/summary.json` in the run's
directory and prints a table, and traces go beside it (for chrome://tracing or ui.perfetto.dev).

What counts as what, on CUDA, on the device's own clock:

- communication: kernels of NCCL, on whichever stream. They run from when this rank is there until the slowest is, so
  waiting for a slower rank is communication; on the slow rank it is not.
- compute: every other kernel, copy or fill. So FSDP's copies into and out of its buffers are compute.
- data wait: the host is waiting for the loader, and the device does neither.
- host gaps: the rest. The host launches too late, or reads something back.

On CPU the device is the thread that trains:

- compute: torch's operators on that thread, also those inside a collective's range (copies into buffers), and
  compiled graphs as wholes.
- communication: no operator runs, and that thread is inside a collective (c10d's operators, FSDP2's gathering and
  reducing), where it waits for gloo to begin and to end; or one of gloo's own threads carries a transfer. So nothing
  is ever hidden: training on CPU waits for each transfer where it asks for it, and what gloo carries while operators
  run is the hosts' agreement on requests.
- data wait: as above. Host gaps: Python between the operators.

The device is waited for before the first and after the last of the steps, no longer between them, so their time is
that of the wall clock, and work of one step that reaches into the next is in one of them. Validation and saving are
cut out. Recording costs time on the host for each operator: small models look more host-bound than they are.
"""

import logging
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from llamatrain.config import LoggingConfig
from llamatrain.device import device_name, finish
from llamatrain.distributed import World
from llamatrain.files import write_json_atomically
from llamatrain.observe.intervals import (
    COMMUNICATION,
    COMPUTE,
    DATA_WAIT,
    Interval,
    Span,
    TimeShares,
    merged,
    time_shares,
    without,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

STEP_RANGE, WAIT_RANGE, ASIDE_RANGE = "llamatrain::step", "llamatrain::data_wait", "llamatrain::aside"
OPERATOR = re.compile(
    r"(?!c10d::|_c10d_functional::|autograd::|torch::|FSDP::|llamatrain::|gloo:)\w+::|## Call CompiledFxGraph"
)
COLLECTIVE = re.compile(
    r"c10d::|_c10d_functional::|FSDP::(all_gather|post_backward_reduce|post_backward_rs_wait)( \(|$)"
)
GLOO = "gloo:"
SUMMARY_VERSION = 1
LABELS = {  # in the order of the table; all but the last add up to it
    "compute": "compute",
    "exposed_communication": "exposed communication",
    "data_wait": "data wait",
    "host_gaps": "host gaps",
    "wall": "a step",
}


def aside() -> record_function:
    """Marks what is not training (validation, saving), for a profile to leave out."""
    return record_function(ASIDE_RANGE)


class Profiler:
    """Watches a training loop; a context manager, since the last step it is to record may be the run's last.

    `step` is the last step before the loop, `last_step` the one it is to end with, if that is known. The profile is
    written into the run's directory. `pause` is told the seconds that this takes from training. An error that leaves
    the context leaves the profile as it is.
    """

    def __init__(
        self,
        settings: LoggingConfig,
        run_dir: Path,
        *,
        step: int,
        world: World,
        device: torch.device,
        pause: Callable[[float], None],
        last_step: int | None = None,
    ) -> None:
        first = step + settings.profile_after_steps + 1
        self._steps = range(first, first + settings.profile_steps)
        self._skipped = settings.profile_after_steps
        self._all_traces = settings.profile_traces == "all"
        self._directory = run_dir / "profile" / f"step-{first:08d}"
        self._world, self._device, self._pause = world, device, pause
        self._record: profile | None = None
        self._left = len(self._steps)  # to begin
        self._range: record_function | None = None  # of the step under way
        if self._steps and last_step is not None and self._steps[-1] > last_step:
            log.warning(
                "%s are to be profiled and step %d is the last: nothing of them will be kept; lower "
                "logging.profile_after_steps or logging.profile_steps",
                _told(self._steps),
                last_step,
            )

    def watched(self, batches: Iterable[T]) -> Iterable[T]:
        """The batches. What is done with one until the next is asked for is its step."""
        return self._watch(iter(batches)) if self._steps else batches

    def _watch(self, batches: Iterator[T]) -> Iterator[T]:
        yield from islice(batches, self._skipped - 1)
        self._start()
        yield from islice(batches, 1)
        finish(self._device)
        for _ in self._steps:
            self._begin_step()
            with record_function(WAIT_RANGE):
                batch = next(batches)
            yield batch
            self._end_step()
        self._write()
        yield from batches

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        if self._range is not None and not self._left:
            self._end_step()
            self._write()
        elif self._left:
            self._stop()
            log.warning("the run ends before %s are profiled: nothing of them is kept", _told(self._steps))

    def _start(self) -> None:
        """The profiler warms up for a step, then records."""
        began = time.perf_counter()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        plan = schedule(wait=0, warmup=1, active=len(self._steps), repeat=1)
        self._record = profile(activities=activities, schedule=plan, acc_events=True)
        self._record.start()
        self._pause(time.perf_counter() - began)

    def _begin_step(self) -> None:
        assert self._record is not None
        self._record.step()
        self._left -= 1
        self._range = record_function(STEP_RANGE)
        self._range.__enter__()

    def _end_step(self) -> None:
        assert self._range is not None
        if not self._left:
            finish(self._device)
        self._range.__exit__(None, None, None)
        self._range = None

    def _stop(self) -> None:
        if self._record is not None:
            self._record.stop()

    def _write(self) -> None:
        """Summarise on every rank, write and tell on rank 0."""
        began = time.perf_counter()
        self._stop()
        assert self._record is not None
        intervals, windows = classified(self._record.events(), self._device.type)
        reports = self._world.gather_to_leader((socket.gethostname(), time_shares(intervals, windows)))
        if reports is not None:
            log.info(table([shares for _, shares in reports], self._steps))
        try:
            if self._world.leads or self._all_traces:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._record.export_chrome_trace(str(self._directory / f"rank{self._world.rank:05d}.json.gz"))
            if reports is not None:
                write_json_atomically(self._directory / "summary.json", summary(reports, self._steps, self._device))
                log.info("  summary and traces: %s", self._directory)
        except OSError as error:
            log.warning("%s: the profile cannot be written there (%s)", self._directory, error)
        self._record = None  # it is large
        self._pause(time.perf_counter() - began)


def classified(events: Iterable[Any], device: str) -> tuple[list[Interval], list[Span]]:
    """Events of torch's profiler as intervals of the kinds of this module's docstring, and the time to account for."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    steps = [event for event in on_host if event.name == STEP_RANGE]
    asides = [_span(event) for event in on_host if event.name == ASIDE_RANGE]
    windows = without(merged(map(_span, steps)), merged(asides))
    found = [(*_span(event), DATA_WAIT) for event in on_host if event.name == WAIT_RANGE]
    if device == "cpu":
        return found + _on_cpu([e for e in on_host if e.thread == steps[0].thread], on_host), windows
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found.append((*_span(event), COMMUNICATION if "nccl" in event.name.lower() else COMPUTE))
    return found, windows


def _on_cpu(training: Iterable[Any], every_thread: Iterable[Any]) -> list[Interval]:
    operators = merged(_span(event) for event in training if OPERATOR.match(event.name))
    collectives = merged(_span(event) for event in training if COLLECTIVE.match(event.name))
    transfers = [_span(event) for event in every_thread if event.name.startswith(GLOO)]
    waiting = without(merged(collectives + transfers), operators)
    return [(*span, COMPUTE) for span in operators] + [(*span, COMMUNICATION) for span in waiting]


def _span(event: Any) -> Span:
    """Nanoseconds."""
    return round(event.time_range.start * 1e3), round(event.time_range.end * 1e3)


def summary(reports: Sequence[tuple[str, TimeShares]], steps: range, device: torch.device) -> dict[str, Any]:
    """What summary.json holds: seconds of all steps together, by rank."""
    return {
        "version": SUMMARY_VERSION,
        "steps": list(steps),
        "device": device_name(device),
        "torch": torch.__version__,
        "ranks": [
            {
                "rank": rank,
                "host": host,
                **{f"{part}_s": getattr(shares, part) / 1e9 for part in (*LABELS, "hidden_communication")},
            }
            for rank, (host, shares) in enumerate(reports)
        ],
    }


def table(reports: Sequence[TimeShares], steps: range) -> str:
    """The parts of an average step, over all ranks, and on which ranks each was smallest and largest."""
    wall = sum(shares.wall for shares in reports)
    per_step = 1e6 * len(steps) * len(reports)
    lines = [f"profile of {_told(steps)}" + (f", mean of {len(reports)} ranks:" if len(reports) > 1 else ":")]
    for part, label in LABELS.items():
        values = [getattr(shares, part) for shares in reports]
        line = f"  {label:<22}{sum(values) / per_step:>10.1f} ms{sum(values) / wall:>8.1%}"
        if len(reports) > 1 and part != "wall":
            shares_of = [value / shares.wall for value, shares in zip(values, reports, strict=True)]
            least, most = (choose(range(len(reports)), key=shares_of.__getitem__) for choose in (min, max))
            line += f"   {shares_of[least]:.1%} on rank {least} to {shares_of[most]:.1%} on rank {most}"
        lines.append(line)
    communication = sum(shares.communication for shares in reports)
    hidden = sum(shares.hidden_communication for shares in reports)
    if communication:
        lines.append(
            f"  communication is {communication / per_step:.1f} ms of a step, {hidden / communication:.1%} of it "
            "behind compute"
        )
    return "\n".join(lines)


def _told(steps: range) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
