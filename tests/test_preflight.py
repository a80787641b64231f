"""The preflight: whom its findings name, what is refused and what is only told; in one process, without a fault."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamatrain.checkpoint.commit import MANIFEST_FILE
from llamatrain.config import RunConfig
from llamatrain.distributed import World
from llamatrain.errors import ConfigError
from llamatrain.preflight.findings import (
    Facts,
    Need,
    Speeds,
    judge_facts,
    judge_speeds,
    numbers,
    odd_ones,
    slow_ones,
    told,
)
from llamatrain.preflight.inspection import preflight, room_needed
from llamatrain.run_directory import RunDirectory
from llamatrain.session import run_on
from tests.small_run import small_config

GIB = 2**30
NEED = Need(size=10 * GIB, files=13, more=3)
SOUND = Facts(
    node="a",
    packages={"torch": "2.13.0", "numpy": "2.0"},
    machine={"the device": "H100", "its memory in GiB": 80},
    free=100 * GIB,
    clock_s=(50.0, 51.0),
)


def cluster(**of_rank_2: Any) -> list[Facts]:
    """Four ranks on nodes a and b; rank 2, the first on b, differs in what is given."""
    ranks = [SOUND, SOUND, replace(SOUND, node="b"), replace(SOUND, node="b")]
    return [*ranks[:2], replace(ranks[2], **of_rank_2), ranks[3]]


def test_a_sound_cluster_has_nothing_odd() -> None:
    assert judge_facts(cluster(), NEED, "r") == []
    assert judge_speeds([Speeds(product=5e14, peak=9e14, link=GIB)] * 4, cluster(), "cuda") == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"packages": {"torch": "2.11.0", "numpy": "2.0"}},
            r"^rank 2 on b: torch is 2\.11\.0 there, 2\.13\.0 elsewhere; install the same on all nodes",
        ),
        ({"packages": {"torch": "2.13.0"}}, "^rank 2 on b: numpy is None there, 2.0 elsewhere"),
        (
            {"run_dir_error": "cannot write there (Read-only file system)"},
            r"^run_dir=r: rank 2 on b cannot write there \(Read-only file system\); it must lie where all nodes can",
        ),
        (
            {"run_dir_error": "cannot write there (No space left on device)"},
            r"\(No space left on device\); make room there",
        ),
    ],
)
def test_what_cannot_go_well_is_refused_by_rank_and_node(fault: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judge_facts(cluster(**fault), NEED, "r")


def test_all_that_is_to_be_mended_is_told_at_once() -> None:
    facts = cluster(packages={"torch": "1"}, run_dir_error="cannot write there (x)")
    with pytest.raises(
        ConfigError, match=r"torch is 1 .*numpy is None .*cannot write there.*resilience\.preflight=false"
    ):
        judge_facts(facts, NEED, "r")


def test_processes_that_share_a_gpu_are_refused() -> None:
    facts = [replace(found, gpu=gpu) for found, gpu in zip(cluster(), ["g0", "g1", "g2", "g1"], strict=True)]
    with pytest.raises(ConfigError, match="rank 1 on a, rank 3 on b have one GPU between them"):
        judge_facts(facts, NEED, "r")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"machine": {**SOUND.machine, "its memory in GiB": 40}},
            "rank 2 on b: its memory in GiB is 40 there, 80 else",
        ),
        ({"used_gib": 30.25}, "rank 2 on b: 30.2 GiB of its GPU are in use"),
        ({"gpus_left": 6}, "b: 6 GPUs there have no process"),
        ({"clock_s": (53.5, 54.5)}, "rank 2 on b: its clock is 3.5 s ahead of the others'"),
        ({"clock_s": (43.0, 44.0)}, "rank 2 on b: its clock is 7.0 s behind the others'"),
    ],
)
def test_what_can_be_borne_is_told(fault: dict[str, Any], message: str) -> None:
    (warning,) = judge_facts(cluster(**fault), NEED, "r")
    assert message in warning


def test_a_rank_that_came_late_to_one_barrier_has_no_wrong_clock() -> None:
    assert judge_facts(cluster(clock_s=(58.0, 51.001)), NEED, "r") == []


def test_room_for_less_than_a_checkpoint_is_refused_and_for_less_than_all_is_told() -> None:
    with pytest.raises(
        ConfigError, match=r"run_dir=r: 9\.0 GiB are free there, a checkpoint takes 10\.0 GiB; make room"
    ):
        judge_facts([replace(SOUND, free=9 * GIB)], NEED, "r")
    with pytest.raises(ConfigError, match="room for 12 files there, a checkpoint has 13"):
        judge_facts([replace(SOUND, free_files=12)], NEED, "r")
    (warning,) = judge_facts([replace(SOUND, free=29 * GIB, free_files=13)], NEED, "r")
    assert "29.0 GiB are free there, the 3 checkpoints to come take 30.0 GiB" in warning
    assert judge_facts([replace(SOUND, free=0, free_files=0)], replace(NEED, more=0), "r") == []


def test_slow_ranks_links_and_disks_are_named_with_the_median_of_the_others() -> None:
    facts = [replace(found, written=rate) for found, rate in zip(cluster(), [8e8, None, 2e8, None], strict=True)]
    speeds = [Speeds(product=rate) for rate in (5e14, 5e14, 5.2e14, 3.9e14)]
    assert judge_speeds(speeds, facts, "cuda") == [
        "rank 3 on b: matrix products at 390 TFLOP/s, the others' median is 500 TFLOP/s",
        "b: writes to run_dir at 191 MiB/s, the other nodes' median is 763",
    ]
    assert judge_speeds(speeds, cluster(), "cpu") == []  # where others run too, that says nothing
    (warning,) = judge_speeds([Speeds(product=3e14, peak=9e14)] * 4, cluster(), "cuda")
    assert "rank 0 on a, rank 1 on a, rank 2 on b and 1 more: matrix products at 300 TFLOP/s, 33% of" in warning


def test_links_are_compared_with_their_kind() -> None:
    """Four nodes of two: the links 1-2, 3-4, 5-6 leave a node, and are slower all."""
    facts = [replace(SOUND, node=node) for node in "aabbccdd"]
    rates: list[float | None] = [40.0, 4.0, 40.0, 1.0, 10.0, 4.0, 40.0]
    speeds = [Speeds(link=rate * GIB if rate else None) for rate in [*rates, None]]
    assert judge_speeds(speeds, facts, "cuda") == [
        "rank 4 on c and rank 5 on c: 10 GiB/s between them, the others' median inside nodes is 40",
        "rank 3 on b and rank 4 on c: 1 GiB/s between them, the others' median between nodes is 4",
    ]


@given(st.integers(0, 30), st.floats(0.0, 0.49), st.integers(1, 30))
def test_the_one_slow_rank_is_found_and_no_other(place: int, share: float, others: int) -> None:
    rates: list[float | None] = [1.0 + 0.01 * (i % 7) for i in range(others)]
    rates.insert(place % (others + 1), share)
    ((number, rate, median),) = slow_ones(rates, 0.5)
    assert (number, rate) == (place % (others + 1), share)
    assert 1.0 <= median <= 1.06


@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=12))
def test_whoever_has_what_most_have_is_not_odd(values: list[str]) -> None:
    facts = [replace(SOUND, packages={"p": value}) for value in values]
    usual = max(dict.fromkeys(values), key=values.count)
    odd = [rank for rank, value in enumerate(values) if value != usual]
    told = odd_ones(facts, lambda found: found.packages)
    assert bool(told) == bool(odd)
    assert all(f"rank {rank} on" in told[0] for rank in odd[:3])


def test_the_line_and_the_journal_have_the_numbers() -> None:
    facts = [replace(found, written=1e9) for found in cluster()]
    speeds = [Speeds(product=p * 1e12, all_reduce=2.0 * GIB, link=GIB) for p in (5, 5, 4, 5)]
    found = numbers([*speeds[:3], replace(speeds[3], link=None)], facts, NEED)
    assert found["product_flops"] == {"median": 5e12, "slowest": 4e12, "rank": 2, "node": "b"}
    assert json.loads(json.dumps(found)) == found
    assert told(found) == (
        "4 ranks on 2 nodes; 100.0 GiB free, 3 checkpoints to come take 30.0 GiB; writes 953.7 MiB/s; products "
        "5 TFLOP/s, the slowest 4 TFLOP/s on rank 2 (b); all-reduce 2.0 GiB/s; neighbours inside nodes 1.0 GiB/s, the "
        "slowest 1.0 GiB/s on rank 0 (a); neighbours between nodes 1.0 GiB/s, the slowest 1.0 GiB/s on rank 1 (a); "
        "clocks within 0 ms"
    )


# ---------------------------------------------------------------------- in one process


def config_in(run_dir: Path, **settings: Any) -> RunConfig:
    return small_config(run_dir, {"text": run_dir}, train={"precision": "fp32"}, **settings)


@pytest.mark.parametrize(
    ("steps_there", "keep_every", "more"),
    [([], 0, 3), ([], 4, 6), ([4], 0, 2), ([4, 8], 4, 4), ([4, 8, 12], 0, 0), ([1, 2, 3, 4, 5], 0, 1)],
)
def test_room_is_needed_for_what_is_not_there_yet(
    steps_there: list[int], keep_every: int, more: int, tmp_path: Path
) -> None:
    for step in steps_there:
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / MANIFEST_FILE).write_text("")
    (tmp_path / ".unfinished-step-00000016").mkdir()
    need = room_needed(config_in(tmp_path, checkpoint={"keep_every_steps": keep_every}), tmp_path, 2)
    assert (need.more, need.files, need.size) == (more, 7, 12 * 59_552)
    assert not (tmp_path / ".unfinished-step-00000016").exists()


def test_alone_it_looks_at_the_disk_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / ".preflight-of-a-killed-start").write_text("")
    directory = RunDirectory(tmp_path)
    preflight(config_in(tmp_path), directory, World())
    (event,) = directory.events("preflight")
    directory.close()
    assert event["written_bytes_per_s"]["slowest"] > 0
    assert event["free_bytes"] > 0
    assert event["warnings"] == []
    assert event["seconds"] < 5
    assert "product_flops" not in event  # a CPU alone has no equal
    assert list(tmp_path.glob(".preflight*")) == []


def test_a_disk_too_full_refuses_the_run_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*full[:4], 0, *full[5:])))
    with pytest.raises(ConfigError, match=r"0\.0 MiB are free there, a checkpoint takes 0\.7 MiB"):
        run_on(World(), config_in(tmp_path / "run"), None)  # type: ignore[arg-type]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], "a checkpoint takes" in status["reason"]) == ("bad_input", True)
    with pytest.raises(Exception, match=r"no dataset\.json"):  # it goes on without looking
        run_on(World(), config_in(tmp_path / "run", resilience={"preflight": False}), None)  # type: ignore[arg-type]
