"""The bytes of a raw file, plain or packed, in bounded memory, whole, in parts or through a window.

Checksums and ends are checked: a file that stops in the middle gives what was whole and then raises, it does not end as
if it were complete.
"""

from collections.abc import Iterator
from pathlib import Path

from data_tools.compression import unpacked
from data_tools.progress import opened
from llamatrain.errors import DataError


def file_chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of the file.

    Raises DataError naming it when it is damaged or cut; an OSError, which may pass, goes through.
    """
    with opened(path) as stream:
        yield from unpacked(stream, path)


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
