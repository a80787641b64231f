"""A SentencePiece BPE model as the tokenizer files of transformers, which give the same ids for every text.

tokenizer.json is the program of the `tokenizers` library: put the space mark in front and for every space, merge pairs
by rank, spell what has no piece in bytes. SentencePiece merges the neighbours whose piece has the highest score, the
leftmost of equals; so the pairs that make a piece rank as the piece does. Text never encodes to a control token here,
so `split_special_tokens` is set: `<s>` in a text is three characters, not the beginning of one.

The classes are named so that transformers takes tokenizer.json as it is: its LlamaTokenizer builds a tokenizer of its
own, which leaves out the space in front of a text that begins with one.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llamatrain.errors import DataError
from llamatrain.tokenizer import SPACE_MARK, Tokenizer

BPE = 2  # model_type of a trainer's settings
LONGEST_PIECE = 1000  # characters; LLaMA's longest has 16. Merges are found in the square of it
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def tokenizer_files(tokenizer: Tokenizer, *, longest: int) -> dict[str, Any]:
    """tokenizer.json and those beside it, as JSON values by file name. Raises DataError for what they cannot say."""
    pieces = pieces_of(tokenizer.path)
    special = [piece.text for piece in pieces if piece.kind in (UNKNOWN, CONTROL)]
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    bos, eos = pieces[tokenizer.bos_id].text, pieces[tokenizer.eos_id].text
    names = {"bos_token": bos, "eos_token": eos, "unk_token": unknown}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": longest,
        "padding_side": "left",
    }
    program = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(pieces, text) for text in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE_MARK},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _with_bos(bos, tokenizer.bos_id),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: number for number, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges_of(pieces)],
        },
    }
    return {"tokenizer.json": program, "tokenizer_config.json": settings, "special_tokens_map.json": names}


def _added(pieces: list[Piece], text: str) -> dict[str, Any]:
    number = next(i for i, piece in enumerate(pieces) if piece.text == text)
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **plain, "special": True}


def _with_bos(bos: str, number: int) -> dict[str, Any]:
    """A post-processor that puts BOS before each text."""
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts: dict[str, Any] = {which: {"Sequence": {"id": which, "type_id": int(which == "B")}} for which in "AB"}
    return {
        "type": "TemplateProcessing",
        "single": [token, texts["A"]],
        "pair": [token, texts["A"], {"SpecialToken": {"id": bos, "type_id": 1}}, texts["B"]],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order in which SentencePiece prefers what they make."""
    numbers = {piece.text: number for number, piece in enumerate(pieces) if piece.kind == NORMAL}
    made = sorted((piece for piece in pieces if piece.kind == NORMAL), key=lambda piece: -piece.score)
    merges: list[tuple[str, str]] = []
    for piece in made:
        halves = [(piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text))]
        pairs = [pair for pair in halves if pair[0] in numbers and pair[1] in numbers]
        merges += sorted(pairs, key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
    return merges


# ---------------------------------------------------------------------- the model file


def pieces_of(path: Path) -> list[Piece]:
    """The pieces of a SentencePiece model. Raises DataError for one that is not like LLaMA's."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append(Piece(piece[1].decode(), _float(piece.get(2)), piece.get(3, NORMAL)))
            elif field in (2, 3):
                (trainer if field == 2 else normalizer).update(_fields(value))
    except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not a SentencePiece model that can be read ({error})") from None
    # Numbers of fields and defaults: sentencepiece_model.proto.
    wanted = {
        "its model type is not BPE": trainer.get(3, 1) == BPE,
        "it does not spell unknown characters in bytes": bool(trainer.get(35, 0)),
        "it puts the space mark behind words": not trainer.get(24, 0),
        "it normalizes texts": not normalizer.get(2) and not normalizer.get(4, 1),
        "it puts no space in front of texts": bool(normalizer.get(3, 1)),
        "it does not write spaces as marks": bool(normalizer.get(5, 1)),
        "it has pieces of a kind that LLaMA's has not": not {piece.kind for piece in pieces} & {USER_DEFINED, UNUSED},
        f"it has a piece of more than {LONGEST_PIECE} characters": all(
            len(piece.text) <= LONGEST_PIECE for piece in pieces
        ),
        "it has no one unknown piece": sum(piece.kind == UNKNOWN for piece in pieces) == 1,
    }
    if faults := [fault for fault, holds in wanted.items() if not holds]:
        raise DataError(f"{path}: tokenizer.json cannot be written for it: {faults[0]}")
    return pieces


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of the fields of a protocol buffer: whole numbers, or bytes."""
    place = 0
    value: Any
    while place < len(content):
        key, place = _varint(content, place)
        match key & 7:
            case 0:
                value, place = _varint(content, place)
            case 1 | 5 as kind:
                width = 8 if kind == 1 else 4
                value, place = content[place : place + width], place + width
            case 2:
                length, place = _varint(content, place)
                value, place = content[place : place + length], place + length
            case kind:
                raise ValueError(f"a field of wire type {kind}")
        if place > len(content):
            raise ValueError("a field beyond the end")
        yield key >> 3, value


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[place]
        value, place = value | (byte & 0x7F) << shift, place + 1
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")


def _float(content: bytes | None) -> float:
    return 0.0 if content is None else float(struct.unpack("<f", content)[0])
