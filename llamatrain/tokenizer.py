"""The SentencePiece tokenizer (paper, section 2.1: BPE, digits split, byte fallback). No torch."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from llamatrain.errors import DataError

TOKENIZER_FILE = "tokenizer.model"  # its name in data sets and run directories
LARGEST_FILE = 64 << 20  # bytes; LLaMA's has 500 kB
SPACE_MARK = "\u2581"  # what SentencePiece writes for a space; a text that holds it cannot be told from one with spaces


class Tokenizer:
    """A trained tokenizer.model.

    Raises DataError when the file is missing or not a SentencePiece model with BOS and EOS.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                content = file.read(LARGEST_FILE + 1)
            if len(content) > LARGEST_FILE:
                raise DataError(f"{path}: larger than any tokenizer; it is another file")
            if not content:  # which would be taken, and warned of at every call
                raise RuntimeError
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except OSError as error:
            raise DataError(f"{path}: the tokenizer cannot be read ({error.strerror})") from None
        except (RuntimeError, UnicodeDecodeError):  # what is not UTF-8 is put into messages
            raise DataError(
                f"{path}: not a SentencePiece model, or a damaged one; data_tools.train_tokenizer trains them"
            ) from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(f"{path}: the tokenizer has no BOS or no EOS token")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of a text. Raises DataError for what no UTF-8 text can hold (lone surrogates)."""
        try:
            ids: list[int] = self._processor.encode(text)
        except RuntimeError:
            raise DataError(f"{text!r}: not valid Unicode text") from None
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; control tokens (BOS, EOS) have none."""
        text: str = self._processor.decode(list(ids))
        return text

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes of text each id stands for, int64 [vocab_size]; for bits per byte.

        Encoding puts one space before every document that its text does not have, so BOS counts -1: over whole
        documents that carry BOS the sum is the length of their texts.
        """
        counts = np.zeros(self.vocab_size, np.int64)
        for token in range(self.vocab_size):
            if self._processor.is_byte(token):
                counts[token] = 1
            elif not self._processor.is_control(token) and not self._processor.is_unknown(token):
                piece: str = self._processor.id_to_piece(token)
                counts[token] = len(piece.replace(SPACE_MARK, " ").encode())
        counts[self.bos_id] = -1
        return counts
