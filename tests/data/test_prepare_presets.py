"""The presets of the sources: each composes, lists every setting it has, and the command does what they say."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.engine.components import filter_of, reader_of
from data_tools.engine.settings import PrepareSettings, check_settings
from data_tools.prepare import prepare
from llamatrain.cli import config_directory
from llamatrain.config.build import build
from llamatrain.errors import ConfigError
from tests.data.preparing import documents_of

ROOT = Path(__file__).parent.parent.parent
PRESETS = {path.stem: path for path in (config_directory() / "data_tools/prepare/source").glob("*.yaml")}
# Where a preset's value is not the default of the reader or filter.
OWN_VALUES = {("c4_from_crawl", "language"): {"threshold": 0.65}}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_tools.prepare", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_there_is_a_preset_for_each_of_the_papers_sources() -> None:
    assert set(PRESETS) >= {
        "arxiv",
        "books",
        "c4",
        "common_crawl",
        "github",
        "plain",
        "stackexchange",
        "wikipedia",
    }


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_lists_every_setting_of_its_reader_and_filters(name: str) -> None:
    content: dict[str, Any] = yaml.safe_load(PRESETS[name].read_text(encoding="utf-8"))
    settings = build(PrepareSettings, {**content, "input": "x", "output": "y"})
    if name == "own":
        assert (settings.name, settings.reader, settings.read) == ("???", "???", {})
        return
    check_settings(settings)
    reader = reader_of(settings.reader, settings.read).settings
    assert settings.read == dataclasses.asdict(reader)
    assert reader == type(reader)()
    assert set(settings.filters) == {*settings.before, *settings.after}
    for each, values in settings.filters.items():
        made = filter_of(each, values).settings
        assert values == dataclasses.asdict(made)
        assert made == dataclasses.replace(type(made)(), **OWN_VALUES.get((name, each), {}))


def test_the_command_lists_every_setting_with_its_default() -> None:
    values = yaml.safe_load((config_directory() / "data_tools/prepare/prepare.yaml").read_text(encoding="utf-8"))
    values.pop("defaults")
    by_preset = {"name", "reader", "read", "largest", "before", "after", "filters", "dedup", "near_duplicates", "near"}
    by_preset |= {"tokenize"}
    assert set(values) | by_preset == {field.name for field in dataclasses.fields(PrepareSettings)}
    assert build(PrepareSettings, values) == PrepareSettings()


def test_a_source_is_prepared_and_audited_from_the_command_line(tmp_path: Path, tiny_tokenizer: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = [f"Text number {number}. It has two sentences." for number in range(30)]
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(text)
    output = tmp_path / "an out[put]"
    arguments = ["source=plain", f"input={tmp_path / 'in'}", f"output={output}", f"tokenizer={tiny_tokenizer}"]
    done = command(*arguments, "workers=1", "tokenize.validation_fraction=0.2")
    assert done.returncode == 0, done.stderr
    assert [document["text"] for document in documents_of(output)] == texts
    assert "clean: 30 of 30 documents kept" in done.stdout
    audited = subprocess.run(
        [sys.executable, "-m", "data_tools.audit", f"output={output}"], cwd=ROOT, capture_output=True, text=True
    )
    assert audited.returncode == 0 and "whole" in audited.stdout
    refused = command(*arguments, "workers=1", "dedup.level=line", "tokenize.validation_fraction=0.2")
    assert refused.returncode == 2 and "overwrite=true" in refused.stderr


def test_a_model_that_is_missing_is_named_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "a.warc.wet").write_text("")
    content = yaml.safe_load(PRESETS["common_crawl"].read_text(encoding="utf-8"))
    output = tmp_path / "out"
    with pytest.raises(
        ConfigError, match=r"filters\.(perplexity|quality): .*or leave \w+ out of before=\[…\] and after="
    ):
        prepare(build(PrepareSettings, {**content, "input": str(tmp_path / "a.warc.wet"), "output": str(output)}))
    assert not output.exists()
