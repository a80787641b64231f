"""Records and sinks: speed figures that add up, lines people can read, a wandb that can neither stop nor slow a run."""

import json
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamatrain.arithmetic import flops_per_token
from llamatrain.config import LoggingConfig
from llamatrain.observe.records import MetricsLog
from llamatrain.observe.sinks import Console, Wandb, duration, stored_run_id
from llamatrain.observe.throughput import Throughput
from tests.small_run import GLOBAL_BATCH, SEQ_LEN, metrics, small_config, status, train_in_process

CONFIG = small_config(Path("unused"), {"text": Path("unused")})
RECORD = {
    "step": 40, "tokens": 4096, "train/loss": 2.5, "train/lr": 3e-4, "train/grad_norm": 0.7, "perf/step_ms": 500.0,
    "perf/tokens_per_s_per_device": 12_345.6, "perf/data_wait_ms": 0.1, "perf/memory_gib": 1.5,
}  # fmt: skip


def test_speed_is_tokens_over_the_time_that_was_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    throughput = Throughput(CONFIG, device_name="NVIDIA H200", world_size=2)
    for _ in range(4):
        clock[0] += 0.5
        throughput.step_done(data_wait_s=0.01)
    clock[0] += 7.0
    throughput.pause(7.0)
    fields = throughput.lap()
    rate = GLOBAL_BATCH * SEQ_LEN / 0.5 / 2
    assert fields["perf/step_ms"] == pytest.approx(500)
    assert fields["perf/tokens_per_s_per_device"] == pytest.approx(rate)
    assert fields["perf/data_wait_ms"] == pytest.approx(10)
    assert fields["perf/mfu"] == pytest.approx(rate * flops_per_token(CONFIG.model, SEQ_LEN) / 989.4e12, rel=1e-2)
    assert 0 < fields["perf/mfu_causal"] < fields["perf/mfu"]
    clock[0] += 0.25
    throughput.step_done(data_wait_s=0.0)
    assert throughput.lap()["perf/step_ms"] == pytest.approx(250)


def test_an_unknown_accelerator_has_no_mfu() -> None:
    assert "perf/mfu" not in Throughput(CONFIG, device_name="an abacus", world_size=1).lap()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (9.94, "9.9s"), (42.4, "42s"), (185, "3m05s"), (26_000, "7h13m"), (360_000, "4d04h")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_console_line_tells_progress_loss_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    Console(total_steps=400).write({**RECORD, "perf/mfu": 0.451})
    line = capsys.readouterr().out
    for part in (
        "step  40/400  10%",
        "loss 2.5000",
        "lr 3.00e-04",
        "grad 0.700",
        "12,346 tok/s/device",
        "mfu 45.1%",
        "eta 3m00s",
    ):
        assert part in line


def test_records_are_cut_at_the_resumed_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resumed_step=None)
    for step in range(1, 6):
        log.write({"step": step})
    log.close()
    log = MetricsLog(tmp_path / "metrics.jsonl", resumed_step=3)
    log.write({"step": 4, "again": True})
    log.sync()
    log.close()
    assert [record.get("again") for record in metrics(tmp_path)] == [None, None, None, True]
    MetricsLog(tmp_path / "metrics.jsonl", resumed_step=None).close()
    assert metrics(tmp_path) == []


# wandb


class FakeWandb(types.ModuleType):
    """Stands where the package stands; records what it is asked."""

    def __init__(self, init: Callable[..., Any]) -> None:
        super().__init__("wandb")
        self.init = init


class FakeRun:
    def __init__(self, delay_s: float = 0.0) -> None:
        self.logged: list[dict[str, Any]] = []
        self.defined: list[Any] = []
        self.finished = False
        self.delay_s = delay_s

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, record: dict[str, Any]) -> None:
        time.sleep(self.delay_s)
        self.logged.append(record)

    def finish(self) -> None:
        self.finished = True


def open_wandb(directory: Path) -> Wandb:
    return Wandb(LoggingConfig(wandb="offline"), name="small", directory=directory, config={})


def test_wandb_gets_every_record_with_tokens_as_the_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, arguments = FakeRun(), []
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(lambda **given: arguments.append(given) or run))
    sink = open_wandb(tmp_path)
    sink.write(RECORD)
    sink.close()
    open_wandb(tmp_path).close()
    assert (run.logged, run.finished) == ([RECORD], True)
    assert ("*", "tokens") in run.defined
    assert arguments[0]["id"] == arguments[1]["id"] == stored_run_id(tmp_path / "wandb_id")
    assert arguments[0]["resume"] == "allow"


@pytest.mark.parametrize("broken", ["init", "log"])
def test_a_wandb_that_fails_does_not_stop_the_run(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no network")

    run = FakeRun()
    monkeypatch.setattr(run, "log", fail)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail if broken == "init" else lambda **_: run))
    sink = open_wandb(tmp_path)
    for _ in range(3):
        sink.write(RECORD)
        time.sleep(0.05)
    sink.close()
    assert [r.getMessage() for r in caplog.records] == [
        "wandb is off from here on, metrics.jsonl has everything: no network"
    ]


def test_a_wandb_that_hangs_does_not_slow_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamatrain.observe.sinks.WANDB_FINISH_S", 0.2)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(lambda **_: time.sleep(60)))
    begin = time.perf_counter()
    sink = open_wandb(tmp_path)
    for _ in range(2000):  # more than the queue holds
        sink.write(RECORD)
    sink.close()
    assert time.perf_counter() - begin < 2


@pytest.mark.slow
def test_the_real_wandb_offline_leaves_a_run_that_can_be_synced(
    tiny_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    source = tiny_dataset("text", ["row, row, row your boat gently down the stream. " * 20] * 9, tmp_path / "data")
    config = small_config(tmp_path / "run", {"text": source}, evaluation={"every_steps": 0}, train={"steps": 4})
    train_in_process(replace(config, logging=LoggingConfig(every_steps=1, wandb="offline")))
    assert status(tmp_path / "run")["state"] == "done"
    run_id = (tmp_path / "run" / "wandb_id").read_text()
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
    assert len(metrics(tmp_path / "run")) == 4
    json.dumps(metrics(tmp_path / "run"))
