"""How surprising a page is to an n-gram model over SentencePiece pieces (CCNet, section 3.3; Heafield, 2011, KenLM).

    perplexity = 10 ** (-log10 p / length)     length: the pieces of all lines, and the end of each

Text is brought to one form before it is cut into pieces: lower case, no accents, digits as 0, punctuation as ASCII
has it, no control characters. cc_net does so with the whole page at once, which deletes the line breaks too, so the
page becomes one line with the words on either side of each break glued. `newlines` says which is wanted:

    line  each line of the page by itself; a tab is a space
    glue  as cc_net: needed with its own models and cut-offs
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from llamatrain.errors import ConfigError, DataError

NEWLINES = ("line", "glue")
PIECES_SUFFIX = ".sp.model"
NGRAM_SUFFIXES = (".binary", ".arpa.bin", ".arpa", ".arpa.gz")  # KenLM's own formats first: they load at once
RECORD_SUFFIX = ".ngrams.json"  # how a model was made, and its percentiles

# CCNet's punctuation; its entry for the fullwidth digit one never applies, as digits are 0 by then.
PUNCTUATION = {
    **dict.fromkeys("„”“«»」「《》", '"'),
    **dict.fromkeys("´’", "'"),
    **dict.fromkeys("，、", ","),
    **dict.fromkeys("∶：", ":"),
    **dict.fromkeys("–━►", "-"),
    **{"。": ".", "．": ". ", "…": "...", "—": " - "},
    **{"？": "?", "！": "!", "；": ";", "～": "~", "％": "%"},
    **{"（": "(", "）": ")", "〈": "<", "〉": ">", "【": "[", "】": "]"},
}
_CONTROLS = bytes([*range(32), 127])
_WHITE_CONTROLS = b"\t\v\f\r\x1c\x1d\x1e\x1f"
_ZEROES = bytes.maketrans(b"123456789", b"000000000")
_ZEROES_AND_SPACES = bytes.maketrans(b"123456789" + _WHITE_CONTROLS, b"000000000" + b" " * len(_WHITE_CONTROLS))
_LINE_DELETED = bytes(code for code in _CONTROLS if code not in b"\n" + _WHITE_CONTROLS)
_NON_ASCII = re.compile(r"[^\x00-\x7f]+")
_REMEMBERED_CHARACTERS = 32  # longer runs outside ASCII seldom come twice

Scorer = Callable[[str], float | None]


def normalised_lines(text: str, newlines: str) -> list[str]:
    """The lines of a page in the form the model reads; empty ones are left out."""
    text = text.strip().lower()
    if not text.isascii():
        text = _NON_ASCII.sub(_folded_match, text)
    content = text.encode("utf-8", "replace")  # lone surrogates become question marks
    if newlines == "glue":
        line = content.translate(_ZEROES, _CONTROLS).decode()
        return [line] if line else []
    content = content.translate(_ZEROES_AND_SPACES, _LINE_DELETED)
    return [line for line in map(str.strip, content.decode().split("\n")) if line]


def _folded_match(match: re.Match[str]) -> str:
    run = match[0]
    return _folded_and_remembered(run) if len(run) <= _REMEMBERED_CHARACTERS else _folded(run)


def _folded(run: str) -> str:
    """A run of characters outside ASCII. A base letter before it is not needed: canonical order moves no starter."""
    characters = []
    for character in unicodedata.normalize("NFD", run):
        category = unicodedata.category(character)
        if category == "Nd":
            characters.append("0")
        elif category != "Mn" and not "\x80" <= character <= "\x9f":
            characters.append(PUNCTUATION.get(character, character))
    return "".join(characters)


_folded_and_remembered = lru_cache(maxsize=1 << 16)(_folded)


def page_scorer(pieces: Path, ngrams: Path, *, newlines: str) -> Scorer:
    """text -> its perplexity, None for a page without a piece. Raises ConfigError and DataError for the models."""
    encode: Callable[[str], list[str]] = load_pieces(pieces).encode_as_pieces
    score: Callable[[str], float] = load_ngrams(ngrams).score  # log10 of a sentence's probability, its end included

    def perplexity(text: str) -> float | None:
        log_probability, length = 0.0, 0
        for line in normalised_lines(text, newlines):
            if words := encode(line):
                log_probability += score(" ".join(words))
                length += len(words) + 1
        return float(10 ** (-log_probability / length)) if length else None

    return perplexity


def load_pieces(path: Path) -> Any:
    """A SentencePieceProcessor. Raises DataError."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except RuntimeError as error:
        raise DataError(f"{path}: not a SentencePiece model ({error})") from None


def kenlm_module() -> Any:
    """Raises ConfigError where kenlm is missing."""
    try:
        import kenlm
    except ImportError:
        raise ConfigError("kenlm is not installed: pip install 'llamatrain[data]'") from None
    return kenlm


def load_ngrams(path: Path) -> Any:
    """A kenlm.Model. Raises ConfigError where kenlm is missing, and DataError."""
    kenlm = kenlm_module()
    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    try:
        return kenlm.Model(str(path), config)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: not a model KenLM reads ({' '.join(str(error).split())})") from None


def check_newlines(newlines: str) -> None:
    """Raises ConfigError."""
    if newlines not in NEWLINES:
        raise ConfigError(f"newlines={newlines}: choose one of {', '.join(NEWLINES)}")
