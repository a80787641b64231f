"""Records of a huge XML file one by one: the pages of a Wikipedia dump, the rows of a StackExchange one.

The file is cut at the records' own tags, and each piece is parsed by itself: memory is bounded by a record, a damaged
one costs no other, and there is no document type to declare entities in, so nothing can expand. The tags cannot stand
in a record's text, where XML wants `<` escaped.

A piece becomes its element, or is dropped as
    broken_xml   not well-formed (or with more tags than any true record), or text between records
    too_large    longer than the limit; it is skipped without being held
"""

import codecs
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from data_tools.compression import unpacked
from data_tools.progress import opened
from data_tools.records import SAMPLE_CHARACTERS, Dropped
from llamatrain.errors import DataError

OVERLAP_BYTES = 32  # a tag may be cut by the end of a chunk
DECLARATION_BYTES = 400  # of the beginning that tell the encoding
MOST_TAGS = 10_000  # of one record
ARCHIVES = {b"7z\xbc\xaf\x27\x1c": "7z x", b"PK\x03\x04": "unzip"}
WIDE_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_ENCODING = re.compile(rb"""<\?xml[^>]{0,100}?\sencoding\s*=\s*["']([A-Za-z0-9._-]{1,40})["']""")
_TEXT_ENCODING = re.compile(r"ascii|utf-(?:8|16|32)(?:-[lb]e)?|iso8859-\d+|cp\d+|koi8-[ru]")
UNREADABLE = (OSError, UnicodeError)


@dataclass(frozen=True)
class XmlFormat:
    """Where records begin and end. `marks` begins with `<` alone, which bytes are searched for at memory's speed."""

    root: str  # the document's element
    marks: re.Pattern[bytes]  # group 1: a record's beginning; without it, an end
    has_end_tag: bool  # the mark of an end belongs to the record; else it is what follows


def element_format(root: str, record: str) -> XmlFormat:
    """<record>…</record>, whose inside may hold other tags."""
    tag = record.encode()
    return XmlFormat(root, re.compile(rb"<(?:(" + tag + rb"[\s/>])|/" + tag + b">)"), has_end_tag=True)


def row_format(root: str, record: str) -> XmlFormat:
    """<record … />, in which no `<` can stand: any tag ends it."""
    return XmlFormat(root, re.compile(rb"<(" + record.encode() + rb"[\s/>])?"), has_end_tag=False)


@dataclass(frozen=True)
class Header:
    """What stands before the first record."""

    data: bytes


@dataclass(frozen=True)
class Piece:
    data: bytes  # of one that is too large, its beginning
    size: int
    offset: int  # in the unpacked file
    is_record: bool  # or what stands between two


def xml_records(
    path: Path, name: str, form: XmlFormat, max_bytes: int, *, share: float = 1.0
) -> Iterator[Header | ElementTree.Element | Dropped]:
    """The headers and records of a file, plain or packed. Raises DataError, after all that was whole, when the file
    cannot be read to its end. `share`: what reading is of the work with the file."""
    ended = False
    try:
        for piece in _pieces(unpacked_chunks(path, share=share), form, max_bytes):
            if not piece.is_record:
                ended, items = _between(piece, name, form, ended)
                yield from items
            elif piece.size > max_bytes:
                yield _dropped("too_large", piece, name)
            else:
                yield _element(piece, name)
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); fetch the file again") from error
    if not ended:
        raise DataError(f"{path}: has no </{form.root}> at its end: cut short, or no such file; fetch it again")


def _element(piece: Piece, name: str) -> ElementTree.Element | Dropped:
    if piece.data.count(b"<") <= MOST_TAGS:
        try:
            return ElementTree.fromstring(piece.data)
        except (ElementTree.ParseError, ValueError):
            pass
    return _dropped("broken_xml", piece, name)


def _dropped(reason: str, piece: Piece, name: str) -> Dropped:
    return Dropped.of_bytes(reason, f"{name}@{piece.offset}", piece.data, size=piece.size)


def _between(piece: Piece, name: str, form: XmlFormat, ended: bool) -> tuple[bool, list[Header | Dropped]]:
    """Whether the document has ended after this, and what it holds: a header, nothing, or what is no record."""
    opened, closed = piece.data.rfind(b"<" + form.root.encode()), piece.data.rfind(f"</{form.root}>".encode())
    if opened >= 0 or closed >= 0:
        ended = closed > opened
    if opened >= 0:
        return ended, [Header(piece.data)]
    rest = piece.data.replace(f"</{form.root}>".encode(), b"").strip()
    return ended, [_dropped("broken_xml", piece, name)] if rest else []


def _pieces(chunks: Iterator[bytes], form: XmlFormat, limit: int) -> Iterator[Piece]:
    """The stream cut into records and what lies between them. One longer than `limit` is cut down to its beginning."""
    buffer, start, scanned = b"", 0, 0  # the piece begins at `start`; marks were looked for up to `scanned`
    beginning, skipped = b"", 0  # of a piece that is too long
    offset, is_record = 0, False

    def piece(end: int) -> Piece:
        nonlocal start, offset, beginning, skipped
        found = Piece((beginning or buffer[start:end]), skipped + end - start, offset, is_record)
        offset, start = offset + found.size, end
        beginning, skipped = b"", 0
        return found

    for chunk in itertools.chain(filter(None, chunks), (b"",)):
        buffer = buffer[start:] + chunk
        start, scanned = 0, scanned - start
        whole = len(buffer) - (OVERLAP_BYTES if chunk else 0)  # a mark that begins behind this may be cut
        while (match := form.marks.search(buffer, scanned)) and match.start() < whole:
            scanned = match.end()
            if match[1]:
                if match.start() > start or skipped:
                    yield piece(match.start())
                is_record = True
            elif is_record:
                yield piece(match.end() if form.has_end_tag else match.start())
                is_record = False
        scanned = max(scanned, whole)
        if skipped + scanned - start > limit:
            beginning = beginning or buffer[start : start + 4 * SAMPLE_CHARACTERS]
            skipped, start = skipped + scanned - start, scanned
    if skipped or start < len(buffer):
        if is_record and (closed := buffer.find(f"</{form.root}>".encode(), start)) >= 0:
            yield piece(closed)
        is_record = False
        yield piece(len(buffer))


def unpacked_chunks(path: Path, *, share: float = 1.0) -> Iterator[bytes]:
    """The file in pieces, unpacked, in UTF-8 whatever its encoding.

    Raises DataError for an archive and for damage, UnicodeError for an encoding that is not known or not kept.
    """
    with opened(path, share=share) as file:
        magic = file.read(6)
        for mark, command in ARCHIVES.items():
            if magic.startswith(mark):
                raise DataError(f"{path}: an archive; unpack it ({command} {path.name}) and name the XML file in it")
        file.seek(0)
        yield from _in_utf8(unpacked(file, path))


def _in_utf8(chunks: Iterator[bytes]) -> Iterator[bytes]:
    first = b""
    while len(first) < DECLARATION_BYTES and (chunk := next(chunks, b"")):
        first += chunk
    declared = _ENCODING.search(first[:DECLARATION_BYTES])
    encoding = WIDE_MARKS.get(first[:2], declared[1].decode() if declared else "utf-8")
    try:
        codec = codecs.lookup(encoding)
    except LookupError:
        codec = None
    if codec is None or not _TEXT_ENCODING.fullmatch(codec.name):
        raise UnicodeError(f"encoding {encoding} is not known")
    if codec.name in ("utf-8", "ascii"):
        yield first
        yield from chunks
        return
    decoder = codec.incrementaldecoder()
    yield decoder.decode(first).encode("utf-8")
    for chunk in chunks:
        yield decoder.decode(chunk).encode("utf-8")
    yield decoder.decode(b"", final=True).encode("utf-8")
