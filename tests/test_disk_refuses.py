"""A disk that takes no more, where drills found that a run did not end in order (tests/drills)."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatrain import run_directory
from llamatrain.checkpoint import background, commit, store
from llamatrain.config import RunConfig
from llamatrain.errors import CheckpointError, ConfigError, UnhealthyRun
from llamatrain.run_directory import UNHEALTHY, RunDirectory
from tests.small_run import saved_steps, small_config, status, train_in_process

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "RETRY_AFTER_S", 0.0)


def short_run(run_dir: Path, sources: dict[str, Path], **checkpoint: Any) -> RunConfig:
    return small_config(
        run_dir,
        sources,
        model={"n_layers": 1},
        train={"steps": 4, "global_batch_tokens": 128, "micro_batch": 2},
        evaluation={"every_steps": 0},
        resilience={"preflight": False, "hang_timeout_s": 0},
        checkpoint={"every_steps": 2, "keep_last": 1, **checkpoint},
    )


def full_from(first: int) -> Callable[..., Any]:
    """`write_json_atomically` on a disk that is full from the so-many-th call on."""
    calls = 0
    original = run_directory.write_json_atomically

    def write(path: Path, content: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= first:
            raise FULL
        original(path, content)

    return write


def test_a_status_that_cannot_be_written_ends_the_run_with_one_line(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "write_json_atomically", full_from(2))
    with pytest.raises(UnhealthyRun, match=r"records cannot be written.*No space left on device"):
        train_in_process(short_run(tmp_path, sources))
    monkeypatch.undo()
    train_in_process(short_run(tmp_path, sources))
    assert status(tmp_path)["state"] == "done"


def test_a_failure_that_cannot_be_noted_is_still_what_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = RunDirectory(tmp_path)
    monkeypatch.setattr(run_directory, "write_json_atomically", full_from(1))
    monkeypatch.setattr(os, "fsync", raising)
    directory.note_failure(UNHEALTHY, "something else")
    assert "cannot be written" in caplog.text
    directory.close()


def raising(*_: Any, **__: Any) -> None:
    raise FULL


def test_of_an_event_that_is_refused_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path)
    directory.record("one")
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", raising)
        with pytest.raises(OSError, match="No space"):
            directory.record("two")
        full.setattr(os, "ftruncate", raising)
        with pytest.raises(OSError, match="No space"):
            directory.record("three")  # and it cannot be cut off
    directory.record("four")
    directory.close()
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["one", "four"]


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    RunDirectory(tmp_path).close()
    (tmp_path / ".status.json.123.tmp").write_text("{")
    RunDirectory(tmp_path).close()
    assert not list(tmp_path.glob(".*"))


def test_a_request_that_cannot_be_removed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunDirectory(tmp_path).close()
    (tmp_path / "control" / "stop").write_text("another attempt")
    monkeypatch.setattr(Path, "unlink", raising)
    with pytest.raises(ConfigError, match="cannot be written"):
        RunDirectory(tmp_path)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_unmake_the_new_one(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "delete", raising)
    train_in_process(short_run(tmp_path, sources, retries=0, max_failures=1))
    assert saved_steps(tmp_path) == [2, 4]
    assert status(tmp_path)["state"] == "done"


def test_a_checkpoint_is_not_written_again_because_its_event_was_refused(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, refused, write, record = [], [], store.write, RunDirectory.record

    def counting(root: Path, step: int, *args: Any, **others: Any) -> Path:
        written.append(step)
        return write(root, step, *args, **others)

    def refusing(self: RunDirectory, event: str, **fields: Any) -> None:
        if event == "checkpoint" and not refused:
            refused.append(event)
            raise FULL
        record(self, event, **fields)

    monkeypatch.setattr(store, "write", counting)
    monkeypatch.setattr(RunDirectory, "record", refusing)
    train_in_process(short_run(tmp_path, sources, retries=1))
    assert (written, refused) == ([2, 4], ["checkpoint"])


def test_a_folder_that_cannot_be_made_is_told_with_the_room_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "begin", raising)
    with pytest.raises(CheckpointError, match=r"No space left.*MiB are free"):
        store.save(tmp_path / "checkpoints", 1, {}, {})


def test_a_file_that_another_rank_renames_meanwhile_is_left_out_of_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(root: Path, step: int) -> None:
        temporary = commit.temporary_directory(root, step)
        temporary.mkdir(parents=True)
        (temporary / "there").write_bytes(bytes(1 << 20))
        (temporary / "gone").symlink_to("nowhere")
        raise FULL

    monkeypatch.setattr(commit, "begin", begin)
    with pytest.raises(CheckpointError, match=r"free beside 1\.0 written"):
        store.save(tmp_path / "checkpoints", 1, {}, {})


# ---------------------------------------------------------------------- damage that was not noticed


@pytest.mark.parametrize("last", [b" ", b"\r", b""])
def test_a_manifest_with_another_last_byte_is_refused(last: bytes, tmp_path: Path) -> None:
    checkpoint = store.save(tmp_path, 1, {}, {})
    path = checkpoint / commit.MANIFEST_FILE
    path.write_bytes(path.read_bytes()[:-1] + last)
    with pytest.raises(CheckpointError, match="altered"):
        commit.read_manifest(checkpoint)


def test_a_checkpoint_that_lost_its_manifest_is_told_and_set_aside(sources: dict[str, Path], tmp_path: Path) -> None:
    config = short_run(tmp_path, sources, keep_last=2)
    train_in_process(config)
    (tmp_path / "checkpoints" / "step-00000004" / commit.MANIFEST_FILE).unlink()
    train_in_process(config)
    events = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    (refused,) = [event for event in events if event["event"] == "refused"]
    assert "no checkpoint.json there" in refused["reason"]
    assert saved_steps(tmp_path) == [2, 4]
