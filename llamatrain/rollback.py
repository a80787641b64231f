"""Back to the last checkpoint when a spike was seen, and on without the samples that brought it.

Chowdhery et al. (arXiv 2204.02311, section 5.1) found spikes to come of certain samples met in a certain state, and
went around them so. What is passed over stands in the run's journal before training goes on: whatever checkpoint the
run is resumed from later, one older than the rollback too, it passes over the same samples and does the same steps.
"""

import logging
from pathlib import Path

from llamatrain.checkpoint import commit
from llamatrain.config import RunConfig
from llamatrain.data.order import DataState
from llamatrain.distributed import World
from llamatrain.errors import UnhealthyRun
from llamatrain.resilience.bad_steps import BadSteps
from llamatrain.resilience.guard import Spike, for_journal
from llamatrain.run_directory import RunDirectory

log = logging.getLogger("llamatrain")


def without_passed_over(state: DataState, directory: RunDirectory, world: World) -> DataState:
    """A data state without the samples that the run's rollbacks passed over; all ranks call it."""
    for event in world.decide(lambda: directory.events("rollback")):
        state = state.pass_over(*event["samples"])
    return state


def samples_of(spike: Spike, to_step: int, state: DataState, config: RunConfig) -> tuple[int, int]:
    """Samples [first, end) of the spike's step and of those before it that are passed over with it.

    `state` is the data state at the end of step `to_step`, from which the run came to the spike and to which it goes
    back. What came before is not passed over.
    """
    numbers, batch = spike.numbers, config.global_batch
    steps_between = max(0, numbers.step - config.resilience.rollback_skip_steps - to_step)
    first, _ = state.advance(steps_between * batch).span(batch)
    return first, numbers.samples[1]


def record(
    spike: Spike,
    samples: tuple[int, int],
    from_step: int,
    to_step: int,
    config: RunConfig,
    directory: RunDirectory,
    world: World,
) -> None:
    """Put a rollback into the journal; all ranks call it. Raises UnhealthyRun if too many came to nothing."""

    def without_progress() -> int:
        count = 0
        for event in directory.events("rollback", "checkpoint"):
            count = count + 1 if event["event"] == "rollback" else 0
        return count

    numbers, limits = spike
    allowed = config.resilience.max_rollbacks
    if world.decide(without_progress) >= allowed:
        raise UnhealthyRun(
            f"{numbers.describe()}: a spike again, after {allowed} rollbacks without a new checkpoint. "
            f"{_to_look_at(directory, numbers.step, numbers.samples)}; resilience.max_rollbacks allows more"
        )
    told = for_journal(numbers, limits)
    told["spike_step"], told["samples"] = told.pop("step"), list(samples)
    directory.record("rollback", from_step=from_step, to_step=to_step, **told)
    log.warning(
        "%s (limits %.6g, %.6g), a spike: back from step %d to %d, and on without samples %d-%d",
        numbers.describe(),
        limits.loss,
        limits.grad_norm,
        from_step,
        to_step,
        samples[0],
        samples[1] - 1,
    )


def refuse_too_many(seen: BadSteps, directory: RunDirectory, world: World) -> None:
    """Raises UnhealthyRun if the last steps were all skipped, and so many that a person has to look.

    What a stop in between had saved is set aside, for it may be the weights that are bad: the next start goes on from
    the last checkpoint before. All ranks call it.
    """
    guard, last = seen.guard, seen.last
    if last is None or not guard.too_many:
        return
    first_bad_step, samples = last.step - guard.in_a_row + 1, (guard.first_bad_sample, last.samples[1])

    def put_aside() -> list[str]:
        saved = commit.list_checkpoints(directory.checkpoints)
        bad = [checkpoint for checkpoint in saved if commit.step_of(checkpoint) >= first_bad_step]
        if len(bad) == len(saved):  # nothing would be left
            return []
        return [_put_aside(checkpoint, directory).name for checkpoint in bad]

    aside = ", ".join(world.decide(put_aside))
    raise UnhealthyRun(
        f"{last.describe()}: {guard.in_a_row} steps in a row brought no update. "
        f"{_to_look_at(directory, first_bad_step, samples)}"
        f"{f'; saved since then and set aside: {aside}' if aside else ''}"
        "; resilience.max_bad_steps allows more"
    )


def _put_aside(checkpoint: Path, directory: RunDirectory) -> Path:
    aside = commit.set_aside(checkpoint)
    reason = "it was saved while steps brought no update"
    directory.record("refused", path=checkpoint.name, reason=reason, moved_to=aside.name)
    return aside


def _to_look_at(directory: RunDirectory, first_bad_step: int, samples: tuple[int, int]) -> str:
    """The last checkpoint from before it went wrong, and how to see what the samples are."""
    saved = commit.list_checkpoints(directory.checkpoints)
    good = next((checkpoint for checkpoint in saved if commit.step_of(checkpoint) < first_bad_step), None)
    told = f"The last good checkpoint is {good}" if good else "There is no checkpoint from before"
    return (
        f"{told}; python -m data_tools.show_samples run_dir={directory.path} "
        f"samples={samples[0]}-{samples[1] - 1} prints what came in"
    )
