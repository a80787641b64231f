"""Where the time of steps goes: parts that add up, events sorted into them, a profile of a real loop."""

import gzip
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import DeviceType

from llamatrain.config import LoggingConfig
from llamatrain.config.logging import check_logging
from llamatrain.distributed import World
from llamatrain.errors import ConfigError
from llamatrain.observe.intervals import COMMUNICATION, COMPUTE, DATA_WAIT, Interval, Span, TimeShares, time_shares
from llamatrain.observe.profiler import LABELS, Profiler, aside, classified, table
from tests.small_run import small_config, train_in_process

LENGTH = 30  # of the time in which hypothesis draws intervals
points = st.integers(0, LENGTH)
spans = st.tuples(points, points).map(lambda pair: (min(pair), max(pair)))
intervals = st.lists(st.tuples(spans, st.sampled_from((COMPUTE, COMMUNICATION, DATA_WAIT))), max_size=8).map(
    lambda drawn: [(start, end, kind) for (start, end), kind in drawn]
)
windows = st.lists(spans, max_size=3)


# The arithmetic


def moment_by_moment(found: list[Interval], within: list[Span]) -> TimeShares:
    """The same, by looking at every unit of time."""
    counts = dict.fromkeys((*LABELS, "hidden_communication"), 0)
    for moment in range(LENGTH):
        if not any(start <= moment < end for start, end in within):
            continue
        kinds = {kind for start, end, kind in found if start <= moment < end}
        counts["wall"] += 1
        counts["hidden_communication"] += {COMPUTE, COMMUNICATION} <= kinds
        if COMPUTE in kinds:
            counts["compute"] += 1
        elif COMMUNICATION in kinds:
            counts["exposed_communication"] += 1
        elif DATA_WAIT in kinds:
            counts["data_wait"] += 1
        else:
            counts["host_gaps"] += 1
    return TimeShares(**counts)


@settings(deadline=None)
@given(intervals, windows)
def test_every_moment_is_in_one_part(found: list[Interval], within: list[Span]) -> None:
    assert time_shares(found, within) == moment_by_moment(found, within)


@settings(deadline=None)
@given(intervals, windows)
def test_the_parts_add_up(found: list[Interval], within: list[Span]) -> None:
    shares = time_shares(found, within)
    assert shares.compute + shares.exposed_communication + shares.data_wait + shares.host_gaps == shares.wall
    alone = time_shares([interval for interval in found if interval[2] == COMMUNICATION], within)
    assert shares.exposed_communication + shares.hidden_communication == shares.communication == alone.communication


@settings(deadline=None)
@given(intervals, windows, spans)
def test_more_compute_never_exposes_more_communication(found: list[Interval], within: list[Span], more: Span) -> None:
    before, after = time_shares(found, within), time_shares([*found, (*more, COMPUTE)], within)
    assert after.exposed_communication <= before.exposed_communication
    assert after.communication == before.communication


# What is which


def event(name: str, start_us: float, end_us: float, **fields: Any) -> SimpleNamespace:
    time_range = SimpleNamespace(start=start_us, end=end_us)
    given_or = {"device_type": DeviceType.CPU, "thread": 1, "is_user_annotation": False, **fields}
    return SimpleNamespace(name=name, time_range=time_range, **given_or)


def on_device(name: str, start_us: float, end_us: float, **fields: Any) -> SimpleNamespace:
    return event(name, start_us, end_us, device_type=DeviceType.CUDA, **fields)


def shares_of(events: list[SimpleNamespace], device: str) -> dict[str, float]:
    """In microseconds."""
    shares = time_shares(*classified(events, device))
    return {part: getattr(shares, part) / 1e3 for part in (*LABELS, "hidden_communication")}


def test_on_cuda_kernels_of_nccl_are_communication_and_all_others_compute() -> None:
    found = shares_of(
        [
            event("llamatrain::step", 0, 60),
            event("llamatrain::step", 60, 100),
            event("llamatrain::data_wait", 0, 10),
            event("aten::mm", 0, 100),  # on the host: no matter
            event("c10d::_allgather_base_", 0, 100),
            on_device("llamatrain::step", 0, 100, is_user_annotation=True),
            on_device("nccl:all_gather", 0, 100, is_user_annotation=True),
            on_device("Memcpy HtoD (Pinned -> Device)", 5, 10),  # compute comes before the wait
            on_device("sm90_xmma_gemm_bf16", 20, 50),
            on_device("ncclDevKernel_AllGather_RING_LL(...)", 40, 70),
            on_device("multi_tensor_apply_kernel", 90, 130),  # the last 30 after the steps
        ],
        "cuda",
    )
    assert found == {
        "wall": 100,
        "compute": 5 + 30 + 10,
        "exposed_communication": 20,
        "data_wait": 5,
        "host_gaps": 10 + 20,
        "hidden_communication": 10,
    }


def test_on_cpu_it_is_operators_waiting_in_collectives_and_python() -> None:
    found = shares_of(
        [
            event("llamatrain::step", 0, 100),
            event("llamatrain::data_wait", 0, 10),
            event("FSDP::pre_forward (layers.0)", 10, 42),
            event("FSDP::all_gather (layers.0)", 12, 40),
            event("fsdp::all_gather_copy_in", 12, 15),  # a copy is compute
            event("c10d::_allgather_base_", 15, 17),
            event("gloo:all_gather", 18, 41, thread=5),
            event("aten::mm", 18, 40, thread=5),
            event("autograd::engine::evaluate_function: MmBackward0", 42, 99),
            event("aten::mm", 45, 65),
            event("gloo:all_reduce", 60, 75, thread=6),  # under an operator until 65
        ],
        "cpu",
    )
    assert found == {
        "wall": 100,
        "compute": 3 + 20,
        "exposed_communication": (41 - 15) + (75 - 65),
        "data_wait": 10,
        "host_gaps": 2 + 4 + 25,
        "hidden_communication": 0,
    }


def test_validation_and_saving_are_cut_out() -> None:
    found = shares_of(
        [event("llamatrain::step", 0, 50), event("llamatrain::aside", 20, 45), event("aten::mm", 10, 30)], "cpu"
    )
    assert (found["wall"], found["compute"], found["host_gaps"]) == (25, 10, 15)


def test_the_table_has_each_part_once_and_names_the_ranks_at_both_ends() -> None:
    one = TimeShares(10**7, 8 * 10**6, 10**6, 0, 10**6, 3 * 10**6)
    lines = table([one, replace(one, compute=5 * 10**6, exposed_communication=4 * 10**6)], range(11, 13)).splitlines()
    assert lines[0] == "profile of steps 11 to 12, mean of 2 ranks:"
    told = [" ".join(line.split()) for line in lines]
    assert told[1] == "compute 3.2 ms 65.0% 50.0% on rank 1 to 80.0% on rank 0"
    assert told[2] == "exposed communication 1.2 ms 25.0% 10.0% on rank 0 to 40.0% on rank 1"
    assert told[5] == "a step 5.0 ms 100.0%"
    assert lines[6] == "  communication is 2.8 ms of a step, 54.5% of it behind compute"


# A loop


SETTINGS = LoggingConfig(profile_steps=2, profile_after_steps=2)


def loop(directory: Path, settings: LoggingConfig, *, steps: int, wait_s: float = 0.0, work_s: float = 0.0) -> float:
    """Some steps of a loop that is slow in places; the seconds told as pauses."""

    def slow_batches() -> Any:
        while True:
            time.sleep(wait_s)
            yield torch.ones(64, 64)

    pauses = [0.0]
    with Profiler(
        settings, directory, step=10, world=World(), device=torch.device("cpu"), pause=pauses.append
    ) as profiler:
        for step, batch in enumerate(profiler.watched(slow_batches()), start=11):
            batch @ batch
            time.sleep(work_s)
            with aside():
                time.sleep(6 * work_s)
            if step == 10 + steps:
                break
    return sum(pauses)


def summary_of(directory: Path, step: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "profile" / f"step-{step:08d}" / "summary.json").read_text())
    return content


@pytest.mark.parametrize("steps", [4, 6], ids=["its last step is the run's", "the run goes on"])
def test_a_profile_says_where_the_time_went(steps: int, tmp_path: Path) -> None:
    pauses = loop(tmp_path, SETTINGS, steps=steps, wait_s=0.03, work_s=0.05)
    found = summary_of(tmp_path, 13)
    assert found["steps"] == [13, 14]
    (rank,) = found["ranks"]
    parts = [rank[f"{part}_s"] for part in LABELS]
    assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=1e-8)
    assert rank["data_wait_s"] >= 2 * 0.03
    assert rank["host_gaps_s"] >= 2 * 0.05
    assert rank["compute_s"] > 0
    assert rank["wall_s"] < 2 * 6 * 0.05  # what was aside, so long, is not in it
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "step-00000013" / "rank00000.json.gz").read_bytes()))
    assert sum(entry.get("name") == "llamatrain::step" for entry in trace["traceEvents"]) == 2
    assert pauses > 0


def test_no_profile_is_no_change(tmp_path: Path) -> None:
    batches = [1, 2, 3]
    profiler = Profiler(
        LoggingConfig(), tmp_path, step=0, world=World(), device=torch.device("cpu"), pause=lambda seconds: None
    )
    with profiler:
        assert profiler.watched(batches) is batches
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_that_ends_before_says_so(steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop(tmp_path, SETTINGS, steps=steps)
    assert [record.getMessage() for record in caplog.records] == [
        "the run ends before steps 13 to 14 are profiled: nothing of them is kept"
    ]
    assert list(tmp_path.iterdir()) == []
    loop(tmp_path, SETTINGS, steps=4)  # and the profiler is free for another


@pytest.mark.parametrize(("last_step", "told"), [(13, True), (14, False), (None, False)])
def test_a_profile_that_the_run_has_no_steps_for_is_told_at_its_start(
    last_step: int | None, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Profiler(
        SETTINGS, tmp_path, step=10, last_step=last_step, world=World(), device=torch.device("cpu"), pause=print
    )  # fmt: skip
    expected = "steps 13 to 14 are to be profiled and step 13 is the last: nothing of them will be kept; lower "
    assert [record.getMessage().startswith(expected) for record in caplog.records] == [True] * told


def test_a_profile_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("in the way")
    loop(tmp_path, SETTINGS, steps=6)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "the profile cannot be written there" in warning


def test_a_training_run_profiles_itself(sources: dict[str, Path], tmp_path: Path) -> None:
    settings = {"every_steps": 1, "profile_steps": 3, "profile_after_steps": 2}
    train_in_process(small_config(tmp_path, sources, logging=settings, train={"steps": 5}, optim={"warmup_steps": 2}))
    found = summary_of(tmp_path, 3)
    assert found["steps"] == [3, 4, 5]  # a save and a validation fall into it
    assert 0.05 < found["ranks"][0]["compute_s"] / found["ranks"][0]["wall_s"] < 1
    assert found["ranks"][0]["exposed_communication_s"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile_steps": -1}, "logging.profile_steps=-1: must not be negative"),
        ({"profile_after_steps": 0}, "logging.profile_after_steps=0: must be at least 1"),
        ({"profile_traces": "none"}, "logging.profile_traces=none: choose one of rank0, all"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_logging(LoggingConfig(**settings))
