"""Bad steps in a run: skipped on the device or rolled back from, alike on every resumption; and when it is too much."""

import json
import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_tools.show_samples import ShowSamplesSettings, show_samples
from llamatrain.config import RunConfig
from llamatrain.data.loader import Batch
from llamatrain.errors import ConfigError, UnhealthyRun
from llamatrain.optim.adamw import step_count
from llamatrain.trainer import Trainer
from tests.small_run import (
    GLOBAL_BATCH,
    assert_same_run,
    metrics,
    saved_steps,
    saved_tensors,
    small_config,
    status,
    train_in_process,
    trainer_for,
)

SPIKE_STEP = 7
SPIKE = [8 * SPIKE_STEP - 8, 8 * SPIKE_STEP]  # its samples, of a batch of 8
Fault = Callable[[Trainer, Tensor], Tensor]  # of the trainer and the loss; returns the loss


def nan_loss(trainer: Trainer, loss: Tensor) -> Tensor:
    return loss * math.nan


def gradient(trainer: Trainer, value: float) -> None:
    parameter = list(trainer.parameters.values())[3]
    assert isinstance(parameter, torch.nn.Parameter) and parameter.grad is not None
    parameter.grad.view(-1)[5] = value


def nan_gradient(trainer: Trainer, loss: Tensor) -> Tensor:
    gradient(trainer, math.nan)
    return loss


def infinite_gradient(trainer: Trainer, loss: Tensor) -> Tensor:
    gradient(trainer, math.inf)
    return loss


def huge_gradient(trainer: Trainer, loss: Tensor) -> Tensor:
    gradient(trainer, 1e6)
    return loss


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """plant(fault, samples…): the steps that begin with these samples go wrong, whenever they are done."""
    accumulate = Trainer.accumulate_gradients

    def plant(fault: Fault, *samples: int) -> None:
        def faulty(self: Trainer, batch: Batch) -> Tensor:
            loss = accumulate(self, batch)
            return fault(self, loss) if int(batch.samples[0]) in samples else loss

        monkeypatch.setattr(Trainer, "accumulate_gradients", faulty)

    return plant


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "journal.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def settings(run_dir: Path, sources: dict[str, Path], **groups: dict[str, Any]) -> RunConfig:
    """A window of 4 steps; nothing but a planted fault is 50 deviations away."""
    quiet = {"preflight": False, "hang_timeout_s": 0, "hang_timeout_at_start_s": 0}
    resilience = {"spike_window": 4, "spike_sigma": 50.0, **quiet, **groups.pop("resilience", {})}
    evaluation = {"every_steps": 0, **groups.pop("evaluation", {})}
    return small_config(run_dir, sources, resilience=resilience, evaluation=evaluation, **groups)


@pytest.mark.parametrize("fault", [nan_loss, nan_gradient, infinite_gradient])
def test_a_non_finite_step_leaves_weights_and_moments_as_they_are(
    fault: Fault, sources: dict[str, Path], tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(fault, GLOBAL_BATCH)
    with ExitStack() as resources:
        trainer = trainer_for(settings(tmp_path, sources), resources)
        loader = resources.enter_context(trainer.open_loader())
        trainer.train_step(next(loader))
        groups = trainer.snapshots.weights_and_moments()
        before = {name: t.detach().clone() for tensors in groups.values() for name, t in tensors.items()}
        trainer.train_step(next(loader))
        after = {name: t for tensors in groups.values() for name, t in tensors.items()}
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert (trainer.step, step_count(trainer.optimizer)) == (2, 1)
        assert all(parameter.grad is None for parameter in trainer.parameters.values())
        assert trainer.data_state.next_sample == 2 * GLOBAL_BATCH
        trainer.train_step(next(loader))
        assert step_count(trainer.optimizer) == 2
        assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("action", [pytest.param("log", marks=pytest.mark.slow), "skip"])
def test_a_run_goes_on_over_bad_steps_and_resumes_across_them_bitwise(
    action: str, sources: dict[str, Path], tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(nan_gradient if action == "log" else huge_gradient, SPIKE[0], SPIKE[1])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    chosen = {"spike_action": action}
    train_in_process(settings(whole, sources, resilience=chosen))
    for stop in (SPIKE_STEP - 1, SPIKE_STEP, SPIKE_STEP + 1, None):
        train_in_process(settings(broken, sources, resilience=chosen, train={"stop_after_step": stop}))
    assert_same_run(whole, broken, step=12)
    assert [record["train/skipped"] for record in metrics(whole)] == [0] * 6 + [1] + [2] * 5
    assert [event["samples"] for event in events(whole, "skipped")] == [SPIKE, [SPIKE[1], SPIKE[1] + 8]]
    bad, next_one = metrics(whole)[SPIKE_STEP - 1 : SPIKE_STEP + 1]
    assert (bad["train/grad_norm"] is None) == (action == "log")  # nan is no JSON
    assert bad["train/lr"] < next_one["train/lr"]


def test_a_spike_that_is_only_logged_is_told_and_kept(
    sources: dict[str, Path], tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(huge_gradient, SPIKE[0])
    train_in_process(settings(tmp_path, sources))
    (spike,) = events(tmp_path, "spike")
    assert (spike["step"], spike["samples"]) == (SPIKE_STEP, SPIKE)
    assert spike["grad_norm"] > 1e5 > spike["grad_norm_limit"]
    assert metrics(tmp_path)[-1]["train/skipped"] == 0
    assert saved_steps(tmp_path) == [8, 12]


def without(samples: list[int], config: RunConfig, stop: RunConfig) -> None:
    """A run that never meets `samples`: the journal of its first steps says that they are passed over."""
    train_in_process(stop)
    with open(Path(config.run_dir) / "journal.jsonl", "a") as journal:
        journal.write(json.dumps({"event": "rollback", "samples": samples}) + "\n")
    train_in_process(config)


def rolling(run_dir: Path, sources: dict[str, Path], **groups: dict[str, Any]) -> RunConfig:
    resilience = {"spike_action": "rollback", **groups.pop("resilience", {})}
    return settings(run_dir, sources, resilience=resilience, evaluation={"every_steps": 6}, **groups)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("log_every", "skip_steps", "passed"),
    [(10, 1, SPIKE), (1, 1, SPIKE), (1, 2, [SPIKE[0] - 8, SPIKE[1]]), (10, 9, [32, SPIKE[1]])],
)
def test_a_rollback_is_the_run_that_never_met_the_samples(
    log_every: int,
    skip_steps: int,
    passed: list[int],
    sources: dict[str, Path],
    tmp_path: Path,
    plant: Callable[..., None],
) -> None:
    plant(huge_gradient, SPIKE[0])
    groups: dict[str, Any] = {
        "logging": {"every_steps": log_every},
        "resilience": {"rollback_skip_steps": skip_steps},
    }
    rolled, clean = tmp_path / "rolled", tmp_path / "clean"
    train_in_process(rolling(rolled, sources, **groups))
    (event,) = events(rolled, "rollback")
    assert (event["spike_step"], event["to_step"], event["samples"]) == (SPIKE_STEP, 4, passed)
    without(passed, rolling(clean, sources, **groups), rolling(clean, sources, train={"stop_after_step": 4}, **groups))
    assert_same_run(rolled, clean, step=12)
    assert (status(rolled)["state"], saved_steps(rolled)) == ("done", [8, 12])


def test_before_the_first_checkpoint_a_rollback_goes_to_the_start(
    sources: dict[str, Path], tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(huge_gradient, SPIKE[0])
    rolled, clean = tmp_path / "rolled", tmp_path / "clean"
    settings = {"every_steps": 12}
    train_in_process(rolling(rolled, sources, checkpoint=settings))
    assert [event["to_step"] for event in events(rolled, "rollback")] == [0]
    clean.mkdir()
    (clean / "journal.jsonl").write_text(json.dumps({"event": "rollback", "samples": SPIKE}) + "\n")
    train_in_process(rolling(clean, sources, checkpoint=settings))
    assert_same_run(rolled, clean, step=12)


def test_a_run_that_ends_after_a_rollback_makes_the_same_choices_from_any_checkpoint(
    sources: dict[str, Path], tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(huge_gradient, SPIKE[0])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_in_process(rolling(whole, sources, checkpoint={"keep_last": 3}))
    step = Trainer.train_step

    def dying(self: Trainer, batch: Batch) -> Any:
        if self.rollbacks and self.step == 5:
            raise KeyError("the process dies")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", dying)
        with pytest.raises(KeyError):
            train_in_process(rolling(broken, sources, checkpoint={"keep_last": 3}))
    assert saved_steps(broken) == [4]
    train_in_process(rolling(broken, sources, checkpoint={"keep_last": 3}))
    assert_same_run(whole, broken, step=12)
    assert len(events(broken, "rollback")) == 1
    for newer in (8, 12):  # as if they were damaged: the one before the rollback is resumed
        (broken / "checkpoints" / f"step-{newer:08d}").rename(broken / f"lost-{newer}")
    train_in_process(rolling(broken, sources, checkpoint={"keep_last": 3}))
    assert_same_run(whole, broken, step=12)


def test_a_spike_at_a_step_that_is_saved_is_not_saved(
    sources: dict[str, Path], tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(huge_gradient, 56)  # step 8
    train_in_process(rolling(tmp_path, sources, logging={"every_steps": 100}))
    (event,) = events(tmp_path, "rollback")
    assert (event["spike_step"], event["from_step"], event["to_step"]) == (8, 8, 4)
    assert [event["step"] for event in events(tmp_path, "checkpoint")] == [4, 8, 12]


def test_too_many_skipped_in_a_row_end_the_run_and_name_what_to_look_at(
    sources: dict[str, Path], tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(nan_loss, 16, *range(40, 400, 8))
    with pytest.raises(UnhealthyRun) as ended:
        train_in_process(settings(tmp_path, sources, resilience={"max_bad_steps": 3}, checkpoint={"every_steps": 2}))
    assert str(ended.value) == (
        "step 8: loss nan, gradient norm "
        + str(ended.value).split("gradient norm ")[1].split(",")[0]
        + ", samples 56-63: 3 steps in a row brought no update. The last good checkpoint is "
        f"{tmp_path}/checkpoints/step-00000004; python -m data_tools.show_samples run_dir={tmp_path} samples=40-63 "
        "prints what came in; resilience.max_bad_steps allows more"
    )
    assert (status(tmp_path)["state"], saved_steps(tmp_path)) == ("unhealthy", [2, 4])


def test_nothing_is_saved_while_steps_bring_no_update(
    sources: dict[str, Path], tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(nan_gradient, 40, 48)  # steps 6 and 7
    train_in_process(settings(tmp_path, sources, checkpoint={"every_steps": 3}, train={"stop_after_step": 10}))
    assert [event["step"] for event in events(tmp_path, "checkpoint")] == [3, 8, 9, 10]


def test_what_a_stop_saved_among_bad_steps_is_set_aside_when_they_are_too_many(
    sources: dict[str, Path], tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(nan_gradient, *range(40, 400, 8))  # from step 6 on, as with weights that are no numbers
    many = {"max_bad_steps": 4}
    for step in (6, 7, 8):  # stopped again and again
        train = {"stop_after_step": step}
        train_in_process(settings(tmp_path, sources, resilience=many, checkpoint={"every_steps": 5}, train=train))
        assert 5 in saved_steps(tmp_path)
    config = settings(tmp_path, sources, resilience=many, checkpoint={"every_steps": 5})
    told = r"The last good checkpoint is .*step-00000005;.* set aside: refused-step-00000008, .*-7, .*-00000006;"
    with pytest.raises(UnhealthyRun, match=told.replace("-7", "-00000007")):
        train_in_process(config)
    assert saved_steps(tmp_path) == [5]
    plant(nan_gradient)
    train_in_process(config)
    assert events(tmp_path, "start")[-1]["resumed_from"] == 5
    assert status(tmp_path)["state"] == "done"


def test_rollbacks_that_come_to_nothing_end_the_run(
    sources: dict[str, Path], tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(huge_gradient, *range(SPIKE[0], 400, 8))
    config = rolling(tmp_path, sources, resilience={"max_rollbacks": 2})
    with pytest.raises(UnhealthyRun, match=r"step 7.*samples 64-71: a spike again, after 2 rollbacks.*step-00000004"):
        train_in_process(config)
    assert [event["samples"] for event in events(tmp_path, "rollback")] == [[48, 56], [56, 64]]
    with pytest.raises(UnhealthyRun, match=r"resilience\.max_rollbacks allows more"):
        train_in_process(config)  # the journal counts across starts


def test_a_step_that_is_skipped_may_be_saved(
    sources: dict[str, Path], tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(nan_gradient, 24)  # step 4
    train_in_process(settings(tmp_path, sources, train={"stop_after_step": 4}))
    assert all(
        bool(tensor.isfinite().all()) for tensor in saved_tensors(tmp_path, 4).values() if tensor.is_floating_point()
    )
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000004" / "checkpoint.json").read_text())
    assert (manifest["optimizer"]["step"], manifest["guard"]["skipped"]) == (3, 1)


# What the run was given


@pytest.mark.parametrize("mixed", [False, True])
def test_the_samples_shown_are_those_the_run_was_given(
    mixed: bool, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = sources if mixed else {"lines": sources["lines"]}
    config = settings(tmp_path, chosen, train={"stop_after_step": 1})
    with ExitStack() as resources:
        trainer = trainer_for(config, resources)
        loader = resources.enter_context(trainer.open_loader())
        rows = torch.cat([next(loader).tokens for _ in range(3)])[:, :-1].tolist()
        expected = [trainer.tokenizer.decode(row) for row in rows]
    capsys.readouterr()
    show_samples(ShowSamplesSettings(run_dir=str(tmp_path), samples="5-21"))
    shown = capsys.readouterr().out
    blocks = shown.split("===== ")[1:]
    assert [block.split(":")[0] for block in blocks] == [f"sample {number}" for number in range(5, 22)]
    assert "from its token" in shown
    for block, text in zip(blocks, expected[5:22], strict=True):
        documents = re.split(r"----- document .*\n", block)[1:]
        assert "".join("".join(documents).split()) == "".join(text.split())
    if mixed:
        assert {block.split("source ")[1].split(",")[0] for block in blocks} == {"functions", "lines"}


def test_a_checkpoints_mixture_counts_and_a_limit_shortens(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(settings(tmp_path, sources, train={"stop_after_step": 1}))
    texts = []
    for tokens in (0, 4):
        capsys.readouterr()
        show_samples(ShowSamplesSettings(run_dir=str(tmp_path), samples="7", tokens=tokens))
        texts.append(capsys.readouterr().out)
    assert len(texts[1]) < len(texts[0])
    journal = tmp_path / "journal.jsonl"
    assert '"weight": 2.0' in journal.read_text()
    journal.write_text(journal.read_text().replace('"weight": 2.0', '"weight":200.0'))
    show_samples(ShowSamplesSettings(run_dir=str(tmp_path), samples="7"))
    assert capsys.readouterr().out == texts[0]  # the checkpoint has the mixture that the samples came from


@pytest.mark.parametrize(
    ("run_dir", "samples", "message"),
    [
        ("???", "1-2", "run_dir is not set"),
        (".", "???", "samples is not set"),
        (".", "5-3", r"samples=5-3: the range is empty; samples=3-5"),
        (".", "a-b", r"samples=a-b: give a range as FIRST-LAST"),
        ("nowhere", "1-2", r"run_dir=nowhere: .*is that a run's folder\?"),
    ],
)
def test_what_cannot_be_shown_is_refused(run_dir: str, samples: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        show_samples(ShowSamplesSettings(run_dir=run_dir, samples=samples))
