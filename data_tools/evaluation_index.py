"""Evaluation sets as a table of hashed n-grams, to find their examples in training text.

A set is a file (or a pattern of files) of examples: JSON lines, JSON, CSV, TSV, or text with an example a line; plain
or packed. Of an example the named fields are taken, each by itself: a question and its answer seldom stand together
in a page as in the file. Words are those of `dedup.shingles`: letters and digits in lower case, without accents,
whatever stands between them.

A field of n words or more is found by any n words in a row, one of 8 to n-1 words by all of them; a shorter one cannot
be told from common speech, and is counted as not searched. As all of a short field must be there, a label that the file
puts before it ("Question:") would hide it: such labels are stripped, and a set that shows one unstripped is refused.
"""

import csv
import glob
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_tools.compression import PACKED_SUFFIXES, ChunkFile, unpacked
from data_tools.dedup.shingles import Hashes, word_hashes
from llamatrain.errors import ConfigError, DataError

FORMATS = ("auto", "jsonl", "json", "csv", "tsv", "text")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".lst": "text",
}
_LABEL = re.compile(r"\s*([A-Z][A-Za-z]{0,20}:)\s")
FACTOR = 0xD1342543DE82EF95  # odd; its powers weigh the words of an n-gram
SMALLEST_FILTER_BITS = 12
FILTER_LOAD = 16  # places in the bitmap an n-gram


@dataclass
class EvaluationSet:
    name: str  # goes into drop reasons: contaminated_<name>
    path: str  # a file, or a pattern of files
    # of JSON: names, dotted into objects; of CSV and TSV: column names, or numbers from 0 where there is no header
    fields: list[str] = field(default_factory=list)
    format: str = "auto"  # by suffix
    strip: list[str] = field(default_factory=list)  # labels of the file before its texts: "Question:"


@dataclass(frozen=True)
class Table:
    """The n-grams of one length."""

    hashes: Hashes  # sorted, each once
    owners: NDArray[np.int32]  # the example each was first seen in
    bitmap: NDArray[np.bool_]  # by the upper bits of a hash: whether there is one of these
    shift: np.uint64

    def find(self, hashes: Hashes) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """Which of the hashes are here, and whose they are."""
        places = np.flatnonzero(self.bitmap[hashes >> self.shift])
        if len(places) == 0:
            return places, np.empty(0, dtype=np.int32)
        wanted = hashes[places]
        found = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        same = self.hashes[found] == wanted
        return places[same], self.owners[found[same]]


@dataclass(frozen=True)
class EvaluationIndex:
    tables: dict[int, Table]  # by length in words
    sets: tuple[str, ...]
    set_of: NDArray[np.int32]  # [examples]: number of the set
    number_of: NDArray[np.int32]  # [examples]: its number in the set, from 0
    hits_possible: NDArray[np.int32]  # [examples]: n-grams it has
    counts: dict[str, dict[str, int]]  # by set: examples, not_searched, n-grams

    def name(self, example: int) -> str:
        """SET#NUMBER."""
        return f"{self.sets[self.set_of[example]]}#{self.number_of[example]}"


def ngram_hashes(words: Hashes, longest: int, lengths: Iterable[int]) -> Iterator[tuple[int, Hashes]]:
    """For each of the lengths in rising order: the hashes of all runs of so many words; one pass for them all.

    What is handed out is the sum in the making: it is overwritten when the next is asked for.
    """
    wanted = set(lengths)
    total = np.zeros(len(words), dtype=np.uint64)
    factor = FACTOR
    for length in range(1, min(longest, len(words)) + 1):
        count = len(words) - length + 1
        total = total[:count]
        total += words[length - 1 :] * np.uint64(factor)
        factor = factor * FACTOR % (1 << 64)
        if length in wanted:
            yield length, total


def build_index(sets: list[EvaluationSet], *, ngram: int, shortest: int) -> EvaluationIndex:
    """Raises ConfigError and DataError."""
    owners: dict[int, list[NDArray[np.int32]]] = {}
    hashes: dict[int, list[Hashes]] = {}
    set_of: list[int] = []
    number_of: list[int] = []
    possible: list[int] = []
    counts: dict[str, dict[str, int]] = {}
    for set_number, evaluation_set in enumerate(sets):
        labels: Counter[str] = Counter()
        count = counts[evaluation_set.name] = {"examples": 0, "not_searched": 0, "ngrams": 0}
        for number, texts in enumerate(read_examples(evaluation_set)):
            example = len(set_of)
            set_of.append(set_number)
            number_of.append(number)
            grams = 0
            labels.update({match[1] for text in texts if (match := _LABEL.match(text))})
            for text in texts:
                words = word_hashes(text)
                if len(words) < shortest:
                    continue
                length = min(ngram, len(words))
                for _, found in ngram_hashes(words, length, (length,)):
                    hashes.setdefault(length, []).append(found.copy())
                    owners.setdefault(length, []).append(np.full(len(found), example, dtype=np.int32))
                    grams += len(found)
            possible.append(grams)
            count["examples"] += 1
            count["not_searched"] += grams == 0
            count["ngrams"] += grams
        if count["examples"] == 0:
            raise DataError(f"{evaluation_set.path}: the evaluation set {evaluation_set.name} has no examples")
        _refuse_label(evaluation_set, labels, count["examples"])
    return EvaluationIndex(
        tables={length: _table(np.concatenate(hashes[length]), np.concatenate(owners[length])) for length in hashes},
        sets=tuple(evaluation_set.name for evaluation_set in sets),
        set_of=np.array(set_of, dtype=np.int32),
        number_of=np.array(number_of, dtype=np.int32),
        hits_possible=np.array(possible, dtype=np.int32),
        counts=counts,
    )


def _refuse_label(evaluation_set: EvaluationSet, labels: Counter[str], examples: int) -> None:
    label, times = labels.most_common(1)[0] if labels else ("", 0)
    if 2 * times > examples and label not in evaluation_set.strip:
        raise ConfigError(
            f"{times} of {examples} examples of the evaluation set {evaluation_set.name} begin with {label!r}, which "
            f"pages that hold them do not: give the set strip=[{label}]"
        )


def _table(hashes: Hashes, owners: NDArray[np.int32]) -> Table:
    unique, first = np.unique(hashes, return_index=True)
    bits = max(SMALLEST_FILTER_BITS, int(len(unique) * FILTER_LOAD).bit_length())
    shift = np.uint64(64 - bits)
    bitmap = np.zeros(1 << bits, dtype=np.bool_)
    bitmap[unique >> shift] = True
    return Table(unique, owners[first], bitmap, shift)


def read_examples(evaluation_set: EvaluationSet) -> Iterator[list[str]]:
    """The texts of each example. Raises ConfigError and DataError."""
    paths = sorted(path for path in map(Path, glob.glob(evaluation_set.path, recursive=True)) if path.is_file())
    if not paths:
        raise DataError(f"{evaluation_set.path}: no file there, for the evaluation set {evaluation_set.name}")
    named = False
    for path in paths:
        try:
            with _opened(path) as file:
                for example in _examples(file, path, evaluation_set):
                    texts = [_stripped(text, evaluation_set.strip) for value in example for text in _texts(value)]
                    named = named or bool(texts)
                    yield texts
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{path}: cannot be read as evaluation set {evaluation_set.name} ({error})") from error
    if not named:
        raise ConfigError(
            f"fields={','.join(evaluation_set.fields)}: no example of {evaluation_set.path} has text there; "
            f"name the fields that hold the questions of {evaluation_set.name}"
        )


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    with open(path, "rb") as packed:
        plain = io.BufferedReader(ChunkFile(unpacked(packed, path)))
        yield io.TextIOWrapper(plain, encoding="utf-8-sig", newline="")


def _format(path: Path, evaluation_set: EvaluationSet) -> str:
    if evaluation_set.format not in FORMATS:
        raise ConfigError(f"format={evaluation_set.format}: choose one of {', '.join(FORMATS)}")
    if evaluation_set.format != "auto":
        return evaluation_set.format
    plain = path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path
    if plain.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: set the format of the evaluation set {evaluation_set.name}: {', '.join(FORMATS)}")
    return SUFFIXES[plain.suffix]


def _examples(file: IO[str], path: Path, evaluation_set: EvaluationSet) -> Iterator[list[Any]]:
    """The values of the fields, example by example."""
    kind = _format(path, evaluation_set)
    if kind == "text":
        yield from ([line] for line in file if line.strip())
        return
    if not evaluation_set.fields:
        raise ConfigError(f"fields is empty: name the fields of the evaluation set {evaluation_set.name} to search for")
    if kind in ("csv", "tsv"):
        yield from _rows(file, "," if kind == "csv" else "\t", path, evaluation_set)
        return
    objects = json.load(file) if kind == "json" else (json.loads(line) for line in file if line.strip())
    if isinstance(objects, dict):
        objects = objects.values()
    for item in objects:
        yield [_value(item, name.split(".")) for name in evaluation_set.fields]


def _rows(file: IO[str], delimiter: str, path: Path, evaluation_set: EvaluationSet) -> Iterator[list[Any]]:
    if delimiter == "\t":
        rows = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(file)
    fields = evaluation_set.fields
    if all(name.isdigit() for name in fields):
        columns = [int(name) for name in fields]
    else:
        header = next(rows, [])
        missing = [name for name in fields if name not in header]
        if missing:
            raise ConfigError(f"fields: {path} has no column {missing[0]}; it has {', '.join(header)}")
        columns = [header.index(name) for name in fields]
    for row in rows:
        if row:
            yield [row[column] if column < len(row) else "" for column in columns]


def _value(item: Any, names: list[str]) -> Any:
    for place, name in enumerate(names):
        if isinstance(item, list):
            return [_value(part, names[place:]) for part in item]
        item = item.get(name) if isinstance(item, dict) else None
    return item


def _stripped(text: str, labels: list[str]) -> str:
    for label in labels:
        if label and text.lstrip().startswith(label):
            return text.lstrip().removeprefix(label).lstrip()
    return text


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []
