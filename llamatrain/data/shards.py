"""Token shards on disk: reading, checking and writing. No torch.

A data set is a directory with a manifest, `dataset.json`, and for each split (`train`, `validation`) any number
of shards. A shard is two files: `.bin`, the token ids one after the other (little-endian uint16 or uint32), and
`.idx`, where each document starts (little-endian uint64, in tokens). docs/data-format.md describes every field.
The manifest is written last: its presence makes the directory a data set.
"""

import json
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llamatrain.errors import DataError
from llamatrain.files import fsync_path, sha256_of_file, sha256_of_json, write_json_atomically

FORMAT = "llamatrain-shards"
VERSION = 1
MANIFEST_FILE = "dataset.json"
SPLITS = ("train", "validation")
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
INDEX_DTYPE = np.dtype("<u8")
LARGEST_MANIFEST = 256 << 20  # bytes; a shard takes 400

FIELD_KINDS = {
    "source": str,
    "dtype": str,
    "tokenizer_sha256": str,
    "vocab_size": int,
    "bos_id": int,
    "eos_id": int,
    "add_bos": bool,
    "add_eos": bool,
    "documents": dict,
    "settings": dict,
}
SHARD_KINDS = {
    "file": str,
    "tokens": int,
    "documents": int,
    "text_bytes": int,
    "sha256": str,
    "index_file": str,
    "index_sha256": str,
}


def token_dtype(vocab_size: int) -> str:
    """The narrowest type that holds every id: "uint16" up to 65,536 ids, else "uint32"."""
    return "uint16" if vocab_size <= 65_536 else "uint32"


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest records it."""

    file: str
    tokens: int
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents' texts
    sha256: str
    index_file: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data set holds. `directory` is where it was read from and no part of its identity."""

    directory: Path
    source: str
    dtype: str
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    add_bos: bool
    add_eos: bool
    splits: dict[str, tuple[ShardInfo, ...]]
    documents: dict[str, int] = field(default_factory=dict)  # what became of the input documents: kept, dropped, …
    settings: dict[str, Any] = field(default_factory=dict)  # how it was made

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        return self.splits.get(split, ())

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.shards(split))

    def text_bytes(self, split: str) -> int:
        return sum(shard.text_bytes for shard in self.shards(split))

    def content(self) -> dict[str, Any]:
        """The JSON form."""
        content = asdict(self)
        del content["directory"]
        return {"format": FORMAT, "version": VERSION, **content}

    @cached_property
    def hash(self) -> str:
        """Identity of the data set: SHA-256 over the manifest, which holds the hashes of all files."""
        return sha256_of_json(self.content())


def write_manifest(manifest: Manifest) -> None:
    """Make the directory a data set; call it when every shard is on disk."""
    write_json_atomically(manifest.directory / MANIFEST_FILE, manifest.content())


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check a manifest; no shard is opened. Raises DataError naming what is wrong and where."""
    path = Path(directory) / MANIFEST_FILE
    content = _read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: not a {FORMAT} manifest")
    if content.get("version") != VERSION:
        raise DataError(
            f"{path}: format version {content.get('version')}; this program reads version {VERSION}: "
            "tokenize the corpus again, or use the release that wrote it"
        )
    try:
        splits = {name: tuple(ShardInfo(**shard) for shard in shards) for name, shards in content["splits"].items()}
        values = {k: v for k, v in content.items() if k not in ("format", "version", "splits")}
        manifest = Manifest(directory=Path(directory), splits=splits, **values)
        _check_kinds(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: a field is missing or of the wrong kind ({error})") from None
    shards = [shard for split in splits.values() for shard in split]
    names = [name for shard in shards for name in (shard.file, shard.index_file)]
    plain = all(Path(name).name == name and name.isprintable() and name != ".." for name in names)
    counts_fit = all(0 <= count < 2**63 for s in shards for count in (s.tokens, s.documents, s.text_bytes))
    if manifest.dtype not in DTYPES or not plain or not counts_fit:
        raise DataError(f"{path}: an unknown dtype, a file outside the directory or a count that cannot be")
    ids_fit = all(0 <= token < manifest.vocab_size for token in (manifest.bos_id, manifest.eos_id))
    if not ids_fit or manifest.vocab_size > 2 ** (8 * DTYPES[manifest.dtype].itemsize):
        raise DataError(
            f"{path}: {manifest.vocab_size} token ids, BOS {manifest.bos_id}, EOS {manifest.eos_id}: cannot be"
        )
    return manifest


def _read_json(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError(f"{path}: not a file")
        if path.stat().st_size > LARGEST_MANIFEST:
            raise DataError(f"{path}: larger than any manifest this program writes")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path.parent}: no {MANIFEST_FILE} there, so it is not a data set; "
            "write one with python -m data_tools.tokenize_shards, or correct the path"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _check_kinds(manifest: Manifest) -> None:
    """Raises TypeError for a field of another kind than declared; a bool is no number."""
    mistyped = [name for name, kind in FIELD_KINDS.items() if type(getattr(manifest, name)) is not kind]
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        mistyped += [name for name, kind in SHARD_KINDS.items() if type(getattr(shard, name)) is not kind]
    if mistyped:
        raise TypeError(mistyped[0])


def windows_per_shard(manifest: Manifest, split: str, seq_len: int) -> list[int]:
    """Samples each shard holds: `seq_len` inputs, and one target more that the next window shares."""
    return [max(0, shard.tokens - 1) // seq_len for shard in manifest.shards(split)]


def check_sizes(manifest: Manifest, splits: Sequence[str] = SPLITS) -> None:
    """Compare every file's size with the manifest. Raises DataError naming the first file that does not fit."""
    width = DTYPES[manifest.dtype].itemsize
    for split in splits:
        for shard in manifest.shards(split):
            expected_sizes = (
                (shard.file, shard.tokens * width),
                (shard.index_file, shard.documents * INDEX_DTYPE.itemsize),
            )
            for name, expected in expected_sizes:
                path = manifest.directory / name
                try:
                    status = path.stat()
                except OSError as error:
                    raise DataError(f"{path}: named in the manifest but cannot be read ({error.strerror})") from None
                if not stat.S_ISREG(status.st_mode):
                    raise DataError(f"{path}: named in the manifest and no file")
                size = status.st_size
                if size != expected:
                    raise DataError(
                        f"{path}: {size} bytes where the manifest says {expected}; it is truncated or was "
                        "replaced: copy it again, or tokenize the corpus again"
                    )


def check_hash(path: Path, sha256: str) -> None:
    """Raises DataError when the file's content is not what the manifest recorded."""
    if sha256_of_file(path) != sha256:
        raise DataError(
            f"{path}: its SHA-256 is not the manifest's, so its content was altered: copy it again, "
            "or tokenize the corpus again"
        )


def check_hashes(manifest: Manifest, splits: Sequence[str] = SPLITS, *, share: tuple[int, int] = (0, 1)) -> None:
    """Hash every file, or share r of n. Raises DataError naming the first that was altered."""
    rank, ranks = share
    for split in splits:
        for shard in manifest.shards(split)[rank::ranks]:
            check_hash(manifest.directory / shard.file, shard.sha256)
            check_hash(manifest.directory / shard.index_file, shard.index_sha256)


def open_tokens(manifest: Manifest, shard: ShardInfo) -> np.ndarray:
    """Memory map of a shard's tokens, uint16 or uint32 [tokens]. Raises DataError."""
    return _open(manifest.directory / shard.file, DTYPES[manifest.dtype], shard.tokens)


def open_document_starts(manifest: Manifest, shard: ShardInfo) -> np.ndarray:
    """Memory map of where a shard's documents start, uint64 [documents], ascending from 0. Raises DataError."""
    return _open(manifest.directory / shard.index_file, INDEX_DTYPE, shard.documents)


def _open(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype)
    try:
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,)))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be mapped ({error})") from None


class ShardWriter:
    """Writes one shard under temporary names; `commit` gives it its own.

    Tokens go straight to disk, so memory does not grow with the shard.
    """

    def __init__(self, directory: Path, name: str, dtype: str) -> None:
        self.directory = directory
        self.name = name
        self.dtype = DTYPES[dtype]
        self.tokens = 0
        self.text_bytes = 0
        self._starts: list[int] = []
        self._temporary = directory / f".{name}.bin.tmp"
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - open until commit

    def add(self, tokens: Sequence[int] | np.ndarray, *, text_bytes: int) -> None:
        """Append one document."""
        self._starts.append(self.tokens)
        self._file.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self.tokens += len(tokens)
        self.text_bytes += text_bytes

    def commit(self) -> ShardInfo:
        """Sync both files and give them their names: `<name>.bin`, `<name>.idx`."""
        self._file.flush()
        self._file.close()
        fsync_path(self._temporary)
        index_temporary = self.directory / f".{self.name}.idx.tmp"
        np.asarray(self._starts, dtype=INDEX_DTYPE).tofile(index_temporary)
        fsync_path(index_temporary)
        path, index_path = self.directory / f"{self.name}.bin", self.directory / f"{self.name}.idx"
        index_temporary.replace(index_path)
        self._temporary.replace(path)
        fsync_path(self.directory)
        return ShardInfo(
            file=path.name,
            tokens=self.tokens,
            documents=len(self._starts),
            text_bytes=self.text_bytes,
            sha256=sha256_of_file(path),
            index_file=index_path.name,
            index_sha256=sha256_of_file(index_path),
        )

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)
