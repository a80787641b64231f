"""What counts as a copy: a line, a document or a few sentences, as 64-bit hashes of a document and back.

    line       lines between line feeds, made alike as CCNet does (data_tools.dedup.lines); repeated ones are cut out
    document   the text, or a field of its provenance (a checksum of the raw file, say); a repeated document goes whole
    span       runs of `span_sentences` sentences (C4: "discarded all but one of any three-sentence span occurring more
               than once", arXiv:1910.10683 §2.2); every sentence of a repeated run is cut out

A Level gives a document's hashes (`hashes`), and takes the mask of those that stay (`keep`). Reasons to drop:

    duplicate            a copy (document), or nothing was left of it (line, span)
    short_after_dedup    fewer words left than `min_words`, where something was cut out
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from data_tools.dedup.exact import POLICIES
from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError, DataError

KINDS = ("xxh3", "cc_net")  # data_tools.dedup.lines, which is imported where lines are hashed: it takes half a second
LEVELS = ("none", "line", "document", "span")
SCOPES = ("all", "dump", "files")
PROVENANCE = "provenance."
SENTENCE = re.compile(r"(?:[^.!?\n]|[.!?](?![\s\"'”’)\]]))*+(?:[.!?]+[\"'”’)\]]*|\n|$)\s*")

Array = np.ndarray[Any, Any]


@dataclass
class DedupSettings:
    level: str = "none"  # none | line (CommonCrawl, as CCNet) | document (GitHub) | span (C4)
    policy: str = "keep_first"  # keep_first | drop_all (CCNet's code drops the first copy too)
    scope: str = "all"  # among what copies are looked for: all | dump | files. CCNet: 50 of a dump's 1600 shards
    scope_files: int = 50  # scope=files: so many input files, in their order
    dump_pattern: str = r"CC-MAIN-\d{4}-\d{2}"  # scope=dump: what in a file's name tells the dump
    hash: str = "xxh3"  # level=line: xxh3, or cc_net for CCNet's own hashes (the same lines, slower)
    key: str = "text"  # level=document: text | provenance.NAME, which the source gives
    span_sentences: int = 3  # level=span: C4's three
    min_words: int = 0  # a document that lost something goes with fewer words than this left (datatrove: 50)
    partitions: int | None = None  # pieces the hashes are sorted in, and of work; null: one for 4 GiB of input


def check_dedup(settings: DedupSettings) -> None:
    """Raises ConfigError."""
    choices = {"level": LEVELS, "policy": POLICIES, "scope": SCOPES, "hash": KINDS}
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            raise ConfigError(f"dedup.{name}={getattr(settings, name)}: choose one of {', '.join(allowed)}")
    for name in ("scope_files", "span_sentences"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"dedup.{name}={getattr(settings, name)}: must be at least 1")
    if settings.partitions is not None and not 1 <= settings.partitions <= 65536:
        raise ConfigError(f"dedup.partitions={settings.partitions}: between 1 and 65536, or null")
    if settings.key != "text" and not settings.key.startswith(PROVENANCE):
        raise ConfigError(f"dedup.key={settings.key}: text, or provenance.NAME")
    try:
        re.compile(settings.dump_pattern)
    except re.error as error:
        raise ConfigError(f"dedup.dump_pattern={settings.dump_pattern}: no regular expression ({error})") from None


@dataclass(frozen=True)
class Level:
    hashes: Callable[[Record], Array]
    count: Callable[[Record], int]  # how many hashes there are
    keep: Callable[[Record, Array], Record | Dropped]


def level_of(settings: DedupSettings) -> Level:
    """What `settings.level` means."""
    if settings.level == "line":
        from data_tools.dedup.lines import line_hashes

        return Level(
            lambda record: line_hashes(record.text, kind=settings.hash),
            lambda record: record.text.count("\n") + 1,
            _keeping_lines(settings),
        )
    if settings.level == "document":
        return Level(_document_hash(settings.key), lambda record: 1, _keeping_documents)
    length = settings.span_sentences
    return Level(
        _span_hashes(length),
        lambda record: max(0, len(sentences(record.text)) - length + 1),
        _keeping_spans(settings),
    )


def _document_hash(key: str) -> Callable[[Record], Array]:
    name = key.removeprefix(PROVENANCE) if key != "text" else None

    def hashes(record: Record) -> Array:
        if name is not None and name not in record.provenance:
            raise DataError(f"document {record.id}: its provenance has no {name!r}; dedup.key=text")
        value = record.text if name is None else record.provenance[name]
        return np.array([xxhash.xxh3_64_intdigest(value.encode("utf-8", "surrogatepass"))], np.uint64)

    return hashes


def _keeping_documents(record: Record, mask: Array) -> Record | Dropped:
    return record if mask.all() else Dropped.of(record, "duplicate")


def _keeping_lines(settings: DedupSettings) -> Callable[[Record, Array], Record | Dropped]:
    from data_tools.dedup.lines import keep_lines

    def keep(record: Record, mask: Array) -> Record | Dropped:
        repeated = len(mask) - int(np.count_nonzero(mask))
        if not repeated:
            return record
        return _shortened(record, keep_lines(record.text, mask), {"lines_duplicate": repeated}, settings)

    return keep


def sentences(text: str) -> list[str]:
    """The text in pieces, each a sentence with the white space after it; joined they are the text."""
    return [found.group() for found in SENTENCE.finditer(text) if found.group()]


def _span_hashes(length: int) -> Callable[[Record], Array]:
    def hashes(record: Record) -> Array:
        alike = [
            " ".join(sentence.lower().split()).encode("utf-8", "surrogatepass") for sentence in sentences(record.text)
        ]
        spans = [b" ".join(alike[start : start + length]) for start in range(len(alike) - length + 1)]
        return np.fromiter(map(xxhash.xxh3_64_intdigest, spans), np.uint64, len(spans))

    return hashes


def _keeping_spans(settings: DedupSettings) -> Callable[[Record, Array], Record | Dropped]:
    def keep(record: Record, mask: Array) -> Record | Dropped:
        if mask.all():
            return record
        parts = sentences(record.text)
        stays = np.ones(len(parts), bool)
        for start in np.flatnonzero(~mask).tolist():
            stays[start : start + settings.span_sentences] = False
        text = "".join(part for part, stay in zip(parts, stays.tolist(), strict=True) if stay)
        return _shortened(record, text, {"sentences_duplicate": int(np.count_nonzero(~stays))}, settings)

    return keep


def _shortened(record: Record, text: str, counts: dict[str, int], settings: DedupSettings) -> Record | Dropped:
    if not text or text.isspace():
        return Dropped.of(record, "duplicate")
    if settings.min_words and len(text.split()) < settings.min_words:
        return Dropped.of(record, "short_after_dedup")
    record.text = text
    record.counts |= counts
    return record
