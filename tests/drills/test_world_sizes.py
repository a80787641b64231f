"""A run that goes on with more or fewer processes, and other layouts, each time: the same samples in the same order,
and but for the rounding of sums the same losses and the same state at the end.
"""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatrain.checkpoint import commit, store
from llamatrain.distributed import World
from tests.courses import LOSS_TOLERANCE
from tests.distributed.test_resumption import STEPS, config_for, train
from tests.drills.plugin import Drills
from tests.ranks import on_ranks
from tests.small_run import GLOBAL_BATCH, metrics, reproducible

pytestmark = [pytest.mark.drill, pytest.mark.timeout(7200)]

STATE_TOLERANCE = 1e-5  # of weights and moments, absolute
TENSOR: dict[str, Any] = {"tp": 2}
REPLICAS: dict[str, Any] = {"dp_replicate": 2}
# legs of five steps: processes, and how they are laid out
JOURNEYS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "4 → 2 → 1 → 4": [(4, {}), (2, {}), (1, {}), (4, {})],
    "1 → 4 → 2 → 4, with tensor parallelism": [(1, {}), (4, TENSOR), (2, {}), (4, TENSOR)],
    "4 → 2 → 4 → 1, with replicas": [(4, REPLICAS), (2, TENSOR), (4, {}), (1, {})],
}
LEG = STEPS // 4


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the last checkpoint, whole."""
    checkpoint = commit.find_checkpoint(run_dir)
    manifest = store.open_checkpoint(checkpoint)
    found = {}
    for group in ("model", "optimizer"):
        entries = manifest["tensors"][group]
        tensors = {
            name: torch.empty(entry["shape"], dtype=store.DTYPES[entry["dtype"]]) for name, entry in entries.items()
        }
        store.Reader(checkpoint, manifest).fill(group, tensors)
        found |= {f"{group}/{name}": tensor for name, tensor in tensors.items()}
    return found


@pytest.fixture(scope="module")
def alone(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone")
    train(World(), config_for(run_dir, sources))
    return run_dir


def difference(alone: Path, moved: Path, samples: list[list[int]]) -> str | None:
    if samples != [list(range(t * GLOBAL_BATCH, (t + 1) * GLOBAL_BATCH)) for t in range(STEPS)]:
        return f"other samples: {samples}"
    one, other = reproducible(metrics(alone)), reproducible(metrics(moved))
    if [record["step"] for record in one] != [record["step"] for record in other]:
        return "other steps in metrics.jsonl"
    for record, again in zip(one, other, strict=True):
        if again != pytest.approx(record, rel=LOSS_TOLERANCE):
            return f"{again} where one process has {record}"
    one_state, other_state = state(alone), state(moved)
    if one_state.keys() != other_state.keys():
        return "other tensors"
    worst = max((one_state[name] - other_state[name]).abs().max().item() for name in one_state)
    return None if worst <= STATE_TOLERANCE else f"the state differs by {worst:.1e}"


@pytest.mark.parametrize("journey", JOURNEYS)
def test_the_number_of_processes_changes(
    journey: str, alone: Path, sources: dict[str, Path], drills: Drills, tmp_path: Path
) -> None:
    samples: list[list[int]] = []
    for number, (ranks, parallel) in enumerate(JOURNEYS[journey], start=1):
        stop = LEG * number if number < len(JOURNEYS[journey]) else None
        groups = {"train": {"stop_after_step": stop}, "parallel": parallel}
        leg = on_ranks(ranks, train, config_for(tmp_path, sources, **groups))
        steps = [rank_samples for rank_samples, _ in leg]
        if parallel.get("tp"):  # the ranks of a group have the same samples
            steps = steps[:: parallel["tp"]]
        samples += [list(chain(*rows)) for rows in zip(*steps, strict=True)]
    loss = difference(alone, tmp_path, samples)
    drills.report(
        f"started again on other numbers of processes: {journey}",
        f"the same samples in the same order, losses within {LOSS_TOLERANCE:g}, the state within {STATE_TOLERANCE:g}",
        times=len(JOURNEYS[journey]) - 1,
        losses=[loss] if loss else [],
    )
