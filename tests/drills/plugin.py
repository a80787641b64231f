"""What makes a test a drill: the marker `drill`, and a line of the table.

    @pytest.mark.drill
    def test_…(drills: Drills) -> None:
        points = drills.pick(range(200), sample=20)
        …
        drills.report("kill -9 in a save", "nothing saved is lost", times=len(points), losses=losses)

    @pytest.mark.drill("a rank stands still", "it is named within the limit")  # a test is one time, a failure a loss
    def test_…() -> None:

Drills run only when asked for: `--drills=full`, or `--drills=sample`, a seeded part of each for every change. Then
nothing else runs. A drill that is fast is marked with `always=True` and runs among the other tests too.
"""

import random
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import pytest

T = TypeVar("T")


@dataclass
class Drills:
    """How much is asked for, and what came of it, a row of the table each."""

    full: bool
    seed: int
    rows: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)  # (fault, promise): (times, losses)

    def pick(self, points: Iterable[T], *, sample: int) -> list[T]:
        """All of them, or so many drawn by the seed, in their order."""
        points = list(points)
        if self.full or sample >= len(points):
            return points
        drawn = sorted(random.Random(self.seed + len(self.rows)).sample(range(len(points)), sample))
        return [points[number] for number in drawn]

    def report(self, fault: str, promise: str, *, times: int, losses: Sequence[str]) -> None:
        """Put a line into the table, or more times into it; fails with the losses, each a sentence."""
        before = self.rows.get((fault, promise), (0, 0))
        self.rows[fault, promise] = before[0] + times, before[1] + len(losses)
        assert times > 0, "nothing was tried"
        assert not losses, f"{len(losses)} of {times}:\n" + "\n".join(losses)

    def table(self) -> str:
        """Markdown, for docs/reliability.md."""
        head = ["| fault | promise | times | losses |", "|---|---|---|---|"]
        return "\n".join([*head, *(f"| {' | '.join(row)} | {n} | {lost} |" for row, (n, lost) in self.rows.items())])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--drills", choices=("sample", "full"), help="run the drills, and only them")
    parser.addoption("--drills-seed", type=int, default=1, help="which ones are in the sample, and when faults come")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = Drills(config.getoption("--drills") == "full", config.getoption("--drills-seed"))


KEY = pytest.StashKey[Drills]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("--drills") is not None

    def runs(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("drill")
        return marker is not None if asked else marker is None or marker.kwargs.get("always", False)

    others = [item for item in items if not runs(item)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if runs(item)]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    marker, report = item.get_closest_marker("drill"), outcome.get_result()  # type: ignore[attr-defined]
    if marker is not None and marker.args and not report.skipped and (call.when == "call" or report.failed):
        with suppress(AssertionError):  # of the loss, which the test tells itself
            item.config.stash[KEY].report(*marker.args, times=1, losses=["it failed"] if report.failed else [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    drills = config.stash[KEY]
    if drills.rows:
        command = "python -m pytest " + shlex.join(sys.argv[1:])
        terminalreporter.section("drills")
        terminalreporter.write_line(f"{time.strftime('%Y-%m-%d')}, seed {drills.seed}: {command}\n\n{drills.table()}")


@pytest.fixture(scope="session")
def drills(pytestconfig: pytest.Config) -> Drills:
    return pytestconfig.stash[KEY]
