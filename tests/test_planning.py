"""What a run will take: the paper's own figures, published rows, what its parts must obey, and the command."""

import json
import math
import random
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatrain.arithmetic import carbon, flops_per_token, parameter_count
from llamatrain.cli import config_directory
from llamatrain.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    validate,
)
from llamatrain.config.build import build
from llamatrain.config.cluster import ClusterConfig
from llamatrain.config.parallel import RECOMPUTE
from llamatrain.config.plan import PlanConfig, ServeConfig, check_plan
from llamatrain.errors import ConfigError
from llamatrain.memory import STATE, memory_by_part, training_memory
from llamatrain.plan import run as command_run
from llamatrain.planning.hardware import CALIBRATION, REQUIRED, Cluster, cluster_of
from llamatrain.planning.layouts import Choice, candidates, fitting, settled
from llamatrain.planning.lifetime import FITS, LARGEST, SMALLEST, Prices, lifetime
from llamatrain.planning.plan import Plan, as_values, effort, mfu, plan
from llamatrain.planning.reliability import reliability
from llamatrain.planning.roofline import Habits, StepTime, step_time
from llamatrain.planning.telling import draw, refusal, told
from tests.benchmarks.bench_planning import UNSEEN, fit, fitted, held_out, published
from tests.test_arithmetic import preset

REPOSITORY = Path(__file__).resolve().parent.parent
PRESETS = {name: preset(name) for name in ("7b", "13b", "33b", "65b")}


def cluster_config(name: str = "a100_80gb", **hardware: Any) -> ClusterConfig:
    values = yaml.safe_load((config_directory() / "cluster" / f"{name}.yaml").read_text())
    config = build(ClusterConfig, values)
    return replace(config, hardware=replace(config.hardware, **hardware))


def plan_config(
    size: str = "65b", *, nodes: int = 256, tokens: float = 1.4e12, cluster: str = "a100_80gb", **groups: Any
) -> PlanConfig:
    hardware = groups.pop("hardware", {})
    config = PlanConfig(
        model=preset(size),
        cluster=cluster_config(cluster, **hardware),
        nodes=nodes,
        train=TrainConfig(tokens=int(tokens)),
    )
    changed = {
        name: replace(getattr(config, name), **values) if isinstance(values, dict) else values
        for name, values in groups.items()
    }
    return replace(config, **changed)


# The paper


@pytest.mark.parametrize(
    ("gpu_hours", "mwh", "tonnes"),
    [  # Table 15: OPT-175B, BLOOM-175B, LLaMA 7B, 13B, 33B, 65B, all at 400 W
        (809_472, 356, 137),
        (1_082_880, 475, 183),
        (82_432, 36, 14),
        (135_168, 59, 23),
        (530_432, 233, 90),
        (1_022_362, 449, 173),
    ],
)
def test_energy_and_carbon_are_those_of_the_papers_table_15(gpu_hours: float, mwh: float, tonnes: float) -> None:
    assert carbon(gpu_hours, watts=400) == pytest.approx((mwh, tonnes), rel=0.03)


def test_the_papers_65b_takes_the_papers_hours_at_the_papers_rate() -> None:
    config = settled(plan_config(hardware={"gpu_hours_between_failures": 1e15}))
    assert isinstance(config, PlanConfig)
    stated = StepTime(products=config.train.global_batch_tokens / (380 * 2048))  # 2.4: 380 tokens/s on 2,048 GPUs
    taken = effort(config, cluster_of(config.cluster), Choice(config, 2048, "none", no_memory(), stated))
    assert taken.gpu_hours == pytest.approx(1_022_362, rel=0.003)
    assert taken.days == pytest.approx(21, abs=0.5)
    assert (taken.mwh, taken.tonnes) == pytest.approx((449, 173), rel=0.03)


def no_memory() -> dict[str, float]:
    return dict.fromkeys(("weights", "gradients", "optimizer state"), 0.0)


def test_the_rate_of_the_papers_65b_is_foretold_by_fits_that_have_not_seen_llama() -> None:
    (row,) = [row for row in published() if row.model == "llama_65b"]
    assert "llama" in UNSEEN
    assert row.world_size == 2048
    assert row.predicted(CALIBRATION["A100"]) == pytest.approx(380.4, rel=0.10)


@pytest.mark.parametrize("size", ["7b", "65b"])
def test_a_plan_foretells_the_papers_rows_as_the_table_has_them(size: str) -> None:
    (row,) = [row for row in published() if (row.publication, row.model) == ("llama", f"llama_{size}")]
    parallel = {"sharding": "fairscale", "reduce_dtype": "bf16", "recompute": "block_backward"}
    found = planned(plan_config(size, parallel=parallel, train={"compile": False}))
    assert found.asked.rate == pytest.approx(row.predicted(CALIBRATION["A100"]))
    copied = replace(row.config, parallel=replace(row.config.parallel, sharding="fsdp2"))
    flat = replace(row, config=copied, habits=Habits(flat_copies=True))  # fairscale's weights are not copied
    assert found.asked.rate == pytest.approx(flat.predicted(CALIBRATION["A100"]))


# Published rows


def test_the_calibration_foretells_the_published_rows() -> None:
    errors = [abs(row.error(CALIBRATION[row.kind])) for row in published()]
    assert len(errors) >= 40
    assert statistics.median(errors) <= 0.10


@pytest.mark.slow
def test_rows_held_out_of_the_fit_are_foretold_to_a_tenth() -> None:
    rows, later = published(), published("later")
    errors = {id(row): abs(row.error(reached)) for _, reached, own in held_out(rows + later, rows) for row in own}
    assert len(later) >= 200
    assert statistics.median(errors[id(row)] for row in rows) <= 0.10
    assert statistics.median(errors[id(row)] for row in later) <= 0.10
    for kind, reached in CALIBRATION.items():
        assert fitted(rows, kind) == reached


def test_a_fit_finds_what_rows_were_made_with() -> None:
    made_with = replace(CALIBRATION["A100"], products=0.66, attention=0.30)
    rows = [row for row in published() if row.publication == "titan_a100"]
    assert fit([replace(row, rate=row.predicted(made_with)) for row in rows]) == made_with


# Step time


def run_config(*, micro_batch: int = 1, ranks: int = 64, accumulate: int = 4, size: str = "7b", **parallel: Any) -> Any:
    seq_len = 2048
    settings = ParallelConfig(**parallel)
    data_ranks = ranks // (settings.tp * settings.pp * settings.cp)
    return RunConfig(
        model=replace(preset(size), attention="xformers"),
        data=DataConfig(seq_len=seq_len, sources={"any": SourceConfig(path="any")}),
        train=TrainConfig(
            steps=10,
            micro_batch=micro_batch,
            global_batch_tokens=seq_len * micro_batch * data_ranks * accumulate,
            precision="bf16",
            compile=True,
        ),
        parallel=settings,
    )


def seconds(config: RunConfig, recompute: str = "none", *, ranks: int = 64, cluster: Cluster | None = None) -> StepTime:
    return step_time(config, recompute, cluster or cluster_of(cluster_config()), world_size=ranks)


@settings(max_examples=30, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 8]),
    pp=st.sampled_from([1, 2]),
    cp=st.sampled_from([1, 2]),
    copies=st.sampled_from([1, 2]),
    micro_batch=st.sampled_from([1, 4]),
    recompute=st.sampled_from(RECOMPUTE),
    compiled=st.booleans(),
)
def test_no_layout_is_faster_than_what_its_gpus_reach(
    tp: int, pp: int, cp: int, copies: int, micro_batch: int, recompute: str, compiled: bool
) -> None:
    config = run_config(micro_batch=micro_batch, tp=tp, pp=pp, cp=cp, dp_replicate=copies)
    config = replace(config, train=replace(config.train, compile=compiled))
    found = seconds(config, recompute)
    parts = [value for name, value in vars(found).items() if name != "exposed"] + list(found.exposed.values())
    assert all(part >= 0 for part in parts)
    assert found.total == pytest.approx(sum(parts))
    matmuls = 6 * (parameter_count(config.model) - 32_000 * 4096) * config.train.global_batch_tokens / 64
    assert found.total >= matmuls / (CALIBRATION["A100"].products * 312e12)


def test_what_is_done_again_takes_time() -> None:
    times = {way: seconds(run_config(micro_batch=4), way) for way in RECOMPUTE}
    assert times["none"].total < times["block_backward"].total < times["full"].total
    assert times["full"].repeated / times["full"].products == pytest.approx(0.26, abs=0.02)  # 6 of 7 of a third
    assert times["none"].repeated == times["block_backward"].repeated == 0


def test_a_slow_network_is_waited_for_and_a_fast_one_hidden() -> None:
    config = run_config(micro_batch=1)
    slow, fast = (seconds(config, cluster=cluster_of(cluster_config(network_gb_s=gb_s))) for gb_s in (10, 200))
    assert slow.exposed["dp_shard"] > 0.5 * slow.total
    assert fast.exposed["dp_shard"] < 0.05 * fast.total
    copies = run_config(micro_batch=1, dp_replicate=8, dp_shard=8)  # one all-reduce a step
    assert seconds(copies, cluster=cluster_of(cluster_config(network_gb_s=10))).total < slow.total


def test_products_in_fp32_take_as_long_as_its_own_peak_says() -> None:
    config = run_config(micro_batch=4)
    fp32 = seconds(replace(config, train=replace(config.train, precision="fp32")))
    assert fp32.products / seconds(config).products == pytest.approx(312 / 19.5)
    assert fp32.attention / seconds(config).attention == pytest.approx(312 / 19.5)
    assert fp32.total > 10 * seconds(config).total


def test_each_axis_shows_what_it_costs() -> None:
    assert seconds(run_config(ranks=1), ranks=1).exposed == {}
    assert set(seconds(run_config(tp=2)).exposed) == {"dp_shard", "tp"}
    assert "cp" in seconds(run_config(cp=2)).exposed
    stages = seconds(run_config(pp=4, accumulate=8))
    assert stages.bubble > 0
    more = seconds(run_config(pp=4, accumulate=32))
    assert more.bubble == pytest.approx(stages.bubble, rel=0.05)  # the same, of a step four times as long
    wide = run_config(micro_batch=4, tp=8)
    across = cluster_of(replace(cluster_config(network_gb_s=25), gpus_per_node=4))
    assert seconds(wide, cluster=across).exposed["tp"] > 2 * seconds(wide).exposed["tp"]


# Memory


def test_parts_of_the_memory_are_those_that_recompute_is_chosen_by() -> None:
    layouts: list[dict[str, Any]] = [{}, {"tp": 2}, {"pp": 4}, {"dp_replicate": 2}]
    for parallel in layouts:
        config = run_config(**parallel)
        for way in RECOMPUTE:
            parts, chosen_by = memory_by_part(config, way, world_size=64), training_memory(config, way, world_size=64)
            state = parts["weights"] + parts["gradients"] + parts["optimizer state"]
            assert state == pytest.approx(chosen_by[STATE], rel=1e-3)  # room for uneven rows, and counted steps
            assert parts["activations"] == chosen_by["activations"]
            assert sum(parts.values()) == pytest.approx(sum(chosen_by.values()), rel=1e-3)


# Failures


def test_a_run_is_saved_when_it_loses_least() -> None:
    def goodput(failure_s: float, save_s: float = 10.0) -> float:
        found = reliability(1e6, failure_s=failure_s, save_s=save_s, written_s=30.0, restart_s=900.0)
        assert found.failures * found.goodput == pytest.approx(1e6 / failure_s) or found.failures == math.inf
        return found.goodput

    assert goodput(1e12) > 0.999
    assert goodput(86_400) > goodput(3600) > goodput(1800) > goodput(600) > 0
    assert goodput(3600, save_s=1) > goodput(3600, save_s=100)
    assert goodput(30) == 0.0
    hourly = reliability(1e6, failure_s=3600, save_s=10, written_s=30, restart_s=0)
    assert hourly.interval_s == pytest.approx(math.sqrt(2 * 10 * 3600), rel=0.05)
    assert reliability(1e6, failure_s=3600, save_s=0.001, written_s=30, restart_s=0).interval_s == 30


@pytest.mark.parametrize(("save_s", "failure_s", "restart_s"), [(1, 88_920, 900), (10, 3600, 900), (300, 7200, 1200)])
def test_goodput_and_failures_are_those_of_runs_that_fail_at_random(
    save_s: float, failure_s: float, restart_s: float
) -> None:
    told = reliability(1e9, failure_s=failure_s, save_s=save_s, written_s=0, restart_s=restart_s)
    chance = random.Random(0)
    done = clock = failures = 0.0
    restarting = 0.0  # what is left of it
    while failures < 20_000:
        quiet = chance.expovariate(1 / failure_s)
        through = max(0.0, quiet - restarting) // (told.interval_s + save_s)
        done, clock, failures = done + through * told.interval_s, clock + quiet, failures + 1
        restarting = restart_s
    assert told.goodput == pytest.approx(done / clock, rel=0.03)
    assert told.failures * told.goodput == pytest.approx(1e9 / failure_s)
    rarer = reliability(1e9, failure_s=failure_s, save_s=save_s, written_s=2 * told.interval_s, restart_s=restart_s)
    assert rarer.goodput < told.goodput


# The model's life


def test_chinchillas_optimum_is_where_size_and_tokens_are_worth_the_same() -> None:
    for found in FITS.values():
        size = lifetime(found, 2.0, Prices(1e-14, 1e-14), served=1e12).chinchilla
        of_size = found.a * found.alpha / size.parameters**found.alpha
        assert of_size == pytest.approx(found.b * found.beta / size.tokens**found.beta, rel=1e-3)
        assert found.loss(size.parameters, size.tokens) == pytest.approx(2.0)


def test_chinchillas_own_budget_gives_its_own_loss() -> None:
    assert FITS["hoffmann"].loss(70e9, 1.4e12) == pytest.approx(1.937, abs=0.002)


@settings(max_examples=25, deadline=None)
@given(
    served=st.floats(1e9, 1e14),
    loss=st.floats(1.95, 2.6),
    share=st.floats(0.05, 1.0),
    attention=st.sampled_from([0.0, 1e3, 1e6]),
)
def test_no_other_size_costs_less_over_its_life(served: float, loss: float, share: float, attention: float) -> None:
    prices = Prices(train_flop=2e-14, serve_flop=1e-14 / share, attention=attention)
    found = lifetime(FITS["hoffmann"], loss, prices, served=served)
    assert found.cheapest.parameters <= found.chinchilla.parameters * 1.001  # serving is cheaper for smaller ones
    assert all(found.cheapest.cost <= size.cost * (1 + 1e-9) for size in found.curve)
    assert found.chinchilla.training <= found.cheapest.training * (1 + 1e-9)
    assert not (found.cheapest.at_the_edge or found.chinchilla.at_the_edge)


def test_more_served_means_smaller_and_longer() -> None:
    prices = Prices(2e-14, 6e-14)
    sizes = [lifetime(FITS["hoffmann"], 2.0, prices, served=10.0**n).cheapest for n in (9, 11, 12, 13)]
    assert [size.parameters for size in sizes] == sorted((size.parameters for size in sizes), reverse=True)
    assert [size.tokens for size in sizes] == sorted(size.tokens for size in sizes)


@pytest.mark.parametrize(
    ("seq_len", "groups", "price"),
    [(131_072, {"parallel": {"cp": 8, "tp": 2}}, 3.0), (2048, {"restart_minutes": 6000.0}, None)],
)
def test_training_costs_in_the_models_life_what_it_costs_in_the_plan(
    seq_len: int, groups: dict[str, Any], price: float | None
) -> None:
    """Attention and what failures take are in both."""
    serve, hardware = ServeConfig(tokens=1e11), {"price_per_gpu_hour": price}
    config = plan_config("7b", nodes=16, tokens=1e11, serve=serve, hardware=hardware, **groups)
    config = replace(
        config, model=replace(config.model, max_seq_len=seq_len), data=replace(config.data, seq_len=seq_len)
    )
    values = as_values(planned(config))
    asked, cost = values["life"]["asked"], values["gpu_hours"] if price is None else values["cost"]
    assert asked["training"] == pytest.approx(cost, rel=1e-9)
    assert (asked["parameters"], asked["tokens"]) == (values["parameters"], values["tokens"])
    served_hours = 2 * values["parameters"] * 1e11 / (0.2 * 312e12) / 3600
    assert asked["serving"] == pytest.approx(served_hours * (price or 1))
    assert asked["cost"] >= values["life"]["cheapest"]["cost"]


def test_attention_grows_as_a_models_layers_and_width() -> None:
    """By the presets: to a tenth for each of the paper's sizes, from the smallest."""
    attention = {name: flops_per_token(model, 2048) - 6 * parameter_count(model) for name, model in PRESETS.items()}
    each = attention["7b"] / parameter_count(PRESETS["7b"]) ** (2 / 3)
    for name, model in PRESETS.items():
        reckoned = Prices(1.0, 1.0, each).training(parameter_count(model), 1.0)
        assert reckoned - 6 * parameter_count(model) == pytest.approx(attention[name], rel=0.1)


@pytest.mark.parametrize("form", ["text", "json"])
def test_it_is_told_where_the_plot_is(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "life.svg"
    config = plan_config("7b", nodes=1, serve=ServeConfig(tokens=1e12, plot=str(path)), format=form)
    command_run(replace(config, parallel=replace(config.parallel, recompute="full")))
    out, err = capsys.readouterr()
    assert "<svg" in path.read_text()[:1000]
    if form == "json":
        assert json.loads(out)["life"] and err.strip() == f"drawn: {path}"
    else:
        assert out.endswith(f"\ndrawn: {path}\n")


def test_a_run_of_another_loss_than_asked_for_is_not_compared() -> None:
    life = planned(plan_config("7b", nodes=2, serve=ServeConfig(tokens=1e12, loss=2.2))).life
    assert life is not None and life.asked is None


@pytest.mark.parametrize(
    ("loss", "edge"),
    [(10.0, SMALLEST), (FITS["hoffmann"].loss(0.97 * LARGEST, math.inf), LARGEST)],
)
def test_an_optimum_at_the_edge_of_the_search_is_said_to_be_one(loss: float, edge: float) -> None:
    found = planned(plan_config("7b", nodes=1, serve=ServeConfig(tokens=1e12, loss=loss)))
    assert found.life is not None
    sizes = (found.life.found.cheapest, found.life.found.chinchilla)
    assert all(size.parameters == pytest.approx(edge, rel=1e-3) and size.tokens < math.inf for size in sizes)
    assert "at the edge of what is looked at, 1e+07 to 1e+13 parameters" in told(found)
    assert all(SMALLEST <= size.parameters <= LARGEST for size in found.life.found.curve)
    assert as_values(found)["life"]["cheapest"]["at_the_edge"] is True


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = planned(plan_config(serve=ServeConfig(tokens=2e12)))
    assert found.life is not None
    draw(found.life, str(tmp_path / "life.png"))
    assert (tmp_path / "life.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"serve\.plot=.*cannot be written"):
        draw(found.life, str(tmp_path / "nowhere" / "life.svg"))


# Layouts


def planned(config: PlanConfig) -> Plan:
    check_plan(config, clusters=["a100_80gb"])
    return plan(config, PRESETS)


def test_a_plan_says_all_there_is_to_know() -> None:
    found = planned(plan_config(serve=ServeConfig(tokens=2e12)))
    text, values = told(found), as_values(found)
    assert found.fits and found.nearest is None
    assert "65,285,660,672 parameters on 256 x 8 A100-SXM4-80GB: 2048 GPUs" in text
    for part in ("weights", "gradients", "optimizer state", "activations", "loss, or backward of a layer"):
        assert f"  {part} " in text
    for words in ("MFU", " d ", "GPU-hours", " MWh", " t of CO2", "failures", "goodput", "Chinchilla's optimum"):
        assert words in text
    assert json.loads(json.dumps(values)) == values
    assert values["days"] == pytest.approx(21, rel=0.1)
    assert values["co2eq_tonnes"] == pytest.approx(173, rel=0.1)
    assert values["memory_bytes"]["total"] == sum(values["memory_bytes"]["parts"].values())
    seconds_by_part = dict(values["step_seconds"])
    assert seconds_by_part.pop("total") == pytest.approx(sum(seconds_by_part.values()))
    assert set(values["memory_bytes_by_recompute"]) == set(RECOMPUTE)
    assert values["life"]["cheapest"]["parameters"] < values["life"]["chinchilla"]["parameters"]
    assert "edge" not in text and values["life"]["cheapest"]["at_the_edge"] is False


@pytest.mark.parametrize(
    ("size", "nodes", "cluster", "groups"),
    [
        ("65b", 256, "a100_80gb", {}),
        ("7b", 2, "h200", {}),
        ("13b", 4, "h100", {"parallel": {"tp": 2}, "train": {"micro_batch": 2}}),
        ("33b", 16, "a100_80gb", {"parallel": {"recompute": "full", "reduce_dtype": "bf16"}}),
    ],
)
def test_layouts_are_valid_fit_and_are_told_the_fastest_first(
    size: str, nodes: int, cluster: str, groups: dict[str, Any]
) -> None:
    config = plan_config(size, nodes=nodes, cluster=cluster, **groups)
    found = planned(config)
    assert len(found.best) >= 2
    assert [choice.rate for choice in found.best] == sorted((choice.rate for choice in found.best), reverse=True)
    assert found.best[0].rate >= found.asked.rate
    for best in found.best[:20]:
        assert best.bytes <= found.room
        assert 0.1 < mfu(found.config, found.cluster, best) < 0.8
        typed = as_typed(config, best.overrides())
        validate(typed, world_size=nodes * 8)
        again = memory_by_part(settled(typed), best.recompute, world_size=nodes * 8)
        assert again == best.memory  # nothing of the layout is left unsaid
        for group, values in groups.items():
            for key, value in values.items():
                assert getattr(getattr(typed, group), key) == value


def test_what_makes_no_difference_is_not_proposed_twice() -> None:
    alone = replace(cluster_config("h200"), gpus_per_node=1)
    found = planned(replace(plan_config("1b", nodes=1, tokens=1e10), cluster=alone))
    assert found.best and len({choice.rate for choice in found.best}) == len(found.best)
    assert " 0.0 " not in told(found).partition("the run")[2].partition("layouts")[0]


def test_a_budget_beyond_the_gpu_does_not_make_room() -> None:
    found = planned(plan_config("65b", nodes=4, tokens=1e12, parallel={"recompute_budget_gib": 1000.0}))
    assert found.room == found.cluster.gpu.memory


def test_no_pipeline_is_proposed_for_a_run_that_answers_questions() -> None:
    found = planned(plan_config("7b", nodes=2, evaluation={"every_steps": 100, "samples": ["Once upon a time"]}))
    assert found.best
    for best in found.best:
        validate(best.config, world_size=16)
    assert any(choice.mesh.pp > 1 for choice in planned(plan_config("7b", nodes=2)).best)


def as_typed(config: PlanConfig, overrides: list[str]) -> RunConfig:
    """The run with settings as they are pasted."""
    source = {"any": SourceConfig(path="any")}
    values = RunConfig(model=config.model, train=config.train, data=DataConfig(sources=source)).as_dict()
    for override in overrides:
        key, _, value = override.partition("=")
        group, _, name = key.partition(".")
        values[group][name] = yaml.safe_load(value)
    return build(RunConfig, values)


def test_the_nearest_that_fits_is_told_for_what_does_not() -> None:
    found = planned(plan_config("7b", nodes=1, tokens=1e12, train={"micro_batch": 32}, parallel={"recompute": "none"}))
    assert not found.fits and found.best == []  # both were set, so neither is searched
    assert found.nearest is not None and found.nearest.world_size > 8
    assert "the nearest that fits: nodes=" in refusal(found)
    found = planned(plan_config("7b", nodes=1, tokens=1e12, train={"micro_batch": 32}, parallel={"tp": 8}))
    assert found.fits
    found = planned(plan_config("65b", nodes=2, tokens=1e12))
    assert not found.fits and found.nearest is not None
    assert found.nearest in found.best and found.nearest.bytes <= found.room
    text = refusal(found)
    assert f"{found.asked.bytes / 2**30:.1f} GiB on a GPU are needed" in text
    assert text.endswith(" ".join(found.nearest.overrides()))


def test_a_layout_that_keeps_the_batch_is_told_for_more_gpus_than_sequences() -> None:
    config = plan_config("65b", nodes=512, tokens=1e12)  # 4,096 GPUs, 2,048 sequences
    with pytest.raises(
        ConfigError, match=r"nearest that does is train.global_batch_tokens=\d+; or keep all that"
    ) as refused:
        planned(config)
    overrides = str(refused.value).partition("another layout: ")[2].split()
    validate(as_typed(config, overrides), world_size=4096)
    many, pinned = (
        plan_config(nodes=100_000, tokens=1e12),
        plan_config(nodes=512, tokens=1e12, parallel={"tp": 1, "pp": 3}),
    )
    for config, told_so in ((many, "800,000 GPUs keeps that batch and fits"), (pinned, "with parallel.pp=3 as set")):
        with pytest.raises(ConfigError, match=f"no other layout for .*{told_so}$"):
            planned(config)
    for groups in ({"train": {"micro_batch": 0}}, {"parallel": {"recompute": "some"}}, {"data": {"seq_len": 0}}):
        with pytest.raises(ConfigError) as refused:
            planned(plan_config("7b", nodes=4, tokens=1e12, **groups))
        assert "other layout" not in str(refused.value)


def test_what_was_set_is_named_where_it_leaves_nothing_that_fits() -> None:
    parallel = {"recompute": "none", "tp": 2}
    found = planned(plan_config("65b", nodes=1, data={"seq_len": 2048}, train={"micro_batch": 512}, parallel=parallel))
    assert found.nearest is None
    assert "with parallel.tp=2 parallel.recompute=none train.micro_batch=512 as set, no layout fits" in refusal(found)
    assert "on up to 256 nodes" in refusal(found)


@pytest.mark.parametrize(
    ("cluster", "hardware", "told_so"),
    [
        ("a100_80gb", {}, "76% of the peak in matrix products, 40% in attention: fitted to published runs on A100"),
        ("h100", {}, "63% of the peak in matrix products, 18% in attention: fitted to published runs on H100"),
        ("h200", {}, "fitted to published runs on H100, not on H200"),
        (
            "h200",
            {"products_share": 0.7, "attention_share": 0.5},
            "70% of the peak in matrix products, 50% in attention, as set",
        ),
    ],
)
def test_it_is_told_what_the_prediction_rests_on(cluster: str, hardware: dict[str, float], told_so: str) -> None:
    found = planned(plan_config("7b", nodes=2, cluster=cluster, hardware=hardware))
    lines = told(found).splitlines()
    assert any(line.endswith(told_so) for line in lines)
    room = found.cluster.gpu.memory / 10 / 2**30
    assert f"  not usable are {room:.1f}, for CUDA's context, NCCL's buffers and gaps between allocations" in lines


def test_candidates_are_what_the_checks_let_pass() -> None:
    config = settled(plan_config("7b", nodes=4))
    cluster = cluster_of(cluster_config())
    found = list(candidates(config, cluster, world_size=32))
    assert len(found) > 100
    for candidate in found[::10]:
        validate(candidate, world_size=32)
    assert {candidate.parallel.tp for candidate in found} == {1, 2, 4, 8}
    fast = fitting(config, cluster, world_size=32)
    assert len({tuple(choice.overrides()) for choice in fast}) == len(fast)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": ClusterConfig()}, "cluster=… is missing: choose one of a100_80gb"),
        ({"nodes": None}, "nodes=… is missing"),
        ({"layouts": 0}, "layouts=0: must be at least 1"),
        ({"format": "xml"}, "format=xml: choose one of text, json"),
        ({"pue": 0.9}, "pue=0.9: must be at least 1"),
        ({"restart_minutes": -1.0}, "restart_minutes=-1.0: must not be negative"),
        ({"serve": ServeConfig(fit="kaplan")}, "serve.fit=kaplan: choose one of hoffmann, besiroglu"),
        ({"serve": ServeConfig(plot="x.svg")}, "serve.plot draws what serve.tokens asks"),
        ({"serve": ServeConfig(tokens=1e12, plot="x.pdf")}, "serve.plot=x.pdf: must end in .svg or .png"),
        ({"serve": ServeConfig(utilisation=1.5)}, "serve.utilisation=1.5: must be at most 1"),
        ({"serve": ServeConfig(tokens=1e12, loss=1.6)}, "serve.loss=1.6: no model reaches 1.6"),
        ({"cluster": ClusterConfig(name="x")}, "cluster=x has no GPUs to plan with"),
        (
            {"cluster": ClusterConfig(name="x", accelerator="NVIDIA B200", gpus_per_node=8)},
            "cluster.accelerator=NVIDIA B200 is not known well enough: cluster.hardware.memory_gib=…",
        ),
        (
            {
                "cluster": replace(cluster_config("h100", **dict.fromkeys(REQUIRED, 1)), accelerator="NVIDIA B200"),
                "train": TrainConfig(tokens=10**12, precision="fp32"),
            },
            "train.precision=fp32 on B200: its peak is not known; cluster.hardware.peak_fp32_tflops=…",
        ),
        ({"restart_minutes": 50_000.0}, "such a run never gets on"),
        ({"train": TrainConfig(tokens=10**12, micro_batch=3)}, "train.micro_batch=1 does, and trains the same"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(replace(plan_config(), **changes))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("H100", "NVIDIA H100 80GB HBM3"),
        ("nvidia h100 80gb", "NVIDIA H100 80GB HBM3"),
        ("a100", "NVIDIA A100-SXM4-80GB or NVIDIA A100-SXM4-40GB"),
        ("A100-80GB", "NVIDIA A100-SXM4-80GB"),
        ("H20", None),
        ("NVIDIA H100 PCIe", None),
        ("", None),
    ],
)
def test_the_whole_name_of_an_accelerator_is_suggested(typed: str, meant: str | None) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(replace(plan_config(), cluster=replace(cluster_config("h100"), accelerator=typed)))
    _, asked, rest = str(refused.value).partition("did you mean ")
    assert (rest.partition("?")[0] if asked else None) == meant


def test_a_setting_is_suggested_by_the_word_that_was_meant() -> None:
    for typed, meant in (("prize", "price_per_gpu_hour"), ("network_gbs", "network_gb_s"), ("wats", "gpu_watts")):
        with pytest.raises(ConfigError, match=rf"did you mean cluster\.hardware\.{meant}\?"):
            build(PlanConfig, {"cluster": {"hardware": {typed: 3}}})
    with pytest.raises(ConfigError, match=r"no such setting(?!.*did you mean cluster\.hardware\?)"):
        build(PlanConfig, {"cluster": {"hardware": {"zzz": 3}}})


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_hardware_is_checked(value: float) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.hardware\.network_gb_s=.*: must be above 0"):
        planned(plan_config(hardware={"network_gb_s": value}))


# Small runs


def small(**changes: Any) -> PlanConfig:
    return replace(plan_config("15m", nodes=1, tokens=1e8, cluster="h100"), **changes)


def test_a_small_run_is_told_in_small_units() -> None:
    train = TrainConfig(tokens=10**8, global_batch_tokens=131_072)
    text = told(planned(small(train=train, optim=OptimConfig(warmup_steps=10)))).partition("the run")[2]
    assert re.search(r"\n  [\d.]+ s, 0\.0\d+ GPU-hours, cost 0\.\d+ at", text), text
    assert re.search(r"\n  [\d.]+ Wh, [\d.]+ g of CO2 equivalent \(", text), text
    text = told(planned(plan_config("7b", nodes=4, tokens=9e9))).partition("the run")[2]
    assert re.search(r"\n  \d+ h \d+ min, [\d.,]+ GPU-hours", text), text
    assert re.search(r"\n  [\d.]+ kWh, [\d.]+ kg of CO2 equivalent", text), text


def test_a_run_shorter_than_the_best_interval_is_saved_at_its_end() -> None:
    found = planned(plan_config("7b", nodes=4, tokens=239 * 4_194_304, optim={"warmup_steps": 10}, cluster="h100"))
    assert 0 < found.effort.save_every_steps < 239
    assert "saving every" in told(found)
    found = planned(plan_config("7b", nodes=256, tokens=239 * 4_194_304, optim={"warmup_steps": 10}, cluster="h100"))
    assert found.effort.save_every_steps == 239
    assert "saving once, at the end, loses least: checkpoint.every_steps=239; goodput" in told(found)
    assert found.effort.reliability.interval_s == pytest.approx(239 * found.asked.time.total)


def test_a_restart_may_take_no_time() -> None:
    days = [planned(plan_config("7b", nodes=2, restart_minutes=minutes)).effort.days for minutes in (0.0, 15.0)]
    assert days[0] < days[1]


# The command


def command(*arguments: str, module: str = "llamatrain.plan") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=REPOSITORY, capture_output=True, text=True)


ASKED = ["model=7b", "cluster=a100_80gb", "nodes=4", "train.tokens=1e12"]


def test_what_is_told_can_be_pasted_behind_the_launcher() -> None:
    done = command(*ASKED, "format=json", "layouts=2")
    assert done.returncode == 0, done.stderr
    layouts = json.loads(done.stdout)["layouts"]
    assert len(layouts) == 2
    pasted = [*ASKED, *layouts[0]["overrides"], "data.sources.web.path=web", "dry_run=true"]
    launched = command(*pasted, module="launch.slurm")
    assert launched.returncode == 0, launched.stderr
    assert "--nodes=4" in launched.stdout


def test_the_command_imports_no_torch_and_ends_badly_where_nothing_fits() -> None:
    arguments = ["model=65b", "cluster=a100_80gb", "nodes=1", "train.tokens=1e12"]
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['plan', *{arguments!r}]\n"
        "try:\n    runpy.run_module('llamatrain.plan', run_name='__main__')\n"
        "except SystemExit as ended:\n    sys.exit(10 + ended.code if 'torch' in sys.modules else ended.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "the nearest that fits: nodes=2 parallel." in done.stderr
    assert "does not fit" in done.stdout


def test_the_models_are_those_of_the_folder() -> None:
    from llamatrain.plan import presets

    assert isinstance(presets()["65b"], ModelConfig)
    assert parameter_count(presets()["65b"]) == 65_285_660_672


def test_the_file_of_the_command_lists_its_settings_with_their_defaults() -> None:
    values = yaml.safe_load((config_directory() / "plan.yaml").read_text(encoding="utf-8"))
    defaults = PlanConfig().as_dict()
    own = set(defaults) - set(RunConfig().as_dict()) - {"cluster"}
    assert values.pop("defaults") == ["config", {"cluster": None}, "_self_"]
    assert values == {key: defaults[key] for key in own}
