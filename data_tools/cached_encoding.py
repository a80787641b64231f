r"""Token ids of whole texts, several times faster than SentencePiece alone: each word is encoded once and remembered.

BPE joins neighbouring symbols only into strings that are pieces of the vocabulary. Where no piece reaches across a
place in the text, nothing is ever joined across it, and both sides can be encoded alone. In LLaMA's vocabulary no
piece holds a space after another character, and none a line feed. So a text, with the space that SentencePiece puts
in front, falls into chunks, each of one of two forms:

    spaces, then characters that are neither space nor line feed      encoded as the text without its first space,
                                                                      which SentencePiece puts back
    a line feed, then characters that are neither                     encoded as it is, less the token of the space

(a chunk that is one single space is the piece of a space). `str.split` finds them at the speed of C: a run of spaces
is made one space and U+2581s, which SentencePiece takes for spaces, and a line feed gets a space in front. Texts that
hold U+2581 themselves are encoded whole, and so is everything where the tokenizer is not of this kind (`obstacle`
says why): the ids are SentencePiece's own for every text.
"""

import re
from collections.abc import Iterator

import numpy as np

from data_tools.sentencepiece_spec import BPE, BYTE, NORMAL, UNUSED, USER_DEFINED, TokenizerSpec, read_spec
from llamatrain.data.shards import DTYPES
from llamatrain.tokenizer import SPACE_MARK, Tokenizer

LONGEST_CHUNK = 24  # characters of a chunk that is remembered; longer ones hardly come again
LARGEST_CACHE = 1 << 19  # chunks; about 75 MB. A full cache is emptied: the frequent chunks are soon back
SLICE_CHARACTERS = 1 << 20  # of a text that is cut at once, which bounds the memory
PROBE = " a  b\n\n\tc \n  d12 \u00e9\u4e16\n "


class CachedEncoder:
    """Encodes as the tokenizer does, to ids in the little-endian bytes of a shard's dtype."""

    def __init__(self, tokenizer: Tokenizer, dtype: str, *, cache_chunks: int = LARGEST_CACHE) -> None:
        self.tokenizer = tokenizer
        self.dtype = DTYPES[dtype]
        spec = read_spec(tokenizer.path.read_bytes())
        self._is_byte = np.array([kind == BYTE for _, kind in spec.pieces])  # bool [vocab_size]
        self._newline = next((n for n, piece in enumerate(spec.pieces) if piece == ("<0x0A>", BYTE)), -1)
        self._bos, self._eos = (np.asarray([n], self.dtype).tobytes() for n in (tokenizer.bos_id, tokenizer.eos_id))
        self.obstacle = _obstacle(spec)  # to encoding chunks alone, in words; None: there is none
        self._cache = _Cache(tokenizer, self.dtype, cache_chunks) if self.obstacle is None else None
        if self._cache is not None and self.encode(PROBE) != self._whole(PROBE):
            self.obstacle = "this release of SentencePiece encodes words alone in another way than in a text"
            self._cache = None

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> bytes:
        """Ids of a text. Raises DataError for lone surrogates."""
        if self._cache is None or not text or SPACE_MARK in text:
            parts = [self._whole(text)]
        else:
            parts = [self._cache.ids_of(chunks) for chunks in _chunks(text)]
        return b"".join([self._bos * bos, *parts, self._eos * eos])

    def count_bytes(self, ids: bytes) -> tuple[int, int]:
        """How many of the ids stand for a single byte, and how many of those for a line feed."""
        tokens = np.frombuffer(ids, self.dtype)
        return int(np.count_nonzero(self._is_byte[tokens])), int(np.count_nonzero(tokens == self._newline))

    def _whole(self, text: str) -> bytes:
        return np.asarray(self.tokenizer.encode(text), self.dtype).tobytes()


def _obstacle(spec: TokenizerSpec) -> str | None:
    """What in a tokenizer keeps chunks from being encoded alone."""
    kinds = {kind for _, kind in spec.pieces}
    joined = [piece for piece, kind in spec.pieces if kind in (NORMAL, UNUSED)]
    across = next((piece for piece in joined if re.search(f"[^{SPACE_MARK}]{SPACE_MARK}|[ \n]", piece)), None)
    reasons = {
        "it is not of type BPE": spec.model_type != BPE,
        "it normalises characters": spec.charsmap != b"",
        "it removes spaces": spec.remove_extra_whitespaces,
        "it puts no space in front of a text": not spec.add_dummy_prefix or not spec.escape_whitespaces,
        "it puts spaces behind words": spec.treat_whitespace_as_suffix,
        "it has no byte tokens": not spec.byte_fallback or BYTE not in kinds,
        "it has user-defined symbols": USER_DEFINED in kinds,
        "it has no piece of a space alone": (SPACE_MARK, NORMAL) not in spec.pieces,
        f"its piece {across!r} reaches across words or lines": across is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _chunks(text: str) -> Iterator[list[str]]:
    """The chunks of a text as keys of the cache, some slices of them."""
    if "  " in text:
        text = text.replace("  ", f" {SPACE_MARK}").replace(f"{SPACE_MARK} ", SPACE_MARK * 2)
    if text[0] == " ":
        text = SPACE_MARK + text[1:]
    if "\n" in text:
        text = text.replace("\n", " \n")
    start = 0
    while (end := text.find(" ", start + SLICE_CHARACTERS)) >= 0:
        yield text[start:end].split(" ")
        start = end + 1
    yield text[start:].split(" ")


class _Cache(dict[str, bytes]):
    """Ids of chunks; one that it does not hold is encoded when it is asked for."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, limit: int) -> None:
        self._tokenizer, self._dtype, self._limit = tokenizer, dtype, limit
        self._space = np.asarray(tokenizer.encode("\n")[:1], dtype).tobytes()

    def ids_of(self, chunks: list[str]) -> bytes:
        return b"".join(map(self.__getitem__, chunks))

    def __missing__(self, chunk: str) -> bytes:
        if chunk == "":
            return self._space
        ids = self._tokenizer.encode(chunk)
        found = np.asarray(ids[1:] if chunk[0] == "\n" else ids, self._dtype).tobytes()
        if len(chunk) <= LONGEST_CHUNK:
            if len(self) >= self._limit:
                self.clear()
            self[chunk] = found
        return found
