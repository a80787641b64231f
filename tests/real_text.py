"""Real English text for tests: novels where shared data is at hand, else this machine's Python library.

The data is looked for in $LLAMATRAIN_DATA, else in ../shared/data beside the repository.
"""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import zstandard

from data_tools.stdlib_corpus import StdlibCorpusSettings, stdlib_corpus

REPOSITORY = Path(__file__).parent.parent


def shared_data() -> Path | None:
    """The folder of shared data, or None."""
    path = Path(os.environ.get("LLAMATRAIN_DATA", REPOSITORY.parent / "shared" / "data"))
    return path if path.is_dir() else None


def needed_data() -> Path:
    """`shared_data`; the test that asks is skipped where there is none."""
    data = shared_data()
    if data is None:
        pytest.skip("no shared data")
    return data


def novels(archive: Path, count: int) -> list[str]:
    """The first novels of the archive."""
    texts: list[str] = []
    with (
        open(archive, "rb") as compressed,
        zstandard.ZstdDecompressor().stream_reader(compressed) as plain,
        tarfile.open(fileobj=plain, mode="r|") as members,
    ):
        for member in members:
            if member.isfile() and len(texts) < count:
                file = members.extractfile(member)
                assert file is not None
                texts.append(file.read().decode("utf-8-sig"))
    return texts


def english_documents(directory: Path) -> list[str]:
    """A few hundred kilobytes of text as documents, and never nothing."""
    data = shared_data()
    archive = data / "corpora" / "english_novels" / "english_novels.tar.zst" if data else None
    if archive is not None and archive.exists():
        return [text[:100_000] for text in novels(archive, 8)]
    stdlib_corpus(StdlibCorpusSettings(output=str(directory)))
    with open(directory / "docs.jsonl.zst", "rb") as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
        return [json.loads(line)["text"] for line in lines][:300]
