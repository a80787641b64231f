"""Parameters laid end to end and cut anywhere, as fairscale spreads them; and the boxes that such a piece is made of.

FSDP2 cuts every parameter by its rows, so that what a rank has of it is a box. A flat shard is a range of several
parameters' numbers, one after the other: it begins and ends in the middle of rows. What it has of one parameter, a
`FlatPart`, is up to three boxes of a matrix: the rest of a row, whole rows, the beginning of another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from llamatrain.distributed import local_part


@dataclass(frozen=True, eq=False)
class FlatPart:
    """What this rank has of one parameter, in its flat shard of several."""

    flat: Tensor  # [n]: the shard, an optimizer's parameter
    first: int  # where in it the part begins
    count: int  # how many numbers it has; may be none
    begin: int  # the place of its first number in the whole parameter, counted row by row
    shape: torch.Size  # of the whole parameter

    @property
    def memory(self) -> Tensor:
        """The numbers themselves: [count]."""
        return self.flat.detach()[self.first : self.first + self.count]

    @property
    def dtype(self) -> torch.dtype:
        return self.flat.dtype

    @property
    def grad(self) -> "FlatPart | None":
        return None if self.flat.grad is None else self.within(self.flat.grad)

    def within(self, other: Tensor) -> "FlatPart":
        """The same part of another tensor that is laid out as the shard, such as its gradient."""
        return replace(self, flat=other)


def updated(parameter: Tensor | FlatPart) -> Tensor:
    """What the optimizer updates: the parameter itself, or the flat shard that it lies in."""
    return parameter.flat if isinstance(parameter, FlatPart) else parameter


def local_boxes(tensor: Tensor | FlatPart) -> list[tuple[Tensor, list[int]]]:
    """The memory of a tensor on this rank, as boxes, and where each begins in the whole tensor; of some, none."""
    if not isinstance(tensor, FlatPart):
        return [local_part(tensor.detach())]
    boxes, taken = [], 0
    for offset, extent in boxes_of_range(tensor.begin, tensor.begin + tensor.count, tensor.shape):
        size = prod(extent)
        boxes.append((tensor.memory[taken : taken + size].view(extent), offset))
        taken += size
    return boxes


def boxes_of_range(begin: int, end: int, shape: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Offset and extent of the boxes that places [begin, end) of a tensor make, counted row by row, in this order."""
    if begin >= end:
        return
    if len(shape) <= 1:
        yield [begin] * len(shape), [end - begin] * len(shape)
        return
    row = prod(shape[1:])
    first, last = -(-begin // row), end // row  # the rows that are whole, if first < last

    def inside(number: int, begin: int, end: int) -> Iterator[tuple[list[int], list[int]]]:
        for offset, extent in boxes_of_range(begin - number * row, end - number * row, shape[1:]):
            yield [number, *offset], [1, *extent]

    if first > last:
        yield from inside(last, begin, end)
        return
    yield from inside(first - 1, begin, first * row)
    if first < last:
        yield [first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]]
    yield from inside(last, last * row, end)
