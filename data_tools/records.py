"""What passes between the stages of data preparation: a document with where it comes from, or why it was dropped.

Everything a source reads ends as one of the two, so that the ledger adds up: records in = records out + dropped.
"""

import builtins
from dataclasses import dataclass, field

SAMPLE_CHARACTERS = 500  # of a dropped document, kept for eyes


@dataclass(slots=True)
class Record:
    """A document. Filters may set `language` and `scores`, and cut `text`; the rest stays as the source gave it."""

    text: str
    id: str  # unique within the source, the same on every machine
    source: str
    provenance: dict[str, str] = field(default_factory=dict)  # url, date, licence, file
    language: str | None = None  # ISO 639
    scores: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # lines taken out of it by reason, for the ledger


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document that does not go on."""

    reason: str
    id: str
    bytes: int  # of its text in UTF-8
    text: str = ""  # its beginning

    @classmethod
    def of(cls, record: Record, reason: str) -> "Dropped":
        size = len(record.text.encode("utf-8", "surrogatepass"))
        return cls(reason, record.id, size, record.text[:SAMPLE_CHARACTERS])

    @classmethod
    def of_bytes(cls, reason: str, id: str, data: builtins.bytes, *, size: int | None = None) -> "Dropped":
        """What is no text yet; `size`: of all of it, where `data` is its beginning."""
        text = data[: 4 * SAMPLE_CHARACTERS].decode("utf-8", "replace")[:SAMPLE_CHARACTERS]
        return cls(reason, id, len(data) if size is None else size, text)
