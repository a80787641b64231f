"""What can be known to go wrong is refused before a preparation begins; what cannot is told loudly."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.data_card import DataCardSettings, data_card
from data_tools.engine.checks import check_used
from data_tools.engine.executors import UnitsFailed
from data_tools.engine.outputs import HashedFile
from data_tools.engine.settings import PrepareSettings
from data_tools.engine.slurm import NotSubmitted
from data_tools.prepare import prepare
from llamatrain.config.build import build
from llamatrain.errors import ConfigError, DataError
from tests.data.preparing import documents_of, prepared, settings_for, write_corpus
from tests.data.test_prepare_presets import command


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "in", files=2)


@pytest.mark.parametrize(
    ("override", "after", "message"),
    [
        ("++filters.decontamination.sets=[]", [], r"decontamination is in neither .* as after=\[decontamination\]"),
        ("+filters.quality.threshold=0.1", ["language"], r"quality is in .* as after=\[language,quality\]"),
        ("filters.ours.toxic.word=x", ["ours.tox"], r"filters.ours.toxic.word is set"),
        ("filters.language.threshold=0.6", ["language"], None),
        ("++filters.ours.tox.word=x", ["ours.tox"], None),
        ("~filters.quality", [], None),
        ("name=filters.x", [], None),
    ],
)
def test_settings_of_a_filter_that_is_not_used_are_refused(
    override: str, after: list[str], message: str | None
) -> None:
    settings = build(PrepareSettings, {"after": after})
    if message is None:
        check_used(settings, [override])
        return
    with pytest.raises(ConfigError, match=message):
        check_used(settings, [override])


def test_the_command_line_refuses_a_filter_that_would_not_run(corpus: Path, tmp_path: Path) -> None:
    arguments = ["source=plain", f"input={corpus}", f"output={tmp_path / 'out'}"]
    done = command(*arguments, "+filters.decontamination.sets=[{name: a, path: b, fields: [c]}]")
    assert done.returncode == 2 and "decontamination is in neither before=[] nor after=[]" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("in", "in"),
        ("in", "in/out"),
        ("in", "link"),
        ("in", "link/deep/out"),
        ("link", "in/out"),
        ("in/0.jsonl", "in"),
        ("in/*.jsonl", "in"),
        ("in/**/*.jsonl", "in/out"),
        ("out/documents", "out"),
    ],
)
def test_an_output_among_the_input_is_refused(corpus: Path, tmp_path: Path, given: str, output: str) -> None:
    (tmp_path / "link").symlink_to(corpus, target_is_directory=True)
    write_corpus(tmp_path / "out" / "documents", files=1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"output=.*; give "):
        prepared(corpus, tmp_path / output, input=str(tmp_path / given))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_beside_or_above_the_input_is_none_of_its_business(corpus: Path, tmp_path: Path) -> None:
    prepared(corpus, tmp_path / "in-2")
    prepared(corpus, tmp_path)


def test_perplexity_in_front_of_language_is_refused(corpus: Path, tmp_path: Path) -> None:
    for changes in ({"after": ["perplexity", "language"]}, {"before": ["perplexity"], "after": ["language"]}):
        with pytest.raises(ConfigError, match="put language in front of perplexity"):
            prepared(corpus, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_language_to_keep_that_no_model_grades_is_refused(corpus: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for name in ("en.sp.model", "en.arpa.gz"):
        (models / name).write_bytes(b"")
    record = {"format": 1, "newlines": "line", "percentiles": list(range(101))}
    (models / "en.ngrams.json").write_text(json.dumps(record))
    changes: dict[str, Any] = {
        "before": ["language"],
        "after": ["perplexity"],
        "filters": {"language": {"languages": ["de", "en"]}, "perplexity": {"models": str(models)}},
    }
    with pytest.raises(ConfigError, match=r"languages=\[de,en\]: .* of de, .*perplexity\.keep=\[head,middle,all\]"):
        prepared(corpus, tmp_path / "out", **changes)
    for keep, languages in ((["head", "all"], ["de", "en"]), (["head"], ["en"]), (["head"], [])):
        changes["filters"]["language"]["languages"] = languages
        changes["filters"]["perplexity"]["keep"] = keep
        prepare(settings_for(corpus, tmp_path / "out", **changes, dry_run=True))


def test_a_language_that_no_wikipedia_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<mediawiki/>")
    for read in ({"languages": ["english"]}, {"languages": ["EN"]}, {"language": "Deutsch"}):
        with pytest.raises(ConfigError, match=r"read\.languages: .* is no code of a Wikipedia"):
            prepared(tmp_path, tmp_path / "out", input=str(tmp_path / "a.xml"), reader="wikipedia", read=read)


def test_a_bad_tokenizer_is_found_first(corpus: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk.model"
    junk.write_bytes(b"junk" * 100)
    with pytest.raises(DataError, match=r"junk\.model: not a SentencePiece model"):
        prepared(corpus, tmp_path / "out", tokenizer=str(junk))
    assert not (tmp_path / "out").exists()


def test_a_stage_that_keeps_nothing_is_told_loudly(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"tests.data.toy_filters": {"min_characters": 10**6}}
    prepared(corpus, tmp_path / "out", filters=short)
    told = capsys.readouterr().err
    assert "WARNING" in told and "clean kept nothing: dropped short 40, redirect 2" in told
    assert "filter kept nothing" not in told  # it was given nothing


def test_units_that_keep_nothing_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "in", files=2)
    (corpus / "2.jsonl").write_text('{"drop": "redirect"}\n')
    prepared(corpus, tmp_path / "out", unit_bytes=1)
    printed = capsys.readouterr()
    assert "1 of 3 units kept nothing" in printed.out and "WARNING" not in printed.err


def test_a_data_card_of_what_is_made_again_goes(corpus: Path, tmp_path: Path) -> None:
    output = prepared(corpus, tmp_path / "out")
    data_card(DataCardSettings(output=str(output)))
    prepared(corpus, output, overwrite=True)
    assert (output / "data_card.html").exists()  # nothing is made again
    prepared(corpus, output, overwrite=True, dedup={"level": "document"})
    assert not (output / "data_card.html").exists() and not (output / "data_card.md").exists()


OWN = """
from dataclasses import dataclass
from data_tools.records import Dropped, Record

@dataclass
class OwnSettings:
    word: str = "none"

def read(path, name, settings: OwnSettings):
    for number, line in enumerate(path.read_text().splitlines()):
        yield Record(f"{settings.word} {line}", f"{name}:{number}", "own", {})

def own_filter(settings: OwnSettings):
    return lambda record: Dropped.of(record, "said") if settings.word in record.text else record
"""


def test_a_reader_and_filters_of_ones_own_take_their_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my" / "deep").mkdir(parents=True)
    for path in ("my/deep/tox.py", "alone.py"):
        (tmp_path / path).write_text(OWN)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("red\ngreen\nblue\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    output = tmp_path / "out"
    where = [f"input={tmp_path / 'in'}", f"output={output}", "name=mine", "workers=1"]
    for module in ("my.deep.tox", "alone"):
        done = command("source=own", *where, f"reader={module}", "read.word=a", f"after=[{module}]",
                       f"+filters.{module}.word=green", "overwrite=true")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert [document["text"] for document in documents_of(output)] == ["a red", "a blue"]
    done = command("source=plain", *where, "reader=alone")
    assert done.returncode == 2 and "read.format: there is no such setting" in done.stderr
    assert "source=own brings no settings of another reader" in done.stderr
    done = command("source=own", f"input={tmp_path / 'in'}", f"output={output}", "name=mine")
    assert done.returncode == 2 and "reader is not set" in done.stderr


def test_help_lists_what_to_choose_from_and_what_a_choice_sets() -> None:
    shown = command("--help")
    assert shown.returncode == 0
    assert "source=NAME, one of these" in shown.stdout and "  wikipedia      Wikipedia's pages-" in shown.stdout
    of_one = command("source=wikipedia", "-h").stdout
    assert "disambiguation_pages: false  # keep them" in of_one and "memory_bytes: 1073741824" in of_one
    bare = command()
    assert bare.returncode == 2 and "source is not set: source=NAME, one of arxiv, books" in bare.stderr
    typo = command("source=wikipdia").stderr
    assert "did you mean source=wikipedia? conf/data_tools/prepare/source has arxiv" in typo


def test_a_slurm_that_does_not_answer_gets_a_way_without_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'one line\\nand another\\nno controller\\n' >&2\nexit 1\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(NotSubmitted, match=r"^scontrol: no controller; .*executor=local, or stage=NAME part=I/N$"):
        prepared(corpus, tmp_path / "out", executor="slurm")


def test_a_full_disk_is_told_with_its_place(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: HashedFile, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(UnitsFailed, match=r"clean/00000: .*/out/clean: No space left on device: while unit 00000"):
        prepared(corpus, tmp_path / "out")
