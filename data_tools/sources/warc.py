"""The records of a web archive (WARC 1.0 and 1.1; ISO 28500), one after the other, whole or refused.

A record is a version line, headers by name, an empty line and a block of as many bytes as Content-Length says, then
two line ends. Libraries end at the first fault as if the file were complete, or go over it in silence; here

* a fault costs the record it is in, which is handed on as Broken, and reading goes on at the next version line;
* the block must end where a record may end, so a wrong Content-Length is noticed before it cuts or swallows text;
* a file that stops within a record raises DataError after what was whole.

Line ends may be LF alone. A gzip file need not have one member for each record.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from data_tools.sources.streams import Window, file_chunks
from llamatrain.errors import DataError

MAX_HEADER_BYTES = 1 << 16
SEARCH_BYTES = 1 << 16
SAMPLE_BYTES = 500
_VERSION = re.compile(rb"WARC/\d+\.\d+[ \t]*\r?\n")
_NEXT = re.compile(rb"\n(?=WARC/\d+\.\d+[ \t]*\r?\n)")
_VERSION_BYTES = 32  # hold a version line and the line end before it
_HEADER_END = re.compile(rb"\r?\n\r?\n")


@dataclass(frozen=True, slots=True)
class WarcRecord:
    number: int  # in the file, from 0; what is broken counts
    headers: dict[str, str]  # names in lower case; of a name given twice the first
    length: int  # of the block
    block: bytes | None  # None: longer than the limit


@dataclass(frozen=True, slots=True)
class Broken:
    """Bytes that are no record."""

    number: int
    reason: str  # broken_header | broken_length
    length: int
    beginning: bytes


def warc_records(path: Path, *, max_block_bytes: int) -> Iterator[WarcRecord | Broken]:
    """The records of the file, in order. Raises DataError naming it."""
    window = Window(file_chunks(path))
    number, is_archive = 0, False
    while _skip_line_ends(window):
        item: WarcRecord | str = "broken_header"
        if _VERSION.match(window.peek(_VERSION_BYTES)):
            is_archive = True
            item = _record(window, number, max_block_bytes, path)
        if isinstance(item, WarcRecord):
            yield item
        else:
            broken = _resynchronise(window, number, item)
            if not is_archive and not window.has(1):
                window.check()
                raise DataError(f"{path}: not a web archive (no line such as WARC/1.0 in it)")
            yield broken
        number += 1
    window.check()
    if number == 0:
        raise DataError(f"{path}: empty; copy it again")


def _skip_line_ends(window: Window) -> bool:
    """Goes to what is no line end; whether there is something."""
    while ahead := window.peek(64):
        line_ends = len(ahead) - len(ahead.lstrip(b"\r\n"))
        window.skip(line_ends)
        if line_ends < len(ahead):
            return True
    return False


def _record(window: Window, number: int, max_block_bytes: int, path: Path) -> WarcRecord | str:
    """The record here, with the window after its block; or why there is none, with the window where it was."""
    end = _HEADER_END.search(window.peek(4096)) or _HEADER_END.search(window.peek(MAX_HEADER_BYTES))
    if end is None:
        _check_goes_on(window, MAX_HEADER_BYTES, path)
        return "broken_header"
    if _NEXT.search(end.string, 0, end.start()):  # these headers have no end, and another record's follow
        return "broken_header"
    headers = _headers(end.string[: end.start()])
    digits = headers.get("content-length", "")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 18):
        return "broken_header"
    begin, length = end.end(), int(digits)
    if length > max_block_bytes:
        if window.skip(begin + length) < begin + length:
            _refuse_cut(window, path)
        return WarcRecord(number, headers, length, None)
    if not window.has(begin + length):
        _check_goes_on(window, begin + length, path)
        return "broken_length"
    following = window.peek(_VERSION_BYTES, after=begin + length).lstrip(b"\r\n")
    if following and not _VERSION.match(following):
        return "broken_length"
    block = window.peek(length, after=begin)
    window.skip(begin + length)
    return WarcRecord(number, headers, length, block)


def _headers(head: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    name = ""
    for line in head.decode("utf-8", "replace").split("\n")[1:]:
        if line[:1] in (" ", "\t") and name:  # goes on
            headers[name] = f"{headers[name]} {line.strip()}".strip()
            continue
        name, _, value = line.partition(":")
        name = name.strip().lower()
        headers.setdefault(name, value.strip())
    return headers


def _check_goes_on(window: Window, count: int, path: Path) -> None:
    """Raises DataError when the file ends before `count` bytes, with no other record begun in what is left."""
    if not window.has(count) and not _NEXT.search(window.peek(count)):
        _refuse_cut(window, path)


def _refuse_cut(window: Window, path: Path) -> NoReturn:
    window.check()
    raise DataError(f"{path}: truncated: it ends in the middle of a record; copy it again")


def _resynchronise(window: Window, number: int, reason: str) -> Broken:
    """Goes to the next version line, or to the end."""
    beginning, offset = window.peek(SAMPLE_BYTES), window.offset
    while ahead := window.peek(SEARCH_BYTES):
        found = _NEXT.search(ahead)
        if found or len(ahead) < SEARCH_BYTES:
            window.skip(found.end() if found else len(ahead))
            break
        window.skip(SEARCH_BYTES - _VERSION_BYTES)
    return Broken(number, reason, window.offset - offset, beginning)
