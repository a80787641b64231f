"""The benchmarks' own logic: their statistics, who is measured with what, and that all measure the same model."""

import argparse
import itertools
import json
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llamatrain.config.parallel import RECOMPUTE
from llamatrain.errors import ConfigError
from tests.benchmarks import bench_gpu, bench_peers, report, report_gpu
from tests.benchmarks.alone import SDP_KERNELS, Case, allow_only, run_alone
from tests.benchmarks.contenders import OURS, PEERS, build_contender, run_config, same_start, settings_on_cpu
from tests.benchmarks.fitting import largest_micro_batch, layers_that_fit, needed_gib
from tests.benchmarks.paired import median_share, paired_ratio, turn_order
from tests.benchmarks.rounds import fastest, prepare, take_turns, training
from tests.benchmarks.workload import Workload, preset

RATES = st.lists(st.floats(1.0, 1e6), min_size=1, max_size=30)
TINY = Workload(
    preset("15m", dim=64, n_heads=4, n_layers=2, vocab_size=384, max_seq_len=32), 32, micro_batch=2, micro_batches=2
)
BIG = Workload(preset("7b"), 2048, micro_batch=1, precision="bf16", device="cuda")


# Statistics


@given(st.integers(1, 6))
def test_everyone_has_every_place_equally_often(count: int) -> None:
    names = list(range(count))
    orders = [turn_order(names, number) for number in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    for place in range(count):
        assert sorted(order[place] for order in orders) == sorted([*names, *names])
    after = [(one, other) for order in orders for one, other in itertools.pairwise(order)]
    assert all(after.count((one, other)) == after.count((other, one)) for one, other in after)


@given(RATES, st.floats(0.1, 10))
def test_what_hits_both_alike_does_not_change_their_ratio(theirs: list[float], factor: float) -> None:
    ratio = paired_ratio([factor * rate for rate in theirs], theirs)
    assert ratio.low == pytest.approx(factor) and ratio.median == pytest.approx(factor) == ratio.high


@given(st.lists(st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), min_size=1, max_size=30))
def test_the_interval_holds_the_median_and_is_the_same_each_time(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    ratio = paired_ratio(ours, theirs)
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio == paired_ratio(ours, theirs)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random, truth, held = np.random.default_rng(1), 1.2, 0
    for _ in range(100):
        load = random.lognormal(0, 0.5, 20)  # of the machine, the same for both
        ours, theirs = (load * factor * random.lognormal(0, 0.1, 20) for factor in (truth, 1.0))
        ratio = paired_ratio(ours.tolist(), theirs.tolist())
        held += ratio.low <= truth <= ratio.high
    assert 88 <= held <= 100


def test_rates_of_different_rounds_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same rounds"):
        paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="same rounds"):
        paired_ratio([], [])
    assert median_share([1.0, 4.0, 9.0], [2.0, 4.0, 10.0]) == 0.9


# Who is measured, with what


class Asleep:
    """A contender that takes so long for a step."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.closed = seconds, False

    def step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self.seconds)
        return torch.tensor(1.0), torch.tensor(1.0)

    def close(self) -> None:
        self.closed = True


def test_the_fastest_setting_that_runs_is_found_and_every_contender_closed() -> None:
    built: list[Asleep] = []

    def build(setting: dict[str, Any]) -> Asleep:
        if setting["seconds"] is None:
            raise RuntimeError("no compiler\nand more")
        built.append(Asleep(setting["seconds"]))
        return built[-1]

    settings = [{"seconds": seconds} for seconds in (0.02, None, 0.002, 0.05)]
    best, tried = fastest(settings, build, TINY, rounds=1)
    assert best == {"seconds": 0.002}
    assert [one.tokens_per_s is None for one in tried] == [False, True, False, False]
    assert tried[1].outcome == "cannot run: RuntimeError: no compiler"
    assert [one.closed for one in built] == [True, True, True]
    with pytest.raises(RuntimeError, match="no setting runs: seconds=none: cannot run"):
        fastest([{"seconds": None}], build, TINY, rounds=1)


def test_turns_are_taken_round_by_round_on_the_tokens_of_the_round() -> None:
    calls: list[tuple[str, int]] = []

    def turn(name: str, number: int) -> float:
        calls.append((name, number))
        return float(number)

    rates = take_turns({name: partial(turn, name) for name in "ab"}, 3)
    assert rates == {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert [number for _, number in calls] == [0, 0, 1, 1, 2, 2]
    assert [name for name, _ in calls[:4]] == ["a", "b", "b", "a"]
    assert torch.equal(TINY.rows(3), TINY.rows(3)) and not torch.equal(TINY.rows(3), TINY.rows(4))
    assert training(Asleep(0.01), TINY, steps=2)(0) < TINY.tokens_per_step / 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_contenders_have_settings_to_choose_from(precision: str) -> None:
    for name in (OURS, *PEERS):
        settings, smoke = (settings_on_cpu(name, precision, smoke=smoke) for smoke in (False, True))
        assert len({json.dumps(setting) for setting in settings}) == len(settings) >= 3
        assert len(smoke) == (1 if precision == "fp32" else 2)
        if name != OURS:
            assert {setting["weights"] == "fp32" for setting in settings} == {precision == "fp32"}


def test_a_setting_that_does_not_exist_is_refused(tmp_path: Any) -> None:
    config = run_config(TINY, {"parallel.recompute": "full"}, tmp_path)
    assert config.parallel.recompute == "full" and config.train.global_batch_tokens == TINY.tokens_per_step == 128
    with pytest.raises(ConfigError, match=r"train\.compyle"):
        run_config(TINY, {"train.compyle": True}, tmp_path)


def contenders_of(precision: str, **setting: Any) -> dict[str, Any]:
    """Whoever is installed, all from the same weights."""
    workload = replace(TINY, precision=precision)
    weights = bench_peers.first_weights(workload)
    found = {OURS: build_contender(OURS, workload, {"parallel.recompute": "none"})}
    for name in PEERS:
        try:
            found[name] = build_contender(name, workload, setting, weights)
        except ModuleNotFoundError:
            assert name == "litgpt"  # it comes with the extra `bench`, Transformers with `test`
    return found


@pytest.mark.parametrize(("precision", "weights"), [("fp32", "fp32"), ("bf16", "autocast"), ("bf16", "copies")])
def test_all_contenders_train_the_same_model(precision: str, weights: str) -> None:
    contenders = contenders_of(precision, weights=weights, compile="off", loss_chunk=16, checkpointing=True)
    tolerance = {"fp32": 1e-5, "bf16": 5e-3}[precision]
    for number in range(3):
        steps = {name: one.step(TINY.rows(number)) for name, one in contenders.items()}
        losses, norms = ({name: step[i].item() for name, step in steps.items()} for i in (0, 1))
        assert same_start(losses, tolerance=tolerance), losses
        assert same_start(norms, tolerance=2 * tolerance), norms
    for one in contenders.values():
        one.close()


def test_a_different_model_is_noticed() -> None:
    assert not same_start({"one": 6.31, "other": 6.30}, tolerance=1e-4)
    assert not same_start({"one": 6.31, "other": math.nan}, tolerance=1e-4)


def test_first_loss_is_that_of_the_first_step() -> None:
    contender = build_contender(OURS, TINY, {"parallel.recompute": "none"})
    expected = math.log(TINY.model.vocab_size)
    assert prepare(lambda: contender, TINY).first_loss == pytest.approx(expected, rel=0.02)
    contender.close()


# Arguments


def test_a_smoke_run_is_three_short_rounds_in_both_precisions() -> None:
    arguments = bench_peers.arguments_of(["--smoke", "--rounds", "99", "--peers", "transformers"])
    assert (arguments.rounds, arguments.steps, arguments.duel_rounds) == (3, 1, 1)
    found = bench_peers.workloads(arguments)
    assert [workload.precision for workload in found] == ["fp32", "bf16"]
    assert all(workload.tokens_per_step <= 256 for workload in found)
    assert bench_peers.arguments_of(["--peers", "transformers"]).rounds >= 20


@pytest.mark.parametrize(
    ("module", "command_line", "message"),
    [
        (bench_peers, ["--rounds", "0"], "--rounds"),
        (bench_peers, ["--precision", "fp8"], "--precision"),
        (bench_gpu, ["--device", "cpu"], "--tiny"),
        (bench_gpu, ["--shapes", "8b"], "--shapes"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    module: Any, command_line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        module.arguments_of(command_line)
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_said_with_its_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: None if name == "litgpt" else object())
    with pytest.raises(SystemExit):
        bench_peers.arguments_of([])
    assert "litgpt must be installed: pip install -e '.[bench]'" in capsys.readouterr().err


# One GPU


def test_micro_batch_and_layers_fill_the_memory_and_no_more() -> None:
    sizes = (1, 2, 4, 8, 16)
    found = {mode: largest_micro_batch(BIG, mode, budget_gib=135, sizes=sizes) or 0 for mode in RECOMPUTE}
    assert found["none"] <= found["block_backward"] <= found["full"]
    best = found["block_backward"]
    assert needed_gib(replace(BIG, micro_batch=best), "block_backward") <= 135
    assert needed_gib(replace(BIG, micro_batch=2 * best), "block_backward") > 135
    assert largest_micro_batch(BIG, "full", budget_gib=80, sizes=sizes) is None
    blocks = replace(BIG, model=preset("13b"))
    layers = layers_that_fit(blocks, "block_backward", budget_gib=135)
    assert 0 < layers < 40
    more = replace(blocks, model=replace(blocks.model, n_layers=layers + 1))
    assert (
        needed_gib(more, "block_backward")
        > 135
        >= needed_gib(replace(blocks, model=replace(blocks.model, n_layers=layers)), "block_backward")
    )


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 300_000))
def test_a_step_has_at_least_its_tokens_and_no_micro_batch_too_many(micro_batch: int, blocks: int, tokens: int) -> None:
    workload = bench_gpu.sized(replace(BIG, seq_len=128 * blocks), micro_batch, tokens)
    assert workload.tokens_per_step >= tokens > workload.tokens_per_step - micro_batch * workload.seq_len


def test_the_search_finds_the_best_along_the_axes_and_every_combination_if_asked() -> None:
    axes: dict[str, list[Any]] = {"recompute": ["a", "b"], "attention": [1, 2, 3], "compile": [False, True]}
    asked: list[dict[str, Any]] = []

    def speed(choice: dict[str, Any]) -> float:
        asked.append(choice)
        return choice["attention"] + (choice["recompute"] == "b") + 10 * (choice == axes_corner)

    axes_corner = {"recompute": "a", "attention": 1, "compile": True}  # alone in its corner: along axes it is missed
    assert bench_gpu.best_choice(axes, speed, every=False) == {"recompute": "b", "attention": 3, "compile": False}
    assert len({json.dumps(choice) for choice in asked}) == 1 + 1 + 2 + 1
    assert bench_gpu.best_choice(axes, speed, every=True) == axes_corner


def test_a_case_is_halved_until_it_fits_and_logged_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def run(case: Case, *, timeout_s: float | None) -> dict[str, Any]:
        fits = case.workload.micro_batch <= 2
        return {"tokens_per_s": [1.0]} if fits else {"failed": "out of memory: CUDA"}

    monkeypatch.setattr(bench_gpu, "run_alone", run)
    log = tmp_path / "deep" / "log.jsonl"
    bench = bench_gpu.Bench(argparse.Namespace(minutes=math.inf, log=log))
    answer = bench.halving(OURS, replace(BIG, micro_batch=8), 32_768, {})
    assert answer["case"]["workload"]["micro_batch"] == 2 and answer["case"]["workload"]["micro_batches"] == 8
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert [one["case"]["workload"]["micro_batch"] for one in logged] == [8, 4, 2]
    late = bench_gpu.Bench(argparse.Namespace(minutes=0, log=log))
    assert late.case(OURS, BIG, {})["failed"] == "not run: the time is up"


def test_mfu_is_by_the_palm_convention_and_missing_where_the_peak_is_not_known() -> None:
    speed, mfu, share = report_gpu.rates(10_000, 800e12, BIG, 989e12)
    assert (speed, mfu) == ("10,000", f"{10_000 * BIG.flops_per_token / 989e12:.1%}")
    assert share == f"{10_000 * BIG.flops_per_token / 800e12:.1%}"
    assert BIG.flops_per_token == 6 * 6_738_415_616 + 12 * 32 * 4096 * 2048
    assert report_gpu.rates(10_000, 800e12, BIG, None)[1] == "peak not known"


def test_attention_can_be_left_a_single_kernel() -> None:
    flags = [getattr(torch.backends.cuda, f"{name}_sdp_enabled") for name in SDP_KERNELS]
    before = [flag() for flag in flags]
    try:
        for place, name in enumerate(SDP_KERNELS):
            allow_only(name)
            assert [flag() for flag in flags] == [at == place for at in range(len(flags))]
    finally:
        for name, enabled in zip(SDP_KERNELS, before, strict=True):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)


# Reports


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "matrix products"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<128>>", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_fused_adamw_", "optimizer and clipping"),
        ("Optimizer.step#AdamW.step", "optimizer and clipping"),
        ("Torch-Compiled Region: 0/0", "calls into compiled code"),
        ("aten::_log_softmax_backward_data", "loss"),
        ("graph_0_cpp_fused_add_mean_mul_rsqrt_0", "compiled elementwise kernels"),
        ("triton_poi_fused_mul_silu_0", "compiled elementwise kernels"),
        ("aten::_to_copy", "copies and casts"),
        ("aten::mul", "elementwise and other operators"),
        ("aten::_mm_something_else", "elementwise and other operators"),
    ],
)
def test_operators_are_of_their_kind(operator: str, kind: str) -> None:
    assert report.kind_of(operator) == kind


def test_where_time_goes_adds_up_to_the_step() -> None:
    operators = {"aten::mm": 60.0, "aten::mul": 20.0, "everything": 85.0}
    kinds = report.by_kind({"operators": operators, "profiled_ms": 100.0})
    assert kinds["matrix products"] == 60 and kinds[report.REST] == 15
    assert kinds["elementwise and other operators"] == 25  # with what was too short to be kept
    assert sum(kinds.values()) == 100
    text = report.where_time_goes({OURS: {"operators": operators, "profiled_ms": 100.0}})
    assert "| matrix products | 60 (60%) |" in text and "aten::mm 60" in text
    assert "no profile, out of memory" in report.where_time_goes({OURS: {"failed": "out of memory"}})


def test_the_goal_is_held_against_the_best_peer() -> None:
    alone = {"peak_mib": 500.0, "before_mib": 300.0}
    entries = {
        OURS: report.Entry("a=b", [120.0, 130.0], alone),
        "slow": report.Entry("", [60.0, 65.0], alone),
        "fast": report.Entry("", [100.0, 108.0], {"failed": "out of memory"}),
    }
    text, ratios = report.speeds(entries, [1e9, 1e9], 1_000_000, ours=OURS)
    lines = text.splitlines()
    assert "| llamatrain | a=b | 125 (120 to 130) | 12.5% | 200 |" in lines[2]
    assert "2.00 (2.00 to 2.00)" in lines[3] and "out of memory" in lines[4]
    peer, line, met = report.verdict(ratios, 1.2)
    assert (peer, met) == ("fast", True) and "met" in line
    assert report.verdict(ratios, 1.3)[1].endswith("not met.")


# In a process of its own


@pytest.mark.slow
def test_a_contender_alone_tells_its_memory_and_operators_or_why_it_failed() -> None:
    case = Case(OURS, TINY, {"parallel.recompute": "none", "model.attention": "sdpa"}, profiled=True, threads=1)
    answer = run_alone(case)
    assert 0 < answer["peak_mib"] - answer["before_mib"] < 1000
    assert len(answer["tokens_per_s"]) == case.steps and answer["first_loss"] == pytest.approx(math.log(384), rel=0.02)
    assert answer["operators"]["aten::mm"] > 0
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in answer["attention"]
    assert "ConfigError: train.compyle" in run_alone(replace(case, setting={"train.compyle": 1}))["failed"]
    assert run_alone(case, timeout_s=0.1)["failed"].startswith("not done in")
