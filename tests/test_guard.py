"""Which steps are bad, decided from numbers: limits, windows, counts, and that a restored guard decides alike."""

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamatrain.config import ResilienceConfig
from llamatrain.resilience.guard import Guard, Limits, Numbers, Spike, for_journal, limit

WINDOW = 4
SETTINGS = {
    action: ResilienceConfig(spike_action=action, spike_window=WINDOW) for action in ("log", "skip", "rollback")
}

values = st.floats(0, 100) | st.sampled_from([math.nan, math.inf, 1e30])
courses = st.lists(st.tuples(values, values), max_size=30)


def numbers(guard: Guard, step: int, loss: float, norm: float) -> Numbers:
    """A step as the device would have done it."""
    limits = guard.update_limits()
    good = abs(loss) <= limits.loss and norm <= limits.grad_norm
    return Numbers(step, loss, norm, skipped=not good, samples=(8 * step - 8, 8 * step))


def decisions(guard: Guard, course: list[tuple[float, float]], first_step: int = 1) -> list[tuple[bool, bool, Limits]]:
    """For each step: whether it was skipped, whether it was a spike that was not, and the limits after it."""
    found = []
    for step, (loss, norm) in enumerate(course, start=first_step):
        seen = numbers(guard, step, loss, norm)
        spike = guard.note(seen)
        found.append((seen.skipped, spike, guard.limits()))
    return found


@given(courses, st.integers(0, 30), st.sampled_from(sorted(SETTINGS)))
def test_a_guard_restored_at_any_step_decides_alike(
    course: list[tuple[float, float]], saved_at: int, action: str
) -> None:
    unbroken, first, second = (Guard(SETTINGS[action]) for _ in range(3))
    whole = decisions(unbroken, course)
    before = decisions(first, course[:saved_at])
    second.load(json.loads(json.dumps(first.to_json(), allow_nan=False)))
    assert before + decisions(second, course[saved_at:], saved_at + 1) == whole
    assert second.to_json() == unbroken.to_json()


@given(courses, st.sampled_from(sorted(SETTINGS)))
def test_the_window_holds_the_last_steps_that_were_not_skipped(course: list[tuple[float, float]], action: str) -> None:
    guard, kept = Guard(SETTINGS[action]), []
    for step, (loss, norm) in enumerate(course, start=1):
        seen = numbers(guard, step, loss, norm)
        guard.note(seen)
        if not seen.skipped:
            kept.append([loss, norm])
        assert guard.to_json()["window"] == kept[-WINDOW:]
        assert all(math.isfinite(value) for pair in kept for value in pair)
    assert guard.skipped == len(course) - len(kept)


@given(courses)
def test_skipped_steps_are_counted_in_a_row_and_in_all(course: list[tuple[float, float]]) -> None:
    guard = Guard(SETTINGS["skip"])
    skipped = [bad for bad, _, _ in decisions(guard, course)]
    in_a_row = skipped[::-1].index(False) if False in skipped else len(skipped)
    assert (guard.skipped, guard.in_a_row) == (sum(skipped), in_a_row)
    if in_a_row:
        assert guard.first_bad_sample == 8 * (len(course) - in_a_row)
    assert guard.too_many == (in_a_row >= ResilienceConfig().max_bad_steps)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=20), st.floats(0.1, 10))
def test_the_limit_is_the_mean_and_so_many_deviations(window: list[float], sigma: float) -> None:
    expected = statistics.fmean(window) + sigma * statistics.pstdev(window)
    assert limit(window, sigma) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_nothing_finite_is_a_spike_before_the_window_is_full() -> None:
    guard = Guard(SETTINGS["skip"])
    course = [(2.0, 1.0)] * (WINDOW - 1) + [(1e30, 1e30)]
    assert [bad for bad, _, _ in decisions(guard, course)] == [False] * WINDOW


@pytest.mark.parametrize("spike", [(9.0, 1.0), (2.0, 9.0)])
@pytest.mark.parametrize("action", sorted(SETTINGS))
def test_a_loss_or_a_norm_alone_makes_a_spike(spike: tuple[float, float], action: str) -> None:
    guard = Guard(SETTINGS[action])
    decisions(guard, [(2.0, 1.0), (2.1, 1.1), (2.0, 1.0), (2.1, 1.1)])
    assert guard.note(numbers(guard, 5, 2.2, 1.2)) is False
    skipped, not_skipped, _ = decisions(guard, [spike], 6)[0]
    assert (skipped, not_skipped) == ((True, False) if action == "skip" else (False, True))


def test_a_window_made_shorter_or_longer_on_resumption_keeps_the_newest() -> None:
    guard = Guard(ResilienceConfig(spike_window=4))
    decisions(guard, [(float(i), 1.0) for i in range(4)])
    shorter, longer = Guard(ResilienceConfig(spike_window=2)), Guard(ResilienceConfig(spike_window=6))
    for other in (shorter, longer):
        other.load(guard.to_json())
    assert shorter.to_json()["window"] == [[2.0, 1.0], [3.0, 1.0]]
    assert len(longer.to_json()["window"]) == 4
    assert longer.limits() == Limits()


def test_the_guard_of_a_checkpoint_from_before_there_was_one_is_the_start() -> None:
    guard = Guard(SETTINGS["skip"])
    decisions(guard, [(2.0, 1.0), (math.nan, 1.0)])
    guard.load({})
    assert guard.to_json() == Guard(SETTINGS["skip"]).to_json()


def test_an_event_is_strict_json() -> None:
    seen = Numbers(3, math.nan, math.inf, skipped=True, samples=(16, 24))
    told = json.loads(json.dumps(for_journal(seen, Limits()), allow_nan=False))
    assert told == {"step": 3, "loss": "nan", "grad_norm": "inf", "skipped": True, "samples": [16, 24]}
    spike = Spike(Numbers(4, 9.0, 1.0, skipped=False, samples=(24, 32)), Limits(3.0, 2.0))
    told = for_journal(*spike)
    assert (told["loss"], told["loss_limit"], told["grad_norm_limit"]) == (9.0, 3.0, 2.0)
