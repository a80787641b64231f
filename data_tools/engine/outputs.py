"""The files between the stages: written whole or not at all, with their hashes, and checked when they are read.

Documents lie as JSON lines in zstd: {"id", "text", "source", "language", "scores", "provenance"}. The bytes depend on
the documents alone.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from data_tools.progress import advance
from data_tools.records import Record
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import written_atomically

ZSTD_LEVEL = 3
READ_BYTES = 1 << 18  # a chunk of zstd may grow a hundredfold
SUFFIX = ".jsonl.zst"


def orjson() -> Any:
    """The module. Raises ConfigError."""
    try:
        import orjson as module
    except ImportError:
        raise ConfigError("orjson is not installed: pip install 'llamatrain[data]'") from None
    return module


class HashedFile:
    """A file being written, and what the ledger says of it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self._bytes += len(data)
        return self._file.write(data)

    def described(self, output: Path) -> dict[str, Any]:
        name = self.path.relative_to(output).as_posix()
        return {"name": name, "bytes": self._bytes, "sha256": self._sha256.hexdigest()}


@contextmanager
def whole_file(path: Path) -> Iterator[HashedFile]:
    """A file that appears under its name when the block has ended well; what dead processes left of it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):
        left_over.unlink(missing_ok=True)
    with written_atomically(path) as file:
        yield HashedFile(path, file)


class DocumentWriter:
    """Documents into a HashedFile. A score that is no number is left out: JSON has none such."""

    def __init__(self, file: HashedFile) -> None:
        self._dumps = orjson().dumps
        self._file = file
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compressobj()

    def line(self, record: Record) -> bytes | None:
        """The document as it would be written; None if it has no UTF-8 (lone surrogates)."""
        content = {
            "id": record.id,
            "text": record.text,
            "source": record.source,
            "language": record.language,
            "scores": {name: score for name, score in record.scores.items() if math.isfinite(score)},
            "provenance": record.provenance,
        }
        try:
            line: bytes = self._dumps(content)
        except TypeError:
            return None
        return line + b"\n"

    def write(self, line: bytes) -> None:
        self._file.write(self._compressor.compress(line))

    def finish(self) -> None:
        self._file.write(self._compressor.flush())


def read_documents(path: Path, described: Mapping[str, Any]) -> Iterator[Record]:
    """The documents of a file that `described` (an output in the ledger) tells of. Raises DataError."""
    loads = orjson().loads
    try:
        for line in _lines(path, described):
            content = loads(line)
            yield Record(
                text=content["text"],
                id=content["id"],
                source=content["source"],
                provenance=content["provenance"],
                language=content["language"],
                scores=content["scores"],
            )
    except (ValueError, KeyError, zstandard.ZstdError) as error:
        raise _damaged(path, str(error)) from None


def _lines(path: Path, described: Mapping[str, Any]) -> Iterator[bytes]:
    sha256, size = hashlib.sha256(), 0
    frame = zstandard.ZstdDecompressor().decompressobj()
    pending: list[bytes] = []
    try:
        with open(path, "rb") as file:
            while data := file.read(READ_BYTES):
                sha256.update(data)
                size += len(data)
                advance(len(data))
                first, *others = frame.decompress(data).split(b"\n")
                pending.append(first)
                if others:
                    yield b"".join(pending)
                    yield from others[:-1]
                    pending = [others[-1]]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if size != described["bytes"] or sha256.hexdigest() != described["sha256"]:
        raise _damaged(path, f"{size:,} bytes, its entry in the ledger says {described['bytes']:,} and other content")


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: damaged since it was written ({why}); remove it and run prepare again to make it anew")


def has_size(path: Path, described: Mapping[str, Any]) -> bool:
    try:
        return bool(path.stat().st_size == described["bytes"])
    except OSError:
        return False
