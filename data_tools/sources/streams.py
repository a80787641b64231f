"""The bytes of a raw file, plain, gzip or zstd, in bounded memory, whole, in parts or through a window.

What a file is shows in its first bytes, not in its name. gzip's checksums and both formats' ends are checked: a file
that stops in the middle gives what was whole and then raises, it does not end as if it were complete.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from data_tools.compression import zstd_chunks
from llamatrain.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

READ_BYTES = 1 << 16  # what follows a gzip member in it is copied for each member
CHUNK_BYTES = 1 << 20  # of decompressed gzip, at most
# zstd's decompressor hands out all there is in what it was given: small pieces bound what a bomb can unfold to.
ZSTD_READ_BYTES = 1 << 12  # 128 KiB for each 4 bytes at worst


def file_chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of the file.

    Raises DataError naming it when it is damaged or cut; an OSError, which may pass, goes through.
    """
    try:
        with open(path, "rb") as stream:
            magic = stream.read(4)
            stream.seek(0)
            if magic.startswith(GZIP_MAGIC):
                yield from _gzip_chunks(stream)
            elif magic == ZSTD_MAGIC:
                yield from zstd_chunks(stream, read_bytes=ZSTD_READ_BYTES)
            else:
                while chunk := stream.read(READ_BYTES):
                    yield chunk
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); copy it again") from None


def _gzip_chunks(stream: BinaryIO) -> Iterator[bytes]:
    # Not the gzip module: a web archive has a member for every page, and that module takes each in small steps.
    member = zlib.decompressobj(wbits=31)
    at_start = True  # of a member, nothing of it read yet
    while data := stream.read(READ_BYTES):
        chunks: list[bytes] = []  # small members are handed on together
        held = 0
        while data:
            if at_start:
                data = data.lstrip(b"\0")  # padding after a member, as tapes and some tools leave it
                if not data:
                    break
            at_start = False
            try:
                chunks.append(member.decompress(data, CHUNK_BYTES))
            except zlib.error:
                yield b"".join(chunks)
                raise
            held += len(chunks[-1])
            data = member.unconsumed_tail
            if member.eof:
                data = member.unused_data
                member, at_start = zlib.decompressobj(wbits=31), True
            if held >= CHUNK_BYTES:
                yield b"".join(chunks)
                chunks, held = [], 0
        yield b"".join(chunks)
    while not at_start and (chunk := member.decompress(b"", CHUNK_BYTES)):
        yield chunk  # what the limit of the last call held back
    if not at_start and not member.eof:
        raise EOFError("the last gzip member has no end")


def bounded_parts(chunks: Iterator[bytes], separator: bytes | None, *, max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """What lies between the separators (None: everything is one part), each with its length.

    Of a part longer than max_bytes only the beginning is held and given. An empty part after the last separator is
    none.
    """
    pending = bytearray()
    gone = 0  # bytes of this part that are not held
    for chunk in chunks:
        searched = 0 if separator is None else max(0, len(pending) - len(separator) + 1)
        pending += chunk
        begin = 0
        while separator is not None and (end := pending.find(separator, max(begin, searched))) >= 0:
            yield bytes(pending[begin : min(end, begin + max_bytes)]), gone + end - begin
            begin, gone = end + len(separator), 0
        del pending[:begin]
        held = max_bytes + len(separator or b"")
        if len(pending) > held:  # the middle goes; the end may hold the beginning of a separator
            surplus = len(pending) - held
            del pending[max_bytes : max_bytes + surplus]
            gone += surplus
    if pending:
        yield bytes(pending[:max_bytes]), gone + len(pending)


class Window:
    """A view of a stream of chunks that can be looked into ahead of the place it is read from.

    Looking ahead must not cost what is whole: where the stream fails it seems to end, and `check` raises.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = b""
        self._at = 0  # in the buffer
        self._failure: DataError | None = None
        self.offset = 0  # of the place, in the stream

    def has(self, count: int) -> bool:
        """Whether `count` bytes are left; reads as far as needed."""
        missing = count - (len(self._buffer) - self._at)
        if missing <= 0:
            return True
        parts = [self._buffer[self._at :]]
        while missing > 0 and (chunk := self._next_chunk()) is not None:
            parts.append(chunk)
            missing -= len(chunk)
        self._buffer, self._at = b"".join(parts), 0
        return missing <= 0

    def _next_chunk(self) -> bytes | None:
        try:
            return next(self._chunks, None)
        except DataError as error:
            self._failure = error
            return None

    def check(self) -> None:
        """Raises the DataError that ended the stream, if one did."""
        if self._failure is not None:
            raise self._failure

    def peek(self, count: int, *, after: int = 0) -> bytes:
        """The next `count` bytes, or as many as are left; those `after` so many."""
        self.has(after + count)
        return self._buffer[self._at + after : self._at + after + count]

    def skip(self, count: int) -> int:
        """Goes on by `count` bytes, or as many as are left, without keeping them; returns how many."""
        skipped = 0
        while skipped < count and self.has(1):
            step = min(count - skipped, len(self._buffer) - self._at)
            self._at += step
            skipped += step
        self.offset += skipped
        return skipped
