"""Books: Project Gutenberg, Books3, PG19 and their like (LLaMA paper, 2.1), a document each.

A book is a .txt file (packed or not), a .txt in a tar or zip, or a line of JSON-lines with its text in a field.
Project Gutenberg's headers, licences and credits are taken off (data_tools.cleaning.gutenberg); line ends become `\\n`,
a byte order mark goes, and what is not UTF-8 is read as Windows-1252, the superset of Latin-1 that old texts are in,
unless its bytes are too unlike any such text.
Editions of one book are found later, by data_tools.dedup.near.

Dropped as
    extension        a file in an archive that is not of `extensions`
    catalogue        a file about the collection, by its name: index, readme, metadata
    empty            nothing but blanks (behind the headers)
    too_short        fewer characters than `min_characters`
    broken_encoding  neither UTF-8 nor Windows-1252 (`MAX_OUTSIDE_ASCII`, `MAX_UNDEFINED`)
    binary           holds zero bytes, and is not UTF-16
    no_text          a line of JSON whose text field is missing or no text
    broken_unicode   a text with lone surrogates, which no UTF-8 can spell
and as data_tools.sources.packed says. Counted: `gutenberg_headers`, `gutenberg_footers`, `gutenberg_left_over` (opens
like a Project Gutenberg file, but the header's end was not found: it stays whole), `windows_1252`.
"""

import codecs
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.cleaning.gutenberg import unwrap
from data_tools.records import SAMPLE_CHARACTERS, Dropped, Record
from data_tools.sources.packed import JSONL_SUFFIXES, TAR_SUFFIXES, ZIP_SUFFIX, json_lines, members, whole_file
from llamatrain.errors import ConfigError

SOURCE = "books"
SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".txt.bz2", *TAR_SUFFIXES, ZIP_SUFFIX, *JSONL_SUFFIXES)

_CATALOGUE = re.compile(r"(?:^|/)(?:readme|index|metadata|gutindex|licen[cs]e|donate)[^/]*$", re.IGNORECASE)
_GUTENBERG_FIELD = re.compile(r"^[ \t]*(Title|Author|Language)[ \t]*:[ \t]*(\S[^\n]{0,200}?)[ \t]*$", re.MULTILINE)
LANGUAGES = {"english": "en", "french": "fr", "german": "de", "spanish": "es", "italian": "it", "dutch": "nl"}
LANGUAGES |= {"portuguese": "pt", "polish": "pl", "czech": "cs", "danish": "da", "swedish": "sv", "russian": "ru"}
MAX_OUTSIDE_ASCII = 0.45  # of letters and bytes outside ASCII: Icelandic has 0.13; Shift-JIS, KOI8-R, EUC above 0.5
MAX_UNDEFINED = 0.01  # of bytes outside ASCII: those that Windows-1252 does not have
UNDEFINED = b"\x81\x8d\x8f\x90\x9d"
HEAD_CHARACTERS = 6_000  # where a Project Gutenberg file names its title


@dataclass
class BooksSettings:
    extensions: list[str] = field(default_factory=lambda: [".txt"])  # of the books in archives
    text_field: str = "text"  # of JSON-lines
    id_field: str = "id"  # of JSON-lines; a line without it is named FILE:LINE
    remove_gutenberg: bool = True  # headers, licences and credits of Project Gutenberg
    min_characters: int = 1  # the paper has no least length; 1 drops what is empty
    max_document_bytes: int = 1 << 26  # of a book: the longest known have about 20 MB


def read(path: Path, name: str, settings: BooksSettings) -> Iterator[Record | Dropped]:
    """The books of a file, in its order. Raises DataError when it cannot be read to its end."""
    if settings.min_characters < 1 or settings.max_document_bytes < 1:
        raise ConfigError("min_characters and max_document_bytes must be at least 1")
    if path.name.endswith(JSONL_SUFFIXES):
        yield from _json_books(path, name, settings)
    elif path.name.endswith((*TAR_SUFFIXES, ZIP_SUFFIX)):
        for member in members(path, name, lambda inside: _refused(inside, settings), settings.max_document_bytes):
            yield member if isinstance(member, Dropped) else _from_bytes(member[1], f"{name}/{member[0]}", settings)
    elif _CATALOGUE.search(name):
        yield Dropped("catalogue", name, path.stat().st_size)
    else:
        content = whole_file(path, name, settings.max_document_bytes)
        yield content if isinstance(content, Dropped) else _from_bytes(content, name, settings)


def _refused(inside: str, settings: BooksSettings) -> str | None:
    if PurePosixPath(inside).suffix.lower() not in settings.extensions:
        return "extension"
    return "catalogue" if _CATALOGUE.search(inside) else None


def _json_books(path: Path, name: str, settings: BooksSettings) -> Iterator[Record | Dropped]:
    for line in json_lines(path, name, settings.max_document_bytes):
        if isinstance(line, Dropped):
            yield line
            continue
        number, content = line
        text, given = content.get(settings.text_field), content.get(settings.id_field)
        identifier = f"{name}:{number}" if not isinstance(given, str | int) else f"{name}:{given}"
        if not isinstance(text, str):
            yield Dropped("no_text", identifier, 0)
            continue
        record = Record(text, identifier, SOURCE, {"file": name, **_facts(content)})
        yield _book(record, settings)


def _facts(content: dict[str, Any]) -> dict[str, str]:
    """What a line says of its book: PG19 has `short_book_title`, Books3 `title`, some all of it in `meta`."""
    meta = content.get("meta")
    known = {**(meta if isinstance(meta, dict) else {}), **content}
    return {
        key: known[key] for key in ("title", "short_book_title", "author", "url") if isinstance(known.get(key), str)
    }


def _from_bytes(content: bytes, identifier: str, settings: BooksSettings) -> Record | Dropped:
    try:
        text, is_windows = _decoded(content)
    except UnicodeError:
        beginning = content[:SAMPLE_CHARACTERS].decode("latin-1")
        return Dropped("broken_encoding", identifier, len(content), beginning)
    if text is None:
        return Dropped("binary", identifier, len(content))
    record = Record(text, identifier, SOURCE, {"file": identifier})
    if is_windows:
        record.counts["windows_1252"] = 1
    return _book(record, settings)


def _decoded(content: bytes) -> tuple[str | None, bool]:
    """(text, or None for a binary file; whether it was not UTF-8). Raises UnicodeError for a foreign encoding."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace"), False
    if b"\0" in content:
        return None, False
    try:
        return content.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        pass
    if not _may_be_windows_1252(content):
        raise UnicodeError
    try:
        return content.decode("cp1252"), True
    except UnicodeDecodeError:  # five bytes have no character there
        return content.decode("latin-1"), True


def _may_be_windows_1252(content: bytes) -> bool:
    high = content.translate(None, bytes(range(128)))
    letters = len(content) - len(content.translate(None, string.ascii_letters.encode()))
    undefined = len(high) - len(high.translate(None, UNDEFINED))
    return len(high) <= MAX_OUTSIDE_ASCII * (len(high) + letters) and undefined <= 1 + MAX_UNDEFINED * len(high)


def _book(record: Record, settings: BooksSettings) -> Record | Dropped:
    text = record.text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if settings.remove_gutenberg:
        book = unwrap(text)
        found = (("headers", book.header), ("footers", book.footer), ("left_over", book.left_over))
        record.counts.update({f"gutenberg_{what}": 1 for what, is_so in found if is_so})
        if book.header:
            _note_header(record, text[: max(0, text.find(book.text[:100]))][:HEAD_CHARACTERS])
        text = book.text
    record.text = text.strip("\n") if text and not text.isspace() else ""
    if not record.text:
        return Dropped("empty", record.id, 0)
    try:
        record.text.encode("utf-8")
    except UnicodeEncodeError:
        beginning = record.text[:SAMPLE_CHARACTERS].encode("utf-8", "replace").decode()
        return Dropped("broken_unicode", record.id, len(record.text), beginning)
    return Dropped.of(record, "too_short") if len(record.text) < settings.min_characters else record


def _note_header(record: Record, head: str) -> None:
    """Title, author and language out of a Project Gutenberg header, the first of each."""
    for key, value in reversed(_GUTENBERG_FIELD.findall(head)):
        if key == "Language":
            record.language = LANGUAGES.get(value.lower(), record.language)
        else:
            record.provenance[key.lower()] = value
