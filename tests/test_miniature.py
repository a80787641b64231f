"""The whole way in small: its commands; `make paper-in-miniature SMALL=1` runs them."""

import json
from pathlib import Path

import pytest

from launch import paper_in_miniature as miniature
from launch.paper_in_miniature import MiniatureSettings, check_settings, compare_texts, stages, use_stages
from llamatrain.errors import ConfigError
from tests import raw_samples


@pytest.fixture
def settings(tmp_path: Path) -> MiniatureSettings:
    raw_samples.written_questions(tmp_path / "questions")
    for source in ("wikipedia", "common_crawl", "books"):
        (tmp_path / "raw" / source).mkdir(parents=True)
    return MiniatureSettings(
        raw=str(tmp_path / "raw"), questions=str(tmp_path / "questions"), output=str(tmp_path / "out")
    )


def test_every_source_leaves_out_what_is_asked_later(settings: MiniatureSettings) -> None:
    commands = list(stages(settings))
    prepared = [command for command in commands if command[0] == "data_tools.prepare"]
    assert len(prepared) == 7  # each source twice, the crawl once more without grades
    for command in prepared:
        (sets,) = (option for option in command if option.startswith("filters.decontamination.sets="))
        assert "piqa" in sets and "gsm8k" not in sets  # what is not there is not looked for
        (after,) = (option for option in command if option.startswith("after="))
        assert after.endswith("decontamination]")
    train = commands[-1]
    assert train[0] == "llamatrain.train" and "evaluation.tasks=[piqa]" in train


def test_what_is_exported_is_not_exported_again(settings: MiniatureSettings) -> None:
    first = [command[0] for command in use_stages(settings)]
    assert first == ["llamatrain.evaluate", "llamatrain.report", "llamatrain.convert"]
    (Path(settings.output) / "exported").mkdir(parents=True)
    assert [command[0] for command in use_stages(settings)] == first[:-1]


def test_another_text_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    compare_texts([("The same", "The same")])
    with pytest.raises(SystemExit, match="does not write the same text"):
        compare_texts([("The same", "The same"), ("one", "another")])
    assert "transformers: 'another'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": "nowhere"}, "questions=nowhere: no such directory"),
        ({"raw": "???"}, "raw is not set"),
        ({"steps": 0}, "steps=0: must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings: MiniatureSettings, changes: dict[str, object], message: str) -> None:
    for name, value in changes.items():
        setattr(settings, name, value)
    with pytest.raises(ConfigError, match=message):
        check_settings(settings)


def test_the_settings_file_has_the_defaults() -> None:
    import yaml

    path = Path(miniature.__file__).parents[1] / "conf" / "paper_in_miniature.yaml"
    assert yaml.safe_load(path.read_text()) == vars(MiniatureSettings())


def test_written_questions_have_one_label_each(tmp_path: Path) -> None:
    raw_samples.written_questions(tmp_path)
    rows = (tmp_path / "piqa" / "valid.jsonl").read_text().splitlines()
    labels = (tmp_path / "piqa" / "valid-labels.lst").read_text().split()
    assert len(rows) == len(labels) > 100 and {*labels} == {"0", "1"}
    assert all(row["sol1"] != row["sol2"] for row in map(json.loads, rows))
