"""The ledger of a preparation: for every stage and unit one JSON entry that says what went in and what became of it.

A unit is a piece of a stage's work: a few input files, or one partition of hashes. `OUTPUT/ledger/STAGE/UNIT.json` is
written last, when the unit's output lies whole on the disk, and its presence is what makes the unit done. It holds
nothing of the machine or the hour, so that a rerun writes the same bytes:

    {
      "format": 1,
      "stage": "clean", "unit": "00003",
      "version": "0.1.0",                     of llamatrain
      "code_sha256": "…",                     of the sources of data_tools
      "config_sha256": "…",                   of the settings of this stage and all that the unit is made from
      "inputs":  [{"name": "x/a.warc.wet.gz", "bytes": 123, "sha256": "…"}, …],
      "outputs": [{"name": "clean/00003.jsonl.zst", "bytes": 456, "sha256": "…"}, …],    names below OUTPUT
      "failed":  [{"name": "x/b.warc.wet.gz", "error": "…"}, …],       inputs that could not be read to the end
      "in":      {"documents": 9, "lines": 80, "bytes": 5000},
      "kept":    {"documents": 5, "lines": 40, "bytes": 3000},
      "dropped": {"too_short": {"documents": 4, "lines": 9, "bytes": 900}, …},           whole documents, by reason
      "cut":     {"lines": {"documents": 3, "lines": 31, "bytes": 1100}, …},             out of documents, by what cut
      "counts":  {"lines_javascript": 7, …},                           what filters counted (Record.counts), added up
      "histograms": {"kept": {…}, "dropped": {…}},                     of the documents that got as far as a filter
      "samples": {"kept": [SAMPLE, …], "dropped": {"too_short": [SAMPLE, …], …}},
      "facts":   {…}                                                   numbers of the stage itself (hashes, pairs)
    }

It adds up: for documents, in = kept + dropped; for lines and bytes, in = kept + dropped + cut. `bytes` are of the text
in UTF-8, `lines` are newlines + 1; both are counted by the engine, not by the filters. `cut` may be negative where a
filter writes something into a text. The "in" of the stage clean is what its source handed on, after the source's own
cleaning: what that took out of a document (markup, headers, licences) is in no sum, at most in `counts`. What a source
drops itself (Dropped) has the bytes the source says, of the raw record mostly, and no lines. Stages that write no
documents (hash, mark, sketch, near, tokenize) have zeros, and `facts`. The "in" of a stage of documents (filter,
select) is the "kept" of the one before it (clean, filter), unit by unit.

A histogram: {"characters": BINS, "languages": {"en": 5, "unknown": 1}, "scores": {NAME: {"scale": "linear", "bins":
BINS}}}, BINS = {"INDEX": documents, …}, sparse. Characters: index 0 is the empty text, index i lengths in
[2^(i-1), 2^i). Scores on the linear scale: index i is [i/50, (i+1)/50), and 1.0 counts into 49; on the log scale
(perplexities): index i is [2^(i/4), 2^((i+1)/4)), and what is not positive counts into -100.
SAMPLE = {"id": …, "text": the first 500 characters, "language": …, "scores": {…}}: those whose ids have the smallest
hashes, so that they are the same on every machine and a sample of a whole stage is made from those of its units.

`OUTPUT/timings/STAGE/UNIT.json` = {"seconds": wall, "cpu_seconds": …, "input_bytes": …, "host": …, "finished": …}: not
reproducible, and no part of the ledger.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data_tools.records import SAMPLE_CHARACTERS, Dropped, Record
from llamatrain.errors import DataError
from llamatrain.files import write_json_atomically

FORMAT = 1
LEDGER, TIMINGS = "ledger", "timings"
SAMPLES = 3  # kept for eyes: of each reason, in each unit
LINEAR_BINS = 50
LOG_BINS_PER_DOUBLING = 4
NOT_POSITIVE = -100
LOG_SCALED = ("perplexity",)  # a score with one of these in its name; others are expected in [0, 1]


@dataclass
class Counts:
    documents: int = 0
    lines: int = 0
    bytes: int = 0

    def add(self, *, documents: int = 0, lines: int = 0, bytes: int = 0) -> None:
        self.documents += documents
        self.lines += lines
        self.bytes += bytes


@dataclass(frozen=True)
class Size:
    """Of a text, as the ledger counts it."""

    lines: int
    bytes: int


def size_of(text: str) -> Size:
    in_utf8 = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return Size(lines=text.count("\n") + 1, bytes=in_utf8)


def character_bin(length: int) -> int:
    return length.bit_length()


def score_scale(name: str) -> str:
    return "log" if any(word in name for word in LOG_SCALED) else "linear"


def score_bin(name: str, value: float) -> int:
    if not math.isfinite(value):
        return NOT_POSITIVE
    if score_scale(name) == "log":
        return math.floor(LOG_BINS_PER_DOUBLING * math.log2(value)) if value > 0 else NOT_POSITIVE
    if value == 1.0:
        return LINEAR_BINS - 1
    return math.floor(value * LINEAR_BINS)


@dataclass
class Histograms:
    characters: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    scores: dict[str, Counter[int]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        self.characters[character_bin(len(record.text))] += 1
        self.languages[record.language or "unknown"] += 1
        for name, value in record.scores.items():
            self.scores.setdefault(name, Counter())[score_bin(name, value)] += 1

    def as_json(self) -> dict[str, Any]:
        scores = {n: {"scale": score_scale(n), "bins": _bins(b)} for n, b in sorted(self.scores.items())}
        return {
            "characters": _bins(self.characters),
            "languages": dict(sorted(self.languages.items())),
            "scores": scores,
        }


def _bins(counts: Counter[int]) -> dict[str, int]:
    return {str(index): counts[index] for index in sorted(counts)}


def _rank(sample: Mapping[str, Any]) -> tuple[bytes, str, str]:
    """Where a sample stands among others: by the hash of its id."""
    identifier = str(sample["id"])
    digest = blake2b(identifier.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return digest, identifier, str(sample["text"])


def _fewest(samples: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    return sorted(samples, key=_rank)[:limit]


def _clean(text: str) -> str:
    """With lone surrogates shown, as UTF-8 has none."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Samples:
    """The few of many whose ids have the smallest hashes."""

    def __init__(self, limit: int = SAMPLES) -> None:
        self.limit = limit
        self._found: dict[str, list[dict[str, Any]]] = {}
        self._worst: dict[str, bytes] = {}  # nothing above this hash can enter any more

    def add(self, group: str, item: Record | Dropped) -> None:
        digest = blake2b(item.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        if digest > self._worst.get(group, b"\xff" * 8):
            return
        sample: dict[str, Any] = {"id": _clean(item.id), "text": _clean(item.text[:SAMPLE_CHARACTERS])}
        if isinstance(item, Record):
            sample |= {"language": item.language, "scores": dict(sorted(item.scores.items()))}
        found = _fewest([*self._found.get(group, []), sample], self.limit)
        self._found[group] = found
        if len(found) == self.limit:
            self._worst[group] = _rank(found[-1])[0]

    def of(self, group: str) -> list[dict[str, Any]]:
        return self._found.get(group, [])


class Tally:
    """What a unit counts while documents pass through it; `as_json` gives the entry's part of it."""

    def __init__(self) -> None:
        self.entered, self.kept = Counts(), Counts()
        self.dropped: dict[str, Counts] = {}
        self.cuts: dict[str, Counts] = {}
        self.counts: Counter[str] = Counter()
        self.facts: dict[str, Any] = {}
        self.failed: list[dict[str, str]] = []
        self._histograms = {"kept": Histograms(), "dropped": Histograms()}
        self._kept_samples, self._dropped_samples = Samples(), Samples()

    def enter(self, size: Size) -> None:
        self.entered.add(documents=1, lines=size.lines, bytes=size.bytes)

    def keep(self, record: Record, size: Size) -> None:
        self.kept.add(documents=1, lines=size.lines, bytes=size.bytes)
        self.counts.update(record.counts)
        self._histograms["kept"].add(record)
        self._kept_samples.add("kept", record)

    def drop(self, dropped: Dropped, size: Size, record: Record | None = None) -> None:
        """`record`: the document as it came to the filter that dropped it; `size`: its size there."""
        self.dropped.setdefault(dropped.reason, Counts()).add(documents=1, lines=size.lines, bytes=size.bytes)
        sample: Record | Dropped = dropped
        if record is not None:
            self.counts.update(record.counts)
            self._histograms["dropped"].add(record)
            sample = record
        self._dropped_samples.add(dropped.reason, sample)

    def cut(self, where: str, before: Size, after: Size) -> None:
        """Something was taken out of a document that stays (for now)."""
        lines, taken = before.lines - after.lines, before.bytes - after.bytes
        if lines or taken:
            self.cuts.setdefault(where, Counts()).add(documents=1, lines=lines, bytes=taken)

    def as_json(self) -> dict[str, Any]:
        reasons = sorted(self.dropped)
        return {
            "failed": self.failed,
            "in": asdict(self.entered),
            "kept": asdict(self.kept),
            "dropped": {reason: asdict(self.dropped[reason]) for reason in reasons},
            "cut": {where: asdict(self.cuts[where]) for where in sorted(self.cuts)},
            "counts": dict(sorted(self.counts.items())),
            "histograms": {which: histograms.as_json() for which, histograms in self._histograms.items()},
            "samples": {
                "kept": self._kept_samples.of("kept"),
                "dropped": {reason: self._dropped_samples.of(reason) for reason in reasons},
            },
            "facts": self.facts,
        }


def gaps(entry: Mapping[str, Any]) -> list[str]:
    """Where the entry does not add up, in words."""
    found = []
    for what in ("documents", "lines", "bytes"):
        came = entry["in"][what]
        went = entry["kept"][what] + sum(counts[what] for counts in entry["dropped"].values())
        went += sum(counts[what] for counts in entry["cut"].values()) if what != "documents" else 0
        if came != went:
            found.append(f"{what}: {came} in, {went} kept, dropped and cut")
    return found


# Files


def entry_path(output: Path, stage: str, unit: str) -> Path:
    return output / LEDGER / stage / f"{unit}.json"


def write_entry(output: Path, entry: Mapping[str, Any]) -> None:
    path = entry_path(output, entry["stage"], entry["unit"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, entry)


def read_entry(path: Path) -> dict[str, Any]:
    """Raises DataError when the file is no entry."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it, and the unit is made again") from None
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise DataError(f"{path}: is no entry of a ledger of format {FORMAT}; remove it, and the unit is made again")
    return entry


def read_stage(output: Path, stage: str) -> list[dict[str, Any]]:
    """The entries of a stage in the order of its units. Raises DataError."""
    names = sorted(path for path in (output / LEDGER / stage).glob("*.json") if not path.name.startswith("."))
    return [read_entry(path) for path in names]


def total(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries of a stage as one of the same form, without those fields that only a unit has."""
    added: dict[str, Any] = {"units": 0, "input_bytes": 0, "output_bytes": 0}
    parts = ("in", "kept", "dropped", "cut", "counts", "histograms", "facts")
    kept: list[dict[str, Any]] = []
    dropped: dict[str, list[dict[str, Any]]] = {}
    failed: list[dict[str, str]] = []
    for entry in entries:
        added["units"] += 1
        added["input_bytes"] += sum(file["bytes"] for file in entry["inputs"])
        added["output_bytes"] += sum(file["bytes"] for file in entry["outputs"])
        failed += entry["failed"]
        for part in parts:
            added[part] = _added(added.get(part, {}), entry[part])
        kept = _fewest(kept + entry["samples"]["kept"], SAMPLES)
        for reason, samples in entry["samples"]["dropped"].items():
            dropped[reason] = _fewest(dropped.get(reason, []) + samples, SAMPLES)
    return {**added, "failed": failed, "samples": {"kept": kept, "dropped": dropped}}


def told_drops(added: Mapping[str, Any]) -> str:
    """What a stage dropped, the most first, in words; `added`: its `total`."""
    if not added["in"]["documents"]:
        return "no document was in its input"
    frequent = sorted(added["dropped"].items(), key=lambda item: (-item[1]["documents"], item[0]))
    return "dropped " + ", ".join(f"{reason} {counts['documents']:,}" for reason, counts in frequent)


def _added(one: Any, other: Any) -> Any:
    """Numbers added up through nested mappings; of anything else, the first."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        missing = object()
        result = {}
        for key in [*one, *(key for key in other if key not in one)]:
            left, right = one.get(key, missing), other.get(key, missing)
            result[key] = right if left is missing else left if right is missing else _added(left, right)
        return result
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one + other
    return one
