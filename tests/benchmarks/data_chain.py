"""The whole CommonCrawl chain through the engine, from a WET file to documents and to token shards. No torch.

The engine notes the CPU-seconds of every unit, and those are added up here: reading and cleaning, hashing lines,
finding the repeated ones, filtering by all three models, writing documents twice, ledger and checksums. Loading the
models, which takes seconds however much there is to filter, falls to a first file of the same pages, not counted.
"""

import gzip
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.dedup.lines import normalised_lines
from data_tools.engine.settings import PrepareSettings
from data_tools.prepare import prepare
from llamatrain.config.build import build
from tests.benchmarks.data_models import Models
from tests.benchmarks.data_texts import quiet
from tests.data.wet_writer import wet_page

STAGES = ("clean", "hash", "mark", "filter", "tokenize")
KEEP_ALL: dict[str, Any] = {
    "read": {"min_characters": 1},
    "filters": {
        "language": {"languages": [], "threshold": 0.0},
        "perplexity": {"keep": ["head", "middle", "tail", "all"]},
        "quality": {"threshold": 0.0},
    },
}


@dataclass(frozen=True)
class ChainRun:
    """What one run took, in CPU-seconds for the pages of one file."""

    bytes_in: int  # of text, titles left out
    bytes_out: int
    seconds: dict[str, float]

    def rate(self, stages: Sequence[str]) -> float:
        """MB of text a CPU-second through these stages."""
        return self.bytes_in / 1e6 / sum(self.seconds[stage] for stage in stages)

    @property
    def kept(self) -> float:
        return self.bytes_out / self.bytes_in


def write_wet(path: Path, texts: Sequence[str]) -> int:
    """The pages as Common Crawl packs them, each a gzip member; returns the bytes of text."""
    with open(path, "wb") as file:
        for number, text in enumerate(texts):
            page = wet_page("Title", text, url=f"http://example.com/{number}")
            file.write(gzip.compress(page, compresslevel=6, mtime=0))
    return sum(len(text.encode()) for text in texts)


def distinct_lines(texts: Sequence[str]) -> list[str]:
    """The pages with each line where it stands first, so that deduplication finds nothing to drop."""
    seen: set[bytes] = set()
    pages = []
    for text in texts:
        lines = []
        for line, alike in zip(text.split("\n"), normalised_lines(text), strict=True):
            if alike not in seen:
                seen.add(alike)
                lines.append(line)
        pages.append("\n".join(lines))
    return [page for page in pages if page]


def run_chain(folder: Path, texts: Sequence[str], models: Models, *, drop: bool) -> ChainRun:
    """`drop`: with the settings of the paper, as `source=common_crawl` has them; else every page goes through all."""
    texts = texts if drop else distinct_lines(texts)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "input").mkdir(parents=True)
    size = write_wet(folder / "input" / "1.warc.wet.gz", texts)
    shutil.copy(folder / "input" / "1.warc.wet.gz", folder / "input" / "2.warc.wet.gz")
    settings = _settings(folder, models, drop=drop)
    with quiet():
        prepare(settings)
    return _times(folder / "output", size)


def _settings(folder: Path, models: Models, *, drop: bool) -> PrepareSettings:
    changed: dict[str, Any] = {"read": {}, "filters": {}} if drop else KEEP_ALL
    filters = {name: dict(changed["filters"].get(name, {})) for name in ("language", "perplexity", "quality")}
    filters["perplexity"]["models"] = str(models.language_models)
    filters["quality"]["model"] = str(models.quality)
    values = {
        "input": str(folder / "input"),
        "output": str(folder / "output"),
        "tokenizer": str(models.tokenizer),
        "name": "common_crawl",
        "reader": "common_crawl",
        "read": changed["read"],
        "filters": filters,
        "after": list(filters),
        # Copies are looked for within each file, as the second is the first once more.
        "dedup": {"level": "line", "policy": "drop_all", "scope": "files", "scope_files": 1},
        "unit_bytes": 1,
        "workers": 1,
    }
    return build(PrepareSettings, values)


def _times(output: Path, size: int) -> ChainRun:
    seconds: dict[str, float] = {}
    for stage in STAGES:
        paths = sorted((output / "timings" / stage).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        taken = [json.loads(path.read_bytes())["cpu_seconds"] for path in paths]
        # Both files have one unit for tokens; of the others the later unit found the models loaded.
        seconds[stage] = taken[0] / 2 if len(taken) == 1 else taken[-1]
    entry = _last_entry(output / "ledger" / "filter")
    return ChainRun(bytes_in=size, bytes_out=entry["kept"]["bytes"], seconds=seconds)


def _last_entry(folder: Path) -> dict[str, Any]:
    newest = max(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    entry: dict[str, Any] = json.loads(newest.read_bytes())
    return entry
