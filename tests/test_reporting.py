"""Reports: what is read from run directories, compared, drawn on a page, and how the page fares in a browser."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatrain import report, words
from llamatrain.arithmetic import KG_PER_KWH, PUE, board_watts, carbon
from llamatrain.config.plan import PlanConfig
from llamatrain.config.report import ReportConfig
from llamatrain.errors import ConfigError, DataError
from llamatrain.observe.goodput import AT_WORK, WITHOUT_A_WORD, Ledger
from llamatrain.reporting import figures
from llamatrain.reporting.comparison import at_equal_tokens, carbon_of, differing_settings, summary
from llamatrain.reporting.page import validation_table
from llamatrain.reporting.runs import read_run, read_runs
from llamatrain.reporting.series import (
    DRAWN_POINTS,
    Series,
    equal_tokens,
    reach,
    smoothed,
    thinned,
    trailing_mean,
    window_of,
)
from llamatrain.reporting.style import PART_COLOURS, RUN_COLOURS, NoPlot, Plot, as_svg
from llamatrain.reporting.terminal import compared
from tests.small_run import small_config, train_in_process

HOSTILE = "<script>console.error('run')</script> & $x_1$ \"quoted\""
STEPS, TOKENS_A_STEP = 200, 1000


def journal_entry(event: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": event, "time": time, **fields}


def write_run(
    path: Path,
    *,
    name: str = "small",
    level: float = 3.0,
    steps: int = STEPS,
    device: str = "x86_64",
    settings: dict[str, Any] | None = None,
    journal: list[dict[str, Any]] | None = None,
    **more: Any,
) -> Path:
    """A run that has fallen to a loss of `level`, validated at every 50th step; an hour of one device."""
    config = {"name": name, "run_dir": str(path), "train": {"steps": steps}, "optim": {"lr": 1e-3, "clip_norm": 1.0}}
    config["optim"].update(settings or {})  # type: ignore[attr-defined]
    journal = journal or [
        journal_entry("launch", 0.0, world_size=1, last_heartbeat=None),
        journal_entry("start", 60.0, step=0, resumed_from=None, config=config, environment={"device": device}),
        journal_entry("account", 3600.0, step=steps, counted={"data_wait": 36.0}),
        journal_entry("done", 3600.0, step=steps),
    ]
    records = []
    for step in range(1, steps + 1):
        where = {"step": step, "tokens": step * TOKENS_A_STEP, "time": float(step)}
        records.append(
            where
            | {"train/loss": level + 50 / (step + 9), "train/grad_norm": 0.5, "train/lr": 1e-3}
            | {"perf/step_ms": 100.0, "perf/tokens_per_s_per_device": 500.0, "perf/data_wait_ms": 5.0}
            | {"perf/memory_gib": 1.5}
            | ({"perf/mfu": 0.5} if device.startswith("NVIDIA") else {})
        )
        if step % 50 == 0:
            numbers = {"loss": level + 60 / step, "bits_per_byte": 1.0, "unigram_entropy": 5.0, "tokens": 99}
            tasks = ("validation", "validation.prose", "validation.code")
            records.append(where | {f"eval/{task}/{key}": value for task in tasks for key, value in numbers.items()})
            records.append(where | {"eval/questions/accuracy": 0.25 + step / 1000})
    status = {"state": "done", "step": steps, "heartbeat": 3600.0, "reason": None, "phase": None, "attempt": "a"}
    path.mkdir(parents=True)
    write_lines(path / "journal.jsonl", journal)
    write_lines(path / "metrics.jsonl", records)
    (path / "status.json").write_text(json.dumps({**status, **more}))
    return path


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_evaluation(path: Path, *, step: int, accuracy: float) -> None:
    file = path / "evaluations" / f"step-{step:08d}" / "own.json"
    file.parent.mkdir(parents=True)
    metrics = {"accuracy": {"value": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "questions": 100}}
    metrics["not_finite"] = {"value": None, "low": None, "high": None, "questions": 100}
    file.write_text(json.dumps({"step": step, "tokens": step * TOKENS_A_STEP, "tasks": {"boolq": metrics}}))


# Reading


def test_a_run_is_summed_up(tmp_path: Path) -> None:
    one = summary(read_run(write_run(tmp_path / "run")))
    assert (one.state, one.step, one.total_steps, one.tokens) == ("done", 200, 200, 200_000)
    assert one.loss == pytest.approx(3.0 + 50 / 208, abs=0.01)
    assert one.validation == (3.3, 200_000)
    assert one.tokens_per_s == 500
    assert one.goodput == pytest.approx((3600 - 60 - 36) / 3600)
    assert one.restarts == 0
    assert one.mfu is None


def test_a_half_written_line_is_left_out_and_a_broken_one_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2')
    assert len(read_run(path).training) == STEPS
    with open(path / "metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"metrics.jsonl, line 209: not a record"):
        read_run(path)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("metrics.jsonl", '{"a": 1}', "metrics.jsonl, line 1: lacks step, tokens, time"),
        ("metrics.jsonl", '{"step": 1, "time": 1.0, "tokens": null}', "metrics.jsonl, line 1: lacks tokens"),
        ("journal.jsonl", "{}", "journal.jsonl, line 1: lacks event"),
        ("samples.jsonl", "{}", "samples.jsonl, line 1: lacks step, tokens, samples"),
        (
            "samples.jsonl",
            '{"step": 1, "tokens": 1, "samples": [{"prompt": "a"}]}',
            "samples.jsonl, line 1, a sample: lacks continuation",
        ),
        ("samples.jsonl", '{"step": 1, "tokens": 1, "samples": [1]}', "samples.jsonl, line 1, a sample: not a record"),
        ("status.json", "{}", "status.json: lacks state, step, heartbeat"),
    ],
)
def test_a_record_that_lacks_a_field_is_named(file: str, content: str, told: str, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    (path / file).write_text(f"{content}\n")
    with pytest.raises(DataError, match=re.escape(told)):
        read_run(path)


def test_where_nothing_ran_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing ever ran there"):
        read_run(tmp_path)


def test_runs_with_a_comma_between_them_are_told_how_to_be_given(tmp_path: Path) -> None:
    write_run(tmp_path / "a,b")
    assert len(read_runs([f"{tmp_path}/a,b"])) == 1
    with pytest.raises(ConfigError, match=r"several are given as 'run=\[runs/a,runs/b\]'"):
        read_runs(["runs/a,runs/b"])


def test_of_an_empty_journal_nothing_is_told(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", device="NVIDIA H100 80GB HBM3")
    (path / "journal.jsonl").write_text("")
    one = summary(read_run(path), power_watts=100)
    assert (one.goodput, one.carbon.device_hours, one.carbon.tonnes) == (None, None, None)
    assert re.search(r"goodput +–\nrestarts +0\ndevice hours +–\nCO2eq +–", compared([read_run(path)], width=60))


def test_runs_of_one_name_are_told_apart_by_their_places(tmp_path: Path) -> None:
    for place in ("a/run", "b/run"):
        write_run(tmp_path / place, name="same")
    assert [run.name for run in read_runs([f"{tmp_path}/a/run", f"{tmp_path}/b/run"])] == ["a/run", "b/run"]
    with pytest.raises(ConfigError, match="the same run twice"):
        read_runs([f"{tmp_path}/a/run", f"{tmp_path}/a/run"])


def test_an_evaluation_that_is_none_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    write_evaluation(path, step=100, accuracy=0.6)
    (found,) = read_run(path).evaluations
    assert (found.task, found.metric, found.tokens, found.value) == ("boolq", "accuracy", 100_000, 0.6)
    assert (found.low, found.high) == pytest.approx((0.55, 0.65))
    (path / "evaluations" / "step-00000100" / "own.json").write_text('{"tasks": {"boolq": {"accuracy": 0.6}}}')
    with pytest.raises(DataError, match=r"own.json: not what llamatrain.evaluate writes"):
        read_run(path)


# Attempts

CRASHED = [
    journal_entry("launch", 0.0, world_size=8, last_heartbeat=None),
    journal_entry("start", 10.0, step=0, resumed_from=None),
    journal_entry("account", 100.0, step=40),
    journal_entry("account", 200.0, step=80),
    journal_entry("launch", 300.0, world_size=4, last_heartbeat=250.0),
    journal_entry("start", 320.0, step=40, resumed_from=40),
    journal_entry("account", 400.0, step=80),
    journal_entry("rollback", 450.0, from_step=99, to_step=80),
    journal_entry("stop", 500.0, step=120, reason="signal"),
]


def test_attempts_tell_when_what_was_lost_was_trained() -> None:
    first, second = Ledger(CRASHED).attempts
    assert (first.ended, first.end, first.from_step, first.to_step) == (250.0, WITHOUT_A_WORD, 0, 80)
    assert first.lost == [(100.0, 250.0)]  # it went on from step 40
    assert (second.end, second.reason, second.from_step, second.to_step) == ("stop", "signal", 40, 120)
    assert second.lost == [(400.0, 450.0)]
    assert first.device_hours + second.device_hours == pytest.approx((250 * 8 + 200 * 4) / 3600)


def test_nothing_is_lost_by_a_stop_that_was_saved() -> None:
    resumed = [*CRASHED, journal_entry("launch", 600.0), journal_entry("start", 610.0, step=120, resumed_from=120)]
    assert [attempt.lost for attempt in Ledger(resumed).attempts] == [[(100.0, 250.0)], [(400.0, 450.0)], []]


def test_a_run_at_work_is_told_up_to_its_last_sign(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", journal=CRASHED[:4], state="running", heartbeat=230.0, step=90)
    (attempt,) = read_run(path).attempts
    assert (attempt.ended, attempt.end, attempt.to_step) == (230.0, AT_WORK, 90)


def test_a_run_that_is_silent_is_told_as_that(tmp_path: Path) -> None:
    now = time.time()
    for silent_s, told in ((20, "running"), (7200, "running, silent for 2 h")):
        path = write_run(tmp_path / f"{silent_s}", journal=CRASHED[:4], state="running", heartbeat=now - silent_s)
        assert summary(read_run(path)).state == told


def test_a_launch_of_a_run_that_was_done_is_no_restart(tmp_path: Path) -> None:
    again = [
        *CRASHED[:4],
        journal_entry("done", 200.0, step=80),
        journal_entry("launch", 900.0, world_size=1),
        journal_entry("start", 901.0, step=80, resumed_from=80),
        journal_entry("done", 902.0, step=80),
    ]
    run = read_run(write_run(tmp_path / "run", journal=again))
    assert len(run.attempts) == 2
    assert run.restarts == []


def test_launches_before_the_first_that_trained_are_no_restarts(tmp_path: Path) -> None:
    refused = [
        one
        for n in range(3)
        for one in (journal_entry("launch", 10.0 * n), journal_entry("bad_input", 10.0 * n + 1, reason="memory"))
    ]
    never = read_run(write_run(tmp_path / "never", journal=refused, state="bad_input"))
    assert (len(never.attempts), never.restarts) == (3, [])
    later = [{**one, "time": one["time"] + 100} for one in CRASHED]
    assert len(read_run(write_run(tmp_path / "later", journal=[*refused, *later])).restarts) == 1


def test_the_rate_is_that_of_the_devices_each_line_was_written_on(tmp_path: Path) -> None:
    journal = [
        journal_entry("launch", 0.0, world_size=8),
        journal_entry("start", 0.5, step=0, resumed_from=None),
        journal_entry("account", 150.5, step=150),
        journal_entry("stop", 150.5, step=150),
        journal_entry("launch", 150.6, world_size=2, last_heartbeat=150.5),
        journal_entry("start", 150.7, step=150, resumed_from=150),
        journal_entry("account", 200.0, step=200),
        journal_entry("stop", 200.0, step=200),
        journal_entry("launch", 300.0, world_size=1),
        journal_entry("bad_input", 301.0, reason="memory"),
    ]
    run = read_run(write_run(tmp_path / "run", journal=journal))  # a line a second, each of 500 on a device
    assert summary(run).tokens_per_s == 500 * 8
    assert run.devices == 2
    kept = [line for line in (run.path / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] > 150]
    (run.path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
    assert summary(read_run(run.path)).tokens_per_s == 500 * 2


# Numbers


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-100, 100) | st.just(math.nan), max_size=2000).map(lambda v: np.array(v, float)),
    points=st.integers(1, 50),
)
def test_drawing_few_points_hides_no_extreme(values: np.ndarray, points: int) -> None:
    one = Series(np.arange(len(values), dtype=float), values)
    band, known = thinned(one, points), one.finite()
    assert len(band.tokens) == min(points, len(known))
    if len(known):
        assert (band.least.min(), band.greatest.max()) == (known.values.min(), known.values.max())
        assert (np.diff(band.tokens) > 0).all()


@settings(deadline=None)
@given(level=st.floats(-10, 10), slope=st.floats(-1, 1), count=st.integers(0, 700), window=st.floats(0, 100))
def test_smoothing_leaves_a_line_as_it_is(level: float, slope: float, count: int, window: float) -> None:
    tokens = np.arange(count, dtype=float)
    line = Series(tokens, level + slope * tokens)
    drawn = smoothed(line, window)
    assert drawn.values == pytest.approx(line.values[: len(drawn)], abs=1e-6)
    assert 2 * len(drawn) >= len(line)


def test_smoothing_takes_noise_away() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    one = Series(np.arange(1000.0), noise)
    assert smoothed(one, window_of([one])).values.std() < 0.4


def test_a_line_does_not_end_on_the_noise_of_one_point() -> None:
    values = np.zeros(1000)
    values[-1] = 1.0
    one = Series(np.arange(1000.0), values)
    assert smoothed(one, window_of([one])).last < 0.25


def test_runs_of_other_log_intervals_are_smoothed_over_the_same_tokens() -> None:
    often, rarely = Series(np.arange(1000.0), np.zeros(1000)), Series(np.arange(0.0, 500, 10), np.zeros(50))
    window = window_of([often, rarely])
    assert window == pytest.approx(20, rel=0.01)
    assert (reach(often, window), reach(rarely, 40)) == (9, 2)


def test_a_trailing_mean_is_of_the_points_before() -> None:
    one = Series(np.arange(0.0, 100, 10), np.arange(0.0, 100, 10))
    assert trailing_mean(one, 50, 20) == 45
    assert trailing_mean(one, 55, 2) == 55


def test_equal_tokens_are_where_the_shortest_ends() -> None:
    short, long = (Series(np.arange(0.0, end, 10), np.arange(0.0, end, 10)) for end in (51, 101))
    assert equal_tokens([short, long]) == 50
    assert long.at(45) == 45
    assert short.at(51) is None
    assert equal_tokens([short, Series(np.array([60.0]), np.array([1.0]))]) is None


@settings(deadline=None)
@given(number=st.floats(1, 1e14))
def test_a_count_says_what_it_counts_to_one_percent(number: float) -> None:
    text = words.count(number)
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1.0)
    assert float(text.rstrip("kMBT")) * scale == pytest.approx(number, rel=0.01)
    assert len(text) <= 8


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (words.energy(449.8), "450 MWh"),
        (words.energy(3.9e-6), "3.9 Wh"),
        (words.emissions(173.2), "173 t"),
        (words.emissions(1.5e-6), "1.5 g"),
        (words.duration(185), "3 min 5 s"),
        (words.duration(21 * 86_400), "21 d"),
        (words.share(0.8977), "89.8 %"),
        (words.count(1_400_000_000_000), "1.4T"),
    ],
)
def test_numbers_are_told_as_people_read_them(told: str, expected: str) -> None:
    assert told == expected


# Energy and carbon


@pytest.mark.parametrize(
    ("gpu_hours", "mwh", "tonnes"),
    [(82_432, 36, 14), (135_168, 59, 23), (530_432, 233, 90), (1_022_362, 449, 173)],
    ids=["7B", "13B", "33B", "65B"],
)
def test_energy_and_carbon_are_those_of_the_papers_table_15(gpu_hours: int, mwh: float, tonnes: float) -> None:
    watts = board_watts("NVIDIA A100-SXM4-80GB")
    assert watts == 400
    assert carbon(gpu_hours, watts=watts) == pytest.approx((mwh, tonnes), rel=0.03)


def test_plans_and_reports_reckon_alike() -> None:
    assert (PlanConfig().pue, PlanConfig().kg_per_kwh) == (PUE, KG_PER_KWH)


def test_carbon_is_told_where_the_power_is_known_or_given(tmp_path: Path) -> None:
    unknown = read_run(write_run(tmp_path / "cpu"))
    known = read_run(write_run(tmp_path / "gpu", device="NVIDIA H100 80GB HBM3"))
    assert carbon_of(unknown).tonnes is None
    assert carbon_of(unknown, power_watts=100).mwh == pytest.approx(1e-4 * 1.1)
    assert carbon_of(known).tonnes == pytest.approx(7e-4 * 1.1 * 0.385)


# Comparison


def test_the_terminal_tells_what_runs_have_come_to_and_how_they_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "a", name="base", level=3.0)
    write_run(tmp_path / "b", name="other", level=2.5, steps=150, settings={"lr": 2e-3})
    runs = read_runs([f"{tmp_path}/a", f"{tmp_path}/b"])
    text = compared(runs, width=200)
    assert re.search(r"base +done +200/200 +200k +3\.2\d\d +3\.300 at 200k +500 +– +97\.3 % +0 +1 +–", text)
    assert re.search(r"optim\.lr +0\.001 +0\.002", text)
    assert re.search(r"train\.steps +200 +150", text)
    assert re.search(r"validation: loss, 150k +3\.400 +2\.900", text)
    assert set(differing_settings(runs)) == {"optim.lr", "train.steps"}
    losses = at_equal_tokens(runs)[0]
    assert losses.tokens == 150_000
    assert losses.values[0] - losses.values[1] == pytest.approx(0.5, abs=0.01)


def test_losses_on_other_texts_are_marked(tmp_path: Path) -> None:
    write_run(tmp_path / "a", name="a")
    path = write_run(tmp_path / "b", name="b")
    changed = (
        (path / "metrics.jsonl").read_text().replace('"eval/validation/tokens": 99', '"eval/validation/tokens": 7')
    )
    (path / "metrics.jsonl").write_text(changed)
    text = compared(read_runs([f"{tmp_path}/a", f"{tmp_path}/b"]), width=200)
    assert "validation: loss, 200k *" in text
    assert "validation, code: loss, 200k " in text
    assert "validation, code: loss, 200k *" not in text


def test_a_narrow_terminal_has_the_table_turned_round(tmp_path: Path) -> None:
    text = compared([read_run(write_run(tmp_path / "run"))], width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert re.search(r"^goodput +97\.3 %$", text, flags=re.M)


def test_the_comparison_needs_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    program = (
        "import sys; from llamatrain.report import run; from llamatrain.config.report import ReportConfig; "
        f"run(ReportConfig(run={str(path)!r}, format='terminal')); print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "97.3 %" in out
    assert not {"torch", "matplotlib"} & set(out.split())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"run": []}, "give run="),
        ({"run": "runs/a", "format": "pdf"}, "format=pdf: choose one of html, terminal"),
        ({"run": "runs/a", "power_watts": -1.0}, "power_watts"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        report.run(ReportConfig(**settings))


def test_without_matplotlib_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'llamatrain\[plots\]'; format=terminal"):
        report.run(ReportConfig(run=str(path)))
    report.run(ReportConfig(run=str(path), format="terminal"))


# The page


def test_a_reader_who_leaves_does_not_cost_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    path = write_run(tmp_path / "run", steps=10)

    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(BrokenPipeError):
        report.run(ReportConfig(run=str(path)))
    assert (path / "report" / "report.html").exists()


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Path, str]]:
    """The report of two runs with everything there is, hostile texts too; made once."""
    pytest.importorskip("matplotlib")
    made: list[tuple[Path, str]] = []

    def make() -> tuple[Path, str]:
        if not made:
            made.append(_full_report(tmp_path_factory.mktemp("report")))
        return made[0]

    return make


def _full_report(directory: Path) -> tuple[Path, str]:
    started = {"config": {"name": HOSTILE, "optim": {"clip_norm": 1.0}}, "environment": {"device": "x86_64"}}
    journal = [{**entry, **started} if entry["event"] == "start" else entry for entry in CRASHED]
    journal.append(journal_entry("spike", 480.0, step=110))
    first = write_run(directory / "a", journal=journal, state="preempted", reason=HOSTILE, step=120)
    texts = [{"prompt": HOSTILE, "continuation": f"\n{HOSTILE} {step}", "ended": False} for step in range(0, 201, 10)]
    lines = [{"step": 10 * n, "tokens": 10_000 * n, "time": 0.0, "samples": [text]} for n, text in enumerate(texts)]
    write_lines(first / "samples.jsonl", lines)
    shares = {"compute_s": 2.0, "exposed_communication_s": 0.5, "data_wait_s": 0.1, "host_gaps_s": 0.4, "wall_s": 3.0}
    (first / "profile" / "step-00000011").mkdir(parents=True)
    profile = {"steps": [11, 12, 13], "ranks": [{"rank": 0, "host": "h", **shares}]}
    (first / "profile" / "step-00000011" / "summary.json").write_text(json.dumps(profile))
    second = write_run(directory / "b", name="on-accelerators-" + "long" * 20, device="NVIDIA H100 80GB HBM3")
    for step in (100, 200):
        write_evaluation(second, step=step, accuracy=step / 400)
    report.run(ReportConfig(run=[str(first), str(second)], output=str(directory / "out")))
    return directory / "out", (directory / "out" / "report.html").read_text()


@pytest.mark.slow
def test_the_page_holds_all_and_fetches_nothing(page_of: Callable[[], tuple[Path, str]]) -> None:
    directory, page = page_of()
    for title in ("Training loss", "Validation, code", "Gradient norm", "Model FLOP/s utilisation", "Goodput", "boolq"):
        assert f"<h3>{title}</h3>" in page
    assert "://" not in page
    assert not re.search(r"<(script|img|iframe|object|embed|link rel=.stylesheet)", page)
    assert not re.search(r"\b(on\w+|src|srcset)=", page)
    pictures = {path.name for path in directory.glob("*.png")}
    assert {"loss.png", "mfu.png", "wall-clock.png", "profile.png", "evaluation-1-questions.png"} <= pictures
    assert all((directory / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.slow
def test_what_runs_call_themselves_never_becomes_markup(page_of: Callable[[], tuple[Path, str]]) -> None:
    _, page = page_of()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 20  # in headings, plots, samples, the status


@pytest.mark.slow
def test_parts_of_drawings_have_names_of_their_own(page_of: Callable[[], tuple[Path, str]]) -> None:
    _, page = page_of()
    names = [set(re.findall(r'id="([^"]+)"', svg)) for svg in re.findall(r"<svg.*?</svg>", page)]
    assert len(names) > 10
    assert sum(map(len, names)) == len(set.union(*names))
    for svg in re.findall(r"<svg.*?</svg>", page):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(re.findall(r'id="([^"]+)"', svg))


@pytest.mark.slow
def test_samples_are_shown_from_the_last_to_the_first(page_of: Callable[[], tuple[Path, str]]) -> None:
    _, page = page_of()
    steps = [int(step) for step in re.findall(r"tokens, step (\d+)</span>", page)]
    assert (steps[0], steps[-1], len(steps)) == (200, 0, 8)
    assert steps == sorted(steps, reverse=True)


def test_a_run_is_compared_with_one_that_has_nothing_yet(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "a", name="a")
    (write_run(tmp_path / "b", name="b") / "metrics.jsonl").write_text("")
    runs = read_runs([f"{tmp_path}/a", f"{tmp_path}/b"])
    drawn = figures.loss(runs)
    assert isinstance(drawn, Plot)
    assert "cut off" in drawn.caption
    assert len(compared(runs).splitlines()) > 3


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_run(tmp_path / "run", name=HOSTILE, reason=HOSTILE)
    (path / "metrics.jsonl").unlink()
    report.run(ReportConfig(run=str(path)))
    page = (path / "report" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    for reason in ("no step has been logged yet", "not told for x86_64", "evaluation.samples=", "power_watts="):
        assert reason in page


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_run(tmp_path / "run", steps=100)
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(
        re.sub(r'"train/(loss|grad_norm)": [\d.]+', r'"train/\1": null', text, count=30)
    )
    for plot in (figures.loss([read_run(path)]), figures.gradient_norm([read_run(path)])):
        assert isinstance(plot, Plot)
        assert "nan" not in as_svg(plot).lower()


def test_losses_none_of_which_is_finite_are_told_as_that(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_run(tmp_path / "run", steps=60)
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(re.sub(r'"(train|eval/[a-z.]*)/loss": [\d.]+', r'"\1/loss": NaN', text))
    run = read_run(path)
    assert figures.loss([run]) == NoPlot("Training loss", "no value that was logged is finite")
    assert [type(plot) for plot in figures.validation([run])] == [NoPlot]
    assert "nan" not in validation_table([run])


@pytest.mark.slow
def test_a_real_run_has_its_report(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    train_in_process(small_config(tmp_path, sources, train={"stop_after_step": 6}))
    train_in_process(small_config(tmp_path, sources, evaluation={"samples": ["the"], "sample_tokens": 4}))
    report.run(ReportConfig(run=str(tmp_path)))
    assert str(tmp_path / "report" / "report.html") in capsys.readouterr().out
    page = (tmp_path / "report" / "report.html").read_text()
    assert "12 of 12 steps" in page
    assert "goodput, 1 restart" in page
    for source in sources:
        assert f">{source}<" in page  # in the validation's table and legend
    assert "tokens, step 12</span>" in page


# Linear RGB as seen without red cones, and without green ones: Viénot, Brettel and Mollon 1999
PROTANOPE = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
DEUTERANOPE = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])


def lab(colour: str, eyes: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of an sRGB colour as those eyes see it."""
    encoded = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ (
        np.clip(eyes @ linear, 0, 1)
    )
    x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", [np.eye(3), PROTANOPE, DEUTERANOPE], ids=["most", "no red", "no green"])
@pytest.mark.parametrize("colours", [RUN_COLOURS, tuple(PART_COLOURS.values())], ids=["runs", "parts"])
def test_colours_are_told_apart_by_all_eyes(colours: tuple[str, ...], eyes: np.ndarray) -> None:
    seen = {colour: lab(colour, eyes) for colour in colours}
    apart = {(a, b): float(np.linalg.norm(seen[a] - seen[b])) for a in colours for b in colours if a < b}
    assert min(apart.values()) > 10, min(apart, key=lambda pair: apart[pair])


# In a browser

PHONE, SCREEN = 390, 1280
PROBE = """<!doctype html><body style="margin:0">
<iframe id="page" src="PAGE" style="width:WIDTHpx;height:900px;border:0"></iframe><pre id="found"></pre><script>
document.getElementById("page").addEventListener("load", event => {
  const page = event.target.contentDocument, found = {width: page.documentElement.scrollWidth, plots: []};
  for (const svg of page.querySelectorAll("figure svg")) {
    const box = svg.getBoundingClientRect(), text = svg.querySelector("text");
    if (box.width > 0) found.plots.push({width: box.width, right: box.right, paths: svg.querySelectorAll("path").length,
      drawn: svg.getBBox().width, text: text ? text.getBoundingClientRect().height : 0});
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script></body>"""


def in_browser(page: Path, *, width: int) -> tuple[dict[str, Any], str]:
    """What a page measures in a window of so many pixels, and what came on the console."""
    browser = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    probe = page.parent / f"probe-{page.stem}-{width}.html"
    probe.write_text(PROBE.replace("PAGE", page.name).replace("WIDTH", str(width)))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=5000", "--enable-logging=stderr", f"--user-data-dir={page.parent / 'browser'}"]
    done = subprocess.run(
        [*command, f"--window-size={SCREEN},1000", "--dump-dom", f"file://{probe}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found is not None, done.stderr
    return json.loads(found[1]), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_a_browser_draws_the_plots_and_nothing_sticks_out(width: int, page_of: Callable[[], tuple[Path, str]]) -> None:
    directory, page = page_of()
    found, console = in_browser(directory / "report.html", width=width)
    assert console == ""
    assert found["width"] <= width
    assert len(found["plots"]) == page.count("<figure")
    for plot in found["plots"]:
        assert plot["right"] <= width
        assert plot["drawn"] > 100
        assert plot["paths"] > 2
        assert plot["text"] >= 8  # pixels


@pytest.mark.slow
def test_the_browser_would_tell_of_errors_and_of_what_sticks_out(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<body><script>console.error("seen")</script><p style="width:600px">wide')
    found, console = in_browser(page, width=PHONE)
    assert found["width"] > PHONE
    assert "seen" in console


@pytest.mark.slow
def test_a_long_run_is_drawn_with_few_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_run(tmp_path / "run", steps=5_000)
    report.run(ReportConfig(run=str(path)))
    assert (path / "report" / "report.html").stat().st_size < 1_000_000
    assert DRAWN_POINTS < 2000
