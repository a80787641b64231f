"""Runs that begin with weights of another checkpoint: the same on any mesh, once, and only where they fit."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatrain.checkpoint import commit
from llamatrain.config import InitConfig, RunConfig, validate
from llamatrain.distributed import World
from llamatrain.errors import CheckpointError, ConfigError, DataError, UnhealthyRun
from llamatrain.resilience.control import StopRequest
from llamatrain.session import run_on
from llamatrain.verification.runner import whole_state
from tests.distributed.test_fairscale import fairscale_trainer, fitted
from tests.interchange.converting import assert_same_weights, converted, loaded
from tests.ranks import on_ranks
from tests.small_run import assert_same_run, metrics, small_config, status, train_in_process


def journal(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["event"] == kind]


@pytest.fixture(scope="session")
def imported(
    tiny_dataset: Any, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunConfig]:
    """A small run, exported and imported again, and the run's configuration."""
    directory = tmp_path_factory.mktemp("imported")
    config = small_config(directory / "first", sources, checkpoint={"asynchronous": False})
    train_in_process(config)
    there = converted(directory / "first", directory / "there", "huggingface", max_shard_gib=1e-5)
    return converted(there, directory / "import", "llamatrain", max_shard_gib=1e-5), config


def begun_with(origin: Path, config: RunConfig, run_dir: Path, **changes: dict[str, Any]) -> RunConfig:
    groups = {"init": {"from_": str(origin)}, "train": {"steps": 2}, **changes}
    settled = {name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
    return dataclasses.replace(config, run_dir=str(run_dir), **settled)


def test_a_run_begins_with_the_weights_of_an_import(imported: tuple[Path, RunConfig], tmp_path: Path) -> None:
    origin, first = imported
    run = begun_with(origin, first, tmp_path / "run")
    train_in_process(run)
    validated = [
        record for record in metrics(first.run_dir) if "eval/validation/loss" in record and record["step"] == 12
    ]
    begun = [record for record in metrics(run.run_dir) if "eval/validation/loss" in record and record["step"] == 0]
    assert validated[0]["eval/validation/loss"] == begun[0]["eval/validation/loss"]
    (noted,) = journal(tmp_path / "run", "initial weights")
    sha256 = commit.manifest_hash(origin / "checkpoints" / "step-00000000")
    assert noted["manifest_sha256"] == sha256
    (start,) = journal(tmp_path / "run", "start")
    assert start["config"]["init"] == {"from": str(origin), "sha256": sha256, "allow": []}
    assert f"sha256: {sha256}" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.slow
def test_a_resumed_run_reads_the_import_no_more(imported: tuple[Path, RunConfig], tmp_path: Path) -> None:
    origin, first = imported
    shutil.copytree(origin, tmp_path / "origin")
    whole = begun_with(origin, first, tmp_path / "whole", checkpoint={"every_steps": 1})
    train_in_process(whole)
    parts = begun_with(
        tmp_path / "origin", first, tmp_path / "parts", train={"steps": 2, "stop_after_step": 1},
        checkpoint={"every_steps": 1},
    )  # fmt: skip
    train_in_process(parts)
    shutil.rmtree(tmp_path / "origin")
    train_in_process(dataclasses.replace(parts, train=dataclasses.replace(parts.train, stop_after_step=None)))
    assert len(journal(tmp_path / "parts", "initial weights")) == 1
    assert_same_run(whole.run_dir, parts.run_dir, step=2)
    with pytest.raises(ConfigError, match=r"init\.from was .* is None: the run began with those weights"):
        train_in_process(dataclasses.replace(parts, init=InitConfig()))


def read_weights(origin: Path) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in loaded(origin).named_parameters()}


def weights_by_fairscale(world: World, config: RunConfig) -> dict[str, torch.Tensor]:
    """The weights that a run of fairscale's shards begins with, put together."""
    with fairscale_trainer(config, world) as (trainer, _):
        return dict(whole_state(trainer)["model"])


def train_checked(config: RunConfig) -> None:
    validate(config)
    train_in_process(config)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"model": {"dim": 64}}, r"model\.dim=32 model\.ffn_dim=96 \(model\.dim is 64 here.*set that"),
        ({"model": {"n_layers": 3}}, r"model\.n_layers=2"),
        ({"model": {"tied_embeddings": True}}, r"model\.tied_embeddings=false"),
        ({"model": {"rope_theta": 5e5}}, r"model\.rope_theta=10000\.0 .*init\.allow=\[model\.rope_theta\]"),
        ({"init": {"from_": "nowhere"}}, r"init\.from=nowhere: there is no such directory"),
        ({"init": {"from_": "there"}}, r"llamatrain\.convert input=.* to=llamatrain makes"),
        ({"init": {"sha256": "0" * 64}}, "put that checkpoint back"),
        ({"init": {"allow": ["model.dim"]}}, "nothing to allow"),
    ],
)
def test_weights_of_another_model_do_not_begin_a_run(
    imported: tuple[Path, RunConfig], tmp_path: Path, changes: dict[str, dict[str, Any]], refusal: str
) -> None:
    origin, first = imported
    init: dict[str, Any] = {"from_": str(origin), **changes.get("init", {})}
    if init["from_"] == "there":
        init["from_"] = str(origin.parent / "there")
    config = begun_with(origin, first, tmp_path / "run", **{**changes, "init": init})
    with pytest.raises((ConfigError, CheckpointError), match=refusal):
        train_checked(config)


@pytest.mark.slow
def test_another_rotary_base_is_taken_by_name_and_another_length_without(
    imported: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    origin, first = imported
    init = {"from_": str(origin), "allow": ["model.rope_theta"]}
    model = {"rope_theta": 5e5, "max_seq_len": 64}
    run = begun_with(origin, first, tmp_path / "run", init=init, model=model, data={"seq_len": 64})
    train_in_process(run)
    assert status(run.run_dir)["state"] == "done"


def test_weights_of_another_tokenizer_are_refused(
    imported: tuple[Path, RunConfig], tmp_path: Path, tiny_tokenizer: Path
) -> None:
    origin, first = imported
    shutil.copytree(origin, tmp_path / "origin")
    from data_tools.train_tokenizer import TrainTokenizerSettings, train_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("".join(f"another tokenizer of other words {n * 7919}\n" for n in range(300)))
    train_tokenizer(TrainTokenizerSettings(input=str(text), output=str(tmp_path / "t"), vocab_size=300))
    other = converted(origin, tmp_path / "other", "llamatrain", tokenizer=str(tmp_path / "t" / "tokenizer.model"))
    with pytest.raises(DataError, match="would mean other words"):
        train_in_process(begun_with(other, first, tmp_path / "run"))


def test_an_import_is_not_trained_in_place(imported: tuple[Path, RunConfig], tmp_path: Path) -> None:
    origin, first = imported
    shutil.copytree(origin, tmp_path / "origin")
    before = sorted(tmp_path.rglob("*"))
    for init in ({"from_": None}, {"from_": str(origin)}):
        with pytest.raises(ConfigError, match=r"run_dir=.*llamatrain\.convert wrote.*init\.from="):
            train_in_process(begun_with(origin, first, tmp_path / "origin", init=init))
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "origin" / "conversion.json").unlink()  # which is not all that tells an import
    with pytest.raises(UnhealthyRun, match=r"it is an import.*init\.from="):
        train_in_process(begun_with(origin, first, tmp_path / "origin", init={"from_": None}))
    assert loaded(tmp_path / "origin")


MESHES: list[tuple[int, dict[str, Any]]] = [
    (2, {"dp_shard": 2}),
    (4, {"dp_shard": 4}),
    (2, {"tp": 2, "dp_shard": 1}),
    (2, {"pp": 2, "dp_shard": 1}),
]


def losses_of(run_dir: str) -> list[float]:
    return [record["train/loss"] for record in metrics(run_dir) if "train/loss" in record]


@pytest.fixture(scope="module")
def alone(imported: tuple[Path, RunConfig], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that begins with the import, in one process."""
    config = begun_with(*imported, tmp_path_factory.mktemp("alone") / "run")
    train_in_process(config)
    return losses_of(config.run_dir)


def course_of(world: World, config: RunConfig) -> list[float]:
    run_on(world, config, StopRequest())
    return losses_of(config.run_dir) if world.leads else []


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mesh"), MESHES, ids=str)
def test_any_mesh_begins_with_the_weights(
    imported: tuple[Path, RunConfig], alone: list[float], tmp_path: Path, ranks: int, mesh: dict[str, Any]
) -> None:
    origin, first = imported
    config = begun_with(origin, first, tmp_path / "spread", parallel=mesh, train={"steps": 2, "micro_batch": 1})
    losses = on_ranks(ranks, course_of, config)[0]
    assert losses == pytest.approx(alone, rel=1e-5) and len(losses) == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fairscales_flat_shards_begin_with_the_weights(
    imported: tuple[Path, RunConfig], tmp_path: Path, ranks: int
) -> None:
    origin, first = imported
    weights = read_weights(origin)
    for found in on_ranks(ranks, weights_by_fairscale, begun_with(origin, first, tmp_path / "run")):
        assert found.keys() == weights.keys()
        assert [name for name in found if not torch.equal(found[name], weights[name])] == []


@pytest.mark.slow
def test_fairscale_goes_on_from_an_import_as_the_plain_model_does(
    imported: tuple[Path, RunConfig], alone: list[float], tmp_path: Path
) -> None:
    origin, first = imported
    shutil.copytree(origin, tmp_path / "origin")
    each = {"every_steps": 1}
    whole = begun_with(origin, first, tmp_path / "whole", checkpoint=each)
    on_ranks(2, fitted, whole)
    assert losses_of(whole.run_dir) == pytest.approx(alone, rel=1e-5)
    for to in ("huggingface", "meta", "llamatrain"):  # from flat shards
        taken = converted(Path(whole.run_dir), tmp_path / to, to)
        assert_same_weights(
            loaded(converted(taken, tmp_path / f"{to} and back", "llamatrain")), loaded(Path(whole.run_dir))
        )
    stopped = {"steps": 2, "stop_after_step": 1}
    parts = begun_with(tmp_path / "origin", first, tmp_path / "parts", train=stopped, checkpoint=each)
    on_ranks(2, fitted, parts)
    shutil.rmtree(tmp_path / "origin")
    on_ranks(2, fitted, dataclasses.replace(parts, train=dataclasses.replace(parts.train, stop_after_step=None)))
    assert_same_run(whole.run_dir, parts.run_dir, step=2)


@pytest.mark.slow
def test_init_from_is_typed_as_it_is_documented(imported: tuple[Path, RunConfig], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llamatrain.train", "model=15m", "data.sources.a.path=x", "train.steps=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    typed = [*command, f"init.from={imported[0]}", "init.allow=[model.norm_eps]", "--cfg", "job"]
    done = subprocess.run(typed, capture_output=True, text=True, env=environment)
    assert f"from: {imported[0]}" in done.stdout, done.stderr
