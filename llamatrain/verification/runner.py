"""Runs cases, each against the plain model in one process, on ranks that have met.

Rank 0 follows the plain run, once for each model and precision, and tells the others what it saw. Then all ranks
follow the case. Beside the two courses, checkpoints are exchanged both ways, bit for bit, and the order of collectives
is looked at.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamatrain.checkpoint import commit, store
from llamatrain.config import RunConfig
from llamatrain.config.parallel import layout
from llamatrain.distributed import World
from llamatrain.errors import LlamatrainError
from llamatrain.resilience.control import StopRequest
from llamatrain.session import open_run_directory, settle
from llamatrain.trainer import Trainer
from llamatrain.verification import order
from llamatrain.verification.cases import STEPS, Case
from llamatrain.verification.course import Before, Course, Differences, differences, follow, gathered, same_tensors

Tensors = dict[str, dict[str, Tensor]]  # by group of the checkpoint, whole, on the host


@dataclass
class Result:
    """What came of a case."""

    case: Case
    seconds: float = 0.0
    differences: Differences | None = None
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values, the differences among them."""
        found = self.differences
        return {
            "ranks": self.case.ranks,
            "layout": self.case.name,
            "loss": found.loss if found else None,
            "norm": found.norm if found else None,
            "gradient": found.gradient if found else None,
            "seconds": self.seconds,
            "failures": self.failures,
        }


class Runner:
    """Cases on the ranks of a world; `workspace` and `data` are directories that all ranks see.

    `before` is called before every step of a case: a test's planted fault.
    """

    def __init__(self, world: World, workspace: Path, data: Path, *, before: Before | None = None) -> None:
        self.world = world
        self._workspace, self._data, self._before = workspace, data, before
        self._plain: dict[str, tuple[Course, Path]] = {}

    def run(self, cases: Iterable[Case], tell: Callable[[Result], None]) -> list[Result]:
        """Every case in turn; `tell` is called with each result."""
        results = []
        for number, case in enumerate(cases):
            started = time.perf_counter()
            result = self._run(case, self._workspace / f"case-{case.ranks}-{number:03d}")
            result.seconds = time.perf_counter() - started
            tell(result)
            results.append(result)
        return results

    def _run(self, case: Case, run_dir: Path) -> Result:
        result = Result(case)
        reference, checkpoint = self.plain(case.plain)
        try:
            with ExitStack() as resources:
                trainer = compose(case.config(str(run_dir), str(self._data)), self.world, resources)
                course = follow(trainer, STEPS, self._before)
                result.differences = differences(reference, course)
                result.failures += result.differences.failures(case.precision)
                result.failures += self._exchange(trainer, checkpoint)
                result.failures += self._order(trainer)
        except LlamatrainError as error:
            result.failures.append(str(error))
        return result

    def plain(self, case: Case) -> tuple[Course, Path]:
        """The course of a case's plain run, and its checkpoint."""
        if case.name not in self._plain:
            config = case.config(str(self._workspace / f"plain-{len(self._plain)}"), str(self._data))
            self._plain[case.name] = self.world.decide(lambda: follow_alone(config))
        return self._plain[case.name]

    def _exchange(self, trainer: Trainer, plain: Path) -> list[str]:
        """Save here and read as a whole; read here what the plain run saved."""
        mine = whole_state(trainer)
        trainer.snapshots.save(trainer.step, trainer.data_state)
        run_dir = trainer.directory.path
        written = self.world.decide(lambda: same_state(read_whole(commit.find_checkpoint(run_dir)), mine))
        names = trainer.snapshots.names_everywhere()
        with self.world.together():
            trainer.snapshots.fill(store.Reader(plain, store.open_checkpoint(plain)), names)
        found = whole_state(trainer)
        read = self.world.decide(lambda: same_state(read_whole(plain), found))
        right = {"its checkpoint, read whole, differs": written, "the plain run's checkpoint, read here, differs": read}
        return [told for told, same in right.items() if not same]

    def _order(self, trainer: Trainer) -> list[str]:
        if self.world.size == 1 or trainer.layout.pp > 1:  # with stages, micro-batches overlap as the schedule has it
            return []
        with trainer.open_loader() as loader:
            events = order.issued(trainer, next(loader))
        config = trainer.config
        gathers = layout(config.parallel, self.world.size).shards > 1
        return order.violations(events, config.parallel, layers=config.model.n_layers, gathers=gathers)


def compose(config: RunConfig, world: World, resources: ExitStack) -> Trainer:
    """A trainer that has not taken a step."""
    directory = open_run_directory(config, world)
    resources.callback(directory.close)
    return Trainer(settle(config, directory, world), directory, StopRequest(), world, resources)


def follow_alone(config: RunConfig) -> tuple[Course, Path]:
    """The course of the plain model in this process, and the checkpoint at its end."""
    with ExitStack() as resources:
        trainer = compose(config, World(), resources)
        course = follow(trainer, STEPS)
        trainer.snapshots.save(trainer.step, trainer.data_state)
        return course, commit.find_checkpoint(trainer.directory.path)


def whole_state(trainer: Trainer) -> Tensors:
    """Copies of all weights and moments, with the parts of all ranks; all ranks call it."""
    groups = trainer.snapshots.weights_and_moments()
    return {group: gathered(tensors, trainer) for group, tensors in groups.items()}


def read_whole(checkpoint: Path) -> Tensors:
    """All weights and moments of a checkpoint."""
    manifest = store.open_checkpoint(checkpoint, groups=["model", "optimizer"])
    reader = store.Reader(checkpoint, manifest)
    state = {}
    for group in ("model", "optimizer"):
        entries = manifest["tensors"][group]
        tensors = {
            name: torch.zeros(entry["shape"], dtype=store.DTYPES[entry["dtype"]]) for name, entry in entries.items()
        }
        reader.fill(group, tensors)
        state[group] = tensors
    return state


def same_state(one: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return one.keys() == other.keys() and all(same_tensors(tensors, other[group]) for group, tensors in one.items())
