"""Evaluation examples out of the training text: documents that hold runs of words of a benchmark are dropped or cut.

LLaMA does not say what it did; the numbers are GPT-3's (n-grams of 13 words, a window of 200 characters, pieces of at
least 200, at most 10 of them, as lm-evaluation-harness documents them). A document overlaps with an example where both
hold the same 13 words in a row. That a field of 8 to 12 words counts when all of it is there is our own addition, as
n-grams of 13 words would miss it. `action` says what becomes of a document:

    drop  the document is Dropped as contaminated_<set>, the set of the example it holds most of
    cut   the overlap goes, with `window` characters on either side; what is left of the document stays together.
          Pieces shorter than `min_piece` go too; a document cut more than `max_cuts` times, or with nothing left, is
          Dropped as contaminated_<set>

Overlap with an example counts from `min_hits` of its n-grams on (or all it has, if these are fewer). Which examples
were found goes into the ledger through `counts`, of documents dropped and cut alike: found_in_<set>#<number> is how
many documents hold example <number> (from 0) of the set. Documents that were cut also count as contaminated_<set>,
what they lost as contaminated_characters, and `provenance["contaminated"]` names their examples.

Words that are common to many documents (a proverb that is also an answer) are not pardoned: that takes a pass over the
whole corpus.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_tools.dedup.shingles import word_hashes
from data_tools.evaluation_index import EvaluationIndex, EvaluationSet, build_index, ngram_hashes
from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError

ACTIONS = ("drop", "cut")
MOST_NAMED = 20  # examples of one document that are named
STEP = 4000  # characters whose words are counted at once, on the way to a word's place


@dataclass
class DecontaminationSettings:
    sets: list[EvaluationSet] = field(default_factory=list)
    ngram: int = 13  # words (GPT-3)
    shortest: int = 8  # words of a field that are looked for whole (ours)
    min_hits: int = 1  # n-grams of one example
    action: str = "drop"  # drop | cut
    window: int = 200  # characters cut on either side (GPT-3)
    min_piece: int = 200  # characters of a piece that stays (GPT-3)
    max_cuts: int = 9  # which make 10 pieces, GPT-3's limit


@dataclass(frozen=True)
class Overlap:
    """Words [start, end) of a document that are words of an example."""

    start: int
    end: int
    example: int


def check_settings(settings: DecontaminationSettings) -> None:
    """Raises ConfigError."""
    names = [evaluation_set.name for evaluation_set in settings.sets]
    if not names:
        raise ConfigError("decontamination.sets is empty: name evaluation sets, or leave the stage out")
    for name in names:
        if not name.replace("_", "").isalnum() or names.count(name) > 1:
            raise ConfigError(f"decontamination.sets: name={name}: use letters, digits and _, each name once")
    if settings.action not in ACTIONS:
        raise ConfigError(f"action={settings.action}: choose one of {', '.join(ACTIONS)}")
    if not 1 <= settings.shortest <= settings.ngram:
        raise ConfigError(f"shortest={settings.shortest}: must be between 1 and ngram={settings.ngram}")
    for name in ("min_hits", "max_cuts"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be at least 1")
    for name in ("window", "min_piece"):
        if getattr(settings, name) < 0:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be 0 or more")


def decontamination_filter(settings: DecontaminationSettings) -> Callable[[Record], Record | Dropped]:
    """Raises ConfigError and DataError while it reads the sets; the filter raises nothing."""
    check_settings(settings)
    index = build_index(settings.sets, ngram=settings.ngram, shortest=settings.shortest)

    def keep(record: Record) -> Record | Dropped:
        overlaps = find_overlaps(record.text, index, min_hits=settings.min_hits)
        if not overlaps:
            return record
        for example in list(dict.fromkeys(overlap.example for overlap in overlaps))[:MOST_NAMED]:
            record.counts[f"found_in_{index.name(example)}"] = 1
        if settings.action == "drop":
            return _dropped(record, overlaps, index)
        return _cut(record, overlaps, index, settings)

    return keep


def find_overlaps(text: str, index: EvaluationIndex, *, min_hits: int = 1) -> list[Overlap]:
    """Where the text holds words of examples, in order; neighbouring n-grams of an example are one overlap."""
    words = word_hashes(text)
    starts: list[NDArray[np.intp]] = []
    lengths: list[NDArray[np.intp]] = []
    owners: list[NDArray[np.int32]] = []
    for length, hashes in ngram_hashes(words, max(index.tables, default=0), index.tables):
        places, found = index.tables[length].find(hashes)
        if len(places):
            starts.append(places)
            lengths.append(np.full(len(places), length, dtype=np.intp))
            owners.append(found)
    if not starts:
        return []
    start, length_of, owner = np.concatenate(starts), np.concatenate(lengths), np.concatenate(owners)
    examples, hits = np.unique(owner, return_counts=True)
    enough = set(examples[hits >= np.minimum(min_hits, index.hits_possible[examples])].tolist())
    overlaps: list[Overlap] = []
    for place in np.lexsort((start, owner)):
        example, first = int(owner[place]), int(start[place])
        if example not in enough:
            continue
        end = first + int(length_of[place])
        if overlaps and overlaps[-1].example == example and first <= overlaps[-1].end:
            overlaps[-1] = Overlap(overlaps[-1].start, max(end, overlaps[-1].end), example)
        else:
            overlaps.append(Overlap(first, end, example))
    return sorted(overlaps, key=lambda overlap: (overlap.start, overlap.end, overlap.example))


def _dropped(record: Record, overlaps: list[Overlap], index: EvaluationIndex) -> Dropped:
    """For the set of the example the document holds most words of."""
    held: Counter[int] = Counter()
    for overlap in overlaps:
        held[overlap.example] += overlap.end - overlap.start
    example = max(held, key=lambda number: (held[number], -number))
    return Dropped.of(record, f"contaminated_{index.sets[index.set_of[example]]}")


def _cut(
    record: Record, overlaps: list[Overlap], index: EvaluationIndex, settings: DecontaminationSettings
) -> Record | Dropped:
    text = record.text
    spans = _merged([(overlap.start, overlap.end) for overlap in overlaps])
    apart = sum(after[0] - before[1] > settings.window for before, after in pairwise(spans))
    if apart >= settings.max_cuts:  # a word and what follows it are two characters: these gaps are no window's
        return _dropped(record, overlaps, index)
    places = word_places(text, [place for span in spans for place in span])
    window = settings.window
    around = [(max(0, start - window), end + window) for start, end in zip(places[::2], places[1::2], strict=True)]
    holes = _merged(around)
    edges = [0, *(min(edge, len(text)) for hole in holes for edge in hole), len(text)]
    pieces = [text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True)]
    kept = [piece for piece in pieces if len(piece) >= max(1, settings.min_piece)]
    if len(holes) > settings.max_cuts or not kept:
        return _dropped(record, overlaps, index)
    examples = list(dict.fromkeys(overlap.example for overlap in overlaps))
    for number in sorted({int(index.set_of[example]) for example in examples}):
        record.counts[f"contaminated_{index.sets[number]}"] = 1
    record.text = "\n\n".join(kept)
    record.counts["contaminated_characters"] = len(text) - len(record.text)
    record.provenance["contaminated"] = " ".join(index.name(example) for example in examples[:MOST_NAMED])
    return record


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order, those that touch as one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def word_places(text: str, words: list[int]) -> list[int]:
    """Where in the text the words of these numbers start (`word_hashes` counts them); the text's end for more."""
    steps = [0]
    while steps[-1] < len(text):
        steps.append(_between(text, steps[-1] + STEP))
    before = np.cumsum([0, *(len(word_hashes(text[a:b])) for a, b in pairwise(steps))])
    places = []
    for word in words:
        step = int(np.searchsorted(before, word, side="right")) - 1
        if step >= len(steps) - 1:
            places.append(len(text))
            continue
        start, wanted = steps[step], word - int(before[step])
        low, high = 0, steps[step + 1] - start  # the fewest characters that hold more than `wanted` words
        while low < high:
            middle = (low + high) // 2
            if len(word_hashes(text[start : start + middle])) > wanted:
                high = middle
            else:
                low = middle + 1
        places.append(start + max(0, low - 1))
    return places


def _between(text: str, position: int) -> int:
    """A place near the position that splits no word, or the position where there is none."""
    if position >= len(text):
        return len(text)
    while position < len(text) and not text[position].isspace():
        position += 1
    return position
