"""The command that checks checkpoints whole and changes nothing."""

import shutil
from pathlib import Path

import pytest
import torch

from llamatrain import check
from llamatrain.checkpoint import store
from llamatrain.config.check import CheckConfig
from llamatrain.errors import CheckpointError, ConfigError
from tests.distributed.test_checkpoint import flip_a_byte


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    groups = {"model": {"weight": torch.ones(4, 3)}, "optimizer": {"weight.exp_avg": torch.zeros(4, 3)}}
    for step in (1, 2):
        store.write(tmp_path / "checkpoints", step, store.Share.of(groups), {"model": {}})
    return tmp_path


def test_all_checkpoints_of_a_run_are_checked_or_one(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check.run(CheckConfig(str(run_dir)))
    newest, older = capsys.readouterr().out.splitlines()
    assert newest.startswith("step-00000002  whole: 2 files, ") and older.startswith("step-00000001  whole")
    check.run(CheckConfig(str(run_dir / "checkpoints" / "step-00000001")))
    assert capsys.readouterr().out.startswith("step-00000001  whole")


@pytest.mark.parametrize("group", ["model", "optimizer"])
def test_one_flipped_bit_is_named_and_stays_where_it_is(
    run_dir: Path, group: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = run_dir / "checkpoints" / "step-00000001" / store.file_name(group, 0)
    flip_a_byte(damaged)
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(CheckpointError, match=rf"^1 of 2 checkpoints are not whole: .*{damaged.name}: its SHA-256"):
        check.run(CheckConfig(str(run_dir)))
    assert capsys.readouterr().out.splitlines()[1] == "step-00000001  NOT WHOLE"
    assert sorted(run_dir.rglob("*")) == before


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give checkpoint="):
        check.run(CheckConfig())
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        check.run(CheckConfig(str(tmp_path)))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint is there yet"):
        check.run(CheckConfig(str(tmp_path)))


def test_a_run_that_removes_all_that_is_read_is_not_called_whole(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removed(checkpoint: Path) -> str:
        shutil.rmtree(checkpoint)
        raise CheckpointError("gone")

    monkeypatch.setattr(check, "verified", removed)
    with pytest.raises(CheckpointError, match="removed each checkpoint while it was read; check again"):
        check.run(CheckConfig(str(run_dir)))
