"""From input files to documents and shards by the engine: all is accounted for, and the same however it goes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_tools.audit import AuditSettings, audit
from data_tools.dedup.lines import normalised_line
from data_tools.engine.executors import StageIncomplete, UnitsFailed, units_of_part
from data_tools.engine.ledger import gaps, read_stage, total
from data_tools.engine.plan import make_plan, read_plan
from data_tools.engine.slurm import array_tasks
from data_tools.engine.worker import work
from data_tools.prepare import prepare
from data_tools.records import Record
from llamatrain.data.shards import read_manifest
from llamatrain.errors import ConfigError, DataError
from tests.data.preparing import documents_of, files_of, prepared, settings_for, write_corpus
from tests.data.toy_filters import ToyFilterSettings, toy_filter


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "toy")


def texts_in(corpus: Path) -> list[str]:
    lines = [line for path in sorted(corpus.glob("*")) for line in path.read_text().splitlines()]
    return [content["text"] for line in lines if "text" in (content := json.loads(line))]


def quiet(text: str) -> str:
    record = toy_filter(ToyFilterSettings())(Record(text, "x", "toy"))
    assert isinstance(record, Record)
    return record.text


# ---------------------------------------------------------------------- the result


@pytest.mark.parametrize("policy", ["drop_all", "keep_first"])
def test_repeated_lines_go_as_by_a_dictionary_over_all_files(corpus: Path, tmp_path: Path, policy: str) -> None:
    output = prepared(corpus, tmp_path / "out", dedup={"level": "line", "policy": policy, "partitions": 3})
    pages = [quiet(text).split("\n") for text in texts_in(corpus)]
    counts = Counter(normalised_line(line) for page in pages for line in page)
    seen: set[str] = set()
    wanted = []
    for page in pages:
        kept = []
        for line in page:
            key = normalised_line(line)
            if counts[key] == 1 if policy == "drop_all" else key not in seen:
                kept.append(line)
            seen.add(key)
        wanted += ["\n".join(kept)] if "".join(kept).strip() else []
    assert [document["text"] for document in documents_of(output)] == wanted
    assert len(wanted) > 50


def test_repeated_documents_go_and_the_first_stays(corpus: Path, tmp_path: Path) -> None:
    output = prepared(corpus, tmp_path / "out", before=[], dedup={"level": "document"})
    assert [document["text"] for document in documents_of(output)] == list(dict.fromkeys(texts_in(corpus)))


def test_repeated_runs_of_three_sentences_go(tmp_path: Path) -> None:
    corpus = tmp_path / "in"
    corpus.mkdir()
    shared = "All rights are reserved. Do not copy this. Ask us first. "
    texts = [f"One is a number. {shared}It is the first.", f"{shared}Two is even.", "Ask us first. Nothing else."]
    (corpus / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = prepared(corpus, tmp_path / "out", before=[], dedup={"level": "span"})
    assert [document["text"] for document in documents_of(output)] == [texts[0], "Two is even.", texts[2]]


def test_copies_are_looked_for_within_a_group_only(corpus: Path, tmp_path: Path) -> None:
    scoped = {"level": "document", "scope": "files", "scope_files": 1}
    output = prepared(corpus, tmp_path / "files", before=[], dedup=scoped)
    wanted = []
    for path in sorted(corpus.glob("*")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        wanted += list(dict.fromkeys(line["text"] for line in lines if "text" in line))
    assert [document["text"] for document in documents_of(output)] == wanted
    assert len(wanted) > len(set(wanted))
    with pytest.raises(ConfigError, match=r"dedup\.dump_pattern"):
        prepared(corpus, tmp_path / "dump", dedup={"level": "line", "scope": "dump"})
    by_dump = {"level": "document", "scope": "dump", "dump_pattern": r"[0-2](?=\.jsonl)|[34]"}
    plan = make_plan(settings_for(corpus, tmp_path / "dump", dedup=by_dump, unit_bytes=1 << 30))
    assert [unit.files for unit in plan.stage("clean").units] == [(0,), (1,), (2,), (3,), (4,)]


def test_documents_that_are_nearly_the_same_go_and_the_longer_stays(tmp_path: Path) -> None:
    corpus = tmp_path / "in"
    corpus.mkdir()
    words = [f"word{number}" for number in range(3000)]
    texts = [" ".join(words[:2900]), " ".join(words), " ".join(reversed(words))]
    for number, text in enumerate(texts):
        (corpus / f"{number}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    output = prepared(corpus, tmp_path / "out", before=[], dedup={}, near_duplicates=True, unit_bytes=1)
    assert [document["text"] for document in documents_of(output)] == texts[1:]
    audit(AuditSettings(output=str(output)))


def test_documents_become_shards_and_the_chain_is_whole(
    corpus: Path, tmp_path: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = prepared(corpus, tmp_path / "out", tokenizer=str(tiny_tokenizer), tokenize={"validation_fraction": 0.1})
    manifest = read_manifest(output / "shards")
    assert manifest.documents["kept"] == len(documents_of(output))
    assert manifest.source == "toy" and manifest.tokens("validation") > 0
    audit(AuditSettings(output=str(output), inputs=True))
    assert "every document is accounted for" in capsys.readouterr().out


def test_a_tokenizer_may_come_later(
    corpus: Path, tmp_path: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = prepared(corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.zst")}
    prepared(corpus, output, tokenizer=str(tiny_tokenizer))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.zst")} == before
    assert files_of(output) == files_of(prepared(corpus, tmp_path / "fresh", tokenizer=str(tiny_tokenizer)))
    complete = files_of(output)
    assert files_of(prepared(corpus, output)) == complete  # asked for without one, it stays
    audit(AuditSettings(output=str(output)))


# ---------------------------------------------------------------------- the ledger


def test_every_unit_adds_up_and_tells_what_was_dropped_and_cut(corpus: Path, tmp_path: Path) -> None:
    output = prepared(corpus, tmp_path / "out")
    entries = read_stage(output, "clean")
    assert [entry["unit"] for entry in entries] == ["00000", "00001", "00002"]
    assert all(
        gaps(entry) == [] for stage in ("clean", "hash", "mark", "filter") for entry in read_stage(output, stage)
    )
    cleaned, filtered = total(entries), total(read_stage(output, "filter"))
    texts = texts_in(corpus)
    assert cleaned["in"]["documents"] == len(texts) + 5
    assert cleaned["dropped"]["redirect"]["documents"] == 5
    shouted = sum(text.count("Click here!") for text in texts)
    assert cleaned["counts"] == {"lines_shouted": shouted}
    assert cleaned["cut"]["tests.data.toy_filters"]["lines"] == shouted
    assert cleaned["kept"] == filtered["in"]
    assert filtered["dropped"].keys() == {"duplicate"}
    assert filtered["kept"]["bytes"] == sum(len(document["text"].encode()) for document in documents_of(output))
    assert filtered["counts"]["lines_duplicate"] > 0


def test_what_has_no_utf8_or_no_text_is_dropped_and_counted(tmp_path: Path) -> None:
    corpus = tmp_path / "in"
    corpus.mkdir()
    (corpus / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n{"text": ""}\n{"text": "whole"}\n')
    output = prepared(corpus, tmp_path / "out", before=[], dedup={})
    (entry,) = read_stage(output, "clean")
    assert {reason: counts["documents"] for reason, counts in entry["dropped"].items()} == {
        "empty": 1,
        "lone_surrogates": 1,
    }
    assert [document["text"] for document in documents_of(output)] == ["whole"]


def test_a_file_that_ends_in_the_middle_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", files=3)
    with open(corpus / "1.jsonl", "a") as file:
        file.write('{"raise": true}\n{"text": "never seen"}\n')
    output = prepared(corpus, tmp_path / "out")
    cleaned = total(read_stage(output, "clean"))
    assert cleaned["failed"] == [{"name": "1.jsonl", "error": "1.jsonl: ends in the middle"}]
    assert cleaned["in"]["documents"] == 63

    write_corpus(corpus, files=3)  # the file is fetched again
    with pytest.raises(DataError, match="other input files; set overwrite=true"):
        prepared(corpus, output)
    prepared(corpus, output, overwrite=True)
    assert files_of(output) == files_of(prepared(corpus, tmp_path / "fresh"))
    audit(AuditSettings(output=str(output), inputs=True))


def test_what_a_filter_cannot_do_is_not_blamed_on_the_input_file(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_HAS_NO_MODEL", "1")
    with pytest.raises(UnitsFailed, match=r"clean/00000: model\.bin: there is no model"):
        prepared(corpus, tmp_path / "out", before=["tests.data.deadly_filters"])
    assert read_stage(tmp_path / "out", "clean") == []


# ---------------------------------------------------------------------- going on


def test_any_number_of_processes_and_parts_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    one = files_of(prepared(corpus, tmp_path / "one"))
    assert files_of(prepared(corpus, tmp_path / "two", workers=2)) == one
    for stage in ("clean", "hash", "mark", "filter"):
        for part in ("1/2", "0/2"):
            prepared(corpus, tmp_path / "parts", stage=stage, part=part)
    assert files_of(tmp_path / "parts") == one


def test_a_finished_preparation_is_left_as_it_is(corpus: Path, tmp_path: Path) -> None:
    output = prepared(corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.zst")}
    prepared(corpus, output)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.zst")} == before


@pytest.mark.parametrize("stage", ["clean", "hash", "mark", "documents"])
def test_an_output_that_is_cut_short_or_gone_is_made_again(corpus: Path, tmp_path: Path, stage: str) -> None:
    output = prepared(corpus, tmp_path / "out")
    whole = files_of(output)
    first, second, *_ = sorted((output / stage).glob("*"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    prepared(corpus, output)
    assert files_of(output) == whole


def test_an_output_whose_content_changed_is_refused_by_who_reads_it(corpus: Path, tmp_path: Path) -> None:
    output = prepared(corpus, tmp_path / "out")
    path = output / "clean" / "00001.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    (output / "ledger" / "filter" / "00001.json").unlink()
    with pytest.raises(UnitsFailed, match=r"filter/00001: .*clean/00001\.jsonl\.zst: damaged"):
        prepared(corpus, output)


def test_what_is_made_of_an_output_that_has_another_content_now_is_made_again(corpus: Path, tmp_path: Path) -> None:
    output = prepared(corpus, tmp_path / "out")
    whole = files_of(output)
    path = output / "ledger" / "clean" / "00001.json"
    entry = json.loads(path.read_text())
    entry["outputs"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(entry))  # the hashes are there, but not of this
    with pytest.raises(UnitsFailed, match=r"hash/00001: .*damaged since it was written"):
        prepared(corpus, output)
    path.unlink()
    prepared(corpus, output)
    assert files_of(output) == whole


def test_left_overs_of_killed_processes_go(corpus: Path, tmp_path: Path) -> None:
    left = tmp_path / "out" / "clean" / ".00000.jsonl.zst.999999.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    prepared(corpus, tmp_path / "out")
    assert not left.exists()


def test_other_settings_are_refused_and_with_overwrite_redo_only_what_they_change(corpus: Path, tmp_path: Path) -> None:
    output = prepared(corpus, tmp_path / "out")
    early = {path: path.stat().st_mtime_ns for path in (output / "clean").glob("*")}
    changed: dict[str, Any] = {"after": ["tests.data.toy_filters"], "before": []}
    late: dict[str, Any] = {"dedup": {"level": "line", "policy": "keep_first", "partitions": 2}}
    with pytest.raises(DataError, match=r"other settings for mark.*overwrite=true"):
        prepared(corpus, output, **late)
    with pytest.raises(DataError, match="other settings for clean"):
        prepared(corpus, output, **changed)
    prepared(corpus, output, **late, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in (output / "clean").glob("*")} == early
    assert files_of(output) == files_of(prepared(corpus, tmp_path / "fresh", **late))
    prepared(corpus, output, before=[], dedup={}, overwrite=True)  # one stage, which writes to documents
    assert files_of(output) == files_of(prepared(corpus, tmp_path / "short", before=[], dedup={}))


def test_a_defect_in_one_unit_is_told_and_the_other_units_are_made(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", files=3)
    with open(corpus / "1.jsonl", "a") as file:
        file.write('{"crash": true}\n')
    with pytest.raises(UnitsFailed, match=r"1 of 3 units of clean(.|\n)*clean/00001(.|\n)*a defect"):
        prepared(corpus, tmp_path / "out", unit_bytes=1)
    assert [entry["unit"] for entry in read_stage(tmp_path / "out", "clean")] == ["00000", "00002"]


def test_a_process_that_dies_is_told_with_the_units_at_work(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_DIES", "1")
    changes: dict[str, Any] = {"before": ["tests.data.deadly_filters"], "workers": 2}
    with pytest.raises(UnitsFailed, match=r"a process of stage clean died.* 0000"):
        prepared(corpus, tmp_path / "out", **changes)
    monkeypatch.delenv("TOY_DIES")
    prepared(corpus, tmp_path / "out", **changes)
    assert files_of(tmp_path / "out") == files_of(prepared(corpus, tmp_path / "calm", **changes | {"workers": 1}))


def test_a_worker_waits_for_the_stages_before_its_own(corpus: Path, tmp_path: Path) -> None:
    output = prepared(corpus, tmp_path / "out", slurm={"patience_s": 0})
    (output / "ledger" / "hash" / "00002.json").unlink()
    with pytest.raises(StageIncomplete, match="hash is not complete: 00002 missing"):
        work(output, "mark", (0, 1), workers=1)
    with pytest.raises(StageIncomplete, match="hash is not complete"):
        prepared(corpus, output, stage="mark")
    work(output, "hash", (0, 1), workers=1)
    work(output, "mark", (0, 1), workers=1)


# ---------------------------------------------------------------------- the plan


def test_units_are_cut_by_bytes_and_a_large_file_is_one_by_itself(tmp_path: Path) -> None:
    corpus = tmp_path / "in"
    corpus.mkdir()
    for name, size in (("a", 10), ("b", 10), ("c", 100), ("d", 10), ("e", 20)):
        (corpus / f"{name}.jsonl").write_bytes(b"x" * size)
    (corpus / "notes.md").write_text("left out")
    plan = make_plan(settings_for(corpus, tmp_path / "out", unit_bytes=30))
    assert [unit.files for unit in plan.stage("clean").units] == [(0, 1), (2,), (3, 4)]
    assert [file.name for file in plan.files] == ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl", "e.jsonl"]
    parts = [unit.id for part in range(2) for unit in units_of_part(plan.stage("clean"), (part, 2))]
    assert sorted(parts) == ["00000", "00001", "00002"]


def test_the_plan_lies_on_disk_once_and_is_read_as_it_was(corpus: Path, tmp_path: Path) -> None:
    output = prepared(corpus, tmp_path / "out")
    plan = make_plan(settings_for(corpus, output))
    assert read_plan(output).as_json() == plan.as_json()
    content = (output / "plan.json").read_text()
    assert str(tmp_path) not in content and str(corpus) not in content
    (output / "plan.json").write_text(content.replace('"number": 1', '"number": 2', 1))
    with pytest.raises(DataError, match="do not fit together"):
        read_plan(output)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_corpus(tmp_path / name, files=1)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(DataError, match=r"two files are named 0\.jsonl"):
        prepare(settings_for(tmp_path / "a", tmp_path / "out", input=both))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reader": "gopher"}, "reader: there is no gopher; choose of"),
        ({"read": {"repaet": 2}}, r"read\.repaet: there is no such setting; did you mean repeat"),
        ({"before": ["gopher"]}, "filters: there is no gopher"),
        ({"filters": {"langauge": {}}}, "filters: there is no langauge"),
        ({"filters": {"language": {"treshold": 0.5}}}, r"filters\.language\.treshold: there is no such setting"),
        ({"dedup": {"level": "page"}}, r"dedup\.level=page: choose one of"),
        ({"dedup": {"level": "document", "key": "digest"}}, r"dedup\.key=digest"),
        ({"part": "1/2"}, r"part=1/2: say of which stage"),
        ({"part": "2/2", "stage": "clean"}, r"part=2/2: write it as I/N"),
        ({"stage": "clear"}, r"stage=clear: the plan has no such stage; choose of clean, hash, mark, filter"),
        ({"workers": 0}, "workers=0"),
        ({"memory_bytes": 10}, "memory_bytes=10: must be at least 1000"),
        ({"executor": "ray"}, "executor=ray: choose one of local, slurm"),
        ({"tokenizer": "gone.model"}, "gone.model: cannot be read"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        prepared(corpus, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_arrays_stay_within_the_clusters_limit() -> None:
    assert array_tasks(9000, 200, 1001) == 200
    assert array_tasks(9000, 5000, 1001) == 1001
    assert array_tasks(3, 200, 1001) == 3
