"""Check every byte of a data set against its manifest, and name every file that is not whole.

python -m data_tools.verify_shards path=DIRECTORY
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.documents import byte_bar
from llamatrain.cli import run_command
from llamatrain.data.shards import (
    DTYPES,
    INDEX_DTYPE,
    Manifest,
    ShardInfo,
    open_document_starts,
    open_tokens,
    read_manifest,
)
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import sha256_of_file
from llamatrain.tokenizer import TOKENIZER_FILE

CHUNK_BYTES = 1 << 24
CHUNK_DOCUMENTS = 1 << 20


@dataclass
class VerifyShardsSettings:
    path: str = "???"  # directory of the data set


@dataclass
class FileReport:
    """What was found in one file; whole when there are no problems."""

    name: str
    size: int
    problems: list[str] = field(default_factory=list)


def verify_shards(settings: VerifyShardsSettings) -> None:
    """Print a table of all files. Raises DataError naming each that is not whole."""
    if settings.path in ("", "???"):
        raise ConfigError("path is not set: path=DIRECTORY")
    manifest = read_manifest(settings.path)
    reports = inspect_data_set(manifest)
    for report in reports:
        print(f"{report.name:<28} {report.size:>16,} bytes  {'; '.join(report.problems) or 'whole'}")
    problems = [f"{report.name} ({'; '.join(report.problems)})" for report in reports if report.problems]
    problems += [f"dataset.json ({problem})" for problem in _counts_problems(manifest)]
    if problems:
        raise DataError(
            f"{settings.path}: {len(problems)} not whole: {', '.join(problems)}; "
            "copy them again, or tokenize the corpus again"
        )
    tokens = ", ".join(f"{manifest.tokens(split):,} {split}" for split in manifest.splits)
    print(f"{settings.path}: whole; {tokens} tokens")


def inspect_data_set(manifest: Manifest) -> list[FileReport]:
    """A report for every file the manifest names, the tokenizer, and every shard file it does not name."""
    width = DTYPES[manifest.dtype].itemsize
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    total = sum(shard.tokens * width + shard.documents * INDEX_DTYPE.itemsize for shard in shards)
    reports: list[FileReport] = []
    with byte_bar("verifying", total) as bar:
        for shard in shards:
            tokens = _inspect_file(manifest.directory / shard.file, shard.tokens * width, shard.sha256, bar)
            index_size = shard.documents * INDEX_DTYPE.itemsize
            index = _inspect_file(manifest.directory / shard.index_file, index_size, shard.index_sha256, bar)
            if tokens.size == shard.tokens * width:
                tokens.problems += _id_problems(manifest, shard)
                if index.size == index_size:
                    index.problems += _index_problems(shard, open_document_starts(manifest, shard))
                    if not index.problems:
                        tokens.problems += _boundary_problems(manifest, shard)
            reports += [tokens, index]
    known = {report.name for report in reports}
    return [*reports, *_tokenizer_report(manifest), *_stray_reports(manifest.directory, known)]


def _inspect_file(path: Path, size: int, sha256: str, bar: tqdm) -> FileReport:
    report = FileReport(path.name, 0)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                report.size += len(chunk)
                bar.update(len(chunk))
    except OSError as error:
        report.problems.append(f"cannot be read: {error.strerror}")
        return report
    if report.size != size:
        report.problems.append(f"{report.size:,} bytes, the manifest says {size:,}")
    elif digest.hexdigest() != sha256:
        report.problems.append("altered: its SHA-256 is not the manifest's")
    return report


def _id_problems(manifest: Manifest, shard: ShardInfo) -> list[str]:
    tokens = open_tokens(manifest, shard)
    for start in range(0, shard.tokens, CHUNK_BYTES):
        largest = int(tokens[start : start + CHUNK_BYTES].max())
        if largest >= manifest.vocab_size:
            return [f"holds the id {largest}, the vocabulary has {manifest.vocab_size}"]
    return []


def _index_problems(shard: ShardInfo, starts: np.ndarray) -> list[str]:
    if shard.documents == 0:
        return [] if shard.tokens == 0 else ["no document, but there are tokens"]
    if starts[0] != 0:
        return [f"the first document starts at {starts[0]}, not 0"]
    for first, chunk in _chunks_with_next(starts, shard.tokens):
        wrong = np.flatnonzero(chunk[1:] <= chunk[:-1])
        if len(wrong):
            return [f"document {first + int(wrong[0])} is empty or ends outside the shard"]
    return []


def _boundary_problems(manifest: Manifest, shard: ShardInfo) -> list[str]:
    tokens, starts = open_tokens(manifest, shard), open_document_starts(manifest, shard)
    for first, chunk in _chunks_with_next(starts, shard.tokens):
        for wanted, token, positions in (
            (manifest.add_bos, manifest.bos_id, chunk[:-1]),
            (manifest.add_eos, manifest.eos_id, chunk[1:] - 1),
        ):
            wrong = np.flatnonzero(tokens[positions] != token)
            if wanted and len(wrong):
                name = "begin with BOS" if token == manifest.bos_id else "end with EOS"
                return [f"document {first + int(wrong[0])} does not {name} ({token})"]
    return []


def _chunks_with_next(starts: np.ndarray, tokens: int) -> Iterator[tuple[int, np.ndarray]]:
    """Runs of document starts as int64, each with the start after it (or the end of the shard) appended."""
    for first in range(0, len(starts), CHUNK_DOCUMENTS):
        chunk = np.asarray(starts[first : first + CHUNK_DOCUMENTS + 1]).astype(np.int64)
        if first + CHUNK_DOCUMENTS >= len(starts):
            chunk = np.append(chunk, tokens)
        yield first, chunk


def _tokenizer_report(manifest: Manifest) -> list[FileReport]:
    path = manifest.directory / TOKENIZER_FILE
    if not path.exists():
        return []
    altered = sha256_of_file(path) != manifest.tokenizer_sha256
    problems = ["not the tokenizer the manifest names: its SHA-256 is another"] if altered else []
    return [FileReport(path.name, path.stat().st_size, problems)]


def _stray_reports(directory: Path, known: set[str]) -> list[FileReport]:
    strays = [path for suffix in ("*.bin", "*.idx") for path in directory.glob(suffix) if path.name not in known]
    return [FileReport(p.name, p.stat().st_size, ["not named in the manifest"]) for p in sorted(strays)]


def _counts_problems(manifest: Manifest) -> list[str]:
    counts = manifest.documents
    problems = []
    for split, shards in manifest.splits.items():
        stored = sum(shard.documents for shard in shards)
        if counts.get(split, stored) != stored:
            problems.append(f"documents.{split} is {counts[split]}, the shards hold {stored}")
    kept = sum(shard.documents for shards in manifest.splits.values() for shard in shards)
    dropped = sum(count for name, count in counts.items() if name.startswith("dropped_"))
    if counts.get("kept", kept) != kept:
        problems.append(f"documents.kept is {counts['kept']}, the shards hold {kept}")
    if counts.get("read", kept + dropped) != kept + dropped:
        problems.append(f"documents.read is {counts['read']}, kept and dropped are {kept + dropped}")
    return problems


def main() -> None:
    run_command(VerifyShardsSettings, "data_tools/verify_shards", verify_shards, help_text=__doc__)


if __name__ == "__main__":
    main()
