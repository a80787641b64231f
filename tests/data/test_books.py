"""Books: Project Gutenberg's wrappers of every generation, archives, encodings, damage."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.cleaning.gutenberg import unwrap
from data_tools.records import Dropped, Record
from data_tools.sources import packed
from data_tools.sources.books import BooksSettings, read
from llamatrain.errors import DataError
from tests.real_text import needed_data, novels

SETTINGS = BooksSettings()
BOOK = "THE WHALE\n\nby Somebody\n\n\nCHAPTER I\n\n" + "Call me somebody.  I went to sea.\n\n" * 30 + "THE END"
LICENCE = (
    "\n\n*** START: FULL LICENSE ***\n\nTHE FULL PROJECT GUTENBERG LICENSE\n" + "1.A. By reading any part …\n" * 400
)
SMALL_PRINT = (
    "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\n"
    + 'Why is this "Small Print!" statement here?  You know: lawyers.\n' * 100
    + "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n\n"
)

HEADERS = {
    "today": "The Project Gutenberg eBook of The Whale\n\nThis ebook is for …\n\nTitle: The Whale\n\n"
    "Author: Somebody\n\nLanguage: English\n\n*** START OF THE PROJECT GUTENBERG EBOOK THE WHALE ***\n\n\n\n\n",
    "this": "Project Gutenberg's The Whale\n\n*** START OF THIS PROJECT GUTENBERG EBOOK THE WHALE ***\n\n",
    "no blank": "The Project Gutenberg Etext\n\n***START OF THE PROJECT GUTENBERG EBOOK, THE WHALE***\n\n",
    "etext": "The Project Gutenberg Etext\n\n*** START OF THE PROJECT GUTENBERG ETEXT THE WHALE ***\n",
    "copyrighted": "Gutenberg\n\n*** START OF THE COPYRIGHTED PROJECT GUTENBERG EBOOK, THE WHALE ***\n\n",
    "two lines": "A Gutenberg text\n\n*** START OF THE PROJECT GUTENBERG EBOOK THE WHALE; OR,\nTHE SEA, VOL. I ***\n\n",
    "no closing stars": "The Project Gutenberg\n\n***START OF THE PROJECT GUTENBERG EBOOK THE WHALE\n\n",
    "credits": "The Project Gutenberg\n\n*** START OF THIS PROJECT GUTENBERG EBOOK THE WHALE ***\n\n\n"
    "Produced by A. Person and the Online Distributed\nProofreading Team at https://www.pgdp.net\n\n\n",
    "e-text": "The Project Gutenberg\n\n***START OF THE PROJECT GUTENBERG EBOOK THE WHALE***\n\n\n"
    "E-text prepared by A. Person\n\n\nTranscribed from the 1851 edition by B. Person, email b@example.org\n\n\n",
    "small print": "**The Project Gutenberg Etext of The Whale, by Somebody**\n\n**Welcome To The World of Free Plain "
    "Vanilla Electronic Texts**\n\n" + SMALL_PRINT,
    "small print, then start": "The Project Gutenberg Etext\n\n"
    + SMALL_PRINT
    + "*** START OF THE PROJECT GUTENBERG EBOOK THE WHALE ***\n\nThis etext was prepared by A. Person.\n\n\n",
}
FOOTERS = {
    "today": "\n\n\n*** END OF THE PROJECT GUTENBERG EBOOK THE WHALE ***\n\nUpdated editions …" + LICENCE,
    "this": "\n\n*** END OF THIS PROJECT GUTENBERG EBOOK THE WHALE ***\n" + LICENCE,
    "in words too": "\n\n\nEnd of Project Gutenberg's The Whale\n\n*** END OF THIS PROJECT GUTENBERG EBOOK ***"
    + LICENCE,
    "ebook of": "\n\n\nEnd of the Project Gutenberg EBook of The Whale,\nby X\n\n***END OF THE PROJECT GUTENBERG",
    "in words only": "\n\n\nEnd of the Project Gutenberg Etext of The Whale\n",
    "capitals": "\n\nEND OF THE PROJECT GUTENBERG ETEXT OF THE WHALE\n\n",
    "stars": "\n\n***The Project Gutenberg's Etext***\n\n*** END OF THE PROJECT GUTENBERG ETEXT ***\n".replace(
        "***The Project Gutenberg's Etext***\n\n", ""
    ),
    "german": '\n\nEnde dieses Projekt Gutenberg Etextes "Der Wal"\n',
    "licence only": LICENCE,
    "small print behind": "\n\n*** END OF THE PROJECT GUTENBERG EBOOK, THE WHALE ***\n\n" + SMALL_PRINT,
}


def books(path: Path, settings: BooksSettings = SETTINGS, name: str | None = None) -> list[Record | Dropped]:
    return list(read(path, name or path.name, settings))


def texts(path: Path) -> list[str]:
    return [book.text for book in books(path) if isinstance(book, Record)]


def reasons(path: Path, settings: BooksSettings = SETTINGS) -> dict[str, str]:
    return {book.id: book.reason for book in books(path, settings) if isinstance(book, Dropped)}


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


# Project Gutenberg


@pytest.mark.parametrize("header", HEADERS)
def test_every_header_goes_and_the_book_stays(header: str) -> None:
    found = unwrap(HEADERS[header] + BOOK + FOOTERS["today"])
    assert found.text == BOOK
    assert found.header and found.footer and not found.left_over


@pytest.mark.parametrize("footer", FOOTERS)
def test_every_footer_goes_and_the_book_stays(footer: str) -> None:
    found = unwrap(HEADERS["today"] + BOOK + FOOTERS[footer])
    assert found.text == BOOK
    assert found.header and found.footer


def test_small_print_behind_a_short_poem_is_no_header() -> None:
    poem = (
        "The Project Gutenberg Etext\n\n*** START OF THE PROJECT GUTENBERG EBOOK, POEM ***\n\nO sea!\n\n" + "la\n" * 200
    )
    assert unwrap(poem + SMALL_PRINT).text == "O sea!\n\n" + ("la\n" * 200).strip()


def test_several_books_in_a_file_lose_what_stands_between_them() -> None:
    one = HEADERS["this"] + BOOK + FOOTERS["in words too"]
    other = HEADERS["credits"] + BOOK.replace("WHALE", "SHARK") + FOOTERS["today"]
    assert unwrap(one + "\n\n" + other).text == BOOK + "\n\n\n" + BOOK.replace("WHALE", "SHARK")


def test_a_header_without_a_mark_stays_whole_and_is_counted() -> None:
    text = "The Project Gutenberg Etext of The Whale\n\n" + BOOK
    found = unwrap(text)
    assert found.text == text and found.left_over and not found.header


def test_other_books_are_not_touched() -> None:
    about = BOOK.replace("I went to sea.", "He read it on Project Gutenberg.", 1) + "\n\n*** END OF PART ONE ***\n"
    for text in (BOOK, about, "Produced by a hen.\n\n" + BOOK, ""):
        assert unwrap(text).text == text


@settings(deadline=None)
@given(st.text(alphabet="ab *\n.É", max_size=400))
def test_whatever_lies_between_the_marks_comes_back(book: str) -> None:
    wrapped = HEADERS["this"] + book + FOOTERS["in words too"]
    assert unwrap(wrapped).text.strip("\n ") == book.strip("\n ")


def test_title_author_and_language_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "whale.txt"
    path.write_text(HEADERS["today"] + BOOK + "\nAuthor: not me\n" + FOOTERS["today"])
    (book,) = books(path, name="pg/whale.txt")
    assert isinstance(book, Record)
    assert book.id == "pg/whale.txt" and book.source == "books" and book.language == "en"
    assert book.provenance == {"file": "pg/whale.txt", "title": "The Whale", "author": "Somebody"}
    assert book.counts == {"gutenberg_headers": 1, "gutenberg_footers": 1}


# Encodings


def test_encodings_and_line_ends(tmp_path: Path) -> None:
    book = "Café “sea”\n\nœuvre – 5 £\n"
    cases: dict[str, tuple[bytes, dict[str, int]]] = {
        "utf8.txt": (book.encode(), {}),
        "bom_crlf.txt": (b"\xef\xbb\xbf" + book.replace("\n", "\r\n").encode(), {}),
        "mac.txt": (book.replace("\n", "\r").encode(), {}),
        "windows.txt": (book.encode("cp1252"), {"windows_1252": 1}),
        "utf16.txt": (book.encode("utf-16"), {}),
    }
    for name, (content, counts) in cases.items():
        (tmp_path / name).write_bytes(content)
        (found,) = books(tmp_path / name)
        assert isinstance(found, Record)
        assert (found.text, found.counts) == (book.strip(), counts), name
    (tmp_path / "latin.txt").write_bytes("Café du matin\x81".encode("latin-1"))
    assert texts(tmp_path / "latin.txt") == ["Café du matin\x81"]


def test_what_is_no_book_is_dropped_with_its_reason(tmp_path: Path) -> None:
    cases = {"a.txt": (b"a\0b", "binary"), "b.txt": (b"", "empty"), "c.txt": (b" \n\xef\xbb\xbf".strip(), "empty")}
    cases |= {
        "README.txt": (b"about", "catalogue"),
        "d.txt": (b"short", "too_short"),
        "e.txt": (b"x" * 999, "too_large"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        settings = BooksSettings(min_characters=6, max_document_bytes=900)
        assert reasons(tmp_path / name, settings) == {name: reason}


# Archives


def packings() -> dict[str, Callable[[bytes], bytes]]:
    return {
        ".tar": lambda content: content,
        ".tar.gz": gzip.compress,
        ".tar.bz2": bz2.compress,
        ".tar.xz": lzma.compress,
        ".tar.zst": zstandard.ZstdCompressor().compress,
    }


@pytest.mark.parametrize("suffix", packings())
def test_books_out_of_a_tar(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"books{suffix}"
    content = tar_of({"a/1.txt": b"first", "a/metadata.csv": b"1,2", "a/2.txt": b"second", "../3.txt": b"outside"})
    path.write_bytes(packings()[suffix](content))
    assert texts(path) == ["first", "second"]
    assert reasons(path) == {f"{path.name}/a/metadata.csv": "extension", f"{path.name}/../3.txt": "unsafe_path"}


@pytest.mark.parametrize("suffix", packings())
def test_a_truncated_tar_gives_what_was_whole_and_then_fails(tmp_path: Path, suffix: str) -> None:
    noise = [random.Random(number).randbytes(200_000) for number in range(3)]
    content = tar_of({f"{number}.txt": book for number, book in enumerate(noise)})
    path = tmp_path / f"books{suffix}"
    whole = packings()[suffix](content)
    path.write_bytes(whole[: len(whole) * 9 // 10])
    found = []
    with pytest.raises(DataError, match="copy it again"):
        found.extend(read(path, path.name, SETTINGS))
    assert len(found) <= 2
    assert suffix != ".tar" or len(found) == 2


@pytest.mark.parametrize("place", [200_704, 200_704 + 512])
def test_a_tar_that_ends_or_breaks_between_two_books_is_not_taken_for_whole(tmp_path: Path, place: int) -> None:
    """Python's tarfile takes both for the end of the archive, without a word."""
    content = tar_of({"1.txt": b"a" * 200_000, "2.txt": b"b" * 200_000})
    path = tmp_path / "books.tar"
    if place == 200_704:
        path.write_bytes(content[:place])
    else:
        path.write_bytes(content[: place - 512] + b"garbage" * 73 + b"!" + content[place:])
    with pytest.raises(DataError, match="damaged header"):
        list(read(path, path.name, SETTINGS))


def test_links_and_devices_in_a_tar_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "books.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE), ("c.txt", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert list(reasons(path).values()) == ["link", "link", "not_a_file"]


def test_a_bomb_stops_its_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "FREE_BYTES", 1 << 16)
    zeros = tar_of({"1.txt": b"book", "2.txt": b"\0" * 30_000_000})
    for suffix in (".tar.gz", ".tar.bz2", ".tar.zst"):
        path = tmp_path / f"bomb{suffix}"
        path.write_bytes(packings()[suffix](zeros))
        with pytest.raises(DataError, match="times its size"):
            list(read(path, path.name, BooksSettings(max_document_bytes=10_000_000)))


def test_books_out_of_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "books.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.txt", "first")
        archive.writestr("/etc/2.txt", "outside")
        archive.writestr("3.txt", "x" * 5_000)
        archive.writestr("4.txt", "fourth, long enough to break")
    content = path.read_bytes()
    broken = content.index(b"4.txt") + 8
    path.write_bytes(content[:broken] + bytes([content[broken] ^ 255]) + content[broken + 1 :])
    settings = BooksSettings(max_document_bytes=4_000)
    assert texts(path)[:1] == ["first"]
    found = reasons(path, settings)
    assert found["books.zip//etc/2.txt"] == "unsafe_path"
    assert found["books.zip/3.txt"] == "too_large"
    assert found["books.zip/4.txt"] == "broken_member"
    path.write_bytes(content[:60])
    with pytest.raises(DataError):
        books(path)


def test_json_lines_keep_their_ids_apart_by_file(tmp_path: Path) -> None:
    """RedPajama gives PG19's and Books3's books the same numbers."""
    lines = [
        json.dumps(
            {"text": HEADERS["today"] + BOOK + FOOTERS["today"], "id": 7, "meta": {"short_book_title": "Whale"}}
        ),
        "not json",
        json.dumps({"text": None}),
        json.dumps({"text": "lone \ud800"}),
        json.dumps({"text": "x" * 3_000_000}),
        "",
        json.dumps({"text": "last"}),
    ]
    for name in ("pg19.jsonl", "books3.jsonl.zst"):
        content = "\n".join(lines).encode()
        (tmp_path / name).write_bytes(zstandard.ZstdCompressor().compress(content) if "zst" in name else content)
        found = books(tmp_path / name, BooksSettings(max_document_bytes=2_000_000))
        assert [book.id for book in found] == [f"{name}:{key}" for key in (7, 2, 3, 4, 5, 7)]
        assert [book.reason for book in found if isinstance(book, Dropped)] == [
            "broken_json",
            "no_text",
            "broken_unicode",
            "too_large",
        ]
        assert isinstance(found[0], Record) and found[0].text == BOOK
        assert found[0].provenance == {
            "file": name,
            "short_book_title": "Whale",
            "title": "The Whale",
            "author": "Somebody",
        }


# Real books


def test_real_gutenberg_files() -> None:
    data = needed_data()
    sizes = {}
    for path in sorted((data / "raw" / "gutenberg").glob("*.txt")):
        (book,) = books(path)
        assert isinstance(book, Record)
        assert book.counts == {"gutenberg_headers": 1, "gutenberg_footers": 1}
        assert book.language == "en" and book.provenance["author"]
        lowered = book.text.lower()
        for left in ("gutenberg", " ebook", "david widger", "emma dudding", "\r", "\ufeff", "http"):
            assert left not in lowered, (path.name, left)
        sizes[path.stem] = len(book.text)
    assert sizes == {
        "pg-being_ernest": 119451,
        "pg-dorian_gray": 433690,
        "pg-frankenstein": 421503,
        "pg-grimm": 520737,
        "pg-huckleberry_finn": 574981,
        "pg-sherlock_holmes": 562330,
        "pg-tom_sawyer": 393425,
    }


def test_real_novels_keep_every_character() -> None:
    data = needed_data()
    archive = data / "corpora" / "english_novels" / "english_novels.tar.zst"
    found = list(itertools.islice(read(archive, "english_novels.tar.zst", SETTINGS), 8))
    for book, text in zip(found, novels(archive, 8), strict=True):
        assert isinstance(book, Record) and not book.counts
        assert book.text == text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("これは日本語の本です。吾輩は猫である。名前はまだ無い。" * 20, "shift_jis"),
        ("これは日本語の本です。吾輩は猫である。名前はまだ無い。" * 20, "euc_jp"),
        ("Все счастливые семьи похожи друг на друга. " * 20, "koi8-r"),
        ("这是一本中文书。" * 20, "gbk"),
        ("Für die Bücher, „Größe“ und Übermut. " * 20, "cp850"),  # DOS: ü is a byte that Windows-1252 does not have
    ],
)
def test_a_book_in_a_foreign_encoding_is_dropped(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding, "replace"))
    (item,) = read(tmp_path / "a.txt", "a.txt", BooksSettings())
    assert (
        isinstance(item, Dropped)
        and item.reason == "broken_encoding"
        and item.bytes == len(text.encode(encoding, "replace"))
    )


@pytest.mark.parametrize(
    "text",
    [
        "Það var eitt sinn kóngur og drottning í ríki sínu; þau áttu sér börn. ",
        "À l’été, les élèves âgés étaient déjà là où l’on espérait. ",
        "„Für die Größe“, sagte er, »überhört man Übermut.« ",
    ],
)
def test_a_book_in_windows_1252_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_bytes((text * 20).encode("cp1252"))
    (item,) = read(tmp_path / "a.txt", "a.txt", BooksSettings())
    assert isinstance(item, Record) and item.text.startswith(text.strip()) and item.counts["windows_1252"] == 1
