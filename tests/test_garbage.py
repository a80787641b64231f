"""Garbage is collected at the steps told, and nothing waits for it that would fill the memory."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llamatrain.config import ParallelConfig, TrainConfig
from llamatrain.config.parallel import RECOMPUTE
from llamatrain.config.train import check_train
from llamatrain.errors import ConfigError
from llamatrain.garbage import GarbageCollection
from llamatrain.parallel.recompute import apply_recompute
from tests.benchmarks.bench_recompute import LiveBytes
from tests.small_run import small_config, train_in_process
from tests.test_model import some_tokens, tiny


class Knot:
    """Something that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def knot() -> weakref.ref[Knot]:
    return weakref.ref(Knot())


@pytest.fixture(autouse=True)
def collector_as_it_was() -> Iterator[None]:
    assert gc.isenabled()
    yield
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_collects_at_its_steps_and_at_no_others() -> None:
    with GarbageCollection(3) as garbage:
        assert not gc.isenabled()
        freed = []
        for step in range(1, 10):
            rubbish = knot()
            garbage.step_ended(step)
            freed.append(rubbish() is None)
        assert freed == [False, False, True] * 3


def test_what_lives_long_is_not_looked_at_again_but_freed_in_the_end() -> None:
    long_lived = [object(), Knot()]
    with GarbageCollection(2) as garbage:
        before = gc.get_freeze_count()
        assert before > 0
        later = [Knot()]
        garbage.step_ended(2)
        assert gc.get_freeze_count() > before
        assert not any(each is long_lived or each is later for each in gc.get_objects())
        settled = gc.get_freeze_count()
        garbage.step_ended(4)
        assert gc.get_freeze_count() <= settled  # the first collection alone freezes
        left = weakref.ref(later.pop())
    gc.collect()
    assert left() is None


def test_zero_leaves_it_to_python() -> None:
    with GarbageCollection(0) as garbage:
        assert gc.isenabled()
        rubbish = knot()
        garbage.step_ended(50)
        assert rubbish() is not None
        gc.collect()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with GarbageCollection(1):
        pass
    assert not gc.isenabled()
    gc.enable()


def test_it_is_put_back_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError), GarbageCollection(1):
        raise ZeroDivisionError


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_a_step_leaves_no_tensor_to_the_collector(mode: str) -> None:
    """Or device memory would fill up between two collections."""
    model, tokens = tiny(), some_tokens(2, 16)
    apply_recompute(model, ParallelConfig(recompute=mode))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model(tokens, targets=tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    with GarbageCollection(50):
        step()
        known = [*model.parameters(), *model.buffers(), tokens]
        known += [each for state in optimizer.state.values() for each in state.values()]
        with LiveBytes(known) as live:
            for _ in range(3):
                step()
                assert live.now() == 0


def test_a_run_collects_at_its_steps(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(GarbageCollection, "step_ended", lambda self, step: steps.append(step))
    train_in_process(small_config(tmp_path / "run", sources, train={"steps": 4}, evaluation={"every_steps": 0}))
    assert steps == [1, 2, 3, 4]


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.collect_garbage_every_steps=-1: must not be negative"):
        check_train(TrainConfig(steps=1, collect_garbage_every_steps=-1))
