"""An interpolated n-gram model with modified Kneser-Ney smoothing, in numpy, written as ARPA.

Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (1999), in the form Heafield et
al., "Scalable modified Kneser-Ney language model estimation" (2013), give it and `lmplz` computes it:

    p(w | h) = (a(hw) - D(a(hw))) / sum_x a(hx)  +  b(h) p(w | h')          h': h without its first word
    b(h)     = sum over x of D(a(hx)) / sum_x a(hx)                         p(w | nothing) = 1 / vocabulary

a is the number of occurrences for n-grams of the highest order and for those that begin a sentence, else of different
words seen before them; D takes one of three values by a = 1, 2, 3 or more, estimated for each order from how many
n-grams have a = 1, 2, 3, 4. <s> is never predicted; <unk> has nothing but its part of the uniform distribution.

Counting is sorting: an n-gram is the number of its first n-1 words among the distinct (n-1)-grams together with its
last word, one 64-bit key whatever n. All is held in memory, about 110 bytes a token at the most.
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

UNKNOWN, BEGIN, END = 0, 1, 2  # the first words of every vocabulary
SPECIAL_WORDS = ("<unk>", "<s>", "</s>")
FALLBACK = (0.5, 1.0, 1.5)  # discounts where the counts of counts give none (lmplz --discount_fallback)
NEVER = -99.0  # log10 of zero
ROWS_AT_ONCE = 100_000


@dataclass
class Ngrams:
    """The N distinct n-grams of one order, sorted by their first words. Those of order 1 are the vocabulary itself."""

    prefix: NDArray[np.int32]  # [N] the first n-1 words, by number in the order below
    suffix: NDArray[np.int32]  # [N] the last n-1 words, likewise
    word: NDArray[np.int32]  # [N] the last word
    count: NDArray[np.int64]  # [N] a


@dataclass
class Order:
    """One order of a model."""

    ngrams: Ngrams
    probability: NDArray[np.float64]  # [N]
    backoff: NDArray[np.float64]  # [N] 1 where nothing follows
    discounts: tuple[float, float, float]
    estimated: bool  # False: the discounts are FALLBACK


def estimate(tokens: NDArray[np.int32], *, words: int, order: int) -> list[Order]:
    """tokens [T]: sentences one after another, each BEGIN … END; every word but UNKNOWN occurs, `words` there are."""
    orders: list[Order] = []
    for number, ngrams in enumerate(count_ngrams(tokens, words=words, order=order)):
        discounts, estimated = estimate_discounts(ngrams.count)
        taken = np.array([0.0, *discounts])[np.minimum(ngrams.count, 3)]
        contexts = len(orders[-1].probability) if orders else 1
        totals = np.bincount(ngrams.prefix, weights=ngrams.count, minlength=contexts)
        share = np.bincount(ngrams.prefix, weights=taken, minlength=contexts)
        left: NDArray[np.float64] = np.divide(share, totals, out=np.ones(contexts), where=totals > 0)
        if number == 0:
            below: NDArray[np.float64] = np.full(words, 1 / (words - 1))  # <s> is none of them
            below[BEGIN] = 0
        else:
            orders[-1].backoff = left
            below = orders[-1].probability[ngrams.suffix]
        probability = (ngrams.count - taken) / totals[ngrams.prefix] + left[ngrams.prefix] * below
        orders.append(Order(ngrams, probability, np.ones(len(probability)), discounts, estimated))
    return orders


def count_ngrams(tokens: NDArray[np.int32], *, words: int, order: int) -> list[Ngrams]:
    """The distinct n-grams of the orders 1 … order with their adjusted counts a."""
    ends = np.flatnonzero(tokens == END)
    last = np.repeat(ends, np.diff(ends, prepend=-1))  # [T] where the sentence of a token ends
    number = tokens.astype(np.int32)  # [T] of the n-gram that begins here, among those of its order
    begins = np.arange(words) == BEGIN  # [N] whether an n-gram begins a sentence
    nothing = np.zeros(words, dtype=np.int32)
    raw = np.bincount(tokens, minlength=words)
    counted = [Ngrams(nothing, nothing, np.arange(words, dtype=np.int32), raw)]
    starts = np.arange(len(tokens))  # of the n-grams of an order that lie within a sentence
    for length in range(2, order + 1):
        starts = starts[starts + length - 1 <= last[starts]]
        number, ngrams = _longer(tokens, number, starts, length=length, words=words)
        before = np.bincount(ngrams.suffix, minlength=len(begins))
        counted[-1].count = np.where(begins, counted[-1].count, before)
        begins = begins[ngrams.prefix]
        counted.append(ngrams)
    counted[0].count[BEGIN] = 0
    return counted


def _longer(
    tokens: NDArray[np.int32], shorter: NDArray[np.int32], starts: NDArray[np.int64], *, length: int, words: int
) -> tuple[NDArray[np.int32], Ngrams]:
    """The n-grams of `length` words that begin at `starts`, from the numbers of the shorter ones at every token."""
    keys = shorter[starts].astype(np.int64) * words + tokens[starts + length - 1]
    by_key = np.argsort(keys)
    keys = keys[by_key]
    where = starts[by_key]
    del by_key
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = keys[1:] != keys[:-1]
    number = np.zeros(len(tokens), dtype=np.int32)
    number[where] = np.cumsum(is_first, dtype=np.int32) - 1
    firsts = np.flatnonzero(is_first)
    prefix, word = np.divmod(keys[firsts], words)
    return number, Ngrams(
        prefix=prefix.astype(np.int32),
        suffix=shorter[where[firsts] + 1],
        word=word.astype(np.int32),
        count=np.diff(firsts, append=len(keys)),
    )


def estimate_discounts(counts: NDArray[np.int64]) -> tuple[tuple[float, float, float], bool]:
    """D for a = 1, 2, 3 or more, and whether the counts gave them (Chen & Goodman, equation 26)."""
    one, two, three, four = (int((counts == number).sum()) for number in (1, 2, 3, 4))
    if not (one and two and three and four):
        return FALLBACK, False
    ratio = one / (one + 2 * two)
    found = (1 - 2 * ratio * two / one, 2 - 3 * ratio * three / two, 3 - 4 * ratio * four / three)
    if any(not 0 <= discount <= number for number, discount in enumerate(found, start=1)):
        return FALLBACK, False
    return found, True


def write_arpa(path: Path, orders: list[Order], vocabulary: list[str]) -> None:
    """The model as ARPA, gzipped where the name ends with .gz. The same model gives the same bytes."""
    with open(path, "wb") as file:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", compresslevel=3, fileobj=file, mtime=0) as compressed:
                _write(compressed, orders, vocabulary)
        else:
            _write(file, orders, vocabulary)


def _write(file: IO[bytes] | gzip.GzipFile, orders: list[Order], vocabulary: list[str]) -> None:
    sizes = "".join(f"ngram {number}={len(order.probability)}\n" for number, order in enumerate(orders, start=1))
    file.write(f"\\data\\\n{sizes}".encode())
    for number in range(1, len(orders) + 1):
        file.write(f"\n\\{number}-grams:\n".encode())
        for text in _rows(orders[:number], vocabulary, has_backoff=number < len(orders)):
            file.write(text.encode())
    file.write(b"\n\\end\\\n")


def _rows(orders: list[Order], vocabulary: list[str], *, has_backoff: bool) -> Iterator[str]:
    """The lines of the last of the orders, many at once."""
    order = orders[-1]
    with np.errstate(divide="ignore"):
        probability = np.maximum(np.log10(order.probability), NEVER)
        backoff = np.maximum(np.log10(order.backoff), NEVER)
    for start in range(0, len(probability), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        texts = [" ".join([vocabulary[word] for word in row]) for row in _words(orders, rows).tolist()]
        if has_backoff:
            values = zip(probability[rows].tolist(), texts, backoff[rows].tolist(), strict=True)
            yield "".join(f"{p:.7f}\t{text}\t{b:.7f}\n" for p, text, b in values)
        else:
            pairs = zip(probability[rows].tolist(), texts, strict=True)
            yield "".join(f"{p:.7f}\t{text}\n" for p, text in pairs)


def _words(orders: list[Order], rows: slice) -> NDArray[np.int32]:
    """The words of some n-grams of the last order, [rows, n]."""
    columns = []
    numbers: NDArray[np.int32] = np.arange(len(orders[-1].probability), dtype=np.int32)[rows]
    for order in reversed(orders):
        columns.append(order.ngrams.word[numbers])
        numbers = order.ngrams.prefix[numbers]
    return np.stack(columns[::-1], axis=1)
