"""The schema: what is refused, by which name, with which way out; what a resumed run may change."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatrain.config import DataConfig, ParallelConfig, RunConfig, SourceConfig, TrainConfig, validate
from llamatrain.config.build import build, known_keys
from llamatrain.config.parallel import AXES, SCHEDULES, check_parallel, layout
from llamatrain.config.resume import differences, keep_auto_choices
from llamatrain.errors import ConfigError


def valid(**groups: dict[str, Any]) -> RunConfig:
    config = RunConfig(
        data=DataConfig(sources={"text": SourceConfig("somewhere")}),
        train=TrainConfig(steps=100_000),
    )
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in groups.items()})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lrr": 1}}, r"optim\.lrr: there is no such setting; did you mean optim\.lr\?"),
        ({"optm": {}}, r"optm: there is no such setting; did you mean optim\?"),
        ({"lr": 1}, r"lr: .* did you mean optim\.lr\?"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr='fast': must be a number"),
        ({"optim": {"lr": True}}, r"optim\.lr=True: must be a number"),
        ({"train": {"steps": 1.5}}, r"train\.steps=1\.5: must be a whole number"),
        ({"train": {"deterministic": 1}}, r"train\.deterministic=1: must be true or false"),
        ({"train": 3}, r"train=3: this is a group of settings"),
        ({"data": {"sources": {"a": {"pth": 1}}}}, r"data\.sources\.a\.pth: .* did you mean data\.sources\.NAME\.path"),
        ({"data": {"sources": {"a": "dir"}}}, r"data\.sources\.a='dir': settings stand one level deeper"),
        ({"data": {"sources": 1}}, r"data\.sources=1: must be a mapping"),
        ({"name": None}, r"name=None: must be text"),
    ],
)
def test_what_the_schema_does_not_know_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(RunConfig, values)


def test_plain_values_become_the_dataclasses_and_back() -> None:
    config = valid(optim={"lr": 2.0}, model={"n_kv_heads": 8})
    assert build(RunConfig, config.as_dict()) == config
    assert build(RunConfig, {"train": {"tokens": 1e12}}).train.tokens == 10**12
    assert build(RunConfig, {"optim": {"lr": 1}}).optim.lr == 1.0
    assert "data.sources.NAME.weight" in known_keys(RunConfig)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"model": {"dim": 100}}, r"model\.dim=100 .*model\.dim=128"),
        ({"model": {"n_kv_heads": 5}}, r"model\.n_kv_heads=5 must divide .*\[1, 2, 4, 8, 16, 32\]"),
        ({"model": {"dim": 96}}, "even width"),
        ({"model": {"attention": "flash"}}, r"model\.attention=flash: choose one of auto, xformers"),
        ({"model": {"n_layers": 0}}, r"model\.n_layers=0"),
        ({"data": {"sources": {}}}, r"data\.sources is empty"),
        ({"data": {"sources": {"a": SourceConfig("x", 0)}}}, r"every data\.sources\.\*\.weight is 0"),
        ({"data": {"sources": {"a": SourceConfig("x", -1)}}}, r"data\.sources\.a\.weight=-1"),
        ({"data": {"sources": {"a": SourceConfig()}}}, r"data\.sources\.a\.path is not set"),
        (
            {"data": {"sources": {"web": SourceConfig("x"), "wbe": SourceConfig(weight=2.0)}}},
            r"data\.sources\.wbe\.path is not set.*a weight must name one of the sources, web",
        ),
        ({"data": {"seq_len": 4096}}, r"model\.max_seq_len=2048.*model\.max_seq_len=4096"),
        ({"train": {"steps": None}}, r"one of train\.steps=N and train\.tokens=N"),
        ({"train": {"tokens": 5}}, r"one of train\.steps=N and train\.tokens=N"),
        ({"train": {"global_batch_tokens": 5000}}, r"nearest that does is train\.global_batch_tokens=4096"),
        (
            {"train": {"micro_batch": 3}},
            r"train\.micro_batch=2 does, and trains the same; or the nearest .* train\.global_batch_tokens=4196352",
        ),
        ({"train": {"precision": "fp8"}}, r"train\.precision=fp8: choose one of auto, bf16, fp32"),
        ({"train": {"steps": 10}}, r"optim\.warmup_steps=2000 is longer than the schedule of 10 steps"),
        ({"optim": {"lr": 0.0}}, r"optim\.lr=0\.0"),
        ({"optim": {"decay": "some"}}, r"optim\.decay=some: choose one of matrices, all"),
        ({"checkpoint": {"keep_every_steps": 1500}}, r"must be a multiple of checkpoint\.every_steps=1000"),
        ({"logging": {"wandb": "yes"}}, r"logging\.wandb=yes: choose one of off, offline, online"),
        ({"logging": {"straggler_factor": 0.9}}, r"logging\.straggler_factor=0\.9: must be above 1; 0 tells of none"),
        ({"evaluation": {"max_tokens": 1}}, r"evaluation\.max_tokens=1"),
        ({"resilience": {"hang_timeout_s": -1}}, r"resilience\.hang_timeout_s=-1: must not be negative; 0 is no limit"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(groups: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(valid(**groups))


def test_the_batch_must_divide_over_the_devices() -> None:
    validate(valid(), world_size=2048)
    with pytest.raises(ConfigError, match=r"x 3 devices = 6144 tokens; .*=4196352"):
        validate(valid(), world_size=3)


def test_length_in_tokens_is_rounded_up_to_steps() -> None:
    config = valid(train={"steps": None, "tokens": 4_194_304 * 3 + 1})
    assert config.total_steps == 4
    assert config.global_batch == 2048


def test_auto_choices_are_kept_and_named_overrides_win() -> None:
    start = valid(train={"precision": "bf16", "device": "cuda"}, model={"attention": "xformers"})
    again = keep_auto_choices(valid(train={"precision": "fp32"}), start)
    assert (again.train.precision, again.train.device, again.model.attention) == ("fp32", "cuda", "xformers")


def test_a_resumed_run_may_change_what_is_not_structural(tmp_path: Path) -> None:
    start = valid()
    later = valid(optim={"lr": 1e-4}, train={"steps": 200_000}, data={"sources": {"text": SourceConfig("moved")}})
    assert differences(later, start) == {
        "data.sources.text.path": ("somewhere", "moved"),
        "optim.lr": (3e-4, 1e-4),
        "train.steps": (100_000, 200_000),
    }


@pytest.mark.parametrize(
    "groups",
    [
        {"model": {"n_layers": 2}},
        {"data": {"seq_len": 1024}},
        {"data": {"sources": {"text": SourceConfig("somewhere", 2.0)}}},
        {"data": {"sources": {"other": SourceConfig("somewhere")}}},
        {"train": {"global_batch_tokens": 2048}},
        {"train": {"seed": 1}},
    ],
)
def test_a_resumed_run_may_not_change_what_is_structural(groups: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        differences(valid(**groups), valid())


@pytest.mark.parametrize(
    ("settings", "world_size", "sizes"),
    [
        ({}, 1, (1, 1)),
        ({}, 8, (1, 8)),
        ({"dp_replicate": 2}, 8, (2, 4)),
        ({"dp_replicate": 4, "dp_shard": 2}, 8, (4, 2)),
    ],
)
def test_what_is_not_said_of_the_mesh_is_sharded(
    settings: dict[str, int], world_size: int, sizes: tuple[int, int]
) -> None:
    found = layout(ParallelConfig(**settings), world_size)
    assert (found.dp_replicate, found.dp_shard) == sizes
    assert found.data_parallel == world_size


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        ({"dp_replicate": 3}, 8, "parallel.dp_replicate=3 makes 3 ranks, there are 8: the nearest that works is "
         "parallel.dp_replicate=2 parallel.dp_shard=4"),
        ({"dp_shard": 4}, 6, "parallel.dp_shard=4 makes 4 ranks, there are 6: the nearest that works is "
         "parallel.dp_shard=6"),
        ({"tp": 3}, 8, "parallel.tp=3 makes 3 ranks, there are 8: the nearest that works is parallel.dp_shard=4 "
         "parallel.tp=2"),
        ({"pp": 2, "cp": 5, "tp": 2}, 16, "parallel.pp=2 x parallel.cp=5 x parallel.tp=2 makes 20 ranks, there are "
         "16: the nearest that works is parallel.pp=2 parallel.cp=4 parallel.tp=2"),
        ({"dp_replicate": 2, "dp_shard": 8}, 8, "parallel.dp_replicate=2 x parallel.dp_shard=8 makes 16 ranks, there "
         "are 8: the nearest that works is parallel.dp_replicate=1 parallel.dp_shard=8"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_names_the_nearest_that_does(
    settings: dict[str, int], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        layout(ParallelConfig(**settings), world_size)


@settings(deadline=None, max_examples=300)
@given(
    shape=st.fixed_dictionaries({
        "n_heads": st.sampled_from([1, 2, 4, 6, 8]), "n_layers": st.integers(1, 6), "tied_embeddings": st.booleans(),
    }),
    axes=st.fixed_dictionaries(dict.fromkeys(AXES, st.sampled_from([1, 1, 2, 3, 4, 8]))),
    shard=st.booleans(), schedule=st.sampled_from(SCHEDULES), sequences=st.integers(1, 48),
    micro_batch=st.integers(1, 6), ranks=st.sampled_from([None, 1, 2, 4, 6, 8, 12, 16]),
)  # fmt: skip
def test_whatever_is_proposed_is_accepted(
    shape: dict[str, Any], axes: dict[str, int], shard: bool, schedule: str, sequences: int, micro_batch: int,
    ranks: int | None,
) -> None:  # fmt: skip
    world_size = ranks or min(16, math.prod(size for axis, size in axes.items() if shard or axis != "dp_shard"))
    config = valid(
        model={"dim": 48 * shape["n_heads"], **shape},
        data={"seq_len": 48},
        train={"global_batch_tokens": 48 * sequences, "micro_batch": micro_batch},
        parallel={**axes, "pipeline_schedule": schedule, "dp_shard": axes["dp_shard"] if shard else None},
    )
    try:
        validate(config, world_size=world_size)
    except ConfigError as error:
        for proposal in proposals(str(error)):
            validate(overridden(config, proposal), world_size=world_size)


def proposals(message: str) -> list[str]:
    """What a refusal of a mesh or of a batch says would do instead, as one types it."""
    _, mesh, settings = message.partition(": the nearest that works is ")
    if mesh:
        return [settings]
    if "no mesh of" in message:  # of this size; what it needs besides is not to be had by one setting
        return []
    found = re.findall(r"train\.micro_batch=\d+ does|the nearest that does is train\.global_batch_tokens=\d+", message)
    found += message.partition("what would do: ")[2].split(", or ")
    return [setting for text in found for setting in re.findall(r"\w+\.\w+=\w+", text)]


def overridden(config: RunConfig, typed: str) -> RunConfig:
    values = config.as_dict()
    for setting in typed.split():
        key, _, value = setting.partition("=")
        group, _, name = key.partition(".")
        values[group][name] = int(value) if value.isdigit() else value
    return build(RunConfig, values)


@pytest.mark.parametrize(
    ("asked", "model", "message"),
    [
        ({"pp": 8}, {"n_layers": 2}, "parallel.pp=8 makes 8 ranks, there are 4: the nearest that works is "
         "parallel.pp=2 parallel.dp_shard=2"),
        ({"tp": 8}, {"n_heads": 2}, "parallel.tp=8 makes 8 ranks, there are 4: the nearest that works is "
         "parallel.dp_shard=2 parallel.tp=2"),
        ({"tp": 4}, {"n_heads": 2}, "model.n_heads=2 does not divide among parallel.tp=4 ranks: the nearest that works "
         "is parallel.dp_shard=2 parallel.tp=2"),
        ({"pp": 4}, {"n_layers": 3}, "parallel.pp=4 stages are more than the model.n_layers=3 layers they are made of: "
         "the nearest that works is parallel.pp=2 parallel.dp_shard=2"),
        ({"pp": 2}, {"tied_embeddings": True}, "(model.tied_embeddings=false has two): the nearest that works is "
         "parallel.pp=1 parallel.dp_shard=4"),
    ],
)  # fmt: skip
def test_the_mesh_proposed_is_one_that_the_model_allows(
    asked: dict[str, int], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(valid(parallel=asked, model=model), world_size=4)


def test_where_no_mesh_will_do_the_plainest_says_why() -> None:
    config = valid(parallel={"tp": 3}, train={"global_batch_tokens": 2048})
    with pytest.raises(ConfigError, match=r"no mesh of 5 ranks goes .* not even parallel\.dp_shard=5 alone: .*=10240"):
        validate(config, world_size=5)


def test_a_smaller_micro_batch_is_proposed_before_another_batch() -> None:
    message = r"=32768 tokens; train\.micro_batch=2 does, and trains the same; or the nearest .*tokens=32768"
    with pytest.raises(ConfigError, match=message.replace("=32768 t", "= 32768 t")):
        validate(valid(train={"global_batch_tokens": 2048 * 4, "micro_batch": 8}), world_size=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reshard_after_forward": "node"}, "choose one of always, never"),
        ({"reduce_dtype": "fp16"}, "choose one of fp32, bf16"),
        ({"dp_replicate": 0}, "must be at least 1"),
        ({"forward_prefetch": -1}, "must not be negative"),
        ({"reduce_scatter": "last", "all_reduce": "each"}, "set parallel.all_reduce=last"),
        ({"timeout_s": 0}, "must be at least 1"),
    ],
)
def test_settings_of_the_mesh_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parallel(ParallelConfig(**settings))
