"""Near-duplicate books: of two that share more than 90 % of their content, the longer stays (LLaMA paper, 2.1).

Overlap is measured, not guessed: the containment |A∩B| / min(|A|, |B|) of the sets of word shingles (runs of 5
words). Three stages, each a function over files, in bounded memory:

    sketch(records, stem, settings)    one file of documents -> its books' shingles and small sketches of them
    propose(stems, settings)           all sketches -> pairs that may overlap
    verify(stems, pairs, settings)     pairs -> removals, each with its overlap

Two sketches propose, as each finds what the other misses. **MinHash** (112 permutations in bands) estimates
|A∩B|/|A∪B|, so it finds editions of about the same length however short they are, but not one volume in the collected
works: contained in a book ten times its length it has a resemblance of 0.09. A **sample** of the shingles, those whose
hash is below 2^64/128, is a fixed share of the content whatever the length, so the sample of the shorter is found in
that of the longer; that is weak only under a few hundred words. A false proposal costs time and nothing else.

Decision: from the longest book (most distinct shingles; then characters; then order of input) to the shortest, a book
goes if a book that STAYS holds more than 90 % of it. So chains end the same way in every run, every book that goes has
one that stays for it, and no two that stay are a verified pair. (With A in B in C, A not in C: B goes, A stays.)

The files of a stem: STEM.shingles.npy (sorted hashes, book after book), STEM.sketch.npz, and STEM.books.json, written
last. They need about 1.4 bytes a byte of text, and can be deleted when the removals are known.
"""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_tools.dedup.shingles import Hashes, sample, shared, shingles, signature
from data_tools.progress import advance_share
from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import write_json_atomically, written_atomically

Pairs = NDArray[np.int64]  # [pairs, 2]: numbers of the books over all stems, the longer first
Numbers = NDArray[np.int64]

NPY_HEADER_BYTES = 128  # of a one-dimensional array in format 1.0
PROPOSE_BYTES_PER_SAMPLE = 48  # of memory: hash, book, and what sorting them takes
REASON = "near_duplicate"


@dataclass
class NearSettings:
    shingle_words: int = 5  # bigcode and datatrove: 5-grams of words. 2 % of words changed at random leave 0.90 equal
    containment: float = 0.9  # more than this goes: the paper's "more than 90% content overlap"
    permutations: int = 112  # datatrove: 14 bands of 8; here bands of 4 rows, for a lower threshold
    bands: int = 28  # 28 of 4 rows: resemblance 0.82 (two editions at 0.9) is found but for 6e-8, 0.5 in 84 %
    sample_one_in: int = 128  # of the shingles: 780 hashes of a book of 100,000 words
    propose_above: float = 0.6  # containment in the sample; at 16 hashes (2,000 words) 0.9 falls below it in 5e-4
    shared_by_at_most: int = 200  # books: a phrase in more of them tells nothing (and would make n^2 pairs)
    linked_to_longest: int = 16  # of the books of one MinHash bucket, each is compared with so many of the longest
    memory_gib: float = 8.0  # that `propose` may take


@dataclass(frozen=True)
class Removal:
    """A book that goes, and the longer one that stays for it."""

    id: str
    kept: str
    overlap: float  # |A∩B| / |A|, A the one that goes
    shingles: int  # |A|
    kept_shingles: int


@dataclass(frozen=True)
class _Books:
    """What is known of all books: numbers go over the stems in order."""

    ids: list[str]
    sizes: Numbers  # [books] distinct shingles
    rank: Numbers  # [books] 0 is the longest
    stem: Numbers  # [books] number of the stem
    begin: Numbers  # [books] where its shingles begin in the stem's file


def check_near_settings(settings: NearSettings) -> None:
    """Raises ConfigError."""
    if settings.shingle_words < 1:
        raise ConfigError(f"shingle_words={settings.shingle_words}: at least 1")
    if not 0 < settings.containment < 1 or not 0 < settings.propose_above < settings.containment:
        raise ConfigError("0 < propose_above < containment < 1 is needed: a proposal is only an estimate")
    if settings.permutations < 1 or settings.bands < 1 or settings.permutations % settings.bands:
        raise ConfigError(f"permutations={settings.permutations} must be a multiple of bands={settings.bands}")
    if min(settings.sample_one_in, settings.linked_to_longest) < 1 or settings.shared_by_at_most < 2:
        raise ConfigError("sample_one_in and linked_to_longest must be at least 1, shared_by_at_most at least 2")


def sketch(records: Iterable[Record], stem: Path, settings: NearSettings) -> list[Path]:
    """Write the three files of `stem` and return them. One book is in memory at a time."""
    check_near_settings(settings)
    books: list[dict[str, Any]] = []
    signatures, samples = [], []
    files = _files(stem)
    with written_atomically(files[0]) as file:
        file.write(b"\0" * NPY_HEADER_BYTES)
        for record in records:
            hashes = shingles(record.text, settings.shingle_words)
            file.write(hashes.astype("<u8", copy=False).data)
            signatures.append(signature(hashes, settings.permutations))
            samples.append(sample(hashes, settings.sample_one_in))
            books.append({"id": record.id, "characters": len(record.text), "shingles": len(hashes)})
        _write_npy_header(file, sum(book["shingles"] for book in books))
    with written_atomically(files[1]) as file:
        np.savez(
            file,
            signatures=np.stack(signatures) if books else np.empty((0, settings.permutations), dtype=np.uint32),
            samples=np.concatenate(samples) if books else np.empty(0, dtype=np.uint64),
            sample_sizes=np.array([len(one) for one in samples], dtype=np.int64),
        )
    write_json_atomically(files[2], {"made_with": _made_with(settings), "books": books})
    return files


def propose(stems: Sequence[Path], settings: NearSettings) -> Pairs:
    """The pairs to measure. Raises DataError for sketches that were made with other settings."""
    check_near_settings(settings)
    books = _read_books(stems, settings)
    arrays = [_read_sketch(stem) for stem in stems]
    if not books.ids:
        return np.empty((0, 2), dtype=np.int64)
    sizes = np.concatenate([part["sample_sizes"] for part in arrays])
    gib = float(sizes.sum()) * PROPOSE_BYTES_PER_SAMPLE / 2**30
    if gib > settings.memory_gib:
        raise ConfigError(
            f"the sketches need about {gib:.1f} GiB to compare, memory_gib={settings.memory_gib:g}: raise it, or"
            f" make the sketches with a larger sample_one_in than {settings.sample_one_in}"
        )
    signatures = np.concatenate([part["signatures"] for part in arrays])
    codes = [*_alike_in_a_band(signatures, books, settings)]
    codes += _contained_in_samples(np.concatenate([part["samples"] for part in arrays]), sizes, books, settings)
    found = np.unique(np.concatenate(codes)) if codes else np.empty(0, dtype=np.int64)
    return np.stack(np.divmod(found, len(books.ids)), axis=1)


def verify(stems: Sequence[Path], pairs: Pairs, settings: NearSettings) -> list[Removal]:
    """Measure the pairs and decide, from the longest book to the shortest. Two books' shingles are read at a time."""
    check_near_settings(settings)
    books = _read_books(stems, settings)
    hashes = [_read_shingles(stem) for stem in stems]

    def of(book: int) -> Hashes:
        begin = books.begin[book]
        return np.asarray(hashes[books.stem[book]][begin : begin + books.sizes[book]])

    order = np.lexsort((books.rank[pairs[:, 0]], books.rank[pairs[:, 1]]))
    gone: set[int] = set()
    removals: list[Removal] = []
    for longer, shorter in pairs[order].tolist():
        advance_share(1 / len(pairs))
        if longer in gone or shorter in gone:
            continue
        size = int(books.sizes[shorter])
        overlap = shared(of(shorter), of(longer)) / size
        if overlap > settings.containment:
            gone.add(shorter)
            kept_size = int(books.sizes[longer])
            removals.append(Removal(books.ids[shorter], books.ids[longer], overlap, size, kept_size))
    return removals


def near_duplicate_filter(removals: Iterable[Removal]) -> Callable[[Record], Record | Dropped]:
    """Drops the records that go, as `near_duplicate`."""
    gone = {removal.id for removal in removals}
    return lambda record: Dropped.of(record, REASON) if record.id in gone else record


def _alike_in_a_band(signatures: NDArray[np.uint32], books: _Books, settings: NearSettings) -> Iterator[Numbers]:
    """Codes (longer * books + shorter) of the books with an equal band; in large buckets only with the longest."""
    rows = settings.permutations // settings.bands
    members = np.flatnonzero(books.sizes > 0)
    members = members[np.argsort(books.rank[members])]  # within a bucket they stay from long to short
    for band in range(settings.bands):
        keys = np.ascontiguousarray(signatures[members, band * rows : (band + 1) * rows])
        _, bucket = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(bucket.reshape(-1), kind="stable")
        _, begins, counts = np.unique(bucket.reshape(-1)[order], return_index=True, return_counts=True)
        for begin, count in zip(begins[counts > 1], counts[counts > 1], strict=True):
            group = members[order[begin : begin + count]]
            for place in range(min(settings.linked_to_longest, count - 1)):
                yield group[place] * len(books.ids) + group[place + 1 :]


def _contained_in_samples(samples: Hashes, sizes: Numbers, books: _Books, settings: NearSettings) -> list[Numbers]:
    """Codes of the pairs where the longer's sample holds enough of the shorter's."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    order = np.argsort(samples, kind="stable")
    _, counts = np.unique(samples[order], return_counts=True)
    telling = counts <= settings.shared_by_at_most
    of_telling = np.bincount(owner[order], weights=np.repeat(telling, counts), minlength=len(sizes))
    in_several = telling & (counts > 1)
    holders = owner[order][np.repeat(in_several, counts)]  # grouped by hash
    counts = counts[in_several]
    group_end = np.cumsum(counts)
    # For each book its places among the holders, and for each place the group it lies in.
    group = np.repeat(np.arange(len(counts)), counts)
    by_book = np.argsort(holders, kind="stable")
    limits = np.searchsorted(holders[by_book], np.arange(len(sizes) + 1))
    found = []
    for book in np.flatnonzero(np.diff(limits)):
        groups = group[by_book[limits[book] : limits[book + 1]]]
        lengths = counts[groups]
        starts = np.repeat(group_end[groups] - lengths - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths)
        others, times = np.unique(holders[starts + np.arange(lengths.sum())], return_counts=True)
        longer = (books.rank[others] < books.rank[book]) & (times >= settings.propose_above * of_telling[book])
        found.append(others[longer] * len(sizes) + book)
    return found


def _read_books(stems: Sequence[Path], settings: NearSettings) -> _Books:
    ids: list[str] = []
    sizes, characters, stem_numbers, begins = [], [], [], []
    for number, stem in enumerate(stems):
        path = _files(stem)[2]
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); make the sketch again") from None
        if content["made_with"] != _made_with(settings):
            raise DataError(f"{path}: made with {content['made_with']}, now {_made_with(settings)}; make it again")
        own = np.array([book["shingles"] for book in content["books"]], dtype=np.int64)
        ids += [book["id"] for book in content["books"]]
        characters += [book["characters"] for book in content["books"]]
        sizes.append(own)
        begins.append(np.cumsum(own) - own)
        stem_numbers.append(np.full(len(own), number, dtype=np.int64))
    nothing = [np.empty(0, dtype=np.int64)]
    all_sizes = np.concatenate(nothing + sizes)
    rank = np.empty(len(ids), dtype=np.int64)
    longest_first = np.lexsort((np.arange(len(ids)), -np.array(characters, dtype=np.int64), -all_sizes))
    rank[longest_first] = np.arange(len(ids))
    stem_of, begin = np.concatenate(nothing + stem_numbers), np.concatenate(nothing + begins)
    return _Books(ids=ids, sizes=all_sizes, rank=rank, stem=stem_of, begin=begin)


def _read_sketch(stem: Path) -> dict[str, NDArray[Any]]:
    path = _files(stem)[1]
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); make the sketch again") from None


def _read_shingles(stem: Path) -> Hashes:
    path = _files(stem)[0]
    try:
        hashes: Hashes = np.load(path, mmap_mode="r") if path.stat().st_size > NPY_HEADER_BYTES else np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); make the sketch again") from None
    return hashes


def _files(stem: Path) -> list[Path]:
    return [stem.with_name(stem.name + suffix) for suffix in (".shingles.npy", ".sketch.npz", ".books.json")]


def _made_with(settings: NearSettings) -> dict[str, int]:
    names = ("shingle_words", "permutations", "sample_one_in")
    return {name: getattr(settings, name) for name in names}


def _write_npy_header(file: IO[bytes], count: int) -> None:
    """The header of a file of `count` hashes, over the place kept for it."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": (count,)})
    if file.tell() != NPY_HEADER_BYTES:
        raise DataError(f"numpy {np.__version__} writes array headers of {file.tell()} bytes; use numpy 1.26 to 2.x")
