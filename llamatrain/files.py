"""Files that are either whole or absent, and their hashes. No torch."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def fsync_path(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when the block ends well.

    A reader, or a crash at any moment, finds the old content or the new, never a part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    with written_atomically(path) as file:
        file.write(content)


def write_json_atomically(path: Path, content: Any) -> None:
    write_bytes_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content: Any) -> str:
    """Hex SHA-256 of the canonical JSON text (sorted keys, no spaces): equal content, equal hash."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
