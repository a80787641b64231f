"""Doing the units of a plan on this machine: one stage after the other, each with a pool of processes.

The processes keep nothing between units but loaded models; all state is the ledger, so any of them, or all, may die at
any moment. What is done is not done again.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.documents import byte_bar
from data_tools.engine.ledger import LEDGER, read_stage
from data_tools.engine.plan import Plan, Stage, Unit, read_plan
from data_tools.engine.stages import OWN_PROCESSES, Workplace, pending
from data_tools.locking import only_writer
from data_tools.progress import Tell, watched
from llamatrain.errors import ConfigError, LlamatrainError

SHOWN = 5  # failed units whose errors are printed
LOOK_EVERY_S = 0.5  # at how far the processes are

Results = Iterator[tuple[Unit, str | None]]


class UnitsFailed(LlamatrainError):
    """Units that could not be made; all others of their stage are done."""


class StageIncomplete(LlamatrainError):
    """A stage that has to wait for another."""


def run_stages(plan: Plan, stages: Sequence[Stage], *, workers: int, part: tuple[int, int] = (0, 1)) -> None:
    """Make what is missing of these stages, in order. Raises UnitsFailed, ConfigError and DataError."""
    with _Processes(plan, workers) as processes:
        for stage in stages:
            units = units_of_part(stage, part)
            missing = pending(plan, stage, units)
            if not missing:
                continue
            failed = _run_stage(plan, processes, stage, missing, of=len(units))
            if failed:
                raise UnitsFailed(
                    f"{len(failed)} of {len(missing)} units of {stage.name} could not be made; the others are done, "
                    f"and starting again tries these again:\n{_shown(stage, failed)}"
                )


def _run_stage(plan: Plan, processes: "_Processes", stage: Stage, missing: list[Unit], *, of: int) -> dict[str, str]:
    """Errors by unit, with a bar over the bytes that the units read. It moves within units too."""
    if stage.name in OWN_PROCESSES:  # and a bar of their own
        return {unit.id: error for unit, error in processes.run(stage, missing, {}, lambda step: None) if error}
    sizes = bytes_to_read(plan, stage, missing)
    failed, done = {}, of - len(missing)
    with byte_bar(_label(stage, done, of), sum(sizes.values())) as bar:
        for unit, error in processes.run(stage, missing, sizes, bar.update):
            done += 1
            bar.set_description(_label(stage, done, of), refresh=False)
            if error is not None:
                failed[unit.id] = error
    return failed


def _label(stage: Stage, done: int, of: int) -> str:
    return f"{stage.name}, {done} of {of} units done"


def bytes_to_read(plan: Plan, stage: Stage, units: Sequence[Unit]) -> dict[str, int]:
    """What each of the units reads: raw files, or what the stages before have written."""
    if stage.name == "mark":  # each unit reads its part of all the hashes of its group
        written = _bytes_written(plan, "hash")
        sizes = {}
        for group in {unit.group for unit in units}:
            hashes = sum(written.get(unit.id, 0) for unit in plan.group("hash", group))
            sizes[group] = hashes // len(plan.group("mark", group))
        return {unit.id: sizes[unit.group] for unit in units}
    if stage.name == "near":
        return {unit.id: sum(_bytes_written(plan, "sketch").values()) for unit in units}
    if stage.documents_of is not None:
        written = _bytes_written(plan, stage.documents_of)
        return {unit.id: written.get(unit.id, unit.bytes) for unit in units}
    return {unit.id: unit.bytes for unit in units}


def _bytes_written(plan: Plan, stage: str) -> dict[str, int]:
    entries = read_stage(plan.output, stage)
    return {entry["unit"]: sum(file["bytes"] for file in entry["outputs"]) for entry in entries}


def _shown(stage: Stage, failed: dict[str, str]) -> str:
    shown = "\n".join(f"{stage.name}/{unit}: {error}" for unit, error in sorted(failed.items())[:SHOWN])
    return shown + (f"\nand {len(failed) - SHOWN} more" if len(failed) > SHOWN else "")


def units_of_part(stage: Stage, part: tuple[int, int]) -> list[Unit]:
    """The units of part I of N, largest first; which are done already plays no role, so that parts never overlap."""
    number, parts = part
    return sorted(stage.units, key=lambda unit: (-unit.bytes, unit.id))[number::parts]


def check_complete(plan: Plan, stages: Sequence[Stage]) -> None:
    """Raises StageIncomplete, naming the units that have no entry."""
    for stage in stages:
        directory = plan.output / LEDGER / stage.name
        there = set(os.listdir(directory)) if directory.is_dir() else set()
        missing = [unit.id for unit in stage.units if f"{unit.id}.json" not in there]
        if missing:
            named = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
            raise StageIncomplete(f"{stage.name} is not complete: {named} missing; run prepare again to make them")


@contextmanager
def at_work(output: Path, *, shared: bool) -> Iterator[None]:
    """Parts of a stage (`shared`) may run side by side, but nothing beside a driver. Raises DataError."""
    output.mkdir(parents=True, exist_ok=True)
    with only_writer(output, shared=shared, who="prepare"):
        yield


def remove_left_overs(output: Path) -> None:
    """What killed processes have not finished writing."""
    for path in output.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


class _Processes:
    """This process alone, or a pool that lives through all stages, as starting one takes a second."""

    def __init__(self, plan: Plan, workers: int) -> None:
        self.plan, self.workers = plan, workers
        self.here = Workplace(plan, workers=workers)
        self.pool: ProcessPoolExecutor | None = None
        self.read: Any = ()

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def run(self, stage: Stage, units: list[Unit], sizes: Mapping[str, int], advance: Tell) -> Results:
        """Each unit with its error as they are done. Raises ConfigError, and UnitsFailed when a process dies.

        `advance` is told of the bytes read in between, of each unit as many as `sizes` says.
        """
        if self.workers > 1 and len(units) > 1 and stage.name not in OWN_PROCESSES:
            yield from self._in_pool(stage, units, sizes, advance)
            return
        for unit in units:
            with watched(sizes.get(unit.id, 0), advance):
                error = _errors_of(self.here, stage, unit)
            yield unit, error

    def _in_pool(self, stage: Stage, units: list[Unit], sizes: Mapping[str, int], advance: Tell) -> Results:
        # spawn: a forked child would inherit the locks of the progress bar's thread
        context = multiprocessing.get_context("spawn")
        if self.pool is None:
            # Bytes read, a number for each process that it alone writes: no locks, nothing to wait for.
            self.read = context.RawArray("d", self.workers)
            arguments = (str(self.plan.output), self.read, context.Value("i", 0))
            self.pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker, initargs=arguments)
        told = sum(self.read)
        try:
            futures = {self.pool.submit(_do_unit, stage.name, unit.id, sizes[unit.id]): unit for unit in units}
            running: set[Future[str | None]] = set(futures)
            while running:
                done, running = wait(running, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
                advance((now := sum(self.read)) - told)
                told = now
                for future in done:
                    yield futures[future], future.result()
        except BrokenProcessPool:
            # units are begun in order: these were at work, or about to be
            left = [unit.id for unit in pending(self.plan, stage, units)]
            raise UnitsFailed(
                f"a process of stage {stage.name} died, of memory perhaps, at one of "
                f"{', '.join(left[: self.workers])}; start again to go on, with fewer workers=N, or a smaller "
                "memory_bytes=N"
            ) from None


def _errors_of(workplace: Workplace, stage: Stage, unit: Unit) -> str | None:
    """Make the unit; what was wrong with it, in words. Raises ConfigError: no other unit would fare better."""
    try:
        workplace.do(stage, unit)
    except ConfigError:
        raise
    except LlamatrainError as error:
        return str(error)
    except OSError as error:
        if error.filename is not None:
            return f"{type(error).__name__}: {error}"
        # a write that failed does not say where
        return f"{workplace.output / stage.directory}: {error.strerror or error}: while unit {unit.id} was written"
    except Exception:
        return traceback.format_exc()
    return None


class _Worker:
    """The state of a process of the pool."""

    workplace: Workplace
    read: Any  # bytes read by each process
    number: int  # this one's


def _start_worker(output: str, read: Any, started: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback; units are whole or not at all
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with started.get_lock():
        _Worker.read, _Worker.number = read, started.value
        started.value += 1
    _Worker.workplace = Workplace(read_plan(Path(output)))


def _leave_with_parent() -> None:
    # A worker whose parent was killed would go on for nobody.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _count(step: float) -> None:
    _Worker.read[_Worker.number] += step


def _do_unit(stage_name: str, unit_id: str, size: int) -> str | None:
    workplace = _Worker.workplace
    stage = workplace.plan.stage(stage_name)
    unit = next(unit for unit in stage.units if unit.id == unit_id)
    with watched(size, _count):
        return _errors_of(workplace, stage, unit)
