"""Goodput: the parts add up to the wall clock whatever happened, and each moment is in the right one."""

import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llamatrain import goodput
from llamatrain.config import RunConfig
from llamatrain.config.goodput import GoodputConfig
from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluator import Evaluator
from llamatrain.observe.goodput import COUNTED, ENDS, EVENTS, PARTS, WITHOUT_A_WORD, Ledger
from llamatrain.reporting.runs import read_clock
from llamatrain.run_directory import RunDirectory
from llamatrain.trainer import Trainer
from tests.faults.test_kill import processes
from tests.small_run import metrics, small_config, train_in_process


def entry(event: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": event, "time": time, **fields}


def parts(*entries: dict[str, Any]) -> dict[str, float]:
    """Those that are not 0."""
    return {part: seconds for part, seconds in Ledger(entries).parts.items() if round(seconds, 9)}


def test_an_undisturbed_run() -> None:
    saved = {"data_wait": 1.0, "saving": 2.0, "validating": 3.0}
    assert parts(
        entry("launch", 100),
        entry("start", 110, step=0, resumed_from=None),
        entry("account", 140, step=10, counted=saved),
        entry("checkpoint", 141, step=10),
        entry("account", 150, step=20, counted={**saved, "saving": 4.0}),
        entry("done", 150, step=20),
    ) == {"starting": 10, "data_wait": 1, "saving": 4, "validating": 3, "productive": 32}


def test_what_a_killed_attempt_had_not_saved_is_lost_up_to_its_last_heartbeat() -> None:
    assert parts(
        entry("launch", 0),
        entry("start", 10, step=0, resumed_from=None),
        entry("account", 40, step=10, counted={}),
        entry("launch", 100, last_heartbeat=60),  # killed without a word
        entry("start", 105, step=10, resumed_from=10),
        entry("account", 125, step=20, counted={"saving": 1.0}),
        entry("stop", 125, step=20),
    ) == {"starting": 10, "productive": 30 + 19, "saving": 1, "lost": 20, "restarting": 45}


def test_a_start_at_an_older_checkpoint_loses_what_was_thought_productive() -> None:
    entries = [
        entry("launch", 0),
        entry("start", 0, step=0, resumed_from=None),
        entry("account", 10, step=10, counted={"data_wait": 1.0}),
        entry("account", 30, step=20, counted={"data_wait": 3.0, "saving": 1.0}),
        entry("crash", 35),
        entry("launch", 36),
    ]
    resumed = entry("start", 36, step=10, resumed_from=10)
    assert parts(*entries, resumed) == {"productive": 9, "data_wait": 1, "lost": 20 + 5, "restarting": 1}
    between = entry("start", 36, step=15, resumed_from=15)  # half of a stretch
    assert parts(*entries, between)["lost"] == pytest.approx(20 / 2 + 5)
    from_the_start = entry("start", 36, step=0, resumed_from=None)
    assert parts(*entries, from_the_start) == {"lost": 35, "restarting": 1}


def test_an_attempt_that_stopped_in_order_loses_nothing() -> None:
    assert parts(
        entry("launch", 0),
        entry("start", 0, step=0, resumed_from=None),
        entry("account", 10, step=10, counted={}),
        entry("account", 12, step=10, counted={"saving": 1.0}),
        entry("stop", 13, step=10),
        entry("launch", 20),
        entry("start", 21, step=10, resumed_from=10),
    ) == {"productive": 12, "saving": 1, "restarting": 8}


def test_a_rollback_loses_what_it_takes_back() -> None:
    assert parts(
        entry("launch", 0),
        entry("start", 0, step=0, resumed_from=None),
        entry("account", 10, step=10, counted={}),
        entry("rollback", 17, from_step=13, to_step=10),
        entry("account", 27, step=20, counted={}),
        entry("stop", 27, step=20),
    ) == {"productive": 20, "lost": 7}


def test_what_a_hang_took_is_lost_before_anybody_starts_again() -> None:
    assert parts(
        entry("launch", 0),
        entry("start", 0, step=0, resumed_from=None),
        entry("account", 10, step=10, counted={}),
        entry("unhealthy", 610, reason="the run hangs"),
    ) == {"productive": 10, "lost": 600}


def test_a_killed_run_did_not_train_until_a_command_was_refused() -> None:
    killed = [
        entry("launch", 0),
        entry("start", 0, step=0, resumed_from=None),
        entry("account", 10, step=10, counted={}),
    ]
    refused = entry("bad_input", 1000, reason="no such setting", last_heartbeat=14)
    resumed = [entry("launch", 1100, last_heartbeat=1000), entry("start", 1101, step=10, resumed_from=10)]
    assert parts(*killed, refused, *resumed) == {"productive": 10, "lost": 4, "restarting": 1087}
    assert [attempt.end for attempt in Ledger([*killed, refused, *resumed]).attempts] == [WITHOUT_A_WORD] * 2


def test_a_command_refused_after_the_end_costs_the_run_nothing() -> None:
    run = [entry("launch", 0), entry("start", 1, step=0, resumed_from=None), entry("done", 5, step=4)]
    assert parts(*run, entry("bad_input", 1e6, last_heartbeat=5)) == parts(*run)


def test_the_time_after_the_end_does_not_count() -> None:
    run = [entry("launch", 0), entry("start", 1, step=0, resumed_from=None), entry("done", 5, step=4)]
    again = [entry("launch", 1005), entry("start", 1006, step=4, resumed_from=4), entry("stop", 1010, step=8)]
    assert parts(*run, *again) == {"starting": 1, "productive": 8, "restarting": 1}


DONE = [entry("launch", 0), entry("start", 1, step=0, resumed_from=None), entry("done", 5, step=4)]
IDLE = [
    [
        entry("launch", 2e6),
        entry("start", 2e6 + 1, step=4, resumed_from=4),
        entry("account", 2e6 + 2, step=4),
        entry("done", 2e6 + 3, step=4),
    ],
    [entry("launch", 2e6), entry("bad_input", 2e6 + 1, reason="no such setting")],
    [entry("launch", 2e6), entry("launch", 2e6 + 10), entry("crash", 2e6 + 20)],
]


def test_a_launch_that_finds_the_run_done_does_not_count() -> None:
    for idle in IDLE:
        ledger = Ledger([*DONE, *idle])
        assert ledger.parts == Ledger(DONE).parts
        assert [attempt.is_idle for attempt in ledger.attempts] == [False] + [True] * (len(ledger.attempts) - 1)
    on = [entry("launch", 3e6), entry("start", 3e6 + 1, step=4, resumed_from=4), entry("account", 3e6 + 5, step=8)]
    assert parts(*DONE, *IDLE[0], *IDLE[2], *on) == {"starting": 1, "productive": 8, "restarting": 1}


def test_an_attempt_lost_after_the_end_counts() -> None:
    lost = [entry("launch", 9), entry("start", 10, step=4, resumed_from=4), entry("crash", 30)]
    ledger = Ledger([*DONE, *lost])
    assert ledger.parts["lost"] == 20
    assert not ledger.attempts[-1].is_idle


SECONDS = st.floats(-5, 1e6, allow_nan=False)
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {"event": st.sampled_from([*EVENTS, "checkpoint", "save"]), "time": SECONDS},
        optional={
            "step": st.integers(0, 50),
            "resumed_from": st.none() | st.integers(0, 50),
            "to_step": st.integers(0, 50),
            "last_heartbeat": st.none() | SECONDS,
            "counted": st.dictionaries(st.sampled_from(COUNTED), SECONDS),
        },
    ),
    max_size=25,
)


@given(entries=ENTRIES, in_order=st.booleans())
def test_the_parts_add_up_to_the_wall_clock_whatever_happened(entries: list[dict[str, Any]], in_order: bool) -> None:
    if in_order:
        entries.sort(key=lambda entry: entry["time"])
    ledger, wall, now, over = Ledger(), 0.0, None, False
    for one in entries:
        ledger.feed(one)
        if one["event"] in EVENTS and (not over or one["event"] == "launch"):
            if now is None or over:
                now = one["time"]
            later = max(now, one["time"])
            wall, now, over = wall + later - now, later, one["event"] == "done"
    assume(not any(attempt.is_idle for attempt in ledger.attempts))
    assert set(ledger.parts) == set(PARTS)
    assert all(seconds >= 0 for seconds in ledger.parts.values())
    assert ledger.wall_s == pytest.approx(wall, abs=1e-6)
    assert 0 <= ledger.goodput <= 1 + 1e-9


@given(entries=ENTRIES)
def test_the_attempts_on_the_clock_are_what_the_parts_add_up(entries: list[dict[str, Any]]) -> None:
    ledger = Ledger(sorted(entries, key=lambda entry: entry["time"]))
    before = -math.inf
    for attempt in ledger.attempts:
        assert before <= attempt.launched <= attempt.ended
        before = attempt.ended
        at_work = sorted([*attempt.lost, *((stretch.since, stretch.until) for stretch in attempt.kept)])
        places = [attempt.launched, *(edge for span in at_work for edge in span), attempt.ended]
        assert places == sorted(places)
    kept = [stretch for attempt in ledger.attempts for stretch in attempt.kept]
    for part in ("productive", *COUNTED):
        assert ledger.parts[part] == pytest.approx(sum(stretch.seconds[part] for stretch in kept), abs=1e-6)
    assert ledger.parts["lost"] == pytest.approx(lost_on_the_clock(ledger), abs=1e-6)


@given(entries=ENTRIES, idle=st.sampled_from(IDLE))
def test_whatever_a_run_was_done_after_an_idle_launch_changes_nothing(
    entries: list[dict[str, Any]], idle: list[dict[str, Any]]
) -> None:
    done = [*entries, entry("done", 1e6, step=4)]
    assert Ledger([*done, *idle]).parts == Ledger(done).parts


@given(entries=ENTRIES, passed=st.floats(0, 1e6), counted=st.dictionaries(st.sampled_from(COUNTED), SECONDS))
def test_the_share_between_two_accounts_is_that_of_one_now(
    entries: list[dict[str, Any]], passed: float, counted: dict[str, float]
) -> None:
    ledger = Ledger([*entries, entry("launch", 2e6), entry("start", 2e6, step=0)])
    share = ledger.goodput_at(2e6 + passed, counted)
    ledger.feed(entry("account", 2e6 + passed, step=1, counted=counted))
    assert share == pytest.approx(ledger.goodput)


def lost_on_the_clock(ledger: Ledger) -> float:
    return sum(until - since for attempt in ledger.attempts for since, until in attempt.lost)


@given(entries=ENTRIES, end=st.sampled_from(ENDS))
def test_nothing_is_productive_without_a_start(entries: list[dict[str, Any]], end: str) -> None:
    ledger = Ledger([one for one in entries if one["event"] != "start"] + [entry(end, 1e7)])
    assert ledger.goodput == 0


# Of a run


def test_a_run_tells_its_goodput_over_a_crash_and_a_stop(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"evaluation": {"every_steps": 4}, "logging": {"every_steps": 1}}
    step: Callable[..., Any] = Trainer.train_step

    def failing(self: Trainer, *args: Any) -> Any:
        if self.step == 5:
            raise RuntimeError("a fault")
        return step(self, *args)

    monkeypatch.setattr(Trainer, "train_step", failing)
    with pytest.raises(RuntimeError):
        train_in_process(small_config(tmp_path, sources, **settings))
    monkeypatch.undo()
    train_in_process(small_config(tmp_path, sources, train={"stop_after_step": 6}, **settings))
    train_in_process(small_config(tmp_path, sources, **settings))
    told = [record["perf/goodput"] for record in metrics(tmp_path) if "train/loss" in record]
    assert len(told) == 12
    assert all(0 < share < 1 for share in told)
    goodput.run(GoodputConfig(str(tmp_path)))
    shown = capsys.readouterr().out
    directory = RunDirectory(tmp_path)
    ledger, last = Ledger(directory.events(*EVENTS)), directory.events("goodput")[-1]
    first_launch, done = directory.events("launch")[0]["time"], directory.events("done")[-1]["time"]
    directory.close()
    assert ledger.wall_s == pytest.approx(done - first_launch)
    for part in ("productive", "validating", "saving", "lost", "starting", "restarting"):
        assert ledger.parts[part] > 0
        assert f"  {part} " in shown
    assert last["goodput"] == pytest.approx(ledger.goodput, abs=0.05)
    assert "goodput" in (tmp_path / "logs" / "rank00000.log").read_text()


@pytest.mark.slow
def test_a_run_that_is_done_keeps_its_goodput(sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path, sources))
    _, _, before = read_clock(tmp_path)
    train_in_process(small_config(tmp_path, sources))
    with pytest.raises(ConfigError):
        train_in_process(small_config(tmp_path, sources, model={"n_layers": 3}))
    _, journal, after = read_clock(tmp_path)
    assert after.parts == before.parts
    assert [attempt.end for attempt in after.attempts] == ["done", "done", "bad_input"]
    assert sum(one["event"] == "goodput" for one in journal) == 1  # the second had none to tell


@pytest.mark.slow
def test_validation_that_a_rollback_takes_back_is_lost_and_not_counted_afterwards(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: list[float] = []
    evaluate = Evaluator.evaluate
    accumulate: Callable[..., Any] = Trainer.accumulate_gradients

    def slow(self: Evaluator, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        time.sleep(0.5)
        evaluate(self, *args, **kwargs)
        took.append(time.perf_counter() - began)

    def spiky(self: Trainer, batch: Any) -> Any:
        loss = accumulate(self, batch)
        if int(batch.samples[0]) == 48:  # of step 7
            gradient = list(self.parameters.values())[3].grad
            assert gradient is not None
            gradient.view(-1)[5] = 1e6
        return loss

    monkeypatch.setattr(Evaluator, "evaluate", slow)
    monkeypatch.setattr(Trainer, "accumulate_gradients", spiky)
    rolling = {"spike_action": "rollback", "spike_window": 4, "spike_sigma": 50.0}
    train_in_process(small_config(tmp_path, sources, resilience=rolling))
    _, journal, ledger = read_clock(tmp_path)
    assert [entry["to_step"] for entry in journal if entry["event"] == "rollback"] == [4]
    at_0, taken_back, at_6, at_12 = took
    assert ledger.parts["validating"] == pytest.approx(at_0 + at_6 + at_12, abs=0.2)
    assert taken_back < ledger.parts["lost"] == pytest.approx(lost_on_the_clock(ledger))


def train_until_killed(config: RunConfig, step: int) -> None:
    """kill -9 before the step after that one."""
    train_step: Callable[..., Any] = Trainer.train_step

    def fatal(self: Trainer, *args: Any) -> Any:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.03)  # so that a checkpoint is whole before the next
        return train_step(self, *args)

    Trainer.train_step = fatal  # type: ignore[method-assign]
    train_in_process(config)


@pytest.mark.slow
def test_parts_and_clock_of_a_run_killed_twice_tell_the_same_loss(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(
        tmp_path,
        sources,
        train={"steps": 40},
        checkpoint={"every_steps": 10, "keep_last": 3},
        evaluation={"every_steps": 2},  # each has a heartbeat written
    )
    for step in (15, 35):
        process = processes.Process(target=train_until_killed, args=(config, step))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000030")  # so that what came after the one before is lost, too
    train_in_process(config)
    _, journal, ledger = read_clock(tmp_path)
    at = {(entry["event"], entry.get("step")): entry["time"] for entry in journal}
    heartbeats = [entry["last_heartbeat"] for entry in journal if entry["event"] == "launch"]
    assert [entry["resumed_from"] for entry in journal if entry["event"] == "start"] == [None, 10, 20]
    first = [entry["time"] for entry in journal if entry["event"] == "account" and entry["step"] in (10, 20)]
    lost = [(first[0], heartbeats[1]), (first[1], heartbeats[2])]
    assert all(until > since for since, until in lost)
    assert [attempt.lost for attempt in ledger.attempts] == [[lost[0]], [lost[1]], []]
    assert ledger.parts["lost"] == pytest.approx(sum(until - since for since, until in lost))
    goodput.run(GoodputConfig(str(tmp_path)))
    assert re.search(rf"^  lost +{ledger.parts['lost']:.1f} s", capsys.readouterr().out, flags=re.M)
    assert ledger.wall_s == pytest.approx(at["done", 40] - journal[0]["time"])


def test_a_run_at_work_is_told_up_to_its_last_heartbeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [entry("launch", 0.0), entry("start", 10.0, step=0, resumed_from=None), entry("account", 20.0, step=5)]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "heartbeat": 50.0, "step": 9}))
    goodput.run(GoodputConfig(str(tmp_path)))
    assert "goodput 80.0% of 50.0 s" in capsys.readouterr().out


def test_an_empty_journal_has_no_goodput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "journal.jsonl").write_text("")
    (tmp_path / "status.json").write_text(json.dumps({"state": "done", "heartbeat": 50.0, "step": 9}))
    goodput.run(GoodputConfig(str(tmp_path)))
    assert capsys.readouterr().out == "goodput –: the journal tells of no time yet\n"


def test_a_status_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("")
    for content, told in (("{}", "lacks state, step, heartbeat"), ("[]", "not a record")):
        (tmp_path / "status.json").write_text(content)
        with pytest.raises(DataError, match=rf"status\.json: {told}"):
            goodput.run(GoodputConfig(str(tmp_path)))


@pytest.mark.parametrize(("run_dir", "told"), [(None, "run_dir="), ("nowhere", "nowhere: nothing ever ran there")])
def test_where_nothing_ran_is_named(run_dir: str | None, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        goodput.run(GoodputConfig(run_dir and str(tmp_path / run_dir)))
