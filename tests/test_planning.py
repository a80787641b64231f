"""What a run will take: the paper's own figures, published rows, what its parts must obey, and the command."""

import json
import math
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

from llamatrain.arithmetic import carbon, parameter_count
from llamatrain.cli import config_directory
from llamatrain.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, SourceConfig, TrainConfig, validate
from llamatrain.config.build import build
from llamatrain.config.cluster import ClusterConfig
from llamatrain.config.parallel import RECOMPUTE
from llamatrain.config.plan import PlanConfig, ServeConfig, check_plan
from llamatrain.errors import ConfigError
from llamatrain.memory import STATE, memory_by_part, training_memory
from llamatrain.planning.hardware import CALIBRATION, Cluster, cluster_of
from llamatrain.planning.layouts import Choice, candidates, fitting, settled
from llamatrain.planning.lifetime import FITS, Prices, lifetime
from llamatrain.planning.plan import Plan, as_values, effort, mfu, plan
from llamatrain.planning.reliability import reliability
from llamatrain.planning.roofline import StepTime, step_time
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


# Published rows


def test_the_calibration_foretells_the_published_rows() -> None:
    errors = [abs(row.error(CALIBRATION[row.kind])) for row in published()]
    assert len(errors) >= 40
    assert statistics.median(errors) <= 0.10


@pytest.mark.slow
def test_rows_held_out_of_the_fit_are_foretold_to_a_tenth() -> None:
    rows = published()
    errors = [abs(row.error(reached)) for _, reached, own in held_out(rows) for row in own]
    assert len(errors) == len(rows)
    assert statistics.median(errors) <= 0.10
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
    assert goodput(86_400) > goodput(3600) > goodput(1800)
    assert goodput(3600, save_s=1) > goodput(3600, save_s=100)
    assert goodput(600) == 0.0  # a failure before a restart is through
    hourly = reliability(1e6, failure_s=3600, save_s=10, written_s=30, restart_s=0)
    assert hourly.interval_s == pytest.approx(math.sqrt(2 * 10 * 3600), rel=0.05)
    assert reliability(1e6, failure_s=3600, save_s=0.001, written_s=30, restart_s=0).interval_s == 30
    # by hand: of 3600 s, half an interval is computed again, and each interval has a save
    again = hourly.interval_s / 2 / 3600
    assert hourly.goodput == pytest.approx((1 - again) / (1 + 10 / hourly.interval_s))


# The model's life


def test_chinchillas_optimum_is_where_size_and_tokens_are_worth_the_same() -> None:
    for found in FITS.values():
        size = lifetime(found, 2.0, Prices(1e14, 1e14, 1.0), served=1e12).chinchilla
        of_size = found.a * found.alpha / size.parameters**found.alpha
        assert of_size == pytest.approx(found.b * found.beta / size.tokens**found.beta, rel=1e-3)
        assert found.loss(size.parameters, size.tokens) == pytest.approx(2.0)


def test_chinchillas_own_budget_gives_its_own_loss() -> None:
    assert FITS["hoffmann"].loss(70e9, 1.4e12) == pytest.approx(1.937, abs=0.002)


@settings(max_examples=25, deadline=None)
@given(served=st.floats(1e9, 1e14), loss=st.floats(1.95, 2.6), share=st.floats(0.05, 1.0))
def test_no_other_size_costs_less_over_its_life(served: float, loss: float, share: float) -> None:
    prices = Prices(train_flops=1.5e14, serve_flops=share * 3e14, per_gpu_hour=2.0)
    found = lifetime(FITS["hoffmann"], loss, prices, served=served)
    assert found.cheapest.parameters <= found.chinchilla.parameters * 1.001  # serving is cheaper for smaller ones
    assert all(found.cheapest.cost <= size.cost * (1 + 1e-9) for size in found.curve)
    assert found.chinchilla.training <= found.cheapest.training * (1 + 1e-9)
    hours = 6 * found.cheapest.parameters * found.cheapest.tokens / 1.5e14 / 3600
    assert found.cheapest.training == pytest.approx(2.0 * hours)


def test_more_served_means_smaller_and_longer() -> None:
    prices = Prices(1.5e14, 0.5e14, 1.0)
    sizes = [lifetime(FITS["hoffmann"], 2.0, prices, served=10.0**n).cheapest for n in (9, 11, 12, 13)]
    assert [size.parameters for size in sizes] == sorted((size.parameters for size in sizes), reverse=True)
    assert [size.tokens for size in sizes] == sorted(size.tokens for size in sizes)


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = planned(plan_config(serve=ServeConfig(tokens=2e12)))
    assert found.life is not None
    draw(found.life, str(tmp_path / "life.svg"))
    assert "<svg" in (tmp_path / "life.svg").read_text()[:1000]
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
    for words in ("MFU", "days", "GPU-hours", "MWh", "tCO2eq", "failures", "goodput", "Chinchilla's optimum"):
        assert words in text
    assert json.loads(json.dumps(values)) == values
    assert values["days"] == pytest.approx(21, rel=0.1)
    assert values["co2eq_tonnes"] == pytest.approx(173, rel=0.1)
    assert values["memory_bytes"]["total"] == sum(values["memory_bytes"]["parts"].values())
    seconds_by_part = dict(values["step_seconds"])
    assert seconds_by_part.pop("total") == pytest.approx(sum(seconds_by_part.values()))
    assert set(values["memory_bytes_by_recompute"]) == set(RECOMPUTE)
    assert values["life"]["cheapest"]["parameters"] < values["life"]["chinchilla"]["parameters"]


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
        ({"restart_minutes": 0.0}, "restart_minutes=0.0: must be above 0"),
        ({"serve": ServeConfig(fit="kaplan")}, "serve.fit=kaplan: choose one of hoffmann, besiroglu"),
        ({"serve": ServeConfig(plot="x.svg")}, "serve.plot draws what serve.tokens asks"),
        ({"serve": ServeConfig(utilisation=1.5)}, "serve.utilisation=1.5: must be at most 1"),
        ({"serve": ServeConfig(tokens=1e12, loss=1.6)}, "serve.loss=1.6: no model reaches 1.6"),
        ({"cluster": ClusterConfig(name="x")}, "cluster=x has no GPUs to plan with"),
        (
            {"cluster": ClusterConfig(name="x", accelerator="NVIDIA B200", gpus_per_node=8)},
            "cluster.accelerator=NVIDIA B200 is not known well enough: cluster.hardware.memory_gib=…",
        ),
        ({"restart_minutes": 2000.0}, "such a run never gets on"),
        ({"train": TrainConfig(tokens=10**12, micro_batch=3)}, "train.micro_batch=1 does, and trains the same"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(replace(plan_config(), **changes))
    assert message in str(refused.value)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_hardware_is_checked(value: float) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.hardware\.network_gb_s=.*: must be above 0"):
        planned(plan_config(hardware={"network_gb_s": value}))


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
