"""The overlap rule: its numbers, what changes them, and what the program says of them."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatrain.arithmetic import tokens_that_hide
from llamatrain.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, SourceConfig, TrainConfig, validate
from llamatrain.config.build import build
from llamatrain.config.parallel import LINEARS, Layout, check_parallel
from llamatrain.errors import ConfigError
from llamatrain.parallel.overlap import Rates, advice, nothing_to_hide, verdict

MODELS = Path(__file__).parent.parent / "conf" / "model"
A100_AT_60_PERCENT = 0.6 * 312e12
FAST, SLOW = 8 * 200e9 / 8, 400e9 / 8  # bytes a second of a node with 8 x 200 Gb/s, and with 400 Gb/s
RANKS = 128


def config(model: str = "7b", *, micro_batch: int = 1, micro_batches: int = 4, **parallel: Any) -> RunConfig:
    """2,048-token sequences on 128 ranks."""
    shape = build(ModelConfig, yaml.safe_load((MODELS / f"{model}.yaml").read_text()))
    settings = ParallelConfig(**{"recompute": "block_backward", **parallel})
    sequences = micro_batch * micro_batches * RANKS // (settings.tp * settings.cp)
    train = TrainConfig(global_batch_tokens=2048 * sequences, micro_batch=micro_batch, precision="bf16", device="cuda")
    return RunConfig(model=shape, data=DataConfig(seq_len=2048), train=train, parallel=settings)


def needs(given_config: RunConfig, gather: float = FAST, all_reduce: float = FAST) -> dict[str, float]:
    return tokens_that_hide(
        given_config, world_size=RANKS, flops=A100_AT_60_PERCENT, gather=gather, all_reduce=all_reduce
    )


# The arithmetic


@pytest.mark.parametrize("model", ["7b", "65b"])
@pytest.mark.parametrize(
    ("gather", "reduce_dtype", "forward", "backward"),
    [(FAST, "bf16", 936, 936), (FAST, "fp32", 936, 1404), (SLOW, "bf16", 3744, 3744), (SLOW, "fp32", 3744, 5616)],
)
def test_the_published_numbers_come_out_whatever_the_size(
    model: str, gather: float, reduce_dtype: str, forward: int, backward: int
) -> None:
    found = needs(config(model, reduce_dtype=reduce_dtype), gather)
    assert found == pytest.approx({"forward": forward, "backward": backward})


LAST = "a step's last backward"


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"reshard_after_forward": "never"}, {"forward": 936, "backward": 936}),
        ({"reduce_scatter": "last"}, {"forward": 936, "backward": 468, LAST: 1404}),
        ({"tp": 8}, {"forward": 936, "backward": 1404}),
        ({"cp": 8}, {"forward": 936, "backward": 1404}),
        # 4 bytes of each parameter over 8 shards, at a rate far below the gathers'
        ({"dp_replicate": 16}, {"forward": 936, "backward": 1404, LAST: 936 * FAST / 1e9 / 8}),
        ({"dp_replicate": 16, "all_reduce": "each"}, {"forward": 936, "backward": 936 * FAST / 1e9 / 8}),
        ({"dp_replicate": 128}, {"forward": 0, "backward": 0, LAST: 936 * FAST / 1e9}),  # nothing is sharded
    ],
)
def test_the_layout_decides_what_is_sent_when(parallel: dict[str, Any], expected: dict[str, float]) -> None:
    assert needs(config(**parallel), all_reduce=1e9) == pytest.approx(expected)


def test_a_step_of_one_micro_batch_sends_all_in_it() -> None:
    assert needs(config(micro_batches=1, reduce_scatter="last")) == pytest.approx({"forward": 936, "backward": 1404})
    copies = needs(config(micro_batches=1, dp_replicate=16), all_reduce=1e9)
    assert copies == pytest.approx({"forward": 936, "backward": 936 * FAST / 1e9 / 8})


def test_in_fp32_weights_take_twice_as_long() -> None:
    fp32 = config()
    found = needs(replace(fp32, train=replace(fp32.train, precision="fp32")))
    assert found == pytest.approx({"forward": 2 * 936, "backward": (4 + 4) / 4 * 936})


def test_products_that_are_repeated_hide_more() -> None:
    plain, full = (needs(config(recompute=choice))["backward"] for choice in ("none", "full"))
    block = 4 * 4096**2 + 3 * 4096 * 11008
    assert plain / full == pytest.approx(1 + (block - 4096 * 11008) / block / 2, rel=1e-3)  # all but w2's
    kept = [name for name in LINEARS if name not in ("w1", "w2")]
    repeated = needs(config(recompute="selective", recompute_save=kept))["backward"]
    assert plain / repeated == pytest.approx(1 + 4096 * 11008 / block / 2, rel=1e-3)


@settings(deadline=None)
@given(
    st.floats(1e9, 1e15), st.floats(1e6, 1e13), st.floats(1e6, 1e13), st.sampled_from(["always", "never"]),
    st.sampled_from(["fp32", "bf16"]), st.sampled_from([1, 2, 128]),
)  # fmt: skip
def test_faster_links_and_slower_devices_never_need_more(
    flops: float, gather: float, all_reduce: float, reshard: str, reduce_dtype: str, copies: int
) -> None:
    run = config("15m", reshard_after_forward=reshard, reduce_dtype=reduce_dtype, dp_replicate=copies)

    def found(flops: float, gather: float, all_reduce: float) -> dict[str, float]:
        return tokens_that_hide(run, world_size=RANKS, flops=flops, gather=gather, all_reduce=all_reduce)

    base = found(flops, gather, all_reduce)
    for easier in (found(flops / 2, gather, all_reduce), found(flops, 2 * gather, 2 * all_reduce)):
        assert easier == pytest.approx({phase: need / 2 for phase, need in base.items()})
    for easier in (found(flops, 2 * gather, all_reduce), found(flops, gather, 2 * all_reduce)):
        assert all(easier.get(phase, easier["backward"]) <= need * (1 + 1e-9) for phase, need in base.items())


# What is said of it


def rates(gather: float, all_reduce: float = FAST) -> Rates:
    return Rates(A100_AT_60_PERCENT, gather, all_reduce, "60% of the data sheet's", "measured", "as configured")


def test_a_run_that_hides_its_communication_gets_no_advice() -> None:
    assert verdict(config(), rates(FAST), RANKS) == (
        "overlap rule holds: a micro-batch has 2,048 tokens on each rank, to hide communication takes 936 in forward "
        "and 1,404 in backward (187 TFLOP/s, 60% of the data sheet's; gathers 186 GiB/s, measured)"
    )
    assert list(advice(config(), rates(FAST), RANKS, per_node=8)) == []


def test_where_the_rule_fails_the_settings_that_help_are_named_with_their_price() -> None:
    failing = config()
    assert verdict(failing, rates(SLOW), RANKS).startswith("overlap rule fails in forward and backward: ")
    assert list(advice(failing, rates(SLOW), RANKS, per_node=8)) == [
        "train.micro_batch=4",
        "parallel.reduce_dtype=bf16 (then 3,744 in backward; sums of gradients are rounded)",
        "parallel.reduce_scatter=last (then 1,872 in backward and 5,616 in a step's last backward; 25 GiB more)",
        "parallel.reshard_after_forward=never (then 3,744 in backward; 13 GiB more)",
        "parallel.dp_replicate=16, gathers inside a node (12.6 GiB a device for weights, gradients and moments)",
    ]


def test_the_micro_batch_that_is_advised_makes_the_rule_hold() -> None:
    better = config(micro_batch=4, micro_batches=1)
    assert list(advice(better, rates(SLOW), RANKS, per_node=8)) == []


def test_advice_is_what_the_step_and_the_layout_allow() -> None:
    (first, *_) = advice(config(micro_batches=2), rates(SLOW), RANKS, per_node=8)
    assert first == (
        "train.micro_batch=3 with train.global_batch_tokens=786432, which would be another training (524288 allows "
        "train.micro_batch=2 at most)"
    )
    (first, *others) = advice(config(micro_batches=1), rates(SLOW), RANKS, per_node=8)
    assert first.endswith("(262144 allows train.micro_batch=1 at most)")
    assert not any("reduce_scatter" in other for other in others)
    only_forward = config(micro_batches=4, reduce_dtype="bf16", reshard_after_forward="never")
    assert not any("reduce_scatter" in told for told in advice(only_forward, rates(SLOW), RANKS, per_node=8))


@pytest.mark.parametrize("parallel", [{}, {"pp": 4}, {"pp": 4, "pipeline_schedule": "gpipe"}, {"cp": 2, "tp": 2}])
@pytest.mark.parametrize("micro_batches", [4, 8, 24])
def test_with_the_batch_that_is_advised_the_rule_holds(parallel: dict[str, Any], micro_batches: int) -> None:
    failing = config(micro_batches=micro_batches, **parallel)
    (first, *_) = advice(failing, rates(SLOW), RANKS, per_node=8)
    found = {name: int(value) for name, value in re.findall(r"train\.(\w+)=(\d+)", first.partition(" (")[0])}
    better = replace(
        failing,
        train=replace(failing.train, steps=3000, **found),
        data=replace(failing.data, sources={"text": SourceConfig("somewhere")}),
    )
    validate(better, world_size=RANKS)
    assert list(advice(better, rates(SLOW), RANKS, per_node=8)) == []


def test_where_fsdp_sends_nothing_that_is_said() -> None:
    assert nothing_to_hide(Layout(pp=2, tp=4)) == (
        "overlap rule: FSDP sends nothing here, so it has nothing to hide; traffic of parallel.pp=2 and parallel.tp=4 "
        "is not in the rule (a profile shows it: logging.profile_steps)"
    )


@pytest.mark.parametrize(
    ("copies", "per_node", "advised"), [(1, 8, True), (2, 8, True), (16, 8, False), (1, RANKS, False)]
)
def test_copies_are_advised_where_gathers_leave_nodes(copies: int, per_node: int, advised: bool) -> None:
    told = advice(config(dp_replicate=copies), rates(SLOW), RANKS, per_node=per_node)
    assert any(setting.startswith("parallel.dp_replicate=16") for setting in told) == advised


@pytest.mark.parametrize("name", ["bandwidth_gib_s", "replicate_bandwidth_gib_s"])
def test_a_bandwidth_is_above_0(name: str) -> None:
    check_parallel(ParallelConfig(**{name: 0.5}))
    with pytest.raises(ConfigError, match=rf"parallel\.{name}=0: must be above 0, or null to measure it"):
        check_parallel(ParallelConfig(**{name: 0}))
