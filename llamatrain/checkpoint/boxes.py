"""Whether a checkpoint's chunks, as its manifest lists them, are boxes of a tensor and leave nothing of it out."""

from collections.abc import Sequence
from math import prod
from secrets import randbelow
from typing import Any

PRIME = 2**61 - 1


def is_chunk(chunk: Any, shape: list[Any]) -> bool:
    """Whether this is `[rank, offset, shape]`, a box inside a tensor of `shape`, which is itself one."""
    if not (isinstance(chunk, list) and len(chunk) == 3):
        return False
    rank, offset, extent = chunk
    return (
        type(rank) is int
        and rank >= 0
        and isinstance(offset, list)
        and isinstance(extent, list)
        and len(offset) == len(extent) == len(shape)
        and all(
            type(o) is type(n) is type(s) is int and o >= 0 and n >= 0 and o + n <= s
            for o, n, s in zip(offset, extent, shape, strict=True)
        )
    )


def cover(shape: list[int], chunks: Sequence[Any]) -> bool:
    """Whether boxes inside the tensor hold every place of it once. Time grows with their number, whoever wrote them.

    Each coordinate that bounds a box gets a random number F, and a box the product of F(end) - F(begin) over its
    dimensions: a measure, by which disjoint boxes add up to the whole. If a place is left out or held twice, they
    differ by a polynomial in the random numbers that is not zero and, modulo a prime p, vanishes with a probability
    of at most dimensions / p (Schwartz-Zippel), less than one in 10^17.
    """
    if not chunks:  # then nobody has looked at the shape
        return False
    drawn: dict[tuple[int, int], int] = {}

    def height(dimension: int, place: int) -> int:
        key = dimension, place
        if key not in drawn:
            drawn[key] = randbelow(PRIME)
        return drawn[key]

    def measure(offset: Sequence[int], extent: Sequence[int]) -> int:
        sides = (height(d, o + n) - height(d, o) for d, (o, n) in enumerate(zip(offset, extent, strict=True)))
        return prod(sides)

    whole = measure([0] * len(shape), shape)
    return (sum(measure(offset, extent) for _, offset, extent in chunks) - whole) % PRIME == 0
