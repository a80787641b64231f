"""What is packed in a file, in bounded memory and never written to a disk: the files of a tar or zip, the lines of
JSON-lines.

What cannot be used is handed on as Dropped, and reading goes on:
    unsafe_path     a member with an absolute path or with `..`
    link            a symbolic or hard link
    not_a_file      a device or a pipe
    too_large       more bytes than the limit; they are not held
    broken_member   a member of a zip that cannot be unpacked
    broken_json     a line that is no JSON object, or no UTF-8
A file that is truncated, damaged, or that unpacks to more than `MAX_EXPANSION` times its size (a bomb) gives what was
whole and then raises DataError.
"""

import io
import json
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from data_tools.compression import ChunkFile, unpacked
from data_tools.progress import advance, opened
from data_tools.records import Dropped
from llamatrain.errors import DataError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
JSONL_SUFFIXES = tuple(name + packing for name in (".jsonl", ".ndjson") for packing in ("", ".gz", ".zst", ".bz2"))
ZIP_SUFFIX = ".zip"

CHUNK_BYTES = 1 << 17
MAX_EXPANSION = 250  # gzip of plain text reaches 20, of tables perhaps 100, of zeros 1,000
FREE_BYTES = 1 << 26  # may come out of any file
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)

Refusal = Callable[[str], str | None]  # a member's path -> the reason to drop it unread, or None


def members(
    path: Path, name: str, refused: Refusal, max_bytes: int, *, share: float = 1.0
) -> Iterator[tuple[str, bytes] | Dropped]:
    """The files in a tar or zip as (path within, content), in its order; ids of what is dropped are `NAME/PATH`.

    `share`: what reading them is of the work with the file. Raises DataError naming the file.
    """
    packed = _zip_members if path.name.endswith(ZIP_SUFFIX) else _tar_members
    try:
        yield from packed(path, name, refused, max_bytes, share)
    except DAMAGE as error:
        raise DataError(f"{path}: truncated or damaged ({error}); copy it again") from None


def json_lines(path: Path, name: str, max_bytes: int) -> Iterator[tuple[int, dict[str, Any]] | Dropped]:
    """The objects of a JSON-lines file as (line number, object); ids of what is dropped are `NAME:LINE`.

    Raises DataError naming the file.
    """
    try:
        with opened(path) as file:
            for number, (line, size) in enumerate(_lines(_chunks(file, path), max_bytes), start=1):
                if size > max_bytes:
                    yield Dropped.of_bytes("too_large", f"{name}:{number}", line, size=size)
                elif line and not line.isspace():
                    yield _json_object(line, f"{name}:{number}", number)
    except DAMAGE as error:
        raise DataError(f"{path}: truncated or damaged ({error}); copy it again") from None


def whole_file(path: Path, name: str, max_bytes: int) -> bytes | Dropped:
    """The unpacked content of a file. Raises DataError naming it."""
    parts: list[bytes] = []
    size = 0
    try:
        with opened(path) as file:
            for chunk in _chunks(file, path):
                size += len(chunk)
                if size > max_bytes:
                    return Dropped("too_large", name, max(size, path.stat().st_size))
                parts.append(chunk)
    except DAMAGE as error:
        raise DataError(f"{path}: truncated or damaged ({error}); copy it again") from None
    return b"".join(parts)


def is_unsafe(path: str) -> bool:
    """Whether a member's path could lead out of the directory it would be unpacked into."""
    return path.startswith(("/", "\\")) or "\0" in path or ":" in path[1:2] or ".." in PurePosixPath(path).parts


def _json_object(line: bytes, identifier: str, number: int) -> tuple[int, dict[str, Any]] | Dropped:
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return number, content
    return Dropped.of_bytes("broken_json", identifier, line)


def _tar_members(
    path: Path, name: str, refused: Refusal, max_bytes: int, share: float
) -> Iterator[tuple[str, bytes] | Dropped]:
    with opened(path, share=share) as packed:
        plain = cast(IO[bytes], io.BufferedReader(ChunkFile(_chunks(packed, path)), CHUNK_BYTES))
        with tarfile.open(fileobj=plain, mode="r|", tarinfo=_StrictTarInfo, errorlevel=2) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has seen
                if member.isdir():
                    continue
                reason = _reason(member.name, member.size, max_bytes)
                if not member.isreg():
                    reason = "link" if member.issym() or member.islnk() else "not_a_file"
                reason = reason or refused(member.name)
                if reason is not None:
                    yield Dropped(reason, f"{name}/{member.name}", member.size)
                    continue
                file = archive.extractfile(member)
                content = file.read() if file is not None else b""
                if len(content) != member.size:
                    raise EOFError(f"{member.name} is cut short")
                yield member.name, content


def _zip_members(
    path: Path, name: str, refused: Refusal, max_bytes: int, share: float
) -> Iterator[tuple[str, bytes] | Dropped]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            advance(share * member.compress_size)
            if member.is_dir():
                continue
            identifier = f"{name}/{member.filename}"
            reason = _reason(member.filename, member.file_size, max_bytes)
            if stat.S_ISLNK(member.external_attr >> 16):
                reason = "link"
            reason = reason or refused(member.filename)
            if reason is not None:
                yield Dropped(reason, identifier, member.file_size)
                continue
            try:
                with archive.open(member) as file:
                    content = file.read(max_bytes + 1)
            except (*DAMAGE, RuntimeError, NotImplementedError):  # damaged, encrypted, or of an unknown method
                yield Dropped("broken_member", identifier, member.file_size)
                continue
            if len(content) > max_bytes:  # the directory of the zip lied
                yield Dropped("too_large", identifier, len(content))
            else:
                yield member.filename, content


def _reason(path: str, size: int, max_bytes: int) -> str | None:
    if is_unsafe(path):
        return "unsafe_path"
    return "too_large" if size > max_bytes else None


def _chunks(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The file unpacked, by what it begins with. Raises DataError for a bomb."""
    produced = 0
    for chunk in unpacked(file, path):
        produced += len(chunk)
        if produced > FREE_BYTES + MAX_EXPANSION * file.tell():
            raise DataError(f"{path}: unpacks to more than {MAX_EXPANSION} times its size; if it is none, unpack it")
        yield chunk


def _lines(chunks: Iterator[bytes], max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(line, its bytes); of a line that is longer than the limit only the beginning is held."""
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        if size <= max_bytes:
            pending.append(first)
        size += len(first)
        for other in others:
            yield b"".join(pending), size
            pending, size = [other], len(other)
    yield b"".join(pending), size


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header in the middle, and a missing end, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the blocks of zeros that end an archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a damaged header ({error})") from None
