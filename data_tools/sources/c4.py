"""C4 as it is distributed: gzip files of JSON lines with text, url and timestamp. The paper takes it as it is.

To make C4 out of Common Crawl instead, read that source with the filter `c4_rules`.

Drop reasons: broken_json (a line that is no JSON object, or no UTF-8), broken_encoding (its text holds lone
surrogates), missing_text (no text, or not as text), empty, too_large.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.records import Dropped, Record
from data_tools.sources.plain import PlainSettings, json_documents

SUFFIXES = (".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".json", ".jsonl")
PROVENANCE = ["url", "timestamp"]


@dataclass(frozen=True)
class C4ReaderSettings:
    max_document_bytes: int = 1 << 24  # ours; of a line. C4's own pages have at most 190,000 characters
    language: str | None = "en"  # of the variant that is read; null for the multilingual one


def read(path: Path, name: str, settings: C4ReaderSettings) -> Iterator[Record | Dropped]:
    """The documents of a file, in its order; ids are `NAME:LINE`. Raises DataError naming a damaged or cut file."""
    plain = PlainSettings(provenance_fields=PROVENANCE, max_document_bytes=settings.max_document_bytes)
    for item in json_documents(path, name, plain, source="c4"):
        if isinstance(item, Record):
            item.language = settings.language
        yield item
