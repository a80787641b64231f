"""A text as the set of its word shingles (runs of a few words), as 64-bit hashes, with two sketches of that set.

Everything is numpy over whole stretches of text: no Python runs per word or per shingle. Each character becomes a
number: its lower-case letter without accents, 0 for what is no letter, digit or mark, so that punctuation, quotes,
line ends and markup differ freely between two editions. With base β (odd, so that it can be divided by mod 2^64) the
hash of the word at characters [s, e) is

    mix(β^-s Σ_{s<=i<e} letter_i β^i  mod 2^64),

one `add.reduceat` for all words, as the separators add 0; a shingle is mix(Σ_k word_{i+k} γ_k). Words of scripts
without spaces (Chinese, Japanese) are single characters.

Sketches: `signature` is MinHash (Broder 1997), whose equal places estimate |A∩B|/|A∪B|; `sample` keeps the hashes
below 2^64/n, a share of the set that is the same for every set, so that |A∩B|/|A| can be estimated too.
"""

import functools
import unicodedata

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

CHUNK_CHARACTERS = 1 << 17  # hashed at once: the arrays stay in the processor's cache
BLOCK = 1 << 15  # hashes permuted at once, for the same reason
BASE = 0x9E3779B97F4A7C15
BASIC_PLANE = 1 << 16  # characters above count as one letter
IDEOGRAPHS = ((0x3040, 0x3100), (0x3400, 0xA000), (0xF900, 0xFB00))  # each a word of its own
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's


def shingles(text: str, words: int) -> Hashes:
    """The hashes of all runs of `words` words, sorted, each once; a text of fewer words has one, of them all."""
    hashes = word_hashes(text)
    if len(hashes) == 0:
        return hashes
    words = min(words, len(hashes))
    factors = _powers(CHUNK_CHARACTERS)[0][1 : words + 1]
    count = len(hashes) - words + 1
    total = hashes[:count] * factors[0]
    for place in range(1, words):
        total += hashes[place : place + count] * factors[place]
    total = _mixed(total)
    total.sort()
    first = np.empty(count, dtype=bool)
    first[0] = True
    np.not_equal(total[1:], total[:-1], out=first[1:])
    return total[first]


def word_hashes(text: str) -> Hashes:
    """One hash a word, in the text's order."""
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    parts = []
    start = 0
    while start < len(text):
        end = start + CHUNK_CHARACTERS
        if end < len(text):  # between two words, unless there is a word longer than a chunk
            between = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
            end = between + 1 if between > start else end
        parts.append(_word_hashes_of_chunk(text[start:end]))
        start = end
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)


def signature(hashes: Hashes, permutations: int) -> NDArray[np.uint32]:
    """[permutations]: the smallest value of a·h + b mod 2^32 over the hashes' upper halves h, a odd, for each (a, b).

    All ones for an empty set.
    """
    upper = (hashes >> np.uint64(32)).astype(np.uint32)
    factors, terms = _permutations(permutations)
    smallest = np.full(permutations, 0xFFFFFFFF, dtype=np.uint32)
    for start in range(0, len(upper), BLOCK):
        block = upper[start : start + BLOCK]
        permuted = np.empty_like(block)
        for place in range(permutations):
            np.multiply(block, factors[place], out=permuted)
            np.add(permuted, terms[place], out=permuted)
            smallest[place] = min(smallest[place], permuted.min())
    return smallest


def sample(hashes: Hashes, one_in: int) -> Hashes:
    """Of sorted hashes those below 2^64 / one_in."""
    limit = np.uint64((1 << 64) // one_in - 1)
    return hashes[: int(np.searchsorted(hashes, limit, side="right"))]


def shared(left: Hashes, right: Hashes) -> int:
    """|left ∩ right| of two sorted sets."""
    small, large = (left, right) if len(left) <= len(right) else (right, left)
    if len(small) == 0:
        return 0
    places = np.searchsorted(large, small)
    places[places == len(large)] = 0
    return int(np.count_nonzero(large[places] == small))


def _word_hashes_of_chunk(text: str) -> Hashes:
    letters = _letters(text)
    is_word = letters != 0
    begins = np.empty(len(letters), dtype=bool)
    begins[:1] = is_word[:1]
    np.greater(is_word[1:], is_word[:-1], out=begins[1:])
    if letters.dtype != np.uint8:
        single = np.zeros(len(letters), dtype=bool)
        for low, high in IDEOGRAPHS:
            single |= (letters >= low) & (letters < high)
        begins |= single
        begins[1:] |= single[:-1] & is_word[1:]
    starts = np.flatnonzero(begins)
    if len(starts) == 0:
        return np.empty(0, dtype=np.uint64)
    powers, inverse_powers = _powers(CHUNK_CHARACTERS)
    sums = np.add.reduceat(np.multiply(letters, powers[: len(letters)], dtype=np.uint64), starts)
    return _mixed(sums * inverse_powers[starts])


def _letters(text: str) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """A number a character, 0 for those between words."""
    table, ascii_table = _letter_tables()
    if text.isascii():
        return np.frombuffer(text.encode("ascii").translate(ascii_table), dtype=np.uint8)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return np.take(table, np.minimum(codes, BASIC_PLANE - 1))


@functools.cache
def _letter_tables() -> tuple[NDArray[np.uint16], bytes]:
    table = np.zeros(BASIC_PLANE, dtype=np.uint16)
    for code in range(BASIC_PLANE - 1):
        char = chr(code)
        if unicodedata.category(char)[0] in "LNM":
            letter, *accents = list(unicodedata.normalize("NFD", char.lower()))
            accented = letter if all(unicodedata.combining(accent) for accent in accents) else char
            table[code] = min(ord(accented), BASIC_PLANE - 1)
    table[BASIC_PLANE - 1] = BASIC_PLANE - 1  # all characters above
    return table, bytes(int(table[code]) if code < 128 else 0 for code in range(256))


@functools.cache
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """β^i and β^-i mod 2^64 for i < count."""
    forward, backward = np.ones(count, dtype=np.uint64), np.ones(count, dtype=np.uint64)
    forward[1:], backward[1:] = np.uint64(BASE), np.uint64(pow(BASE, -1, 1 << 64))
    return np.multiply.accumulate(forward), np.multiply.accumulate(backward)


@functools.cache
def _permutations(count: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Factors (odd) and terms: from a fixed sequence, so that sketches made anywhere compare."""
    values = _mixed(np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(BASE))
    factors = (values[:count] >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    return factors, (values[count:] >> np.uint64(32)).astype(np.uint32)


def _mixed(values: Hashes) -> Hashes:
    """splitmix64's finaliser, in place: every bit of the input reaches every bit of the output."""
    values ^= values >> np.uint64(30)
    values *= MIX_1
    values ^= values >> np.uint64(27)
    values *= MIX_2
    values ^= values >> np.uint64(31)
    return values
