"""The trainer in one process: resumption, micro-batches, stopping, validation, what a run leaves behind."""

import math
import random
import signal
import sysconfig
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.train_tokenizer import TrainTokenizerSettings, train_tokenizer
from llamatrain import generate
from llamatrain.checkpoint import commit
from llamatrain.config import RunConfig
from llamatrain.config.generate import GenerateConfig
from llamatrain.data.loader import Batch
from llamatrain.distributed import World
from llamatrain.errors import CheckpointError, ConfigError, DataError, UnhealthyRun
from llamatrain.evaluation.validation import Validation
from llamatrain.model.llama import Llama
from llamatrain.observe.records import Record
from llamatrain.resilience.control import StopRequest
from llamatrain.session import run
from llamatrain.train import train
from llamatrain.trainer import Trainer
from tests.courses import BF16_TOLERANCE, Course, check_same_course, course_of
from tests.small_run import (
    GLOBAL_BATCH,
    SEQ_LEN,
    assert_same_run,
    metrics,
    reproducible,
    saved_steps,
    saved_tensors,
    small_config,
    status,
    train_in_process,
    trainer_for,
)


@pytest.fixture(scope="module")
def unbroken(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run."""
    config = small_config(tmp_path_factory.mktemp("unbroken"), sources)
    train_in_process(config)
    return config


def test_a_run_leaves_its_record_behind(unbroken: RunConfig) -> None:
    directory = Path(unbroken.run_dir)
    assert status(directory)["state"] == "done"
    assert status(directory)["step"] == 12
    assert saved_steps(directory) == [8, 12]
    steps = [record["step"] for record in metrics(directory) if "train/loss" in record]
    assert steps == list(range(1, 13))
    assert [record["step"] for record in metrics(directory) if "eval/validation/loss" in record] == [0, 6, 12]
    assert all(record["tokens"] == record["step"] * GLOBAL_BATCH * SEQ_LEN for record in metrics(directory))
    for name in ("config.yaml", "journal.jsonl", "tokenizer.model"):
        assert (directory / name).stat().st_size > 0


def test_the_loss_falls(unbroken: RunConfig) -> None:
    losses = [record["train/loss"] for record in metrics(unbroken.run_dir) if "train/loss" in record]
    assert losses[0] == pytest.approx(math.log(512), rel=0.02)
    assert sum(losses[-3:]) < sum(losses[:3])


def test_a_finished_run_says_so_and_changes_nothing(unbroken: RunConfig, capfd: pytest.CaptureFixture[str]) -> None:
    before = reproducible(metrics(unbroken.run_dir))
    train_in_process(unbroken)
    assert "done: step 12 of 12" in capfd.readouterr().err
    assert status(unbroken.run_dir)["state"] == "done"
    assert reproducible(metrics(unbroken.run_dir)) == before
    assert saved_steps(unbroken.run_dir) == [8, 12]


@pytest.mark.parametrize("stop_at", [1, 4, 5, 6, 11])
def test_a_resumed_run_is_bitwise_the_unbroken_one(
    stop_at: int, unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path
) -> None:
    train_in_process(small_config(tmp_path, sources, train={"stop_after_step": stop_at}))
    assert status(tmp_path)["state"] == "preempted"
    assert saved_steps(tmp_path)[-1] == stop_at
    train_in_process(small_config(tmp_path, sources))
    assert status(tmp_path)["state"] == "done"
    assert_same_run(unbroken.run_dir, tmp_path, step=12)


def test_stopping_at_every_step_is_bitwise_the_unbroken_run(
    unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path
) -> None:
    for step in range(1, 13):
        train_in_process(small_config(tmp_path, sources, train={"stop_after_step": step}))
    assert_same_run(unbroken.run_dir, tmp_path, step=12)


def test_records_after_the_checkpoint_are_cut_and_made_again(
    unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path
) -> None:
    train_in_process(small_config(tmp_path, sources, train={"stop_after_step": 8}))
    checkpoint = tmp_path / "checkpoints" / "step-00000008"
    checkpoint.rename(tmp_path / "moved-away")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "torn')
    train_in_process(small_config(tmp_path, sources))
    assert_same_run(unbroken.run_dir, tmp_path, step=12)


def test_validation_does_not_change_training(unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path, sources, evaluation={"every_steps": 0}))
    one, other = saved_tensors(unbroken.run_dir, 12), saved_tensors(tmp_path, 12)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_signal_saves_and_stops_after_the_step(unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path) -> None:
    stop = StopRequest()
    stop.install()
    try:
        signal.raise_signal(signal.SIGTERM)  # before the first step: the save comes after step 1
        run(small_config(tmp_path, sources), stop)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert status(tmp_path)["state"] == "preempted"
    assert status(tmp_path)["reason"] == "SIGTERM"
    assert saved_steps(tmp_path) == [1]
    train_in_process(small_config(tmp_path, sources))
    assert_same_run(unbroken.run_dir, tmp_path, step=12)


def test_a_longer_run_keeps_the_past_of_a_shorter_one(
    unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path
) -> None:
    train_in_process(small_config(tmp_path, sources, train={"steps": 6}))
    train_in_process(small_config(tmp_path, sources))
    one, other = saved_tensors(unbroken.run_dir, 12), saved_tensors(tmp_path, 12)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_structural_change_is_refused_and_another_is_taken(sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path, sources, train={"stop_after_step": 2}))
    with pytest.raises(ConfigError, match=r"data\.seed was 0, is 1"):
        train_in_process(small_config(tmp_path, sources, data={"seed": 1}))
    assert status(tmp_path)["state"] == "bad_input"
    train_in_process(small_config(tmp_path, sources, train={"steps": 3}, optim={"lr": 1e-4}))
    assert metrics(tmp_path)[-2]["train/lr"] == pytest.approx(1e-4 * 3 / 10)


def test_another_data_set_under_the_same_name_is_refused(
    sources: dict[str, Path], tiny_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    train_in_process(small_config(tmp_path / "run", sources, train={"steps": 2}))
    other = tiny_dataset("lines", ["something else entirely. " * 60], tmp_path / "lines")
    with pytest.raises(DataError, match=r"data\.sources\.lines: its data set is not the one"):
        train_in_process(small_config(tmp_path / "run", {**sources, "lines": other}))


def test_a_first_start_that_failed_may_be_corrected(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set model\.vocab_size=512"):
        train_in_process(small_config(tmp_path, sources, model={"vocab_size": 100}))
    with pytest.raises(DataError, match=r"no shard of it holds a whole sample"):
        train_in_process(small_config(tmp_path, sources, model={"max_seq_len": 10**6}, data={"seq_len": 10**6}))
    assert status(tmp_path)["state"] == "bad_input"
    train_in_process(small_config(tmp_path, sources, train={"steps": 2}))
    assert status(tmp_path)["state"] == "done"


def test_without_its_configuration_a_run_is_still_not_another(sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path, sources, train={"steps": 2}))
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UnhealthyRun, match=r"it is of another run: .*data\.seed was 0, is 5"):
        train_in_process(small_config(tmp_path, sources, data={"seed": 5}))
    train_in_process(small_config(tmp_path, sources, train={"steps": 3}))
    assert (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("content", ["", "model: [", "nmae: x\n"])
def test_a_spoiled_configuration_is_named(content: str, sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path, sources, train={"steps": 2}))
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml|holds a run with other settings"):
        train_in_process(small_config(tmp_path, sources, train={"steps": 3}))


def test_a_run_that_is_done_stays_done_whatever_is_typed_after_it(sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path, sources, train={"steps": 2}))
    before = status(tmp_path)
    with pytest.raises(ConfigError):
        train_in_process(small_config(tmp_path, sources, data={"seed": 3}))
    with pytest.raises(ConfigError):
        train(small_config(tmp_path, sources, optim={"lr": 0.0}))
    assert status(tmp_path) == before


def test_what_cannot_work_is_in_the_status_of_a_run_that_exists(sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path, sources, train={"stop_after_step": 3}))
    with pytest.raises(ConfigError):
        train(small_config(tmp_path, sources, optim={"lr": 0.0}))
    found = status(tmp_path)
    assert (found["state"], found["step"]) == ("bad_input", 3)
    assert "optim.lr=0.0" in found["reason"]


def test_a_full_disk_is_told_with_the_step_and_leaves_what_was_saved(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        if "step-00000008" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(commit, "fsync_path", full)
    config = small_config(tmp_path, sources, checkpoint={"retries": 0, "max_failures": 1})
    with pytest.raises(CheckpointError, match=r"No space left.*MiB are free"):
        train_in_process(config)
    assert status(tmp_path)["state"] == "unhealthy"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("stop_in_validation", [2, 3])
def test_a_stop_breaks_validation_off_and_the_resumed_run_begins_with_it(
    stop_in_validation: int,
    unbroken: RunConfig,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Validations of the run: at step 0, 6 and 12."""
    stop, started = StopRequest(), 0
    evaluate = Validation.evaluate

    def interrupted(self: Validation, model: Llama, *args: Any, keep_going: Callable[[], bool]) -> Record | None:
        nonlocal started
        started += 1
        if started == stop_in_validation:
            stop.reason = "SIGTERM"
        return evaluate(self, model, *args, keep_going=keep_going)

    monkeypatch.setattr(Validation, "evaluate", interrupted)
    run(small_config(tmp_path, sources), stop)
    step = 6 * (stop_in_validation - 1)
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("preempted", step)
    assert "train/loss" in metrics(tmp_path)[-1]
    monkeypatch.undo()
    train_in_process(small_config(tmp_path, sources))
    assert status(tmp_path)["state"] == "done"
    assert_same_run(unbroken.run_dir, tmp_path, step=12)


def test_a_stop_ends_a_sweep_too(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(config: RunConfig, stop: StopRequest) -> None:
        stop.reason = "SIGTERM"

    monkeypatch.setattr("llamatrain.session.run", stopped)
    monkeypatch.setattr(StopRequest, "install", lambda self: None)
    with pytest.raises(SystemExit) as left:
        train(small_config(tmp_path, sources))
    assert left.value.code == 0


def test_two_processes_cannot_train_in_one_directory(sources: dict[str, Path], tmp_path: Path) -> None:
    with ExitStack() as resources:
        trainer_for(small_config(tmp_path, sources), resources)
        with pytest.raises(ConfigError, match="another process trains there"):
            train_in_process(small_config(tmp_path, sources))


def test_checkpoints_are_kept_by_number_and_by_multiple(sources: dict[str, Path], tmp_path: Path) -> None:
    settings = {"every_steps": 2, "keep_last": 2, "keep_every_steps": 4}
    train_in_process(small_config(tmp_path, sources, checkpoint=settings))
    assert saved_steps(tmp_path) == [4, 8, 10, 12]


# Micro-batches: the same batch in other portions is the same step


def course(sources: dict[str, Path], directory: Path, micro_batch: int, precision: str = "fp32") -> Course:
    config = small_config(
        directory,
        sources,
        data={"document_mask": True},
        train={"micro_batch": micro_batch, "steps": 20, "precision": precision},
        optim={"clip_norm": 0.5},
    )
    return course_of(World(), config)


@pytest.fixture(scope="module")
def whole_batch(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Course:
    return course(sources, tmp_path_factory.mktemp("whole"), GLOBAL_BATCH)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_do_not_change_the_course(
    micro_batch: int, whole_batch: Course, sources: dict[str, Path], tmp_path: Path
) -> None:
    found = course(sources, tmp_path, micro_batch)
    assert any(len(set(counts)) > 1 for counts in found.valid_targets)  # unequal numbers of masked targets
    check_same_course(whole_batch, found)


def test_a_mean_of_means_is_caught(
    whole_batch: Course, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean_of_means(self: Trainer, batch: Batch) -> torch.Tensor:
        portions = list(batch.micro_batches())
        loss = torch.zeros(())
        for inputs, targets, lengths in portions:
            logits = self.model(inputs, doc_lengths=lengths).float()
            micro = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / len(portions)
            micro.backward()
            loss += micro.detach()
        return loss

    monkeypatch.setattr(Trainer, "accumulate_gradients", mean_of_means)
    with pytest.raises(AssertionError):
        check_same_course(whole_batch, course(sources, tmp_path, 2))


@pytest.mark.parametrize("wrong", [lambda batch: batch.valid_targets * 2, lambda batch: batch.targets.numel()])
def test_a_wrong_divisor_is_caught(
    wrong: Callable[[Batch], int],
    whole_batch: Course,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = Trainer.accumulate_gradients

    def wrongly_divided(self: Trainer, batch: Batch) -> torch.Tensor:
        return right(self, replace(batch, valid_targets=wrong(batch)))

    monkeypatch.setattr(Trainer, "accumulate_gradients", wrongly_divided)
    with pytest.raises(AssertionError):
        check_same_course(whole_batch, course(sources, tmp_path, 2))


def test_a_wrong_divisor_of_the_gradient_alone_is_caught(
    whole_batch: Course, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW hides the scale of the gradient from the losses; the norm and the first gradient do not."""
    right = Trainer.accumulate_gradients

    def scaled(self: Trainer, batch: Batch) -> torch.Tensor:
        loss = right(self, batch)
        for parameter in self.parameters.values():
            assert parameter.grad is not None
            parameter.grad *= 2
        return loss

    monkeypatch.setattr(Trainer, "accumulate_gradients", scaled)
    with pytest.raises(AssertionError):
        check_same_course(whole_batch, course(sources, tmp_path, 4))


def test_bf16_trains_close_to_fp32(unbroken: RunConfig, sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path, sources, train={"precision": "bf16"}))
    losses = [[r["train/loss"] for r in metrics(d) if "train/loss" in r] for d in (unbroken.run_dir, tmp_path)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[1] != losses[0]


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_in_bf16_stay_within_their_tolerance(
    micro_batch: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    whole, cut = (course(sources, tmp_path / str(size), size, precision="bf16") for size in (GLOBAL_BATCH, micro_batch))
    check_same_course(whole, cut, tolerance=BF16_TOLERANCE)


def test_weights_that_no_longer_verify_end_the_run_as_unhealthy(sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path, sources, train={"steps": 4}))
    for path in (tmp_path / "checkpoints").glob("*/model*.safetensors"):
        path.write_bytes(path.read_bytes()[: -random.Random(0).randint(1, 99)])
    with pytest.raises(UnhealthyRun, match="none can be used"):
        train_in_process(small_config(tmp_path, sources))
    assert status(tmp_path)["state"] == "unhealthy"


def test_the_generate_command_reads_what_training_saved(
    unbroken: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = GenerateConfig(
        checkpoint=unbroken.run_dir, prompt=["def f", "7"], max_new_tokens=8, temperature=0, device="cpu"
    )
    generate.run(settings)
    first = capsys.readouterr().out
    generate.run(replace(settings, checkpoint=str(Path(unbroken.run_dir) / "checkpoints" / "step-00000012")))
    assert capsys.readouterr().out == first
    assert [text[:1] for text in first.split("\n\n")[:2]] == ["d", "7"]
    assert len(first) > len("def f\n\n7\n\n")


def test_generating_with_another_tokenizer_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path, sources, train={"steps": 2}))
    stdlib = (Path(sysconfig.get_path("stdlib")) / "calendar.py").read_text()
    (tmp_path / "other.txt").write_text(stdlib)
    train_tokenizer(
        TrainTokenizerSettings(input=str(tmp_path / "other.txt"), output=str(tmp_path), vocab_size=500, overwrite=True)
    )
    with pytest.raises(DataError, match=r"tokenizer\.model: not the tokenizer .*step-00000002 was trained with"):
        generate.run(GenerateConfig(checkpoint=str(tmp_path), prompt="x"))


def test_ids_the_tokenizer_lacks_are_never_written(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(small_config(tmp_path, sources, train={"steps": 2}, model={"vocab_size": 4000}))
    settings = GenerateConfig(checkpoint=str(tmp_path), prompt="x", max_new_tokens=28, temperature=5.0, top_p=1.0)
    capsys.readouterr()
    generate.run(settings)
    assert capsys.readouterr().out.startswith("x")


def test_generating_from_nothing_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run directory with one"):
        generate.run(GenerateConfig(checkpoint=str(tmp_path), prompt="x"))
