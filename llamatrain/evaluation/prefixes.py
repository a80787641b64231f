"""Which likelihoods are computed together, so that nothing is computed twice. No torch.

What is asked of the model is a piece: some inputs, and the targets after the last of them. Three things are shared:

- Pieces whose inputs begin another's ride on it: a question with four answers of one token each is one row.
- Rows that begin alike (the choices of a question, the questions after the same examples) are a group: the beginning
  goes through the model once, the rest of each row follows its keys and values. Rows are sorted as sequences of
  numbers, so whatever begins alike is adjacent, and the groups are chosen to save the most tokens.
- Rows of about the same length are a batch. Groups in one batch share beginnings of one length, cut to the shortest;
  lengths are rounded down so that many are the same. Only the ends of rows are filled up. The coarser the rounding, the
  less is shared and the less filled up: several are tried, and sharing nothing, and the cheapest plan is taken.

The plan is a function of the pieces and of the bound on a batch, not of ranks. The largest batches come first, so that
memory which does not suffice is known at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

FEWEST_SHARED = 8  # tokens; a shorter beginning is not worth a forward of its own
KEPT_BITS = (4, 3, 2, 1)  # of the length of a shared beginning, tried in turn
KEPT_TOKENS = 8  # times as many as go through the model at a time may have their keys and values kept
FORWARD_TOKENS = 32  # that a forward takes the time of, whatever is in it


class Piece(NamedTuple):
    """Inputs, and the tokens that follow the last len(targets) of them."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def first(self) -> int:
        """The first input whose successor is a target."""
        return len(self.inputs) - len(self.targets)


@dataclass
class Row:
    """Inputs of the model, and the pieces that they answer, by number."""

    inputs: tuple[int, ...]
    pieces: list[int]
    first: int  # of the inputs, whose successors are targets of some piece


@dataclass
class Batch:
    """Rows that go through the model together. The first `shared` inputs of each are those of its beginning."""

    shared: int = 0
    beginnings: list[tuple[int, ...]] = field(default_factory=list)  # none if `shared` is 0
    rows: list[Row] = field(default_factory=list)
    beginning_of: list[int] = field(default_factory=list)  # a row's, among `beginnings`

    @property
    def tokens(self) -> int:
        """That the keys and values of the batch's rows are kept of, filled up to the longest."""
        return len(self.rows) * max(len(row.inputs) for row in self.rows)

    @property
    def forwards(self) -> list[int]:
        """Tokens that go through the model: the beginnings, if there are any, and then the rest of the rows."""
        rest = self.tokens - len(self.rows) * self.shared
        return [len(self.beginnings) * self.shared, rest] if self.shared else [rest]

    @property
    def cost(self) -> int:
        """In tokens."""
        return sum(tokens + FORWARD_TOKENS for tokens in self.forwards)


def plan(pieces: Sequence[Piece], *, max_tokens: int) -> list[Batch]:
    """Batches in which every piece is once.

    At most `max_tokens` tokens of each go through the model in a forward, and of at most KEPT_TOKENS times as many keys
    and values are kept, but for single rows that are longer.
    """
    rows = distinct_rows(pieces)
    plans = [_batches_of_rows(rows, max_tokens)]
    bounds = group_bounds(rows)
    for bits in KEPT_BITS:
        groups = [Group(rows[begin:end], rounded_down(shared, bits)) for begin, end, shared in bounds]
        alone = [row for group in groups if group.shared == 0 for row in group.rows]
        batches = _batches_of_groups([group for group in groups if group.shared], max_tokens)
        plans.append([*batches, *_batches_of_rows(alone, max_tokens)])
    cheapest = min(plans, key=lambda batches: sum(batch.cost for batch in batches))
    return sorted(cheapest, key=lambda batch: -batch.tokens)


def distinct_rows(pieces: Sequence[Piece]) -> list[Row]:
    """The rows that answer all pieces, in the order of their inputs: none is the beginning of another."""
    order = sorted(range(len(pieces)), key=lambda number: pieces[number].inputs)
    rows: list[Row] = []
    for number in order:
        piece = pieces[number]
        last = rows[-1] if rows else None
        if last is not None and piece.inputs[: len(last.inputs)] == last.inputs:
            last.inputs = piece.inputs
            last.pieces.append(number)
            last.first = min(last.first, piece.first)
        else:
            rows.append(Row(piece.inputs, [number], piece.first))
    return rows


class Group(NamedTuple):
    """Rows whose first `shared` inputs are the same."""

    rows: list[Row]
    shared: int


def group_bounds(rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    """Sorted rows cut into groups: (begin, end, inputs shared) of each.

    The groups are those that save most, (rows - 1) x shared inputs each. Neighbours are merged, those that have most
    in common first, and of each merged stretch the better is kept: to be one group, or what its halves were.
    """
    common = [_common(one, other) for one, other in pairwise(rows)]
    end_of, begin_of = list(range(1, len(rows) + 1)), list(range(len(rows)))  # of stretches, by first and last row
    saved = [0] * len(rows)  # by a stretch's first row
    groups: dict[int, list[tuple[int, int, int]]] = {row: [(row, row + 1, 0)] for row in range(len(rows))}
    for row in sorted(range(len(common)), key=lambda row: -common[row]):
        if common[row] < FEWEST_SHARED:
            break
        begin, middle = begin_of[row], row + 1
        end = end_of[middle]
        as_one, as_two = (end - begin - 1) * common[row], saved[begin] + saved[middle]
        if as_one >= as_two:
            groups[begin] = [(begin, end, common[row])]
        else:
            groups[begin] += groups[middle]
        del groups[middle]
        saved[begin] = max(as_one, as_two)
        end_of[begin], begin_of[end - 1] = end, begin
    return [group for begin in sorted(groups) for group in groups[begin]]


def _common(one: Row, other: Row) -> int:
    """Inputs that two rows begin with alike, before the first that has a target in either."""
    most = min(one.first, other.first)
    differ = np.flatnonzero(np.asarray(one.inputs[:most]) != np.asarray(other.inputs[:most]))
    return int(differ[0]) if len(differ) else most


def rounded_down(length: int, bits: int) -> int:
    """The length with its highest `bits` bits only; 0 if it is not worth sharing."""
    if length < FEWEST_SHARED:
        return 0
    dropped = max(0, length.bit_length() - bits)
    return length >> dropped << dropped


def _batches_of_rows(rows: list[Row], max_tokens: int) -> list[Batch]:
    batches: list[Batch] = []
    for row in sorted(rows, key=lambda row: (-len(row.inputs), row.inputs)):
        if not batches or (len(batches[-1].rows) + 1) * len(batches[-1].rows[0].inputs) > max_tokens:
            batches.append(Batch())
        batches[-1].rows.append(row)
    return batches


def _batches_of_groups(groups: list[Group], max_tokens: int) -> list[Batch]:
    """Groups of about the same shared length, then of about the same length, fill batches; large ones are cut."""
    for group in groups:
        group.rows.sort(key=lambda row: -len(row.inputs))
    filled: list[_Filling] = []
    for group in sorted(groups, key=lambda group: (-group.shared, -len(group.rows[0].inputs), group.rows[0].inputs)):
        rows, shared = group
        last = filled[-1] if filled else None
        if last is None or 2 * shared < last.begun_with or last.room(rows[0], shared, max_tokens) < len(rows):
            filled.append(last := _Filling(shared))
        while (room := max(1, last.room(rows[0], shared, max_tokens))) < len(rows):
            last.add(rows[:room], shared)
            rows = rows[room:]
            filled.append(last := _Filling(shared))
        last.add(rows, shared)
    return [filling.batch for filling in filled]


class _Filling:
    """A batch of groups as it grows."""

    def __init__(self, shared: int) -> None:
        self.begun_with = shared
        self.batch = Batch(shared)
        self._longest = 0

    def room(self, longest_row: Row, shared: int, max_tokens: int) -> int:
        """For how many rows of another group there is room."""
        batch = self.batch
        longest, shared = max(self._longest, len(longest_row.inputs)), min(batch.shared, shared)
        if (len(batch.beginnings) + 1) * shared > max_tokens:
            return 0
        return min(max_tokens // (longest - shared), KEPT_TOKENS * max_tokens // longest) - len(batch.rows)

    def add(self, rows: list[Row], shared: int) -> None:
        """Add rows of a group, the longest first."""
        batch = self.batch
        batch.shared = min(batch.shared, shared)
        beginnings = [*batch.beginnings, rows[0].inputs]
        batch.beginnings = [beginning[: batch.shared] for beginning in beginnings]
        batch.rows += rows
        batch.beginning_of += [len(beginnings) - 1] * len(rows)
        self._longest = max(self._longest, len(rows[0].inputs))
