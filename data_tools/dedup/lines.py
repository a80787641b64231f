"""Lines of a page as 64-bit hashes, so that a dump's repeated lines can be found without holding its text.

CCNet (Wenzek et al. 2019, section 3.1; its code `normalize_for_dedup` and `compute_hashes`) compares lines after
making them alike: white space at the ends goes, letters become lower case, every Unicode digit becomes 0, and 34
punctuation marks outside ASCII and the control characters are deleted; accents and ASCII punctuation stay. The hash
`cc_net` is the first 8 bytes of the SHA-1 of that line, little-endian: equal to CCNet's own, bit for bit. The hash
`xxh3` is XXH3-64 of the same line, several times faster. Both are 64 bits: among 90 billion different lines of a
dump about 200 pairs collide by chance, whichever is taken.

`normalised_line` is the definition. `normalised_lines` computes the same for all lines of a page at once, which is
where the speed comes from: one pass of `bytes.translate` does the letters, digits and controls of ASCII (in UTF-8 no
byte of another character is taken for one), and a page is searched once for the characters outside ASCII that change.
"""

import hashlib
import re
import sys
from collections.abc import Iterable
from functools import partial
from itertools import compress

import numpy as np
import xxhash

KINDS = ("xxh3", "cc_net")

# CCNet's marks. The full-width digit one among them never is deleted: as a digit it became 0 before.
MARKS = "，。、„”“«»１」「《》´∶：？！（）；–—．～’…━〈〉【】％►"
CONTROLS = "".join(map(chr, [*range(32), *range(127, 160)]))
_MARK_OR_CONTROL = re.compile(f"[{MARKS}{re.escape(CONTROLS)}]")
_DIGIT = re.compile(r"\d")

# What a page may hold outside ASCII that normalising changes. Beyond the first 65,536 characters all are looked at:
# a pattern that lists some of them is a hundred times slower.
_BEYOND_ASCII = [chr(code) for code in range(128, sys.maxunicode + 1)]
_TO_DELETE = frozenset(char for char in MARKS + CONTROLS if ord(char) > 127 and not char.isdecimal())
_TO_ZERO = frozenset(char for char in _BEYOND_ASCII if char.isdecimal())
_TO_LOWER = frozenset(char for char in _BEYOND_ASCII if char.lower() != char)
_LISTED = "".join(sorted(char for char in _TO_DELETE | _TO_ZERO | _TO_LOWER if char < "\U00010000"))
_CHANGING = re.compile(f"[{_LISTED}\U00010000-\U0010ffff]")
del _BEYOND_ASCII, _LISTED

_UPPER, _LOWER = bytes(range(65, 91)), bytes(range(97, 123))
_ASCII_TABLE = bytes.maketrans(_UPPER + b"0123456789", _LOWER + b"0" * 10)
_ASCII_CONTROLS = bytes([*range(10), *range(11, 32), 127])  # all but the line end

_sha1 = partial(hashlib.sha1, usedforsecurity=False)


def normalised_line(line: str) -> str:
    """One line as CCNet compares it: the definition, slow."""
    line = _DIGIT.sub("0", line.strip().lower())
    return _MARK_OR_CONTROL.sub("", line)


def normalised_lines(text: str) -> list[bytes]:
    """`normalised_line` of every line of the text (what lies between line feeds), in UTF-8, fast.

    Lone surrogates are encoded as they are: text that has no UTF-8 still has its hashes.
    """
    # White space goes first, as by the definition: what deleting marks lays bare at the ends of a line stays.
    stripped = "\n".join(map(str.strip, text.split("\n")))
    if not stripped.isascii():
        stripped = _beyond_ascii(stripped)
    encoded = stripped.encode("utf-8", "surrogatepass")
    return encoded.translate(_ASCII_TABLE, _ASCII_CONTROLS).split(b"\n")


def _beyond_ascii(text: str) -> str:
    changing = set(_CHANGING.findall(text))
    if not changing.isdisjoint(_TO_LOWER):
        # The whole page at once: the one rule that looks at neighbours, the final sigma's, stops at a line feed.
        # It makes no new mark or digit.
        text = text.lower()
    for char in changing:
        if char in _TO_DELETE:
            text = text.replace(char, "")
        elif char in _TO_ZERO:
            text = text.replace(char, "0")
    return text


def line_hashes(text: str, *, kind: str) -> np.ndarray:
    """The hashes of the lines of the text, in order: [number of line feeds + 1] uint64. `kind` is one of KINDS."""
    return hashes_of(normalised_lines(text), kind=kind)


def hashes_of(lines: list[bytes], *, kind: str) -> np.ndarray:
    """The hash of each of the byte strings: [lines] uint64."""
    if kind == "xxh3":
        return np.fromiter(map(xxhash.xxh3_64_intdigest, lines), dtype=np.uint64, count=len(lines))
    if kind == "cc_net":
        digests = b"".join([_sha1(line).digest()[:8] for line in lines])
        return np.frombuffer(digests, dtype="<u8").astype(np.uint64, copy=False)
    raise ValueError(f"kind={kind}: one of {', '.join(KINDS)}")


def keep_lines(text: str, mask: Iterable[bool] | np.ndarray) -> str:
    """The lines of the text for which the mask, one truth value a line, is true."""
    lines = text.split("\n")
    kept = mask.tolist() if isinstance(mask, np.ndarray) else list(mask)
    if len(kept) != len(lines):
        raise ValueError(f"{len(kept)} truth values for {len(lines)} lines")
    return "\n".join(compress(lines, kept))
