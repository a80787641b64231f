"""Doing the units of a plan on this machine: one stage after the other, each with a pool of processes.

The processes keep nothing between units but loaded models; all state is the ledger, so any of them, or all, may die at
any moment. What is done is not done again.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from data_tools.documents import byte_bar
from data_tools.engine.ledger import LEDGER
from data_tools.engine.plan import Plan, Stage, Unit, read_plan
from data_tools.engine.stages import OWN_PROCESSES, Workplace, pending
from data_tools.locking import only_writer
from llamatrain.errors import ConfigError, LlamatrainError

SHOWN = 5  # failed units whose errors are printed


class UnitsFailed(LlamatrainError):
    """Units that could not be made; all others of their stage are done."""


class StageIncomplete(LlamatrainError):
    """A stage that has to wait for another."""


def run_stages(plan: Plan, stages: Sequence[Stage], *, workers: int, part: tuple[int, int] = (0, 1)) -> None:
    """Make what is missing of these stages, in order. Raises UnitsFailed, ConfigError and DataError."""
    with _Processes(plan, workers) as processes:
        for stage in stages:
            missing = pending(plan, stage, units_of_part(stage, part))
            if not missing:
                continue
            with byte_bar(f"{stage.name} ({len(missing)} of {len(stage.units)} units)", _bytes(missing)) as bar:
                failed = processes.run(stage, missing, bar.update)
            if failed:
                raise UnitsFailed(
                    f"{len(failed)} of {len(missing)} units of {stage.name} could not be made; the others are done, "
                    f"and starting again tries these again:\n{_shown(stage, failed)}"
                )


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


def _bytes(units: Sequence[Unit]) -> int:
    return sum(unit.bytes for unit in units)


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

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def run(self, stage: Stage, units: list[Unit], advance: Callable[[int], object]) -> dict[str, str]:
        """Errors by unit. Raises ConfigError, and UnitsFailed when a process dies."""
        if self.workers == 1 or len(units) == 1 or stage.name in OWN_PROCESSES:
            results: Iterator[tuple[Unit, str | None]] = ((unit, _errors_of(self.here, stage, unit)) for unit in units)
        else:
            results = self._in_pool(stage, units)
        failed = {}
        for unit, error in results:
            if error is not None:
                failed[unit.id] = error
            advance(unit.bytes)
        return failed

    def _in_pool(self, stage: Stage, units: list[Unit]) -> Iterator[tuple[Unit, str | None]]:
        if self.pool is None:
            # spawn: a forked child would inherit the locks of the progress bar's thread
            context = multiprocessing.get_context("spawn")
            arguments = (str(self.plan.output),)
            self.pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker, initargs=arguments)
        try:
            futures = {self.pool.submit(_do_unit, stage.name, unit.id): unit for unit in units}
            for future in as_completed(futures):
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
        return f"{type(error).__name__}: {error}"
    except Exception:
        return traceback.format_exc()
    return None


class _Worker:
    """The state of a process of the pool."""

    workplace: Workplace


def _start_worker(output: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback; units are whole or not at all
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _Worker.workplace = Workplace(read_plan(Path(output)))


def _leave_with_parent() -> None:
    # A worker whose parent was killed would go on for nobody.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do_unit(stage_name: str, unit_id: str) -> str | None:
    workplace = _Worker.workplace
    stage = workplace.plan.stage(stage_name)
    unit = next(unit for unit in stage.units if unit.id == unit_id)
    return _errors_of(workplace, stage, unit)
