"""The audit finds every single thing that does not add up, and names it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.audit import AuditFailed, AuditSettings, audit
from data_tools.engine.plan import read_plan
from data_tools.prepare import prepare
from tests.data.preparing import prepared, write_corpus

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    directory = tmp_path_factory.mktemp("audit")
    corpus = write_corpus(directory / "in", files=3)
    return prepared(corpus, directory / "out", unit_bytes=1, tokenizer=str(tiny_tokenizer))


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def change(output: Path, unit: str, alter: Callable[[dict[str, Any]], None]) -> None:
    path = output / "ledger" / f"{unit}.json"
    entry = json.loads(path.read_text())
    alter(entry)
    path.write_text(json.dumps(entry))


def found_wrong(output: Path, **changes: Any) -> str:
    with pytest.raises(AuditFailed) as caught:
        audit(AuditSettings(output=str(output), **changes))
    return str(caught.value)


def test_a_whole_preparation_passes(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit(AuditSettings(output=str(output), inputs=True))
    printed = capsys.readouterr().out
    assert "every document is accounted for" in printed and "tokens" in printed


@pytest.mark.parametrize("unit", ["clean/00001", "hash/00000", "mark/0000-00002", "filter/00002", "tokenize/all"])
def test_a_missing_unit_is_named(output: Path, unit: str) -> None:
    (output / "ledger" / f"{unit}.json").unlink()
    assert f"{unit}: missing" in found_wrong(output)


@pytest.mark.parametrize(
    "name",
    ["clean/00000.jsonl.zst", "hash/00001.hashes", "mark/0000-00000.marks", "documents/00002.jsonl.zst"],
)
def test_an_output_that_is_gone_short_or_altered_is_named(output: Path, name: str) -> None:
    path = output / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{name}: its content is not what the ledger says" in found_wrong(output)
    audit(AuditSettings(output=str(output), hashes=False))
    path.write_bytes(content[:-1])
    assert f"{name}: has {len(content) - 1:,} bytes" in found_wrong(output, hashes=False)
    path.unlink()
    assert f"{name}: cannot be read" in found_wrong(output)


def test_every_kind_of_gap_is_named(output: Path) -> None:
    def lose_a_document(entry: dict[str, Any]) -> None:
        entry["kept"]["documents"] -= 1

    def lose_on_the_way(entry: dict[str, Any]) -> None:
        entry["in"]["bytes"] -= 1
        entry["kept"]["bytes"] -= 1

    change(output, "clean/00000", lose_a_document)
    change(output, "filter/00001", lose_on_the_way)
    change(output, "clean/00002", lambda entry: entry.update(config_sha256="0" * 64))
    change(output, "tokenize/all", lambda entry: entry["facts"].update(read=entry["facts"]["read"] - 1))
    wrong = found_wrong(output)
    assert "clean/00000: does not add up: documents" in wrong
    assert "filter/00001: clean kept" in wrong
    assert "clean/00002: made with other settings or inputs" in wrong
    assert "tokenize/all:" in wrong and "tokenised" in wrong


def test_a_stage_that_was_made_again_without_those_after_it_is_named(output: Path) -> None:
    change(output, "clean/00000", lambda entry: entry["outputs"][0].update(sha256="0" * 64))
    wrong = found_wrong(output)
    assert "filter/00000: read another clean/00000.jsonl.zst than there is now" in wrong
    assert "hash/00000: read another clean/00000.jsonl.zst" in wrong


def test_input_files_read_twice_or_never_or_altered_are_named(output: Path) -> None:
    first = json.loads((output / "ledger" / "clean" / "00000.json").read_text())["inputs"]
    change(output, "clean/00001", lambda entry: entry.update(inputs=first))
    wrong = found_wrong(output)
    assert "0.jsonl: read by two units" in wrong
    assert "1.jsonl: an input file that no unit has read" in wrong
    change(output, "clean/00002", lambda entry: entry["inputs"][0].update(sha256="0" * 64))
    assert "2.jsonl: its content is not what the ledger says" in found_wrong(output, inputs=True)


def test_a_strange_file_among_the_documents_is_named(output: Path) -> None:
    (output / "documents" / "more.jsonl.zst").write_bytes(b"")
    assert "documents/more.jsonl.zst: no unit of filter wrote it" in found_wrong(output)


def test_a_file_that_could_not_be_read_fails_the_audit_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "in", files=2)
    with open(corpus / "1.jsonl", "a") as file:
        file.write('{"raise": true}\n')
    output = prepared(corpus, tmp_path / "out")
    command = [sys.executable, "-m", "data_tools.audit", f"output={output}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    entry = output / "ledger" / "clean" / "00000.json"
    assert f"could not be read: 1.jsonl: ends in the middle; get the file anew, remove {entry} and" in done.stderr
    audit(AuditSettings(output=str(output), allow_failed=True))
    assert "clean/00000: accepted, though not read to its end: 1.jsonl: ends" in capsys.readouterr().out
    restored = write_corpus(tmp_path / "again", files=2) / "1.jsonl"
    (corpus / "1.jsonl").write_bytes(restored.read_bytes())  # what the message says helps
    entry.unlink()
    audit(AuditSettings(output=str(prepared(corpus, output, overwrite=True))))


def test_what_the_audit_advises_mends_it(output: Path) -> None:
    for name in ("documents/00000.jsonl.zst", "clean/00001.jsonl.zst", "shards/train-00000.bin"):
        path = output / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    change(output, "clean/00002", lambda entry: entry["kept"].update(lines=0))
    wrong = found_wrong(output)
    assert len(re.findall(r"remove (\S+) and run prepare again", wrong)) >= 4
    for text in set(re.findall(r"remove (\S+) and run prepare again", wrong)):
        shutil.rmtree(text) if Path(text).is_dir() else Path(text).unlink()
    prepare(read_plan(output).settings)
    audit(AuditSettings(output=str(output)))


def test_too_few_documents_are_told_with_the_reasons(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", files=1)
    output = prepared(corpus, tmp_path / "out", filters={"tests.data.toy_filters": {"min_characters": 10**6}})
    audit(AuditSettings(output=str(output)))
    wrong = found_wrong(output, min_documents=1)
    assert "source toy: 0 documents kept, and min_documents=1 (clean: dropped short 20, redirect 1)" in wrong
