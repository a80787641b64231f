"""Unpacking gzip, zstd, bz2 and xz in bounded memory, to the checked end.

What a file is shows in its first bytes. But a file that its name calls compressed and that is not, is not the file it
should be: a server's error page perhaps, saved under the name of a dump.
"""

import bz2
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import zstandard

from llamatrain.errors import DataError

PACKED_SUFFIXES = (".gz", ".tgz", ".zst", ".bz2", ".xz")
GZIP_MAGIC = b"\x1f\x8b"
BZ2_MAGIC = b"BZh"
XZ_MAGIC = b"\xfd7zXZ"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # behind a byte of 0x50 to 0x5f: pzstd begins files with such a frame

READ_BYTES = 1 << 16  # what follows a gzip member in it is copied for each member
CHUNK_BYTES = 1 << 20  # of decompressed gzip, at most
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
            yield from zstd_chunks(file, read_bytes=ZSTD_READ_BYTES)
        elif magic.startswith(BZ2_MAGIC):
            with bz2.BZ2File(file) as plain:
                yield from _read(plain)
        elif magic.startswith(XZ_MAGIC):
            with lzma.LZMAFile(file) as plain:
                yield from _read(plain)
        elif suffix := next((suffix for suffix in PACKED_SUFFIXES if path.name.lower().endswith(suffix)), None):
            raise DataError(
                f"{path}: its name says compressed, and it is not (a saved error page?): copy it again, or take "
                f"{suffix} off its name"
            )
        else:
            yield from _read(file)
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not the file's own fault; bz2 knows no other error for damage
        raise DataError(f"{path}: truncated or damaged ({error}); copy it again") from None


def _read(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(READ_BYTES):
        yield chunk


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


def zstd_chunks(stream: IO[bytes], *, read_bytes: int) -> Iterator[bytes]:
    """The frames of a file, decompressed; none of the chunks is empty.

    All that is in `read_bytes` of the file comes out at once, and 4 bytes may hold 128 KiB: few, where bombs may come.
    Raises ZstdError for damage, and EOFError where the last frame has no end, which zstandard's stream_reader takes for
    a good one.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    at_frame_end = False
    while data := stream.read(read_bytes):
        while data:
            if chunk := frame.decompress(data):
                yield chunk
            at_frame_end = frame.eof
            data = frame.unused_data if at_frame_end else b""
            if at_frame_end:
                frame = decompressor.decompressobj()
    if not at_frame_end:
        raise EOFError("the last zstd frame has no end")
