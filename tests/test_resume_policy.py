"""What a resumed run may change: every setting has its rule, and what is allowed by name is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatrain.config import DataConfig, RunConfig, SourceConfig
from llamatrain.config.build import known_keys
from llamatrain.config.resume import (
    BY_NAME,
    CHECKPOINT,
    NEVER,
    TABLE,
    as_markdown,
    check_allowed,
    differences,
    environment_changes,
    is_structural,
    rule_of,
)
from llamatrain.data.order import DataState
from llamatrain.errors import ConfigError, DataError
from llamatrain.run_directory import RunDirectory
from llamatrain.session import started_with
from tests.small_run import GLOBAL_BATCH, SEQ_LEN, metrics, saved_steps, small_config, status, train_in_process

DOCUMENT = Path(__file__).parents[1] / "docs" / "resume-policy.md"


def config_with(**values: Any) -> RunConfig:
    """A configuration with settings `group__name`."""
    config = RunConfig(data=DataConfig(sources={"web": SourceConfig("there", 2.0), "code": SourceConfig("here")}))
    config.train.steps = 10
    for key, value in values.items():
        group, _, name = key.partition("__")
        setattr(getattr(config, group), name, value)
    return config


def test_every_setting_stands_once_in_the_table() -> None:
    keys = known_keys(RunConfig)
    settings = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    listed = [key for rule in TABLE for key in rule.settings]
    assert sorted(listed) == sorted(settings), "give the new setting its rule in llamatrain/config/resume.py"


def test_the_document_shows_the_table() -> None:
    shown = DOCUMENT.read_text(encoding="utf-8")
    assert shown == as_markdown(), "python -m llamatrain.config.resume > docs/resume-policy.md"


def test_what_differs_from_the_attempt_before_is_told_there_and_back(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(stop: int, lr: float) -> list[str]:
        train_in_process(small_config(tmp_path, sources, train={"stop_after_step": stop}, optim={"lr": lr}))
        return [line for line in capsys.readouterr().err.splitlines() if " before, is " in line]

    assert told(1, 1e-3) == []
    stop = "train.stop_after_step was {} before, is {} from here on"
    assert told(2, 2e-3) == ["optim.lr was 0.001 before, is 0.002 from here on", stop.format(1, 2)]
    assert told(3, 1e-3) == ["optim.lr was 0.002 before, is 0.001 from here on", stop.format(2, 3)]


def test_a_rule_that_refuses_says_why() -> None:
    assert all(rule.note for rule in TABLE if rule.wins in (BY_NAME, NEVER))
    assert is_structural("data.sources.any-name.weight")
    assert not is_structural("data.sources.any-name.path")
    assert rule_of("train.precision").wins == CHECKPOINT


@pytest.mark.parametrize(
    ("values", "allow"),
    [
        ({"train__global_batch_tokens": 2048}, "train.global_batch_tokens"),
        ({"data__document_mask": True}, "data"),
        ({"data__sources": {"web": SourceConfig("there", 2.0)}}, "data.sources.code"),
        ({"data__sources": {"web": SourceConfig("there", 1.0), "code": SourceConfig("here")}}, "data.sources"),
        ({"model__rope_theta": 5e5, "model__max_seq_len": 4096}, "model"),
    ],
)
def test_what_is_allowed_by_name_may_change_and_is_refused_without(values: dict[str, Any], allow: str) -> None:
    with pytest.raises(ConfigError, match=r"change them from here on with train\.resume_allow=\["):
        differences(config_with(**values), config_with())
    with pytest.raises(ConfigError):
        differences(config_with(**values, train__resume_allow=["data.sources.other"]), config_with())
    changed = differences(config_with(**values, train__resume_allow=[allow]), config_with())
    assert {key for key in changed if is_structural(key)}
    assert differences(config_with(**values), config_with(), allowed=list(changed)) is not None


@pytest.mark.parametrize("setting", ["model__dim", "train__seed", "data__seq_len", "data__seed"])
def test_what_cannot_work_is_refused_with_its_reason_whatever_is_allowed(setting: str) -> None:
    key = setting.replace("__", ".")
    with pytest.raises(ConfigError) as refused:
        differences(config_with(**{setting: 64, "train__resume_allow": ["model", "data", "train"]}), config_with())
    assert f"{key} was " in str(refused.value)
    assert rule_of(key).note in str(refused.value)
    assert "resume_allow" not in str(refused.value)
    with pytest.raises(ConfigError, match="nothing to allow"):
        check_allowed(config_with(train__resume_allow=[key]))


@pytest.mark.parametrize("name", ["optim.lr", "data.sorces", "data.sources.web.path", ""])
def test_a_name_that_allows_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"nothing to allow.*train\.global_batch_tokens"):
        check_allowed(config_with(train__resume_allow=[name]))
    check_allowed(config_with(train__resume_allow=["data", "data.sources.web.weight", "data.sources.new", "model"]))


def test_environments_are_compared_in_what_both_tell() -> None:
    then = {"host": "a", "python": "3.11", "packages": {"torch": "2.11", "numpy": "1"}, "device": "H100"}
    now = {"host": "b", "python": "3.11", "packages": {"torch": "2.13", "numpy": "1"}, "device": "H200", "hosts": 2}
    assert environment_changes(now, then) == {"device": ("H100", "H200"), "packages.torch": ("2.11", "2.13")}


def test_samples_passed_over_are_not_read() -> None:
    state = DataState.start({"a": 1}).advance(10).pass_over(4, 6).pass_over(20, 30)
    assert state.samples_read == 8
    assert state.advance(15).samples_read == 8 + 15
    assert state.advance(5).next_sample == 15


# In a run


def test_a_new_mixture_counts_from_the_next_sample_on_and_stays(
    sources: dict[str, Path], tiny_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    train_in_process(small_config(run_dir, sources, train={"steps": 4}, evaluation={"every_steps": 0}))
    added = tiny_dataset("added", ["a text that was not there before. " * 80] * 6, tmp_path / "added")

    def later(steps: int, **train: Any) -> RunConfig:
        settings = {"steps": steps, **train}
        return small_config(run_dir, {**sources, "added": added}, train=settings, evaluation={"every_steps": 0})

    with pytest.raises(ConfigError, match=r"train\.resume_allow=\[data\.sources\.added\.weight\]"):
        train_in_process(later(8))
    train_in_process(later(8, resume_allow=["data.sources.added.weight"]))
    records = metrics(run_dir)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[-1]["tokens"] == 8 * GLOBAL_BATCH * SEQ_LEN
    grown = {name: records[-1][f"data/epoch.{name}"] - records[3].get(f"data/epoch.{name}", 0) for name in sources}
    assert all(share > 0 for share in grown.values())
    assert records[-1]["data/epoch.added"] > 0
    assert "added" in started_with(run_dir / "config.yaml").data.sources
    train_in_process(later(9))  # needs no name any more
    with pytest.raises(ConfigError, match=r"data\.sources\.added\.weight was 3\.0, is None"):
        train_in_process(small_config(run_dir, sources, train={"steps": 10}))
    directory = RunDirectory(run_dir)
    (changed,) = directory.events("changed")
    assert (changed["step"], changed["settings"]) == (4, {"data.sources.added.weight": [None, 3.0]})
    directory.close()


def test_a_checkpoint_from_before_a_change_is_still_the_runs_own(sources: dict[str, Path], tmp_path: Path) -> None:
    train_in_process(small_config(tmp_path, sources, train={"steps": 4}, evaluation={"every_steps": 0}))
    masked = {"data": {"document_mask": True}, "evaluation": {"every_steps": 0}}
    allowing = {"steps": 5, "resume_allow": ["data.document_mask"]}
    train_in_process(small_config(tmp_path, sources, train=allowing, **masked))
    (tmp_path / "checkpoints" / "step-00000005" / "checkpoint.json").write_text("{}")
    train_in_process(small_config(tmp_path, sources, train={"steps": 6}, **masked))
    assert status(tmp_path)["state"] == "done"
    assert saved_steps(tmp_path) == [4, 6]


def test_a_source_that_comes_back_must_be_the_one_it_was(
    sources: dict[str, Path], tiny_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir, quiet = tmp_path / "run", {"every_steps": 0}
    allow = ["data.sources"]
    first, second = list(sources)
    train_in_process(small_config(run_dir, sources, train={"steps": 2}, evaluation=quiet))
    alone = {first: sources[first]}
    train_in_process(small_config(run_dir, alone, train={"steps": 4, "resume_allow": allow}, evaluation=quiet))
    other = tiny_dataset("other", ["something else entirely. " * 60] * 4, tmp_path / "other")
    settings = {"steps": 6, "resume_allow": allow}
    with pytest.raises(DataError, match="its data set is not the one"):
        train_in_process(small_config(run_dir, {**alone, second: other}, train=settings, evaluation=quiet))
    train_in_process(small_config(run_dir, sources, train=settings, evaluation=quiet))
    assert metrics(run_dir)[-1][f"data/epoch.{second}"] > metrics(run_dir)[1][f"data/epoch.{second}"]


def test_a_larger_batch_goes_on_without_a_gap_and_needs_a_length_in_steps(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    quiet = {"every_steps": 0}
    train_in_process(small_config(tmp_path, sources, train={"steps": 4}, evaluation=quiet))
    larger = {"global_batch_tokens": 2 * GLOBAL_BATCH * SEQ_LEN, "resume_allow": ["train.global_batch_tokens"]}
    in_tokens = {**larger, "steps": None, "tokens": 20 * GLOBAL_BATCH * SEQ_LEN}
    with pytest.raises(ConfigError, match=r"train\.steps=N train\.tokens=null"):
        train_in_process(small_config(tmp_path, sources, train=in_tokens, evaluation=quiet))
    train_in_process(small_config(tmp_path, sources, train={**larger, "steps": 6}, evaluation=quiet))
    tokens = [record["tokens"] // (GLOBAL_BATCH * SEQ_LEN) for record in metrics(tmp_path)]
    assert tokens == [1, 2, 3, 4, 6, 8]
    with pytest.raises(ConfigError, match=r"train\.steps=N train\.tokens=null"):  # nor later
        train_in_process(small_config(tmp_path, sources, train=in_tokens, evaluation=quiet))


def test_another_environment_is_told_or_refused(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamatrain.device.platform.python_version", lambda: "2.7")
    train_in_process(small_config(tmp_path, sources, train={"steps": 2}, evaluation={"every_steps": 0}))
    monkeypatch.undo()
    strict = {"steps": 3, "same_environment": True}
    with pytest.raises(ConfigError, match=r"written elsewhere: python was 2\.7, is 3"):
        train_in_process(small_config(tmp_path, sources, train=strict, evaluation={"every_steps": 0}))
    assert saved_steps(tmp_path) == [2]
    train_in_process(small_config(tmp_path, sources, train={"steps": 3}, evaluation={"every_steps": 0}))
    assert "python was 2.7 where the checkpoint was written, is 3" in (tmp_path / "logs/rank00000.log").read_text()
