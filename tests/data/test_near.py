"""Near-duplicate books: shingles, the sketches that propose, the containment that decides."""

import re
import string
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.dedup import shingles as shingling
from data_tools.dedup.near import NearSettings, Removal, near_duplicate_filter, propose, sketch, verify
from data_tools.dedup.shingles import sample, shared, shingles, signature, word_hashes
from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError, DataError
from tests.real_text import needed_data, novels

SETTINGS = NearSettings()
LETTERS = "abcABCéÉñßжЖ0१가"


def book(count: int, seed: int) -> list[str]:
    """Words as in a language: few are frequent, many rare."""
    generator = np.random.default_rng(seed)
    return [f"w{number}" for number in np.minimum(generator.zipf(1.3, count), 20_000)]


def with_errors(words: list[str], share: float, seed: int) -> list[str]:
    """Each word is changed with this probability."""
    chance = np.random.default_rng(seed).random(len(words))
    return [f"{word}x{place}" if chance[place] < share else word for place, word in enumerate(words)]


def removals_of(tmp_path: Path, books: dict[str, list[str]], settings: NearSettings = SETTINGS) -> list[Removal]:
    records = [Record(" ".join(words), name, "books") for name, words in books.items()]
    sketch(records, tmp_path / "part", settings)
    return verify([tmp_path / "part"], propose([tmp_path / "part"], settings), settings)


def shingle_set(text: str, words: int) -> set[tuple[str, ...]]:
    """The definition, in plain Python."""
    plain = "".join(unicodedata.normalize("NFD", char)[0] if char in "éÉñ" else char for char in text.lower())
    found = re.findall(r"[一-鿿]|[^\W_一-鿿]+", plain)
    if not found:
        return set()
    words = min(words, len(found))
    return {tuple(found[place : place + words]) for place in range(len(found) - words + 1)}


# Shingles


@settings(deadline=None)
@given(st.text(alphabet=LETTERS + " .,'\n—書く" + "x"), st.text(alphabet=LETTERS + " .'\n—書"), st.integers(1, 5))
def test_shingles_are_the_sets_of_word_runs(left: str, right: str, words: int) -> None:
    ours, theirs = shingles(left, words), shingles(right, words)
    left_set, right_set = shingle_set(left.replace("く", "書"), words), shingle_set(right, words)
    assert len(shingles(left.replace("く", "書"), words)) == len(left_set)
    assert shared(shingles(left.replace("く", "書"), words), theirs) == len(left_set & right_set)
    assert np.all(ours[1:] > ours[:-1])


@settings(deadline=None)
@given(st.lists(st.text(alphabet=string.ascii_letters + "é", min_size=1, max_size=9), max_size=60))
def test_words_do_not_depend_on_where_a_text_is_cut_into_chunks(words: list[str]) -> None:
    text = " ".join(words)
    whole = word_hashes(text)
    before = shingling.CHUNK_CHARACTERS
    try:
        shingling.CHUNK_CHARACTERS = 16
        assert np.array_equal(word_hashes(text), whole)
    finally:
        shingling.CHUNK_CHARACTERS = before
    assert len(whole) == len(words)


def test_editions_that_differ_in_marks_only_are_equal() -> None:
    plain = "Don't go! The naive cafe -- he said -- is closed on _Monday_ night."
    other = "“DON’T go!\r\n  the naïve   café—he said—is closed on Monday night.”"
    decomposed = unicodedata.normalize("NFD", other)
    assert np.array_equal(shingles(plain, 3), shingles(other, 3))
    assert np.array_equal(shingles(plain, 3), shingles(decomposed, 3))


def test_korean_syllables_of_one_first_letter_stay_apart() -> None:
    assert len(set(word_hashes("가 거 고 각").tolist())) == 4


def test_strange_text_is_no_error() -> None:
    for text in ("", " \n", "\ud800 a", "𒀀𒀁 𒀂", "\0", "x" * 300_000):
        assert len(shingles(text, 5)) <= 3


def test_equal_places_of_the_signatures_estimate_resemblance() -> None:
    generator = np.random.default_rng(1)
    pool = np.unique(generator.integers(0, 2**63, 30_000, dtype=np.uint64) * np.uint64(2))
    for shared_count in (2_000, 10_000, 18_000):  # of two sets of 20,000: the union has 40,000 - shared
        left, right = (
            pool[:20_000],
            np.sort(np.concatenate([pool[:shared_count], pool[20_000:][: 20_000 - shared_count]])),
        )
        resemblance = shared(left, right) / (len(left) + len(right) - shared(left, right))
        equal = np.mean(signature(left, 2_000) == signature(right, 2_000))
        assert abs(equal - resemblance) < 0.04


def test_sample_is_the_same_share_of_every_set() -> None:
    hashes = shingles(" ".join(book(60_000, 3)), 5)
    taken = sample(hashes, 16)
    assert abs(len(taken) / len(hashes) - 1 / 16) < 0.01
    assert np.array_equal(taken, hashes[: len(taken)])
    assert len(sample(hashes, 1)) == len(hashes)


# Decisions


def test_more_than_nine_tenths_goes_less_stays(tmp_path: Path) -> None:
    """RedPajama's SimHash distance 5 has no relation to a share of content; ours is that share."""
    text = book(8_000, 5)
    for kept_share, goes in ((0.95, True), (0.91, True), (0.89, False), (0.5, False)):
        cut = int(len(text) * kept_share)
        other = text[:cut] + [f"other{place}" for place in range(len(text) - cut - 30)]
        found = removals_of(tmp_path, {"whole": text, "other": other})
        measured = len(shingle_set(" ".join(text), 5) & shingle_set(" ".join(other), 5))
        expected = measured / len(shingle_set(" ".join(other), 5))
        assert goes == (expected > 0.9) == bool(found)
        if goes:
            assert found[0] == Removal("other", "whole", expected, found[0].shingles, found[0].kept_shingles)


def test_the_longer_edition_stays_whatever_the_order(tmp_path: Path) -> None:
    """RedPajama keeps the smaller id, and PG19 before Books3, however short that edition is."""
    long, short = book(10_000, 6), book(10_000, 6)[:7_000]
    for books in ({"long": long, "short": short}, {"short": short, "long": long}):
        assert [(one.id, one.kept) for one in removals_of(tmp_path, books)] == [("short", "long")]


def test_one_volume_in_the_collected_works_goes(tmp_path: Path) -> None:
    """Contained in a book thirty times its length: resemblance 0.03, containment 0.95."""
    volumes = {f"volume{number}": with_errors(book(4_000, number), 0.01, number) for number in range(30)}
    works = [word for number in range(30) for word in book(4_000, number)]
    small, large = shingles(" ".join(volumes["volume0"]), 5), shingles(" ".join(works), 5)
    resemblance = np.mean(signature(small, 112) == signature(large, 112))
    assert resemblance < 0.1
    found = removals_of(tmp_path, {**volumes, "works": works})
    assert {one.id for one in found} == set(volumes)
    assert all(one.kept == "works" and 0.9 < one.overlap < 0.99 for one in found)


def test_chains_end_the_same_way_in_every_order(tmp_path: Path) -> None:
    """A in B in C, A not in C: B goes for C, A stays, as no book that stays holds it."""
    base = book(20_000, 8)
    largest = base[:18_500] + [f"c{place}" for place in range(9_000)]
    middle = base[:20_000]
    smallest = base[9_000:20_000]
    books = {"a": smallest, "b": middle, "c": largest}
    for order in (("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")):
        found = removals_of(tmp_path, {name: books[name] for name in order})
        assert [(one.id, one.kept) for one in found] == [("b", "c")]


def test_of_many_editions_one_stays(tmp_path: Path) -> None:
    """More of them than `shared_by_at_most`: every phrase is too frequent to tell, and MinHash finds them."""
    text = book(3_000, 9)
    books = {f"edition{number:02}": with_errors(text, 0.001, number) for number in range(60)}
    found = removals_of(tmp_path, books, replace(SETTINGS, shared_by_at_most=20))
    assert len(found) == 59 and len({one.kept for one in found}) == 1


def test_equal_books_leave_the_first(tmp_path: Path) -> None:
    text = book(500, 10)
    assert [one.id for one in removals_of(tmp_path, {"x": text, "y": text, "z": text})] == ["y", "z"]


def test_books_without_words_are_no_duplicates(tmp_path: Path) -> None:
    assert removals_of(tmp_path, {"a": [], "b": ["..."], "c": ["word"]}) == []
    assert removals_of(tmp_path, {}) == []


def test_all_pairs_above_the_threshold_are_proposed(tmp_path: Path) -> None:
    """Recall against brute force: 60 books of 300 words and more, copies with errors, cuts and in larger books."""
    generator = np.random.default_rng(11)
    books: dict[str, list[str]] = {}
    for number in range(20):
        text = book(int(np.exp(generator.uniform(np.log(300), np.log(9_000)))), 100 + number)
        errors = generator.uniform(0, 0.02)
        books[f"{number}"] = text
        books[f"{number} copy"] = with_errors(text, errors, number)
        ratio = int(generator.integers(1, 20)) if len(text) >= 1_500 else 0
        books[f"{number} in"] = with_errors(text, errors / 2, 99) + book(len(text) * ratio, 500 + number)
    names = list(books)
    sets = [shingles(" ".join(words), 5) for words in books.values()]
    overlaps = {
        (left, right): shared(sets[left], sets[right]) / min(len(sets[left]), len(sets[right]))
        for left, right in combinations(range(len(names)), 2)
    }
    sketch((Record(" ".join(books[name]), name, "books") for name in names), tmp_path / "part", SETTINGS)
    pairs = propose([tmp_path / "part"], SETTINGS)
    proposed = {tuple(sorted(pair)) for pair in pairs.tolist()}
    above = {pair for pair, overlap in overlaps.items() if overlap > 0.9}
    assert len(above) > 25 and above <= proposed
    assert len(proposed) < 2 * len(above)  # and hardly anything else
    gone = {one.id for one in verify([tmp_path / "part"], pairs, SETTINGS)}
    stay = [place for place, name in enumerate(names) if name not in gone]
    assert all(overlaps[pair] <= 0.9 for pair in combinations(stay, 2))


# Files


def test_several_files_are_compared_with_one_another_and_ids_do_not_collide(tmp_path: Path) -> None:
    """RedPajama numbers the books of PG19 and of Books3 alike, so that they replace one another in its index."""
    text, other = book(2_000, 12), book(2_000, 13)
    sketch(
        [Record(" ".join(text), "pg19/0", "books"), Record(" ".join(other), "pg19/1", "books")],
        tmp_path / "a",
        SETTINGS,
    )
    sketch([Record(" ".join(other[:1_900]), "books3/0", "books")], tmp_path / "b", SETTINGS)
    sketch([], tmp_path / "c", SETTINGS)
    stems = [tmp_path / name for name in "abc"]
    found = verify(stems, propose(stems, SETTINGS), SETTINGS)
    assert [(one.id, one.kept) for one in found] == [("books3/0", "pg19/1")]
    keep = near_duplicate_filter(found)
    record = Record(" ".join(other), "books3/0", "books")
    dropped = keep(record)
    assert isinstance(dropped, Dropped) and dropped.reason == "near_duplicate"
    assert keep(replace(record, id="pg19/1")).id == "pg19/1"


def test_the_same_books_give_the_same_bytes(tmp_path: Path) -> None:
    records = [Record(" ".join(book(700, number)), str(number), "books") for number in range(3)]
    first = [path.read_bytes() for path in sketch(records, tmp_path / "part", SETTINGS)]
    second = [path.read_bytes() for path in sketch(iter(records), tmp_path / "part", SETTINGS)]
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "part.books.json",
        "part.shingles.npy",
        "part.sketch.npz",
    ]


def test_a_sketch_that_stops_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[Record]:
        yield Record("some words of a book", "1", "books")
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        sketch(broken(), tmp_path / "part", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_sketches_are_refused(tmp_path: Path) -> None:
    files = sketch([Record(" ".join(book(700, 1)), "1", "books")], tmp_path / "part", SETTINGS)
    with pytest.raises(DataError, match="made with"):
        propose([tmp_path / "part"], replace(SETTINGS, shingle_words=4))
    files[1].write_bytes(files[1].read_bytes()[:100])
    with pytest.raises(DataError, match="make the sketch again"):
        propose([tmp_path / "part"], SETTINGS)
    files[0].write_bytes(files[0].read_bytes()[:300])
    with pytest.raises(DataError, match="make the sketch again"):
        verify([tmp_path / "part"], np.empty((0, 2), dtype=np.int64), SETTINGS)
    files[2].unlink()
    with pytest.raises(DataError, match="cannot be read"):
        propose([tmp_path / "part"], SETTINGS)


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for change in ({"bands": 5}, {"containment": 1.0}, {"propose_above": 0.95}, {"shingle_words": 0}):
        with pytest.raises(ConfigError):
            sketch([], tmp_path / "part", replace(SETTINGS, **change))
    sketch([Record(" ".join(book(9_000, 1)), "1", "books")], tmp_path / "part", SETTINGS)
    with pytest.raises(ConfigError, match="memory_gib"):
        propose([tmp_path / "part"], replace(SETTINGS, memory_gib=1e-7))


# Real books


def test_real_novels_and_their_editions(tmp_path: Path) -> None:
    """Eight novels, one cut short, one with the errors of scanning, and three bound in one volume."""
    data = needed_data()
    texts = novels(data / "corpora" / "english_novels" / "english_novels.tar.zst", 8)
    texts = [text[:400_000] for text in texts]
    books = {f"novel{number}": text.split() for number, text in enumerate(texts)}
    books["cut short"] = books["novel0"][5_000:]
    books["scanned"] = with_errors(books["novel1"][:-1_000], 0.01, 1)
    books["badly scanned"] = with_errors(books["novel2"], 0.05, 1)
    books["bound"] = books["novel3"] + books["novel4"] + books["novel5"]
    found = {one.id: (one.kept, round(one.overlap, 2)) for one in removals_of(tmp_path, books)}
    assert found == {
        "cut short": ("novel0", 1.0),
        "scanned": ("novel1", 0.95),
        "novel3": ("bound", 1.0),
        "novel4": ("bound", 1.0),
        "novel5": ("bound", 1.0),
    }
