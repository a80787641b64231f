"""What a tokenizer.model says of itself: how texts are normalised and split, and what kind each piece is.

The file is a protocol buffer, `ModelProto` in SentencePiece's sentencepiece_model.proto; the few fields needed are
read here from its wire format, as SentencePiece's Python package does not show them. Numbers and defaults are those
of that file.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from llamatrain.errors import DataError

BPE = 2  # TrainerSpec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.type
VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5  # kinds of fields on the wire
Field = int | bytes


@dataclass(frozen=True)
class TokenizerSpec:
    pieces: tuple[tuple[str, int], ...]  # piece and kind, by id
    model_type: int
    byte_fallback: bool
    treat_whitespace_as_suffix: bool
    charsmap: bytes  # empty: characters are left as they are
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def read_spec(content: bytes) -> TokenizerSpec:
    """Of the bytes of a tokenizer.model. Raises DataError if they are none."""
    try:
        pieces: list[tuple[str, int]] = []
        trainer: dict[int, Field] = {}
        normalizer: dict[int, Field] = {}
        for number, value in _fields(content):
            if number == 1:
                piece = dict(_fields(_bytes(value)))
                pieces.append((_bytes(piece[1]).decode("utf-8"), _number(piece.get(3, NORMAL))))
            elif number == 2:
                trainer.update(_fields(_bytes(value)))
            elif number == 3:
                normalizer.update(_fields(_bytes(value)))
        return TokenizerSpec(
            pieces=tuple(pieces),
            model_type=_number(trainer.get(3, 1)),
            byte_fallback=bool(trainer.get(35, 0)),
            treat_whitespace_as_suffix=bool(trainer.get(24, 0)),
            charsmap=_bytes(normalizer.get(2, b"")),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
            escape_whitespaces=bool(normalizer.get(5, 1)),
        )
    except (IndexError, KeyError, TypeError, ValueError):
        raise DataError("this is not a SentencePiece model") from None


def _fields(content: bytes) -> Iterator[tuple[int, Field]]:
    """Number and value of each field of a message: whole numbers, and the bytes of anything else."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        kind = key & 7
        if kind == VARINT:
            value, position = _varint(content, position)
            yield key >> 3, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(kind)
        if size is None:
            if kind != LENGTH_DELIMITED:
                raise ValueError
            size, position = _varint(content, position)
        if position + size > len(content):
            raise ValueError
        yield key >> 3, content[position : position + size]
        position += size


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _bytes(value: Field) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError
    return value


def _number(value: Field) -> int:
    if not isinstance(value, int):
        raise TypeError
    return value
