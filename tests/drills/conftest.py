"""Servers of forks behind the fault injector, and the undisturbed runs that others are compared with."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from tests.drills.forks import Fault, Forks, build_injector
from tests.drills.plugin import Drills
from tests.drills.runs import config_for, in_turn

AT_A_TIME = 2
T = TypeVar("T")


@dataclass(frozen=True)
class Undisturbed:
    """A run without a fault: its folder, and the counted calls of each rank, "kind path"."""

    run_dir: Path
    calls: list[list[str]]


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Forks]]:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here, to build the fault injector")
    library = build_injector(tmp_path_factory.mktemp("injector"))
    with ExitStack() as servers:
        yield [servers.enter_context(Forks(library)) for _ in range(AT_A_TIME)]


@pytest.fixture(scope="session")
def undisturbed(
    forks: list[Forks], sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Undisturbed]:
    """undisturbed(ranks), made once."""
    made: dict[int, Undisturbed] = {}

    def make(ranks: int) -> Undisturbed:
        if ranks not in made:
            run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
            config = config_for(run_dir, sources, asynchronous=False)
            ends = forks[0].run(config, Fault(), run_dir.with_name("log"), ranks=ranks)
            assert [end.status for end in ends] == [0] * ranks, ends[0].said
            made[ranks] = Undisturbed(run_dir, [end.calls for end in ends])
        return made[ranks]

    return make


@dataclass(frozen=True)
class Yard:
    """What a drill on forked runs needs."""

    forks: Sequence[Forks]
    undisturbed: Callable[[int], Undisturbed]
    sources: dict[str, Path]
    drills: Drills
    path: Path  # for this drill alone

    def place(self, number: int) -> tuple[Path, Path]:
        """Where that point's run directory and logs go."""
        return self.path / str(number), self.path / f"{number}.log"

    def drill(self, fault: str, promise: str, points: Sequence[T], do: Callable[[Forks, T], str | None]) -> None:
        """`do` tells the loss of a point, if there is one; the whole is a line of the table."""
        self.drills.report(fault, promise, times=len(points), losses=in_turn(self.forks, points, do))


@pytest.fixture
def yard(
    forks: list[Forks],
    undisturbed: Callable[[int], Undisturbed],
    sources: dict[str, Path],
    drills: Drills,
    tmp_path: Path,
) -> Yard:
    return Yard(forks, undisturbed, sources, drills, tmp_path)
