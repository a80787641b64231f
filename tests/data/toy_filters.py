"""A filter for tests of the engine: short documents go, lines that shout go, the rest is scored."""

from collections.abc import Callable
from dataclasses import dataclass

from data_tools.records import Dropped, Record


@dataclass
class ToyFilterSettings:
    min_characters: int = 0


def toy_filter(settings: ToyFilterSettings) -> Callable[[Record], Record | Dropped]:
    def keep(record: Record) -> Record | Dropped:
        if len(record.text) < settings.min_characters:
            return Dropped.of(record, "short")
        lines = record.text.split("\n")
        quiet = [line for line in lines if not line.endswith("!")]
        if len(quiet) < len(lines):
            record.counts["lines_shouted"] = len(lines) - len(quiet)
            record.text = "\n".join(quiet)
        record.language = "en"
        record.scores["quality"] = min(1.0, len(record.text) / 1000)
        record.scores["perplexity"] = 100.0 + len(record.text)
        return record

    return keep
