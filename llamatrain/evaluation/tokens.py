"""Texts of a task as tokens: where a continuation begins, what is cut off, and when a written text ends. No torch.

SentencePiece puts a space before every text and may merge across any place in it, so the tokens of a continuation are
not those of its text alone. Context and continuation are encoded as one text, and the context once more by itself: the
continuation's tokens are those after what both encodings begin with, at least one. Mostly that is all of the context;
where it is not, a token at the end of the context counts to the continuation.

A sequence longer than the model's loses its front, BOS with it. That, and the windows of long documents, are as in
lm-evaluation-harness, so that scores can be compared.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from llamatrain.evaluation.prefixes import Piece
from llamatrain.evaluation.scoring import cut
from llamatrain.tokenizer import Tokenizer

ANCHOR = 8  # tokens of a context before what is written after it, decoded with it: the first of a text loses its space


class Encoded(NamedTuple):
    context: list[int]  # BOS first
    continuation: list[int]
    merged: bool  # the context's own encoding is not the beginning of that of both


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, *, alone: Sequence[int] | None = None
) -> Encoded:
    """Tokens of a context and of what follows it. `alone`: the context's, where they are known, without BOS."""
    before = list(tokenizer.encode(context) if alone is None else alone) if context else []
    whole = tokenizer.encode(context + continuation)
    end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
    merged = end < len(before)
    if end == len(whole):  # nothing was added, or what was added has no token
        end, merged = max(0, end - 1), True
    return Encoded([tokenizer.bos_id, *whole[:end]], whole[end:], merged)


def pieces_of(context: Sequence[int], continuation: Sequence[int], *, most: int) -> list[Piece]:
    """What is asked of a model of length `most`, so that each token of the continuation is a target once.

    One piece, its front cut off if it is too long; of a longer continuation windows. The context is not empty.
    """
    targets = tuple(continuation)
    if not targets:
        return []
    inputs = (*context, *targets[:-1])[-most:]
    if len(targets) <= most:
        return [Piece(inputs, targets)]
    tokens = (context[-1], *targets)
    pieces = [Piece(tokens[:most], targets[:most])]
    for begin in range(most, len(targets), most):
        end = min(begin + most, len(targets))
        pieces.append(Piece(tokens[end - most : end], targets[begin:end]))
    return pieces


def room_for(context: Sequence[int], new_tokens: int, *, most: int) -> tuple[list[int], int]:
    """The end of a context, and how many tokens may follow it: what is asked for, or what a model of length `most` has.

    What is new takes the place of the context's front, of half the model's length at most.
    """
    new = min(new_tokens, max(most // 2, most - len(context)))
    return list(context[-(most - new) :]), new


class Ending:
    """Looks for stop strings in what is written after a context, token by token."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._anchor = list(context[-ANCHOR:])
        self._before = len(tokenizer.decode(self._anchor))
        # each character is four tokens at most, when they are bytes
        self._newest = 4 * max(map(len, self._stop), default=0) + ANCHOR

    def reached(self, tokens: list[int]) -> bool:
        """Whether the newest token is EOS or completes a stop string."""
        if tokens[-1] == self._tokenizer.eos_id:
            return True
        if not self._stop:
            return False
        newest = self._tokenizer.decode(tokens[-self._newest :])
        return any(text in newest and text in self._decoded(tokens) for text in self._stop)

    def text(self, tokens: list[int]) -> str:
        """What was written before EOS and the first stop string."""
        eos = self._tokenizer.eos_id
        return cut(self._decoded(tokens[: tokens.index(eos)] if eos in tokens else tokens), self._stop)

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([*self._anchor, *tokens])[self._before :]
