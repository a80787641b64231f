"""Stages of a pipeline: the plain model's run in the order of their schedule, and checkpoints that know no stages."""

from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from llamatrain.arithmetic import micro_batches_in_flight, parameter_shapes
from llamatrain.checkpoint import store
from llamatrain.config import ModelConfig, ParallelConfig, RunConfig
from llamatrain.config.parallel import stage_layers
from llamatrain.config.run import validate
from llamatrain.data.loader import Batch
from llamatrain.distributed import World, local_part
from llamatrain.dry_run import rehearse
from llamatrain.errors import CheckpointError, ConfigError
from llamatrain.memory import training_memory
from llamatrain.model.llama import Llama
from llamatrain.parallel import fsdp
from llamatrain.parallel.pipeline import Pipeline, keep_stage
from llamatrain.resilience.control import StopRequest
from llamatrain.session import run_on
from llamatrain.trainer import Trainer
from tests.benchmarks.bench_recompute import LiveBytes
from tests.courses import BF16_TOLERANCE, LOSS_TOLERANCE, Before, Course, check_same_course, course_of
from tests.distributed.test_resumption import train
from tests.distributed.test_training import STEPS, config_for
from tests.ranks import on_ranks
from tests.small_run import GLOBAL_BATCH, SEQ_LEN, assert_same_run, metrics, reproducible, saved_steps, trainer_for
from tests.test_model import some_tokens, tiny

GPIPE = {"pp": 2, "pipeline_schedule": "gpipe"}

# How layers are shared out


@given(stages=st.integers(1, 40), more=st.integers(0, 200))
def test_layers_are_shared_out_in_order_and_nearly_evenly(stages: int, more: int) -> None:
    shares = stage_layers(stages + more, stages)
    assert [layer for share in shares for layer in share] == list(range(stages + more))
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts)  # it has the head besides
    assert (
        stages < 3 or counts[0] == min(counts) or min(counts[:-1]) == max(counts)
    )  # the first is the next to be spared


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_stages_have_all_parameters_between_them_under_their_own_names(stages: int) -> None:
    config = ModelConfig(dim=32, n_layers=5, n_heads=2, vocab_size=64, max_seq_len=16)
    found: dict[str, tuple[int, ...]] = {}
    for stage in range(stages):
        with torch.device("meta"):
            model = Llama(config)
        keep_stage(model, SimpleNamespace(get_local_rank=lambda stage=stage: stage, size=lambda: stages))  # type: ignore[arg-type]
        own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert own and not own.keys() & found.keys()
        found |= own
    assert found == parameter_shapes(config)


# What is refused


@pytest.mark.parametrize(
    ("groups", "told", "fix"),
    [
        (
            {"parallel": {"pp": 4}},
            "parallel.pp=4 stages are more than the model.n_layers=2 layers they are made of: the nearest that "
            "works is parallel.pp=2 parallel.dp_shard=2",
            {"parallel": {"pp": 2, "dp_shard": 2}},
        ),
        (
            {"parallel": {"pp": 2}, "model": {"tied_embeddings": True}},
            "one weight cannot be both (model.tied_embeddings=false has two)",
            {"model": {"tied_embeddings": False}},
        ),
        (
            {"parallel": {"pp": 2}, "train": {"micro_batch": 4}},
            "needs at least as many micro-batches as parallel.pp=2 stages, a step has 1 on each rank; what would do: "
            "train.micro_batch=2, or train.global_batch_tokens=512, or parallel.pipeline_schedule=gpipe",
            {"train": {"micro_batch": 2}},
        ),
        (
            {"parallel": {"pp": 2}, "train": {"global_batch_tokens": 2 * SEQ_LEN}},
            "what would do: train.global_batch_tokens=128, or parallel.pipeline_schedule=gpipe",
            {"train": {"global_batch_tokens": 128}},
        ),
        (
            {"parallel": {"pp": 2}, "train": {"micro_batch": 4}},
            "parallel.pipeline_schedule=gpipe",
            {"parallel": {"pipeline_schedule": "gpipe"}},
        ),
        (
            {"parallel": {"pp": 2, "pipeline_schedule": "zigzag"}},
            "parallel.pipeline_schedule=zigzag: choose one of 1f1b, gpipe",
            {"parallel": {"pipeline_schedule": "1f1b"}},
        ),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_with_what_it_can(
    groups: dict[str, Any], told: str, fix: dict[str, Any], sources: dict[str, Path], tmp_path: Path
) -> None:
    config = config_for(tmp_path, sources, **groups)
    with pytest.raises(ConfigError) as refusal:
        validate(config, world_size=4)
    assert told in str(refusal.value)
    mended = {name: replace(getattr(config, name), **values) for name, values in fix.items()}
    validate(replace(config, **mended), world_size=4)


# The same run


@pytest.fixture(scope="module")
def alone(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Course:
    """The plain model in one process."""
    return course_of(World(), config_for(tmp_path_factory.mktemp("alone"), sources, micro_batch=GLOBAL_BATCH))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "micro_batch", "parallel"),
    [
        (2, 2, {"pp": 2, "recompute": "block_backward"}),
        (2, 4, {"pp": 2}),  # as many micro-batches as stages
        (2, 8, GPIPE),  # fewer
        (2, 1, {**GPIPE, "recompute": "full"}),
        (4, 1, {"pp": 2, "reduce_scatter": "last"}),
        (4, 2, {**GPIPE, "reshard_after_forward": "never"}),
        (4, 1, {"pp": 2, "dp_replicate": 2, "all_reduce": "each"}),
    ],
)
def test_stages_change_nothing(
    ranks: int, micro_batch: int, parallel: dict[str, Any], alone: Course, sources: dict[str, Path], tmp_path: Path
) -> None:
    courses = on_ranks(ranks, course_of, config_for(tmp_path, sources, micro_batch=micro_batch, parallel=parallel))
    assert all(course.losses == courses[0].losses and course.norms == courses[0].norms for course in courses)
    check_same_course(alone, courses[0])


@pytest.mark.slow
def test_neither_do_stages_of_uneven_depth_whose_ranks_share_layers(sources: dict[str, Path], tmp_path: Path) -> None:
    model = {"n_layers": 3, "vocab_size": 516}
    plain = course_of(World(), config_for(tmp_path / "1", sources, micro_batch=GLOBAL_BATCH, model=model))
    config = config_for(tmp_path / "4", sources, model=model, parallel={"pp": 2, "tp": 2})
    check_same_course(plain, on_ranks(4, course_of, config)[0])


def test_bf16_stays_within_its_tolerance(sources: dict[str, Path], tmp_path: Path) -> None:
    bf16 = {"precision": "bf16"}
    plain = course_of(World(), config_for(tmp_path / "1", sources, micro_batch=GLOBAL_BATCH, train=bf16))
    config = config_for(tmp_path / "2", sources, train=bf16, parallel={"pp": 2})
    check_same_course(plain, on_ranks(2, course_of, config)[0], tolerance=BF16_TOLERANCE)


def averaged_over_micro_batches(trainer: Trainer, batch: Batch) -> None:
    """What torch's schedules do unless told otherwise."""
    schedule = trainer.passes._schedule  # type: ignore[attr-defined]
    if schedule is not None:
        schedule._stage.perform_reduce_grad = lambda _: [p.grad.div_(4) for p in trainer.parameters.values()]


def targets_of_another_micro_batch(trainer: Trainer, batch: Batch) -> None:
    """The last stage does not take micro-batches in the order in which hidden states come."""
    right = Pipeline.accumulate
    if trainer.step == 0 and trainer.passes.last:  # type: ignore[attr-defined]
        Pipeline.accumulate = lambda self, some, valid: right(self, some[::-1], valid)  # type: ignore[method-assign]


def last_gradients_kept_back(trainer: Trainer, batch: Batch) -> None:
    fsdp.begin_micro_batch = lambda model, settings, last: model.set_requires_gradient_sync(not last)


@pytest.mark.parametrize(
    "fault", [averaged_over_micro_batches, targets_of_another_micro_batch, last_gradients_kept_back]
)
def test_a_planted_fault_is_caught(fault: Before, alone: Course, sources: dict[str, Path], tmp_path: Path) -> None:
    config = config_for(tmp_path, sources, micro_batch=2, parallel={"pp": 2})
    with pytest.raises(AssertionError):
        check_same_course(alone, on_ranks(2, course_of, config, STEPS, fault)[0])


# The order of a schedule


def order_of_work(world: World, config: RunConfig) -> str:
    """F and B for every forward and backward of a step on this rank, the last backward as L."""
    done, begin = [], fsdp.begin_micro_batch
    with ExitStack() as resources:
        trainer = trainer_for(config, resources, world)
        trainer.model.register_forward_hook(lambda *_: done.append("F"))

        def beginning(model: Llama, settings: Any, *, last: bool) -> None:
            done.append("L" if last else "B")
            begin(model, settings, last=last)

        fsdp.begin_micro_batch = beginning
        with trainer.open_loader() as loader:
            trainer.train_step(next(loader))
    return "".join(done)


@pytest.mark.parametrize(
    ("parallel", "orders"),
    [({"pp": 2}, ["FFBFBFBL", "FBFBFBFL"]), (GPIPE, ["FFFFBBBL", "FFFFBBBL"])],
)
def test_forwards_and_backwards_come_in_the_order_of_the_schedule(
    parallel: dict[str, Any], orders: list[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    config = config_for(tmp_path, sources, micro_batch=2, parallel=parallel)
    assert on_ranks(2, order_of_work, config) == orders
    for stage, order in enumerate(orders):
        in_flight = [order[:n].count("F") - order[:n].count("B") for n in range(len(order))]
        assert max(in_flight) == micro_batches_in_flight(config, 2, stage)


def peak_of_a_step(world: World, config: RunConfig) -> int:
    """Live bytes of a step, besides weights and moments."""
    with ExitStack() as resources:
        trainer = trainer_for(config, resources, world)
        with trainer.open_loader() as loader:
            batch = next(loader)
        known = [local_part(parameter.detach())[0] for parameter in trainer.parameters.values()]
        with LiveBytes([*known, *trainer.model.buffers(), batch.rows]) as live:
            trainer.accumulate_gradients(batch)
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_peak_of_a_step_is_within_the_sum_of_its_parts(
    schedule: str, recompute: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Of the fullest stage; the logits, which the formula has on all stages, are few here."""
    config = config_for(
        tmp_path,
        sources,
        micro_batch=1,
        model={"dim": 128, "n_layers": 8, "ffn_multiple_of": 32},
        data={"document_mask": False},
        train={"precision": "bf16"},
        parallel={"pp": 2, "pipeline_schedule": schedule, "recompute": recompute},
    )
    peak = max(on_ranks(2, peak_of_a_step, config))
    parts = training_memory(config, recompute, world_size=2)
    predicted = sum(parts.values()) - parts["weights, gradients, moments"] * 12 / 16
    assert peak <= predicted <= 1.4 * peak, (peak, parts)


# Checkpoints and validation


def test_a_resumed_run_is_bitwise_the_unbroken_one(sources: dict[str, Path], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings: dict[str, Any] = {"micro_batch": 2, "parallel": {"pp": 2}}
    on_ranks(2, train, config_for(whole, sources, **settings))
    on_ranks(2, train, config_for(broken, sources, train={"stop_after_step": 7}, **settings))
    on_ranks(2, train, config_for(broken, sources, **settings))
    assert_same_run(whole, broken, step=STEPS)


@pytest.mark.slow
def test_from_two_stages_to_one_process_to_more_and_none(sources: dict[str, Path], tmp_path: Path) -> None:
    """Losses, norms and validation of every leg are those of one process from the start."""
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    train(World(), config_for(alone, sources, micro_batch=2))
    legs: list[tuple[int, int | None, dict[str, Any]]] = [(2, 4, {"pp": 2}), (1, 8, {}), (4, 13, GPIPE), (2, None, {})]
    for ranks, stop, parallel in legs:
        config = config_for(
            moved,
            sources,
            micro_batch=2,
            train={"stop_after_step": stop},
            parallel=parallel,
            evaluation={"micro_batch": 3},
        )
        on_ranks(ranks, train, config)
    assert saved_steps(moved)[-1] == STEPS
    one, other = reproducible(metrics(alone)), reproducible(metrics(moved))
    assert sum("eval/validation/loss" in record for record in one) == 5
    for record, again in zip(one, other, strict=True):
        assert again == pytest.approx(record, rel=LOSS_TOLERANCE)


def rehearsed(world: World, config: RunConfig) -> str:
    """What a dry run prints on this rank."""
    with redirect_stdout(StringIO()) as printed:
        run_on(world, config, StopRequest(), work=rehearse)
    return printed.getvalue()


@pytest.mark.parametrize(("schedule", "micro_batches"), [("1f1b", 5), ("gpipe", 8)])
def test_a_dry_run_takes_one_micro_batch_more_than_are_in_flight(
    schedule: str, micro_batches: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    parallel = {"pp": 4, "pipeline_schedule": schedule}
    config = config_for(tmp_path, sources, micro_batch=1, model={"n_layers": 4}, parallel=parallel)
    printed = on_ranks(4, rehearsed, config)
    assert f"for {micro_batches} micro-batches on each" in printed[0]
    assert f"by {schedule}, in which a stage waits 27% of the time" in printed[0]
    assert printed[1:] == [""] * 3


def a_tensor_amiss(world: World, config: RunConfig, path: Path) -> list[str]:
    """What each rank says of a checkpoint that lacks a tensor of the other stage, and of one that has one too many."""
    said = []
    with ExitStack() as resources:
        trainer = trainer_for(config, resources, world)
        trainer.snapshots.save(0, trainer.data_state)
        (checkpoint,) = path.glob("checkpoints/step-*")
        names = trainer.snapshots.names_everywhere()
        for change in (
            lambda found: found.pop("norm.weight"),
            lambda found: found.update(other=found["layers.0.ffn_norm.weight"]),
        ):
            manifest = store.open_checkpoint(checkpoint, world=world)
            change(manifest["tensors"]["model"])
            with pytest.raises(CheckpointError) as refusal:
                trainer.snapshots.fill(store.Reader(checkpoint, manifest), names)
            said.append(str(refusal.value).rpartition(": ")[2])
    return said


def test_what_no_stage_would_read_or_nobody_wrote_is_noticed_by_all(sources: dict[str, Path], tmp_path: Path) -> None:
    config = config_for(tmp_path, sources, parallel={"pp": 2})
    assert on_ranks(2, a_tensor_amiss, config, tmp_path) == [["lacks norm.weight", "has other"]] * 2


def without_a_weight(world: World, config: RunConfig) -> str:
    with ExitStack() as resources:
        trainer = trainer_for(config, resources, world)
        trainer.snapshots.parameters.pop("layers.1.attention.wq.weight", None)
        with pytest.raises(ValueError) as refusal:
            trainer.snapshots.restore()
    return str(refusal.value)


def test_a_weight_that_no_stage_has_ends_the_start(sources: dict[str, Path], tmp_path: Path) -> None:
    for said in on_ranks(2, without_a_weight, config_for(tmp_path, sources, parallel={"pp": 2})):
        assert said.endswith("layers.1.attention.wq.weight")


# Failures


def failing(world: World) -> str:
    """What comes out of a pipeline, here of one stage, whose model meets gloo's words for a lost peer."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "pp"))["pp"]
    model, tokens = tiny(torch.float32), some_tokens(1, 8)

    def lose_a_peer(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")

    model.register_forward_pre_hook(lose_a_peer)
    with pytest.raises(RuntimeError) as failure:
        Pipeline(model, ParallelConfig(), mesh, tokens_shared_by=1).accumulate([(tokens, tokens, None)], 8)
    return str(failure.value)


def test_a_failure_inside_a_stage_keeps_its_words() -> None:
    """By them it is told who failed and who only noticed."""
    assert on_ranks(2, failing) == ["Connection closed by peer [127.0.0.1]:1"] * 2
