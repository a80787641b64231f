"""The keyed permutation of [0, n): O(1) memory and O(1) seek, no torch.

A Feistel network over splitmix64 permutes [0, 2^b), 2^b the smallest power of two that holds n; what falls
outside [0, n) goes round again (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains",
2002). For small n, where eight rounds are measurably biased, hashed keys are sorted instead, which is
exactly uniform. numpy's own permutation is not used: its stream is not promised to stay the same from
version to version.
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np

ROUNDS = 8  # even, so that both halves end where they began
LARGEST_SORTED = 65_536  # windows up to which a permutation is a sort; 128 kB each
SORTED_KEPT = 128  # sorted permutations kept: at most 16 MiB

_U27, _U30, _U31 = (np.uint64(shift) for shift in (27, 30, 31))
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), uint64 -> uint64; multiplication wraps."""
    x = (x ^ (x >> _U30)) * _MULTIPLIER_1
    x = (x ^ (x >> _U27)) * _MULTIPLIER_2
    return x ^ (x >> _U31)


def _keys(seed: int, name: str, epoch: int) -> np.ndarray:
    """uint64 [ROUNDS]."""
    digest = blake2b(f"{seed}/{name}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection of [0, 2^bits), uint64 -> uint64, bits >= 2; for odd bits the right half is wider."""
    width, other = bits // 2, bits - bits // 2  # of the left half, of the right half
    left, right = x >> np.uint64(other), x & np.uint64((1 << other) - 1)
    for key in keys:
        left, right = right, left ^ (_mix(right + key) >> np.uint64(64 - width))
        width, other = other, width
    return (left << np.uint64(other)) | right


def _walked(positions: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The bijection restricted to [0, n); as 2^bits < 2n, fewer than two goes on average."""
    bits = (n - 1).bit_length()
    x = _feistel(positions, bits, keys)
    outside = np.flatnonzero(x >= n)
    while outside.size:
        x[outside] = _feistel(x[outside], bits, keys)
        outside = outside[x[outside] >= n]
    return x


@lru_cache(maxsize=SORTED_KEPT)
def _sorted_permutation(n: int, seed: int, name: str, epoch: int) -> np.ndarray:
    """uint16 [n]."""
    keys = _keys(seed, name, epoch)
    hashed = _mix(_mix(np.arange(n, dtype=np.uint64) + keys[0]) ^ keys[1])
    return np.argsort(hashed, kind="stable").astype(np.uint16)


def permute(positions: np.ndarray, n: int, *, seed: int, name: str, epoch: int) -> np.ndarray:
    """What the permutation keyed by (seed, name, epoch) has at these positions of [0, n), all int64."""
    if n <= LARGEST_SORTED:
        return _sorted_permutation(n, seed, name, epoch)[positions].astype(np.int64)
    return _walked(positions.astype(np.uint64), n, _keys(seed, name, epoch)).astype(np.int64)
