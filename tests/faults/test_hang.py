"""Ranks that come no further: told within the limit, the guilty one named with its line, nothing left running."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_torchrun import SHAPE, finish, start
from tests.small_run import status

PROMISE = "told within the limit, the guilty rank named, and the line where it can be known; nothing is left running"
pytestmark = [pytest.mark.drill("a rank comes no further", PROMISE), pytest.mark.timeout(300)]

LIMIT_S = 5
PATIENCE_S = 10  # to report, on a busy machine
LIMITS = [
    "resilience.preflight=false", f"resilience.hang_timeout_s={LIMIT_S}", "resilience.hang_timeout_at_start_s=60",
    "checkpoint.every_steps=1000", "train.steps=200",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tiny_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = [f"On day {i} the ship sailed {i * 7 % 31} leagues and saw nothing. " * 3 for i in range(200)]
    directory = tiny_dataset("text", texts, tmp_path_factory.mktemp("data"), validation_fraction=0.05)
    return f"data.sources.text.path={directory}"


def hang(
    kind: str, rank: int, step: int, run_dir: Path, *overrides: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the conclusion, the ranks' reports) of a run on two ranks, of which one comes to a standstill."""
    arguments = [kind, str(rank), str(step), *SHAPE, *LIMITS, f"run_dir={run_dir}", *overrides]
    exit_status, _, err = finish(start(arguments, restarts=1, script=("-m", "tests.faults.hanging")))
    (folder,) = run_dir.glob("hang-*")
    conclusion = json.loads((folder / "conclusion.json").read_text())
    assert exit_status != 0 and conclusion["message"] in err
    found = status(run_dir)
    assert (found["state"], found["reason"]) == ("unhealthy", conclusion["message"])
    events = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    assert [entry["event"] for entry in events] == ["launch", "start", "unhealthy"]  # and no second launch
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    for report in reports:
        assert not Path(f"/proc/{report['pid']}").exists()
    return conclusion, reports


@pytest.mark.parametrize(
    ("kind", "rank", "overrides", "words"),
    [
        ("stopped", 0, [], "stopped from outside (SIGSTOP, or a debugger), at tests/faults/hanging.py:"),
        ("stopped", 1, [], "stopped from outside (SIGSTOP, or a debugger), at tests/faults/hanging.py:"),
        ("loader", 1, [], "at llamatrain/data/loader.py:"),
        ("lock", 1, [], "Python there answers nothing"),
        ("validation", 1, ["evaluation.every_steps=20"], "in sleep"),
        ("loader", 0, ["parallel.timeout_s=3", "resilience.hang_timeout_s=100"], "a collective ran out of time"),
    ],
)
def test_the_rank_that_holds_the_others_up_is_named_within_the_limit(
    kind: str, rank: int, overrides: list[str], words: str, data: str, tmp_path: Path
) -> None:
    conclusion, reports = hang(kind, rank, 20, tmp_path, data, *overrides)
    assert conclusion["guilty"] == [rank]
    assert f"rank {rank} on " in conclusion["message"] and words in conclusion["message"]
    assert len(reports) == 2
    assert all("Thread 0x" in path.read_text() for path in tmp_path.glob("hang-*/*.stacks.txt"))
    assert conclusion["time"] - reports[rank]["last_beat"] < LIMIT_S + PATIENCE_S
    waiting = reports[1 - rank]["collectives"]
    assert [entry["done"] for entry in waiting].count(False) >= 1


def test_ranks_in_different_collectives_are_both_named_with_their_lines(data: str, tmp_path: Path) -> None:
    conclusion, _ = hang("collective", 1, 20, tmp_path, data)
    assert conclusion["guilty"] == [0, 1]
    assert "ranks are in different collectives" in conclusion["message"]
    assert "rank 1 in broadcast of 7 Float at tests/faults/hanging.py:" in conclusion["message"]


def test_a_rank_whose_node_is_gone_is_named_with_its_last_sign(data: str, tmp_path: Path) -> None:
    conclusion, reports = hang("gone", 1, 20, tmp_path, data)
    assert conclusion["guilty"] == [1]
    assert "rank 1 gives no sign: it ran on " in conclusion["message"] and "(pid " in conclusion["message"]
    assert [report["rank"] for report in reports] == [0]
