"""Servers of forks behind the fault injector, and the undisturbed runs that others are compared with."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.drills.forks import Fault, Forks, build_injector
from tests.drills.runs import config_for

AT_A_TIME = 2


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
