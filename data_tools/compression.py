"""Unpacking gzip, zstd, bz2 and xz in bounded memory, to the checked end.

What a file is shows in its first bytes. But a file that its name calls compressed and that is not, is not the file it
should be: a server's error page perhaps, saved under the name of a dump.
"""

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from llamatrain.errors import DataError

PACKED_SUFFIXES = (".gz", ".tgz", ".zst", ".bz2", ".xz")
GZIP_MAGIC = b"\x1f\x8b"
BZ2_MAGIC = re.compile(rb"BZh[1-9](1A|\x17r)")  # with what follows: a block, or the end of an empty file
XZ_MAGIC = b"\xfd7zXZ"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # behind a byte of 0x50 to 0x5f: pzstd begins files with such a frame

READ_BYTES = 1 << 16  # what follows a gzip member in it is copied for each member
CHUNK_BYTES = 1 << 20  # of what is decompressed, at most; but of zstd:
# zstd's decompressor hands out all there is in what it was given: small pieces bound what a bomb can unfold to.
ZSTD_READ_BYTES = 1 << 11  # 128 KiB for each 4 bytes at worst: 64 MiB


def unpacked(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The content of the file, decompressed if it is packed, in pieces.

    Raises DataError naming `path` when it is damaged or cut, or packed by its name alone; an OSError, which may pass,
    goes through.
    """
    magic = file.read(6)
    file.seek(0)
    try:
        if magic.startswith(GZIP_MAGIC):
            yield from gzip_chunks(file)
        elif magic.startswith(ZSTD_MAGIC) or (magic[1:4] == ZSTD_SKIPPABLE and 0x50 <= magic[0] <= 0x5F):
            yield from zstd_chunks(file)
        elif BZ2_MAGIC.match(magic):
            yield from _stream_chunks(file, bz2.BZ2Decompressor)
        elif magic.startswith(XZ_MAGIC):
            yield from _stream_chunks(file, lzma.LZMADecompressor)
        elif suffix := next((suffix for suffix in PACKED_SUFFIXES if path.name.lower().endswith(suffix)), None):
            raise DataError(
                f"{path}: its name says compressed, and it is not (a saved error page?): copy it again, or take "
                f"{suffix} off its name"
            )
        else:
            while chunk := file.read(READ_BYTES):
                yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not the file's own fault; bz2 knows no other error for damage
        raise DataError(f"{path}: truncated or damaged ({error}); copy it again") from None


def _stream_chunks(
    file: IO[bytes], fresh: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]
) -> Iterator[bytes]:
    """The streams of a file, decompressed. Python's BZ2File and LZMAFile take a damaged second one for the end."""
    stream, begun = fresh(), False
    while data := file.read(READ_BYTES):
        if not begun:
            data = data.lstrip(b"\0")  # padding between streams
        while data or (begun and not stream.needs_input):
            chunk, data, begun = stream.decompress(data, CHUNK_BYTES), b"", True
            if chunk:
                yield chunk
            if stream.eof:
                data, stream, begun = stream.unused_data.lstrip(b"\0"), fresh(), False
    if begun:
        raise EOFError("the last stream has no end")


def gzip_chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """The members of a file, decompressed. Raises zlib.error for damage, and EOFError for a cut."""
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


def zstd_chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """The frames of a file, decompressed; none of the chunks is empty.

    Raises ZstdError for damage, and EOFError where the last frame has no end, which zstandard's stream_reader takes for
    a good one.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    at_frame_end = False
    while data := stream.read(ZSTD_READ_BYTES):
        while data:
            if chunk := frame.decompress(data):
                yield chunk
            at_frame_end = frame.eof
            data = frame.unused_data if at_frame_end else b""
            if at_frame_end:
                frame = decompressor.decompressobj()
    if not at_frame_end:
        raise EOFError("the last zstd frame has no end")


class ChunkFile(io.RawIOBase):
    """Chunks as a file that can be read once."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
