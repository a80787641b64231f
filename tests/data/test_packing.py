"""A file that its name calls compressed and that is not fails, whatever reads it: a server's error page saved under
the name of a dump is no text to learn from."""

import bz2
import gzip
import lzma
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_tools.engine.components import reader_of
from llamatrain.errors import DataError

ERROR_PAGE = b"<html><head><title>503 Service Unavailable</title></head><body>Come back later.</body></html>\n"


def read_all(reader: str, path: Path) -> list[Any]:
    return list(reader_of(reader, {}).read(path, path.name))


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        ("plain", "a.txt.gz"),
        ("plain", "b.jsonl.gz"),
        ("plain", "c.txt.zst"),
        ("c4", "b.json.gz"),
        ("books", "a.txt.gz"),
        ("books", "a.txt.bz2"),
        ("books", "b.jsonl.zst"),
        ("books", "b.tar.xz"),
        ("github", "b.jsonl.gz"),
        ("github", "b.tgz"),
        ("common_crawl", "a.warc.gz"),
        ("wikipedia", "enwiki.xml.bz2"),
    ],
)
@pytest.mark.parametrize("content", [ERROR_PAGE, b"\x8f\x03 random \xff\xfe", b""])
def test_a_file_that_is_not_what_its_name_says_fails(tmp_path: Path, reader: str, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_all(reader, path)


def test_the_failure_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(ERROR_PAGE)
    with pytest.raises(DataError, match=r"a\.txt\.gz: its name says compressed.* copy it again, or take \.gz off"):
        read_all("plain", path)


TEXT = b"A novel of some words."
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18\x04\x00\x00\x00" + bytes(4)  # what pzstd writes first
PACKED = {
    "gzip": gzip.compress(TEXT),
    "bz2": bz2.compress(TEXT),
    "xz": lzma.compress(TEXT),
    "zstd": zstandard.ZstdCompressor().compress(TEXT),
    "pzstd": SKIPPABLE_FRAME + zstandard.ZstdCompressor().compress(TEXT),
}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize(("reader", "name"), [("plain", "a.txt.gz"), ("plain", "a.txt"), ("books", "a.txt.zst")])
def test_any_packing_is_known_by_its_content(tmp_path: Path, packing: str, reader: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PACKED[packing])
    assert [record.text for record in read_all(reader, path)] == [TEXT.decode()]


def test_a_text_that_begins_as_bz2_does_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("BZh is what such files begin with.")
    assert [record.text for record in read_all("plain", path)] == [path.read_text()]


@pytest.mark.parametrize("packing", PACKED)
def test_of_several_packed_one_after_the_other_all_are_read(tmp_path: Path, packing: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(3 * PACKED[packing])
    assert [record.text for record in read_all("plain", path)] == [3 * TEXT.decode()]


@pytest.mark.parametrize("packing", ["gzip", "bz2", "xz", "zstd"])
def test_damage_where_a_second_one_begins_fails(tmp_path: Path, packing: str) -> None:
    """Python's own readers of bz2 and xz take it for the end of the file."""
    path = tmp_path / "a.txt"
    path.write_bytes(PACKED[packing] + b"\xff" + PACKED[packing][1:])
    with pytest.raises(DataError, match="truncated or damaged"):
        read_all("plain", path)


@pytest.mark.parametrize("packing", PACKED)
def test_a_packed_file_that_is_cut_fails(tmp_path: Path, packing: str) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(PACKED[packing][:-3])
    with pytest.raises(DataError, match="truncated or damaged"):
        read_all("plain", path)
