"""Goodput: the parts add up to the wall clock whatever happened, and each moment is in the right one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamatrain import goodput
from llamatrain.config.goodput import GoodputConfig
from llamatrain.errors import ConfigError
from llamatrain.observe.goodput import COUNTED, ENDS, EVENTS, PARTS, Ledger
from llamatrain.run_directory import RunDirectory
from llamatrain.trainer import Trainer
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
    assert parts(*entries, resumed) == {
        "productive": 9, "data_wait": 1, "saving": 1, "lost": 19 + 5, "restarting": 1,
    }  # fmt: skip
    between = entry("start", 36, step=15, resumed_from=15)  # half of a stretch
    assert parts(*entries, between)["lost"] == pytest.approx(19 / 2 + 5)
    from_the_start = entry("start", 36, step=0, resumed_from=None)
    assert parts(*entries, from_the_start) == {"saving": 1, "lost": 34, "restarting": 1}


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


def test_the_time_after_the_end_does_not_count() -> None:
    run = [entry("launch", 0), entry("start", 1, step=0, resumed_from=None), entry("done", 5, step=4)]
    again = [entry("launch", 1005), entry("start", 1006, step=4, resumed_from=4), entry("stop", 1010, step=8)]
    assert parts(*run, *again) == {"starting": 1, "productive": 8, "restarting": 1}


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
        before = Ledger.until(ledger, one)
        ledger.feed(one)
        assert before.parts == ledger.parts
        if one["event"] in EVENTS:
            if now is None or (over and one["event"] == "launch"):
                now = one["time"]
            later = max(now, one["time"])
            wall, now, over = wall + later - now, later, one["event"] == "done"
    assert set(ledger.parts) == set(PARTS)
    assert all(seconds >= 0 for seconds in ledger.parts.values())
    assert ledger.wall_s == pytest.approx(wall, abs=1e-6)
    assert 0 <= ledger.goodput <= 1 + 1e-9


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


def test_a_run_at_work_is_told_up_to_its_last_heartbeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [entry("launch", 0.0), entry("start", 10.0, step=0, resumed_from=None), entry("account", 20.0, step=5)]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "heartbeat": 50.0, "step": 9}))
    goodput.run(GoodputConfig(str(tmp_path)))
    assert "goodput 80.0% of 50.0 s" in capsys.readouterr().out


@pytest.mark.parametrize("run_dir", [None, "nowhere"])
def test_where_nothing_ran_is_named(run_dir: str | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run_dir="):
        goodput.run(GoodputConfig(run_dir and str(tmp_path / run_dir)))
