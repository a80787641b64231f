"""A source for tests of the engine: JSON lines with `text`, where a line may ask for trouble.

{"text": …}          a document
{"drop": REASON}     dropped by the source
{"raise": true}      the file cannot be read any further
{"crash": true}      a defect of the source
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.records import Dropped, Record
from llamatrain.errors import DataError

SUFFIXES = (".jsonl",)


@dataclass
class ToySettings:
    repeat: int = 1  # times each document is given


def read(path: Path, name: str, settings: ToySettings) -> Iterator[Record | Dropped]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        content = json.loads(line)
        if "drop" in content:
            yield Dropped(content["drop"], f"{name}:{number}", bytes=len(line), text=line)
        elif "raise" in content:
            raise DataError(f"{path}: ends in the middle")
        elif "crash" in content:
            raise ZeroDivisionError("a defect")
        else:
            for copy in range(settings.repeat):
                identifier = f"{name}:{number}" + (f"#{copy}" if copy else "")
                yield Record(content["text"], identifier, "toy", {"file": name})
