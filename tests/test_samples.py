"""What a run writes after its prompts while it trains: samples.jsonl, and nothing of it in the training."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatrain.config import RunConfig
from llamatrain.config.run import validate
from llamatrain.distributed import World
from llamatrain.errors import ConfigError
from llamatrain.model.generation import generate
from llamatrain.observe.records import SampleLog
from llamatrain.parallel.answering import answering
from llamatrain.trainer import Trainer
from tests.ranks import on_ranks
from tests.small_run import assert_same_run, small_config, train_in_process, trainer_for

PROMPTS = ["the", "a day in", ""]
SAMPLES = {"samples": PROMPTS, "sample_tokens": 9}


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def sampling(directory: Path, sources: dict[str, Path], **groups: dict[str, Any]) -> RunConfig:
    return small_config(directory, sources, **{"evaluation": {"every_steps": 6, **SAMPLES}, **groups})


def test_training_is_bitwise_that_without_samples(sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path / "without", sources))
    train_in_process(sampling(tmp_path / "with", sources))
    assert_same_run(tmp_path / "without", tmp_path / "with", step=12)
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    found = lines(tmp_path / "with")
    assert [(line["step"], line["tokens"]) for line in found] == [(0, 0), (6, 6 * 256), (12, 12 * 256)]
    assert [sample["prompt"] for sample in found[0]["samples"]] == PROMPTS


def test_a_sample_is_the_greedy_text_of_the_generator(sources: dict[str, Path], tmp_path: Path) -> None:
    with ExitStack() as resources:
        trainer = trainer_for(sampling(tmp_path, sources, model={"init_std": 0.3}), resources)
        tokenizer = trainer.tokenizer
        prompts = [tokenizer.encode(text, bos=True) for text in PROMPTS]
        with answering(trainer.model):
            written = trainer.evaluator.samples.write(trainer.model)
        assert trainer.model.training
        expected = generate(
            trainer.model,
            prompts,
            max_new_tokens=9,
            temperature=0,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
        )
    assert written is not None
    for sample, prompt, new in zip(written, prompts, expected, strict=True):
        assert tokenizer.decode(prompt) + sample["continuation"] == tokenizer.decode([*prompt, *new])
    assert len({sample["continuation"] for sample in written}) > 1


def test_a_resumed_run_has_each_line_once(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_in_process(sampling(tmp_path / "whole", sources))
    step = Trainer.train_step

    def failing(self: Trainer, *args: Any) -> Any:
        if self.step == 7:
            raise RuntimeError("a fault")
        return step(self, *args)

    monkeypatch.setattr(Trainer, "train_step", failing)
    with pytest.raises(RuntimeError, match="a fault"):
        train_in_process(sampling(tmp_path / "broken", sources))
    monkeypatch.undo()
    assert [line["step"] for line in lines(tmp_path / "broken")] == [0, 6]
    with open(tmp_path / "broken" / "samples.jsonl", "a") as file:
        file.write('{"step": 6, "to')  # half a line; step 6 comes again, as the checkpoint is that of step 4
    train_in_process(sampling(tmp_path / "broken", sources))
    found = [{**line, "time": 0} for line in lines(tmp_path / "broken")]
    assert found == [{**line, "time": 0} for line in lines(tmp_path / "whole")]
    assert_same_run(tmp_path / "whole", tmp_path / "broken", step=12)


def test_what_a_disk_does_not_take_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = SampleLog(tmp_path / "nowhere" / "samples.jsonl", validated_step=None)
    record.write({"step": 1})
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sample_tokens": 0}, "sample_tokens=0"),
        ({"every_steps": 0}, "set evaluation.every_steps"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], told: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = small_config(tmp_path, sources, evaluation={"every_steps": 6, **SAMPLES, **settings})
    with pytest.raises(ConfigError, match=told):
        validate(config)


def test_a_pipeline_is_refused_before_it_starts(sources: dict[str, Path], tmp_path: Path) -> None:
    config = sampling(tmp_path, sources, parallel={"pp": 2})
    with pytest.raises(ConfigError, match=r"evaluation.samples with parallel.pp=2"):
        validate(config, world_size=2)
    validate(replace(config, evaluation=replace(config.evaluation, samples=[])), world_size=2)


def test_a_prompt_that_leaves_no_room_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    config = small_config(tmp_path, sources, evaluation={"samples": ["the"], "sample_tokens": 64})
    with ExitStack() as resources, pytest.raises(ConfigError, match=r"max_seq_len=32: set evaluation.sample_tokens="):
        trainer_for(config, resources)


def written_by(world: World, config: RunConfig) -> list[str]:
    with ExitStack() as resources:
        trainer = trainer_for(config, resources, world)
        with answering(trainer.model):
            samples = trainer.evaluator.samples.write(trainer.model)
        assert samples is not None
        return [sample["continuation"] for sample in samples]


@pytest.mark.parametrize(
    "parallel",
    [{}, {"tp": 2}, {"cp": 2}, pytest.param({"dp_replicate": 2}, marks=pytest.mark.slow)],
    ids=["fsdp", "layers", "sequences", "copies"],
)
def test_two_ranks_write_what_one_does(parallel: dict[str, Any], sources: dict[str, Path], tmp_path: Path) -> None:
    model = {"n_heads": 4, "vocab_size": 516, "init_std": 0.3}
    alone = written_by(World(), sampling(tmp_path / "1", sources, model=model))
    assert len(set(alone)) > 1
    shared = on_ranks(2, written_by, sampling(tmp_path / "2", sources, model=model, parallel=parallel))
    assert shared == [alone, alone]


def trained_by(world: World, config: RunConfig) -> list[torch.Tensor]:
    """What a rank has of the weights and of the moments when the run is done."""
    with ExitStack() as resources:
        trainer = trainer_for(config, resources, world)
        trainer.fit()
        moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
        tensors = [*trainer.parameters.values(), *moments]
        return [getattr(tensor, "_local_tensor", tensor).detach().clone() for tensor in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"reshard_after_forward": "never"}], ids=str)
def test_ranks_train_bitwise_as_without_samples(
    parallel: dict[str, Any], sources: dict[str, Path], tmp_path: Path
) -> None:
    groups = {"parallel": parallel, "model": {"n_heads": 4, "vocab_size": 516}}
    plain = on_ranks(2, trained_by, small_config(tmp_path / "1", sources, **groups))
    with_samples = on_ranks(2, trained_by, sampling(tmp_path / "2", sources, **groups))
    assert len(lines(tmp_path / "2")) == 3
    for one, other in zip(plain, with_samples, strict=True):
        assert len(one) == len(other) > 10
        assert all(map(torch.equal, one, other))
