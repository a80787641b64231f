"""One run on one, two and four processes: the same samples, initial weights, losses, norms and gradients."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llamatrain.config import ModelConfig, ParallelConfig, RunConfig
from llamatrain.config.parallel import Layout
from llamatrain.data.loader import Batch
from llamatrain.distributed import World, local_part
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from llamatrain.parallel import fsdp
from llamatrain.parallel.mesh import build_mesh
from llamatrain.trainer import Trainer
from tests.courses import BF16_TOLERANCE, Before, Course, check_same_course, course_of
from tests.ranks import on_ranks
from tests.small_run import GLOBAL_BATCH, small_config

STEPS = 20


def config_for(directory: Path, sources: dict[str, Path], *, micro_batch: int = 1, **groups: dict) -> RunConfig:
    """20 steps with documents masked, so that ranks and micro-batches have unequal numbers of targets."""
    settings: dict[str, dict] = {
        "model": {"dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 515},  # uneven on 2 and 4
        "data": {"document_mask": True},
        "train": {"steps": STEPS, "micro_batch": micro_batch},
        "optim": {"clip_norm": 0.5},
    }
    for name, values in groups.items():
        settings[name] = {**settings.get(name, {}), **values}
    return small_config(directory, sources, **settings)


@pytest.fixture(scope="module")
def alone(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Course:
    """The plain model in one process, every step one forward."""
    return course_of(World(), config_for(tmp_path_factory.mktemp("alone"), sources, micro_batch=GLOBAL_BATCH))


LAYOUTS: list[tuple[int, int, dict[str, Any]]] = [
    (2, 2, {"reshard_after_forward": "always"}),
    (2, 4, {"reshard_after_forward": "never"}),
    (2, 1, {"reduce_scatter": "last", "forward_prefetch": 1}),
    (2, 1, {"dp_replicate": 2, "all_reduce": "each"}),
    (4, 1, {"reshard_after_forward": "always"}),
    (4, 2, {"reshard_after_forward": "never"}),
    (4, 1, {"dp_replicate": 2, "backward_prefetch": 2}),
    (4, 1, {"dp_replicate": 2, "reduce_scatter": "last"}),
]


@pytest.mark.parametrize(("ranks", "micro_batch", "parallel"), LAYOUTS)
def test_neither_the_number_of_processes_nor_their_layout_changes_anything(
    ranks: int, micro_batch: int, parallel: dict[str, Any], alone: Course, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = config_for(tmp_path, sources, micro_batch=micro_batch, parallel=parallel)
    courses = on_ranks(ranks, course_of, config, STEPS)
    for course in courses:  # every rank has the whole truth
        assert course.losses == courses[0].losses
        assert course.norms == courses[0].norms
    assert any(len(set(counts)) > 1 for counts in courses[0].valid_targets)
    check_same_course(alone, courses[0])


def test_samples_follow_one_another_without_a_gap(alone: Course) -> None:
    assert alone.samples == [list(range(t * GLOBAL_BATCH, (t + 1) * GLOBAL_BATCH)) for t in range(STEPS)]


def test_tied_embeddings_are_sharded_too(sources: dict[str, Path], tmp_path: Path) -> None:
    tied = {"tied_embeddings": True}
    plain = course_of(World(), config_for(tmp_path / "1", sources, micro_batch=GLOBAL_BATCH, model=tied))
    check_same_course(plain, on_ranks(2, course_of, config_for(tmp_path / "2", sources, model=tied), STEPS)[0])


@pytest.mark.parametrize("ranks", [2, 4])
def test_bf16_stays_within_its_tolerance(ranks: int, sources: dict[str, Path], tmp_path: Path) -> None:
    bf16 = {"precision": "bf16"}
    plain = course_of(World(), config_for(tmp_path / "1", sources, micro_batch=GLOBAL_BATCH, train=bf16))
    spread = on_ranks(ranks, course_of, config_for(tmp_path / "n", sources, train=bf16), STEPS)[0]
    check_same_course(plain, spread, tolerance=BF16_TOLERANCE)


# Faults planted on purpose: each must be caught


def averaged_gradients(trainer: Trainer, batch: Batch) -> None:
    """What FSDP2 does unless told otherwise."""
    for module in trainer.model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(float(trainer.world.size))


def targets_counted_on_one_rank(trainer: Trainer, batch: Batch) -> None:
    trainer._valid_targets = lambda batch: batch.valid_targets * trainer.world.size  # type: ignore[method-assign]


def another_batch_on_rank_1(trainer: Trainer, batch: Batch) -> None:
    """Rank 1 trains on a step's first rows over and over, though it counts its samples rightly."""
    if trainer.world.rank == 1:
        if trainer.step == 0:
            trainer.first_rows = batch.rows.clone()  # type: ignore[attr-defined]
        batch.rows.copy_(trainer.first_rows)  # type: ignore[attr-defined]


def another_seed_on_rank_1(trainer: Trainer, batch: Batch) -> None:
    if trainer.step == 0 and trainer.world.rank == 1:
        init_weights(trainer.model, trainer.config.model, seed=1)


def an_update_missed_on_rank_1(trainer: Trainer, batch: Batch) -> None:
    if trainer.world.rank == 1:
        trainer.optimizer.step = lambda: None  # type: ignore[method-assign, assignment]


FAULTS: list[Before] = [
    averaged_gradients,
    targets_counted_on_one_rank,
    another_batch_on_rank_1,
    another_seed_on_rank_1,
    an_update_missed_on_rank_1,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault: Before, alone: Course, sources: dict[str, Path], tmp_path: Path) -> None:
    spoiled = on_ranks(2, course_of, config_for(tmp_path, sources, micro_batch=2), STEPS, fault)[0]
    with pytest.raises(AssertionError):
        check_same_course(alone, spoiled)


# Initial weights: every rank draws its part


def numbers_drawn(world: World, config: RunConfig) -> tuple[int, int]:
    """(numbers this rank drew at the generator while the model was composed, parameters that need drawing)."""
    from llamatrain.model import init

    drawn = 0
    generator = init._splitmix64

    def counting(counter: torch.Tensor, key: int) -> torch.Tensor:
        nonlocal drawn
        drawn += counter.numel()
        return generator(counter, key)

    init._splitmix64 = counting
    course = course_of(world, config, 1)
    weights = course.initial_weights
    return drawn, sum(w.numel() for name, w in weights.items() if not name.endswith("norm.weight"))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_draws_its_share_of_the_initial_weights(ranks: int, sources: dict[str, Path], tmp_path: Path) -> None:
    config = config_for(tmp_path, sources, model={"vocab_size": 512})  # every matrix divides by 4
    counts = on_ranks(ranks, numbers_drawn, config)
    assert [drawn for drawn, _ in counts] == [counts[0][1] // ranks] * ranks


def boxes_of_65b(world: World) -> dict[str, tuple[list[int], list[int]]]:
    """(shape, offset) of what this rank would draw, by the function that the drawing uses; nothing is allocated."""
    text = (Path(__file__).parents[2] / "conf" / "model" / "65b.yaml").read_text()
    with torch.device("meta"):
        model = Llama(ModelConfig(**yaml.safe_load(text), attention="sdpa"))
    fsdp.shard(model, build_mesh(Layout(dp_shard=world.size), torch.device("cpu")), ParallelConfig())
    parts = {name: local_part(parameter.detach()) for name, parameter in model.named_parameters()}
    return {name: (list(part.shape), offset) for name, (part, offset) in parts.items()}


def test_each_of_four_ranks_draws_a_quarter_of_65b() -> None:
    ranks = on_ranks(4, boxes_of_65b)
    assert [sum(prod(shape) for shape, _ in boxes.values()) for boxes in ranks] == [65_285_660_672 // 4] * 4
    for name, (shape, _) in ranks[0].items():
        assert [boxes[name] for boxes in ranks] == [(shape, [r * shape[0], *[0] * len(shape[1:])]) for r in range(4)]
