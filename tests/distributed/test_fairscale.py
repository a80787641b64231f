"""fairscale's FSDP: the same run as the plain model's, the same checkpoints; on gloo ranks by way of `cpu_streams`."""

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatrain.checkpoint import commit
from llamatrain.config import RunConfig, validate
from llamatrain.distributed import World
from llamatrain.dry_run import rehearse
from llamatrain.errors import ConfigError
from llamatrain.flat import FlatPart
from llamatrain.resilience.control import StopRequest
from llamatrain.session import open_run_directory, run, settle
from llamatrain.trainer import Trainer
from llamatrain.verification.course import Course, differences, follow
from llamatrain.verification.runner import Tensors, read_whole, same_state, whole_state
from tests.courses import BF16_TOLERANCE, Before, check_same_course, course_of
from tests.cpu_streams import Streams, cpu_streams
from tests.ranks import on_ranks
from tests.small_run import GLOBAL_BATCH, assert_same_run, metrics, small_config, trainer_for

STEPS = 4


def config_for(directory: Path, sources: dict[str, Path], **groups: dict[str, Any]) -> RunConfig:
    """A few steps with documents masked, of a model whose parameters divide into no number of ranks."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 515},
        "data": {"document_mask": True},
        "train": {"steps": STEPS, "micro_batch": 1},
        "optim": {"clip_norm": 0.5},
    }
    for name, values in groups.items():
        settings[name] = {**settings.get(name, {}), **values}
    return small_config(directory, sources, **settings)


@contextmanager
def fairscale_trainer(config: RunConfig, world: World) -> Iterator[tuple[Trainer, Streams]]:
    """A trainer with fairscale on the CPU, where settings would be refused if they were not settled without it."""
    with ExitStack() as resources:
        streams = resources.enter_context(cpu_streams())
        directory = open_run_directory(config, world)
        resources.callback(directory.close)
        settled = settle(config, directory, world)
        settled.parallel = replace(settled.parallel, sharding="fairscale")
        yield Trainer(settled, directory, StopRequest(), world, resources), streams


def fairscale_course(world: World, config: RunConfig, before: Before | None = None) -> Course:
    with fairscale_trainer(config, world) as (trainer, streams):
        course = follow(trainer, STEPS, before)
        assert streams.too_early == 0
        assert streams.gathers >= (world.size > 1) * STEPS * 2 * len(trainer.model.layers)
        return course


# The same run


@pytest.fixture(scope="module")
def alone(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Course:
    """The plain model in one process, every step one forward."""
    config = config_for(tmp_path_factory.mktemp("alone"), sources, train={"micro_batch": GLOBAL_BATCH})
    return course_of(World(), config, STEPS)


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (2, {"recompute": "block_backward"}),
    (2, {"recompute": "selective"}),
    (2, {"recompute": "full", "reshard_after_forward": "never"}),
    (4, {"recompute": "block_backward", "reshard_after_forward": "never"}),
]


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS)
def test_fairscale_changes_nothing(
    ranks: int, parallel: dict[str, Any], alone: Course, sources: dict[str, Path], tmp_path: Path
) -> None:
    courses = on_ranks(ranks, fairscale_course, config_for(tmp_path, sources, parallel=parallel))
    for course in courses:
        assert (course.losses, course.norms) == (courses[0].losses, courses[0].norms)
    check_same_course(alone, courses[0])


@pytest.mark.parametrize("tied", [False, True])
def test_in_bf16_too(tied: bool, sources: dict[str, Path], tmp_path: Path) -> None:
    bf16 = {"train": {"precision": "bf16", "micro_batch": 2}, "model": {"tied_embeddings": tied}}
    plain = course_of(World(), config_for(tmp_path / "1", sources, **bf16), STEPS)
    for ranks in (1, 2):
        spread = on_ranks(ranks, fairscale_course, config_for(tmp_path / f"on {ranks}", sources, **bf16))[0]
        check_same_course(plain, spread, tolerance=BF16_TOLERANCE)


def test_tied_embeddings_are_spread_too(sources: dict[str, Path], tmp_path: Path) -> None:
    tied = {"tied_embeddings": True}
    plain = course_of(World(), config_for(tmp_path / "1", sources, model=tied), STEPS)
    check_same_course(plain, on_ranks(2, fairscale_course, config_for(tmp_path / "2", sources, model=tied))[0])


def averaged_gradients(trainer: Trainer, batch: Any) -> None:
    """What fairscale does unless told otherwise."""
    trainer.model.set_gradient_divide_factors(1.0, float(trainer.world.size), recursive=True)


def test_averaged_gradients_would_be_noticed(alone: Course, sources: dict[str, Path], tmp_path: Path) -> None:
    spoiled = on_ranks(2, fairscale_course, config_for(tmp_path, sources), averaged_gradients)[0]
    assert differences(alone, spoiled).failures("fp32")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_one_gpu_too(precision: str, sources: dict[str, Path], tmp_path: Path) -> None:
    train = {"device": "cuda", "precision": precision}
    plain = course_of(World(), config_for(tmp_path / "plain", sources, train=train), STEPS)
    config = config_for(tmp_path / "fairscale", sources, train=train, parallel={"sharding": "fairscale"})
    course = course_of(World(), config, STEPS)
    check_same_course(plain, course, tolerance=BF16_TOLERANCE if precision == "bf16" else 1e-5)


# What is spread


def spreading(world: World, config: RunConfig) -> tuple[dict[str, bool], list[int], int]:
    """Whether each parameter decays; numbers in each flat shard; numbers of the model."""
    with fairscale_trainer(config, world) as (trainer, _):
        decays = {
            id(flat): group["weight_decay"] > 0 for group in trainer.optimizer.param_groups for flat in group["params"]
        }
        parts: dict[str, FlatPart] = trainer.parameters  # type: ignore[assignment]
        whole = sum(part.shape.numel() for part in parts.values())
        return (
            {name: decays[id(part.flat)] for name, part in parts.items()},
            [flat.numel() for group in trainer.optimizer.param_groups for flat in group["params"]],
            whole,
        )


def test_a_flat_parameter_decays_as_a_whole_and_each_rank_has_its_share(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    for decays, shards, whole in on_ranks(2, spreading, config_for(tmp_path, sources)):
        assert {name for name, does in decays.items() if not does} == {n for n in decays if n.endswith("norm.weight")}
        assert len(shards) == 2 + 2 * 2 + 1  # embedding and head; of each block matrices and norms; the last norm
        assert 0 <= 2 * sum(shards) - whole <= len(shards)


def dtypes(world: World, config: RunConfig) -> tuple[dict[str, torch.dtype], torch.dtype]:
    """In what each parameter is gathered; that of the RoPE tables."""
    with fairscale_trainer(config, world) as (trainer, _):
        follow(trainer, 1)
        gathered = {name: part.flat._full_param_padded.dtype for name, part in trainer.parameters.items()}
        return gathered, trainer.model.rope_cos.dtype


@pytest.mark.parametrize("tied", [False, True])
def test_all_but_the_embedding_and_rope_are_in_bf16(tied: bool, sources: dict[str, Path], tmp_path: Path) -> None:
    config = config_for(tmp_path, sources, train={"precision": "bf16"}, model={"tied_embeddings": tied})
    gathered, rope = on_ranks(2, dtypes, config)[0]
    assert rope is torch.float32
    assert {name for name, dtype in gathered.items() if dtype is not torch.bfloat16} == {"tok_embeddings.weight"}


def what_stays_gathered(world: World, config: RunConfig) -> tuple[list[int], list[int]]:
    """Bytes of weights that are gathered after a step and after a validation; backward hooks run in each step."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    hook, ran = FullyShardedDataParallel._post_backward_hook, [0]

    def counting(*args: Any) -> None:
        ran[-1] += 1
        hook(*args)

    def gathered(trainer: Trainer) -> int:
        flat = {id(part.flat): part.flat for part in trainer.parameters.values() if isinstance(part, FlatPart)}
        return sum(tensor._full_param_padded.untyped_storage().nbytes() for tensor in flat.values())  # type: ignore

    with fairscale_trainer(config, world) as (trainer, _), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FullyShardedDataParallel, "_post_backward_hook", counting)
        left = []
        with trainer.open_loader() as loader:
            for batch in loader:
                trainer.train_step(batch)
                left.append(gathered(trainer))
                trainer.evaluator.validation.evaluate(trainer.model, trainer.passes.loss)
                left.append(gathered(trainer))
                if trainer.step == STEPS:
                    break
                ran.append(0)
        return left, ran


@pytest.mark.parametrize("reshard", ["always", "never"])
def test_nothing_is_left_behind_by_a_step(reshard: str, sources: dict[str, Path], tmp_path: Path) -> None:
    little = {"max_tokens": 256, "micro_batch": 1}
    config = config_for(tmp_path, sources, parallel={"reshard_after_forward": reshard}, evaluation=little)
    left, ran = on_ranks(2, what_stays_gathered, config)[0]
    assert set(left) == {0}
    assert len(ran) == STEPS
    assert len(set(ran)) == 1


# Checkpoints


def trained(world: World, config: RunConfig, steps: int) -> tuple[Path, Tensors]:
    """The checkpoint of a run by fairscale after some steps, and what is in it."""
    with fairscale_trainer(config, world) as (trainer, _):
        follow(trainer, steps)
        trainer.snapshots.save(trainer.step, trainer.data_state)
        state = whole_state(trainer)
    return commit.find_checkpoint(Path(config.run_dir)), state


def resumed(world: World, config: RunConfig) -> tuple[int, Tensors]:
    """The step at which a run goes on by fairscale, and with what."""
    with fairscale_trainer(config, world) as (trainer, _):
        return trainer.step, whole_state(trainer)


def in_one_process(config: RunConfig, steps: int) -> Tensors:
    """What the plain model has when `steps` are done, which are then saved."""
    with ExitStack() as resources:
        trainer = trainer_for(config, resources)
        if trainer.step < steps:
            follow(trainer, steps)
            trainer.snapshots.save(trainer.step, trainer.data_state)
        return whole_state(trainer)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_checkpoints_are_everybodys(ranks: int, sources: dict[str, Path], tmp_path: Path) -> None:
    three = {"train": {"global_batch_tokens": 6 * 32}}  # sequences for three ranks
    mine, theirs = (config_for(tmp_path / name, sources, **three) for name in ("mine", "theirs"))
    checkpoint, state = on_ranks(ranks, trained, mine, 2)[0]
    assert same_state(read_whole(checkpoint), state)
    assert same_state(in_one_process(mine, 2), state)
    plain = in_one_process(theirs, 2)
    for step, found in on_ranks(ranks, resumed, theirs):
        assert step == 2
        assert same_state(found, plain)


def fitted(world: World, config: RunConfig) -> None:
    with fairscale_trainer(config, world) as (trainer, _):
        trainer.fit()


def test_a_resumed_run_is_bitwise_the_unbroken_run(sources: dict[str, Path], tmp_path: Path) -> None:
    train = {"steps": 8, "micro_batch": 2}
    whole, broken = (config_for(tmp_path / name, sources, train=train) for name in ("whole", "broken"))
    on_ranks(2, fitted, whole)
    on_ranks(2, fitted, replace(broken, train=replace(broken.train, stop_after_step=4)))
    on_ranks(2, fitted, broken)
    assert_same_run(whole.run_dir, broken.run_dir, step=8)
    plain = config_for(tmp_path / "plain", sources, train=train)
    run(plain, StopRequest())
    for mine, theirs in zip(metrics(whole.run_dir), metrics(plain.run_dir), strict=True):
        for name in theirs.keys() & {"train/loss", "train/grad_norm", "eval/validation/loss"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)


def rehearsed(world: World, config: RunConfig) -> str:
    with redirect_stdout(io.StringIO()) as told, fairscale_trainer(config, world) as (trainer, _):
        rehearse(trainer)
    return told.getvalue()


def test_it_can_be_rehearsed(sources: dict[str, Path], tmp_path: Path) -> None:
    told, silence = on_ranks(2, rehearsed, config_for(tmp_path, sources))
    assert "what came back is what was saved" in told
    assert silence == ""


# Refusals


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_without_cuda_it_is_refused_before_anything_is_read(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    missing = {"nothing": tmp_path / "no such data"}
    config = config_for(tmp_path / "run", missing, train={"device": device}, parallel={"sharding": "fairscale"})
    with pytest.raises(ConfigError, match=r"sharding=fairscale needs CUDA.*: set parallel\.sharding=fsdp2"):
        run(config, StopRequest())
    if device == "cpu":
        with pytest.raises(ConfigError, match="sharding=fairscale needs CUDA"):
            validate(config)


def test_the_command_says_so_in_a_line(tmp_path: Path) -> None:
    arguments = ["parallel=fairscale", "train.device=cpu", "train.steps=1", "optim.warmup_steps=0", "model=15m"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "llamatrain.train",
            *arguments,
            f"data.sources.any.path={tmp_path}",
            f"run_dir={tmp_path}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: parallel\.sharding=fairscale needs CUDA.*\n", done.stderr)


REFUSED: dict[str, Any] = {
    "pp": 2,
    "dp_replicate": 2,
    "cp": 2,
    "tp": 2,
    "forward_prefetch": 1,
    "backward_prefetch": 1,
    "reduce_scatter": "last",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_goes_with_fsdp2_only_is_refused(name: str, tmp_path: Path) -> None:
    parallel = {"sharding": "fairscale", name: REFUSED[name]}
    config = config_for(tmp_path, {"any": tmp_path}, train={"device": "cuda"}, parallel=parallel)
    with pytest.raises(ConfigError, match=rf"parallel\.{name}=.* does not go with .*; set parallel\.{name}="):
        validate(config, world_size=2)


def test_bf16_reduction_of_fp32_gradients_is_refused(tmp_path: Path) -> None:
    parallel = {"sharding": "fairscale", "reduce_dtype": "bf16"}
    for precision in ("fp32", "bf16"):
        train = {"device": "cuda", "precision": precision}
        config = config_for(tmp_path, {"any": tmp_path}, train=train, parallel=parallel)
        if precision == "bf16":
            validate(config)
            continue
        with pytest.raises(ConfigError, match=r"reduce_dtype=bf16 does not go with .*fp32"):
            validate(config)
