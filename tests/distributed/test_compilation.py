"""Compiled elementwise functions on several ranks, which share weights, layers or sequences, against one eager one."""

from pathlib import Path
from typing import Any

import pytest

from llamatrain.distributed import World
from tests import ranks
from tests.courses import BF16_TOLERANCE, LOSS_TOLERANCE, check_same_course, course_of
from tests.distributed.test_training import STEPS, config_for
from tests.small_run import GLOBAL_BATCH

SHARED = {"model": {"vocab_size": 516}}  # which two ranks can share

WAYS: list[dict[str, Any]] = [
    {"recompute": "none"},
    {"recompute": "block_backward", "reshard_after_forward": "never"},
    {"recompute": "selective", "tp": 2},
    {"recompute": "block_backward", "tp": 2},
    {"recompute": "full", "cp": 2},
    {"recompute": "block_backward", "pp": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "way"), [*(("fp32", way) for way in WAYS), ("bf16", WAYS[0]), ("bf16", WAYS[3])])
def test_compiled_on_two_ranks_is_eager_on_one(
    precision: str, way: dict[str, Any], sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "PATIENCE_S", 240)  # compilers are slow on a busy machine
    train = {"precision": precision}
    alone = config_for(tmp_path / "1", sources, micro_batch=GLOBAL_BATCH, train=train, **SHARED)
    train |= {"compile": True}
    config = config_for(tmp_path / "2", sources, micro_batch=2, train=train, parallel=way, **SHARED)
    tolerance = BF16_TOLERANCE if precision == "bf16" else LOSS_TOLERANCE
    check_same_course(
        course_of(World(), alone, STEPS), ranks.on_ranks(2, course_of, config, STEPS)[0], tolerance=tolerance
    )
