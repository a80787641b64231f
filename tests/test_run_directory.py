"""The run directory: journal, status, lock, cutting records."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamatrain.errors import ConfigError, UnhealthyRun
from llamatrain.process import attempt_id
from llamatrain.run_directory import (
    BAD_INPUT,
    PREEMPTED,
    RUNNING,
    TRAINING,
    UNHEALTHY,
    RunDirectory,
    cut_lines,
    note_refusal,
    read_status,
    refuse_same_attempt,
)


def test_the_journal_survives_a_torn_last_line(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    first.record("start", step=0)
    first.record("checkpoint", step=5)
    first.close()
    with open(tmp_path / "journal.jsonl", "a") as file:
        file.write('{"event": "checkp')
    second = RunDirectory(tmp_path)
    second.record("checkpoint", step=10)
    assert [entry["step"] for entry in second.events("checkpoint")] == [5, 10]
    second.close()


def test_a_second_process_is_refused_until_the_first_leaves(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    with pytest.raises(ConfigError, match="another process trains there"):
        RunDirectory(tmp_path)
    first.close()
    RunDirectory(tmp_path).close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir=.*file/run: cannot be written"):
        RunDirectory(tmp_path / "file" / "run")


def test_status_says_state_step_reason_and_attempt(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    directory = RunDirectory(tmp_path)
    directory.set_status(RUNNING, step=3)
    directory.set_status(PREEMPTED, reason="SIGTERM")
    found = read_status(tmp_path)
    assert found is not None
    assert (found["state"], found["step"], found["reason"]) == ("preempted", 3, "SIGTERM")
    assert found["attempt"] == directory.attempt
    assert not list(tmp_path.glob(".*tmp"))
    directory.close()


def test_heartbeats_are_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path)
    directory.set_status(RUNNING, step=1, phase=TRAINING)
    directory.heartbeat(2)
    assert (read_status(tmp_path) or {})["step"] == 1
    monkeypatch.setattr("llamatrain.run_directory.HEARTBEAT_S", 0.0)
    directory.heartbeat(3)
    assert (read_status(tmp_path) or {})["step"] == 3
    directory.close()


def test_an_attempt_is_the_slurm_job_and_its_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt_id() == attempt_id()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    alone = attempt_id()  # in an interactive allocation, say, where every command is a launch of its own
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert attempt_id() == "slurm-77-2" != alone
    monkeypatch.setenv("LLAMATRAIN_ATTEMPT", "launch-5")
    assert attempt_id() == "launch-5"


def test_an_attempt_that_failed_is_not_repeated_and_a_new_one_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    refuse_same_attempt(tmp_path)
    directory = RunDirectory(tmp_path)
    directory.set_status(RUNNING, step=2)
    refuse_same_attempt(tmp_path)
    directory.set_status(UNHEALTHY, reason="loss is nan")
    with pytest.raises(UnhealthyRun, match=r"ended as unhealthy \(loss is nan\)"):
        refuse_same_attempt(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    refuse_same_attempt(tmp_path)
    directory.close()


@given(
    steps=st.lists(st.integers(0, 9), max_size=12).map(sorted), limit=st.integers(-1, 10), torn=st.binary(max_size=9)
)
def test_cutting_keeps_whole_leading_lines(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], limit: int, torn: bytes
) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    whole = b"".join(json.dumps({"step": step}).encode() + b"\n" for step in steps)
    path.write_bytes(whole + torn.replace(b"\n", b""))
    cut_lines(path, lambda record: record["step"] <= limit)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [s for s in steps if s <= limit]


@pytest.mark.parametrize("line", ["garbage", "null", "7", '{"tokens": 3}', '{"step": "x"}'])
def test_a_whole_line_that_is_no_record_is_named_and_nothing_is_cut(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    path.write_text(content)
    with pytest.raises(UnhealthyRun, match=r"metrics\.jsonl, line 2: not a record"):
        cut_lines(path, lambda record: record["step"] <= 2)
    assert path.read_text() == content


def test_a_spoiled_status_is_named(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state":')
    with pytest.raises(UnhealthyRun, match=r"status\.json: cannot be read"):
        RunDirectory(tmp_path)


def test_a_journal_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        RunDirectory(tmp_path)


def test_a_refusal_is_noted_in_a_run_that_exists_and_not_in_one_at_work(tmp_path: Path) -> None:
    note_refusal(tmp_path / "new", "typo")
    assert not (tmp_path / "new").exists()
    directory = RunDirectory(tmp_path / "run")
    directory.set_status(RUNNING, step=4)
    with pytest.raises(ConfigError, match="another process trains there"):
        note_refusal(tmp_path / "run", "typo")
    directory.close()
    note_refusal(tmp_path / "run", "typo")
    found = read_status(tmp_path / "run")
    assert found is not None
    assert (found["state"], found["step"], found["reason"]) == ("bad_input", 4, "typo")


def test_a_request_counts_for_the_run_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMATRAIN_ATTEMPT", "launch-1")
    directory = RunDirectory(tmp_path)
    request = tmp_path / "control" / "stop"
    assert not directory.requests("stop")
    request.touch()  # a person's
    assert directory.requests("stop")
    request.write_text("launch-1")
    assert directory.requests("stop")
    request.write_text("launch-2")  # whose run was refused, since this one works here
    assert not directory.requests("stop")
    directory.close()
    again = RunDirectory(tmp_path)
    assert not request.exists()  # of a launch that is over
    again.close()


def test_only_launches_that_came_to_nothing_by_themselves_count_as_vain(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for state in (RUNNING, RUNNING):
        directory.record("launch")
        directory.note_failure(state, "a node")
    assert directory.starts_without_progress() == 2
    directory.record("launch")
    directory.note_failure(BAD_INPUT, "a misspelt path")  # somebody is there, and mends it
    assert directory.starts_without_progress() == 0
    assert [entry["event"] for entry in directory.events("crash", "bad_input")] == ["crash", "crash", "bad_input"]
    directory.close()
