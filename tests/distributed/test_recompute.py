"""Every way to recompute under FSDP2: weights are gathered for the backward, and what is repeated finds them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatrain.config import DataConfig, ParallelConfig, RunConfig, TrainConfig
from llamatrain.config.parallel import RECOMPUTE, layout
from llamatrain.distributed import World, local_part
from llamatrain.memory import training_memory
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from llamatrain.parallel import fsdp
from llamatrain.parallel.mesh import build_mesh
from llamatrain.parallel.recompute import apply_recompute
from llamatrain.session import open_run_directory, settle
from tests.benchmarks.bench_recompute import SHAPE, LiveBytes
from tests.courses import BF16_TOLERANCE, Course, check_same_course, course_of
from tests.distributed.test_training import STEPS, config_for
from tests.ranks import on_ranks
from tests.small_run import GLOBAL_BATCH
from tests.test_model import some_tokens


@pytest.fixture(scope="module")
def alone(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Course:
    """The plain model in one process."""
    config = config_for(tmp_path_factory.mktemp("alone"), sources, micro_batch=GLOBAL_BATCH)
    return course_of(World(), config, STEPS)


WAYS: list[dict[str, Any]] = [
    *({"recompute": mode} for mode in RECOMPUTE),
    {"recompute": "selective", "recompute_save": ["attention", "w1"]},
]


@pytest.mark.parametrize("reshard", ["always", "never"])
@pytest.mark.parametrize("way", WAYS)
def test_recomputing_on_two_ranks_is_the_plain_model_on_one(
    way: dict[str, Any], reshard: str, alone: Course, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = config_for(tmp_path, sources, micro_batch=2, parallel={**way, "reshard_after_forward": reshard})
    check_same_course(alone, on_ranks(2, course_of, config, STEPS)[0])


@pytest.mark.parametrize("mode", RECOMPUTE[1:])
def test_in_bf16_recomputing_stays_within_its_tolerance(mode: str, sources: dict[str, Path], tmp_path: Path) -> None:
    bf16 = {"precision": "bf16"}
    plain = course_of(World(), config_for(tmp_path / "1", sources, micro_batch=GLOBAL_BATCH, train=bf16), STEPS)
    config = config_for(tmp_path / "2", sources, train=bf16, parallel={"recompute": mode})
    check_same_course(plain, on_ranks(2, course_of, config, STEPS)[0], tolerance=BF16_TOLERANCE)


SMALL = replace(SHAPE, dim=256, max_seq_len=256, vocab_size=4096)


def sharded_peak(world: World, settings: ParallelConfig) -> int:
    """Of three micro-batches of two rows in bf16, besides the sharded weights."""
    with torch.device("meta"):
        model = Llama(SMALL, compute_dtype=torch.bfloat16)
    apply_recompute(model, settings)
    device = torch.device("cpu")
    fsdp.shard(model, build_mesh(layout(settings, world.size), device), settings)
    model.to_empty(device=device)
    model.rebuild_rope_tables()
    init_weights(model, SMALL, seed=0)
    tokens = some_tokens(2, SMALL.max_seq_len)
    with LiveBytes([*(local_part(p)[0] for p in model.parameters()), *model.buffers(), tokens]) as live:
        for last in (False, False, True):
            fsdp.begin_micro_batch(model, settings, last=last)
            model(tokens, targets=tokens).backward()
    return live.peak


@pytest.mark.parametrize("parallel", [{}, {"reshard_after_forward": "never"}, {"reduce_scatter": "last"}])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_peak_of_a_sharded_step_is_within_the_sum_of_its_parts(mode: str, parallel: dict[str, Any]) -> None:
    settings = ParallelConfig(recompute=mode, **parallel)
    peak = max(on_ranks(2, sharded_peak, settings))
    config = RunConfig(
        model=SMALL, parallel=settings, train=TrainConfig(micro_batch=2, precision="bf16"), data=DataConfig(seq_len=256)
    )
    parts = training_memory(config, mode, world_size=2)
    predicted = sum(parts.values()) - parts["weights, gradients, moments"] * 12 / 16
    assert peak - 1024 <= predicted <= 1.3 * peak  # 1024: scalars and the like


def choice_of(world: World, config: RunConfig) -> str:
    directory = open_run_directory(config, world)
    try:
        return settle(config, directory, world).parallel.recompute
    finally:
        directory.close()


def test_all_ranks_take_the_choice_of_the_first(sources: dict[str, Path], tmp_path: Path) -> None:
    config = config_for(tmp_path, sources, parallel={"recompute_budget_gib": 1.0})
    assert on_ranks(2, choice_of, config) == ["none", "none"]
