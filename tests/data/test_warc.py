"""Archives: every fault costs its record alone and is counted, and a file that is cut or damaged fails."""

import gzip
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.records import Record
from data_tools.sources import common_crawl
from data_tools.sources.warc import SEARCH_BYTES
from llamatrain.errors import DataError
from tests.data.wet_writer import (
    ANY_LENGTH,
    outcomes,
    read_pages,
    read_records,
    warc_page,
    warcinfo,
    wet_page,
    write_archive,
)

pytest.importorskip("fastwarc")
pytest.importorskip("resiliparse")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (wet_page("T", "Text.", length="abc"), "broken_header"),
        (wet_page("T", "Text.", length=-5), "broken_header"),
        (b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\nText.\r\n\r\n", "broken_header"),  # no length
        (wet_page("T", "Text.").partition(b"\r\n\r\n")[0] + b"\r\n", "broken_header"),  # cut off in its headers
        (b"what is this?\r\n\r\n", "broken_header"),
        (b"\0" * 100_000 + b"\r\n", "broken_header"),
        (b"WARC/1.0\r\nX: " + b"x" * 200_000 + b"\r\n\r\n\r\n\r\n", "broken_header"),
        (wet_page("T", "Too little is declared.", length=10), "broken_length"),
        (wet_page("T", "Too much is declared.", length=200), "broken_length"),
    ],
)
def test_a_broken_record_costs_itself_alone(tmp_path: Path, broken: bytes, reason: str) -> None:
    # fastwarc ends at most of these as if the file were complete, or goes over them in silence.
    for name in ("a.wet", "a.wet.gz"):
        found = read_records(tmp_path, wet_page("T", "Before."), broken, wet_page("T", "After."), name=name)
        if b"what" in broken or b"\0" in broken:  # of no record: nor can the end of the one before be relied on
            assert found == ["broken_length", "After."]
        else:
            assert found == ["Before.", reason, "After."]


def test_the_next_record_is_found_wherever_it_begins(tmp_path: Path) -> None:
    records = []
    for size in range(SEARCH_BYTES - 330, SEARCH_BYTES - 230):  # of blocks; the search begins before the headers
        records += [wet_page("T", "x" * size, length=10), wet_page("T", "After.")]
    assert read_records(tmp_path, *records) == ["broken_length", "After."] * 100


def test_line_ends_may_be_line_feeds_alone(tmp_path: Path) -> None:
    pages = [warcinfo(b"\n"), wet_page("T", "One.", line_end=b"\n"), wet_page("T", "Two.", line_end=b"\n")]
    assert read_records(tmp_path, *pages) == ["One.", "Two."]


def test_one_gzip_member_for_all_records_and_padding_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.wet.gz"
    path.write_bytes(gzip.compress(wet_page("T", "One.") + wet_page("T", "Two.")) + b"\0" * 512)
    assert outcomes(read_pages(path)) == ["One.", "Two."]


def test_too_large_a_record_is_passed_over_unread(tmp_path: Path) -> None:
    pages = [wet_page("T", "One."), wet_page("T", "x" * 3_000_000), wet_page("T", "Two.")]
    assert read_records(tmp_path, *pages, max_record_bytes=100_000) == ["One.", "too_large", "Two."]


@pytest.mark.parametrize("name", ["a.wet", "a.wet.gz", "a.wet.zst"])
def test_a_cut_file_gives_what_was_whole_and_fails(tmp_path: Path, name: str) -> None:
    texts = ["".join(random.Random(number).choices("abcdef", k=3000)) for number in range(200)]
    path = write_archive(tmp_path / name, warcinfo(), *[wet_page("T", text) for text in texts])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    found: list[str] = []
    with pytest.raises(DataError, match=name):
        found.extend(item.text for item in common_crawl.read(path, "f", ANY_LENGTH) if isinstance(item, Record))
    assert found == texts[: len(found)] and len(found) >= (150 if name.endswith("zst") else 178)


def test_a_damaged_file_fails(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.wet.gz", *[wet_page("T", f"Text {number}.") for number in range(3)])
    data = bytearray(path.read_bytes())
    data[-20] ^= 0xFF
    path.write_bytes(data)
    items = common_crawl.read(path, "f", ANY_LENGTH)
    assert [next(items).text for _ in range(2)] == ["Text 0.", "Text 1."]
    with pytest.raises(DataError, match=r"a\.wet\.gz: truncated or damaged"):
        list(items)


@pytest.mark.parametrize("data", [b"", b"\r\n\r\n", b"no archive\n" * 100_000, gzip.compress(b"")])
def test_a_file_that_is_no_archive_fails(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.wet").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.wet: (empty|not a web archive)"):
        read_pages(tmp_path / "a.wet")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_hides_a_page_or_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    pages = [wet_page("T", f"Text {number}.") for number in range(3)] + [
        warc_page(b"<html><body><p>Hello world.</p></body></html>")
    ]
    archive = bytearray(b"".join(pages))
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(archive) - 1))
        archive[begin : begin + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=8))
    path = tmp_path_factory.getbasetemp() / "damaged.warc"
    path.write_bytes(archive)
    items = []
    try:
        items = outcomes(read_pages(path))
    except DataError:
        return
    # A page whose record begins a line and is followed by a record is there.
    for page, text in zip(pages, ["Text 0.", "Text 1.", "Text 2.", "Hello world."], strict=True):
        if b"\n" + page + b"WARC/1.0\r\nWARC-Type" in b"\n" + archive:
            assert text in items
