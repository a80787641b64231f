"""Documents of JSON lines, text, Parquet and ready C4: broken ones are dropped and counted, broken files fail."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_tools.records import Dropped, Record
from data_tools.sources import c4, plain
from data_tools.sources.plain import PlainSettings
from data_tools.sources.streams import bounded_parts
from llamatrain.errors import ConfigError, DataError
from tests.real_text import needed_data

PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(path: Path, **changes: object) -> list[Record | Dropped]:
    return list(plain.read(path, "some/file", replace(PlainSettings(), **changes)))  # type: ignore[arg-type]


def outcomes(items: list[Record | Dropped]) -> list[str]:
    return [item.text if isinstance(item, Record) else item.reason for item in items]


@pytest.mark.parametrize("packing", PACKINGS)
def test_json_lines_are_read_with_what_is_known_of_them(tmp_path: Path, packing: str) -> None:
    lines = [{"text": "One.", "url": "http://a/", "id": 7, "lang": "fr"}, {"text": "Two é.", "other": 1}]
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACKINGS[packing]("\n".join(map(json.dumps, lines)).encode()))
    first, second = read(path, language_field="lang")
    assert first == Record("One.", "some/file:1", "plain", {"id": "7", "url": "http://a/"}, language="fr")
    assert second == Record("Two é.", "some/file:2", "plain")


def test_a_broken_line_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": \n[1]\n{"txt": "a"}\n{"text": 3}\n{"text": "\\ud800"}\n{"text": "\xff"}\n'
        b'{"text": " \\n"}\n\n{"text": "' + b"x" * 100 + b'"}\n{"text": "end"}'
    )
    assert outcomes(read(path, max_document_bytes=60)) == [
        "good",
        "broken_json",
        "broken_json",
        "missing_text",
        "missing_text",
        "broken_encoding",
        "broken_json",
        "empty",
        "too_large",
        "end",
    ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_a_cut_file_gives_what_was_whole_and_fails(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = b"".join(b'{"text": "%d"}\n' % (number**5 % 999_983) for number in range(20_000))
    data = PACKINGS[path.suffix](lines)
    path.write_bytes(data[: len(data) * 9 // 10])
    items = plain.read(path, "f", PlainSettings(document_separator="\n"))
    first = [next(items) for _ in range(5000)]
    assert all(isinstance(item, Record) for item in first)
    with pytest.raises(DataError, match=name):
        list(items)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_text_file_is_a_document(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACKINGS[packing]("\ufeffOne.\n\nTwo é.\n".encode()))
    assert read(path) == [Record("One.\n\nTwo é.\n", "some/file", "plain")]


def test_a_text_file_is_parted_and_a_broken_part_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"One.<|end|>\xff\xfe<|end|>  <|end|>" + b"x" * 100 + b"<|end|>Two.<|end|>")
    items = read(path, document_separator="<|end|>", max_document_bytes=50)
    assert outcomes(items) == ["One.", "broken_encoding", "empty", "too_large", "Two."]
    assert [item.id for item in items] == [f"some/file#{number}" for number in range(5)]
    assert [item.bytes for item in items if isinstance(item, Dropped)] == [2, 2, 100]


@given(
    st.lists(st.binary(max_size=12), max_size=8), st.sampled_from([b"a", b"ab", b"aba"]), st.integers(1, 8), st.data()
)
def test_parts_are_those_of_split_wherever_the_chunks_end(
    parts: list[bytes], separator: bytes, max_bytes: int, data: st.DataObject
) -> None:
    whole = separator.join(parts)
    chunks, rest = [], whole
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        chunks.append(rest[:cut])
        rest = rest[cut:]
    expected = whole.split(separator)
    if not expected[-1]:
        expected.pop()
    assert list(bounded_parts(iter(chunks), separator, max_bytes=max_bytes)) == [
        (part[:max_bytes], len(part)) for part in expected
    ]


def test_parquet_is_read_by_its_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    day = datetime(2024, 5, 18, 1, 58, 10)  # as Parquet files often have it
    table = pa.table(
        {"text": ["One.", None, " "], "url": ["http://a/", "b", "c"], "date": [day] * 3, "x": [[1], [], []]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    first, *others = read(tmp_path / "a.parquet")
    assert first == Record("One.", "some/file:0", "plain", {"url": "http://a/", "date": "2024-05-18T01:58:10"})
    assert outcomes(others) == ["missing_text", "empty"]


def test_a_text_of_parquet_that_is_no_utf8_is_dropped_alone(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    buffers = pa.array([b"good", b"\xff\xfe", b"end"], pa.binary()).buffers()
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, buffers)}), tmp_path / "a.parquet")
    assert outcomes(read(tmp_path / "a.parquet")) == ["good", "broken_encoding", "end"]


def test_a_cut_or_damaged_parquet_file_fails(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {number}" for number in range(1000)]}), path, write_page_checksum=True)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: truncated or damaged"):
        read(path)
    path.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    with pytest.raises(DataError, match=r"a\.parquet: truncated or damaged"):
        read(path)


def test_an_error_of_the_machine_is_not_the_file_s_fault(tmp_path: Path) -> None:
    for name in ("a.txt", "a.parquet"):
        with pytest.raises(OSError):
            read(tmp_path / name)


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for changes in ({"format": "csv"}, {"text_field": ""}, {"document_separator": ""}, {"max_document_bytes": 0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            read(tmp_path, **changes)


def test_ready_c4_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "c4-train.00000-of-01024.json.gz"
    page = {"text": "Beginners BBQ.\nDo you want more?", "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.com/"}
    path.write_bytes(gzip.compress((json.dumps(page) + "\n{broken\n").encode()))
    record, broken = c4.read(path, "en/c4.json.gz", c4.C4ReaderSettings())
    provenance = {"url": "https://a.com/", "timestamp": "2019-04-25T12:57:54Z"}
    assert record == Record(page["text"], "en/c4.json.gz:1", "c4", provenance, language="en")
    assert isinstance(broken, Dropped) and broken.reason == "broken_json"


def test_real_documents_are_all_read() -> None:
    data = needed_data()
    records = [
        item
        for path in sorted((data / "raw" / "jsonl").iterdir())
        for item in plain.read(path, path.name, PlainSettings())
    ]
    assert len(records) == 161
    assert all(isinstance(record, Record) for record in records)
    assert len({record.id for record in records}) == len(records)
