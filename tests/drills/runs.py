"""What drills do with a run: its configuration, what a disk holds after a fault, and that the run then ends as if
nothing had been.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from llamatrain.checkpoint import commit, store
from llamatrain.config import RunConfig
from llamatrain.errors import LlamatrainError
from tests.drills.forks import Fault, Forks
from tests.small_run import assert_same_run, small_config, status

T = TypeVar("T")

STEPS = 4


def config_for(run_dir: Path, sources: dict[str, Path], *, asynchronous: bool, **groups: dict[str, Any]) -> RunConfig:
    """Four steps, a save after the second and the fourth, which prunes the first one's; validated at the end."""
    checkpoint = {"every_steps": 2, "keep_last": 1, "asynchronous": asynchronous, **groups.pop("checkpoint", {})}
    return small_config(
        run_dir,
        sources,
        model={"n_layers": 1},
        train={"steps": STEPS, "global_batch_tokens": 128, "micro_batch": 2, **groups.pop("train", {})},
        evaluation={"every_steps": STEPS, "max_tokens": 64},
        resilience={"preflight": False, "hang_timeout_s": 0, **groups.pop("resilience", {})},
        checkpoint=checkpoint,
        **groups,
    )


def in_turn(forks: Sequence[Forks], points: Sequence[T], do: Callable[[Forks, T], str | None]) -> list[str]:
    """`do` for every point, as many at a time as there are servers; the losses it told, and what it raised."""
    free: SimpleQueue[Forks] = SimpleQueue()
    for server in forks:
        free.put(server)

    def one(point: T) -> str | None:
        server = free.get()
        try:
            loss = do(server, point)
        except (AssertionError, LlamatrainError, OSError, ValueError) as error:
            loss = f"{type(error).__name__}: {error}"
        finally:
            free.put(server)
        return loss and f"{point}: {loss}"

    with ThreadPoolExecutor(len(forks)) as pool:
        return [loss for loss in pool.map(one, points) if loss]


def noted_steps(run_dir: Path) -> list[int]:
    """Steps of which the journal says that they are saved; a torn last line is none."""
    journal = run_dir / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event["step"] for event in events if event["event"] == "checkpoint"]


def lost_on_disk(run_dir: Path) -> str | None:
    """What is wrong with the checkpoints as a fault left them: one that is not whole, or one that is gone."""
    there = commit.list_checkpoints(run_dir / "checkpoints")
    for checkpoint in there:
        store.open_checkpoint(checkpoint)  # raises CheckpointError
    newest, noted = (commit.step_of(there[0]) if there else 0), max(noted_steps(run_dir), default=0)
    return f"step {noted} was saved, and {newest} is the newest there" if newest < noted else None


def lost_for_good(forks: Forks, config: RunConfig, reference: Path, log: Path, *, ranks: int = 1) -> str | None:
    """Start the run again, without a fault; how its end differs from the undisturbed run's."""
    for rank, end in enumerate(forks.run(config, Fault(), log, ranks=ranks)):
        if end.status != 0:
            return f"started again, rank {rank} ended with {end.status}: {end.said[-1500:]}"
    run_dir = Path(config.run_dir)
    if status(run_dir)["state"] != "done":
        return f"started again, it is {status(run_dir)}"
    assert_same_run(reference, run_dir, step=config.total_steps)
    left = [name for name in names(run_dir) - names(reference) if not name.startswith("checkpoints/step-")]
    return f"left behind: {sorted(left)}" if left else None


def names(run_dir: Path) -> set[str]:
    """Of files and folders."""
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}
