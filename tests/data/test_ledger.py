"""The ledger: what is counted adds up, and neither order nor the number of units changes what is told."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.engine.ledger import (
    NOT_POSITIVE,
    SAMPLES,
    Size,
    Tally,
    character_bin,
    entry_path,
    gaps,
    read_entry,
    read_stage,
    score_bin,
    size_of,
    total,
    write_entry,
)
from data_tools.records import SAMPLE_CHARACTERS, Dropped, Record
from llamatrain.errors import DataError


def entry_of(tally: Tally, unit: str = "00000") -> dict[str, Any]:
    return {"format": 1, "stage": "clean", "unit": unit, "inputs": [], "outputs": [], **tally.as_json()}


def pass_through(tally: Tally, record: Record, *, min_characters: int = 5) -> None:
    """A filter that takes shouting lines out, and drops what is short then."""
    before = size_of(record.text)
    tally.enter(before)
    record.text = "\n".join(line for line in record.text.split("\n") if not line.endswith("!"))
    after = size_of(record.text)
    tally.cut("shouting", before, after)
    if len(record.text) < min_characters:
        tally.drop(Dropped.of(record, "short"), after, record)
    else:
        tally.keep(record, after)


TEXTS = st.lists(st.text(st.sampled_from("aé😀!\n\ud800"), max_size=20), max_size=20)


@given(texts=TEXTS)
def test_in_is_kept_dropped_and_cut_for_any_texts(texts: list[str]) -> None:
    tally = Tally()
    for number, text in enumerate(texts):
        pass_through(tally, Record(text, str(number), "x"))
    entry = entry_of(tally)
    assert gaps(entry) == []
    assert entry["in"]["documents"] == len(texts)
    assert entry["in"]["bytes"] == sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    json.dumps(entry, ensure_ascii=False).encode()  # it has UTF-8, whatever the texts had


def test_a_gap_is_told_in_words() -> None:
    tally = Tally()
    tally.enter(Size(lines=1, bytes=10))
    assert gaps(entry_of(tally)) == [
        "documents: 1 in, 0 kept, dropped and cut",
        "lines: 1 in, 0 kept, dropped and cut",
        "bytes: 10 in, 0 kept, dropped and cut",
    ]


@given(texts=TEXTS, seed=st.integers(0, 9), cut=st.integers(0, 20))
def test_neither_order_nor_the_cut_into_units_changes_the_total(texts: list[str], seed: int, cut: int) -> None:
    records = [Record(text, str(number), "x", scores={"quality": 0.5}) for number, text in enumerate(texts)]
    whole = Tally()
    for record in records:
        pass_through(whole, dataclasses.replace(record))
    random.Random(seed).shuffle(records)
    parts = [Tally(), Tally()]
    for number, record in enumerate(records):
        pass_through(parts[number >= cut], dataclasses.replace(record))
    together = total([entry_of(part) for part in parts])
    alone = total([entry_of(whole)])
    assert json.dumps({**together, "units": 1}, sort_keys=True) == json.dumps(alone, sort_keys=True)


def test_samples_are_few_short_and_the_same_in_any_order() -> None:
    records = [Record(f"text {number} " * 200, f"id-{number}", "x") for number in range(100)]
    found = []
    for seed in range(2):
        tally = Tally()
        for record in random.Random(seed).sample(records, len(records)):
            tally.drop(Dropped.of(record, "dull"), size_of(record.text), record)
        found.append(tally.as_json()["samples"])
    assert found[0] == found[1]
    samples = found[0]["dropped"]["dull"]
    assert len(samples) == SAMPLES and all(len(sample["text"]) == SAMPLE_CHARACTERS for sample in samples)


def test_bins_are_those_the_format_names() -> None:
    assert [character_bin(length) for length in (0, 1, 2, 3, 4, 1023, 1024)] == [0, 1, 2, 2, 3, 10, 11]
    assert [score_bin("quality", value) for value in (0.0, 0.019, 0.02, 0.99, 1.0, 1.02)] == [0, 0, 1, 49, 49, 51]
    assert [score_bin("perplexity", value) for value in (1.0, 2.0, 340.0, 0.0, float("inf"))] == [
        0,
        4,
        33,
        NOT_POSITIVE,
        NOT_POSITIVE,
    ]
    tally = Tally()
    for text, language in (("", None), ("abc", "en"), ("abcd", "en")):
        tally.keep(Record(text, "x", "x", language=language, scores={"perplexity": 340.0}), size_of(text))
    assert tally.as_json()["histograms"]["kept"] == {
        "characters": {"0": 1, "2": 1, "3": 1},
        "languages": {"en": 2, "unknown": 1},
        "scores": {"perplexity": {"scale": "log", "bins": {"33": 3}}},
    }


def test_entries_are_read_in_order_and_a_broken_one_is_named(tmp_path: Path) -> None:
    for unit in ("00001", "00000"):
        write_entry(tmp_path, entry_of(Tally(), unit))
    assert [entry["unit"] for entry in read_stage(tmp_path, "clean")] == ["00000", "00001"]
    path = entry_path(tmp_path, "clean", "00000")
    for content in (b"", b"{}", b"[1]", path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"clean/00000\.json"):
            read_entry(path)
