"""Small preparations for tests of the engine."""

import json
import random
import re
from pathlib import Path
from typing import Any

import zstandard

from data_tools.engine.settings import PrepareSettings
from data_tools.prepare import prepare
from llamatrain.config.build import build

WORDS = ("the", "ship", "sailed", "north", "and", "saw", "nothing", "but", "water", "for", "days", "until", "land")


def write_corpus(directory: Path, *, files: int = 5, documents: int = 20, seed: int = 0) -> Path:
    """JSON lines for toy_source: documents of lines, some of which are on many of them, and some whole copies."""
    generator = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    for number in range(files):
        with open(directory / f"{number}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(documents):
                if generator.random() < 0.1 and texts:
                    texts.append(generator.choice(texts))
                else:
                    lines = [" ".join(generator.choices(WORDS, k=generator.randint(3, 12))) for _ in range(4)]
                    lines += ["Home | About", "Click here!"][: generator.randint(0, 2)]
                    generator.shuffle(lines)
                    texts.append("\n".join(lines))
                file.write(json.dumps({"text": texts[-1]}) + "\n")
            file.write(json.dumps({"drop": "redirect"}) + "\n")
    return directory


def settings_for(corpus: Path, output: Path, **changes: Any) -> PrepareSettings:
    """Of all stages but the tokens: line dedup, a filter before and after, units of two files or so."""
    values: dict[str, Any] = {
        "input": str(corpus),
        "output": str(output),
        "name": "toy",
        "reader": "tests.data.toy_source",
        "before": ["tests.data.toy_filters"],
        "dedup": {"level": "line", "policy": "drop_all", "partitions": 3},
        "unit_bytes": 2 * max(path.stat().st_size for path in corpus.glob("*")),
        "workers": 1,
    }
    return build(PrepareSettings, values | changes)


def prepared(corpus: Path, output: Path, **changes: Any) -> Path:
    prepare(settings_for(corpus, output, **changes))
    return output


def documents_of(output: Path, directory: str = "documents") -> list[dict[str, Any]]:
    found = []
    for path in sorted((output / directory).glob("*.jsonl.zst")):
        content = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        found += [json.loads(line) for line in content.splitlines()]
    return found


def files_of(output: Path) -> dict[str, bytes]:
    """All that must be the same however a preparation went."""
    apart = ("timings", "slurm", "run.json")  # seconds and this machine's paths
    code = re.compile(rb'"code_sha256": "[0-9a-f]+"')  # somebody may be at work on data_tools meanwhile
    return {
        path.relative_to(output).as_posix(): code.sub(b"", path.read_bytes())
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.relative_to(output).parts[0] not in apart
    }
