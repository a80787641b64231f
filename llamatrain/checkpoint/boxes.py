"""Whether a checkpoint's chunks, as its manifest lists them, are boxes of a tensor and leave nothing of it out."""

from collections.abc import Sequence
from math import prod
from typing import Any


def is_chunk(chunk: Any, shape: list[Any]) -> bool:
    """Whether this is `[rank, offset, shape]`, a box inside a tensor of `shape`, which is itself one."""
    if not (isinstance(chunk, list) and len(chunk) == 3):
        return False
    rank, offset, extent = chunk
    return (
        type(rank) is int
        and rank >= 0
        and isinstance(offset, list)
        and isinstance(extent, list)
        and len(offset) == len(extent) == len(shape)
        and all(
            type(o) is type(n) is type(s) is int and o >= 0 and n >= 0 and o + n <= s
            for o, n, s in zip(offset, extent, shape, strict=True)
        )
    )


def cover(shape: list[int], chunks: Sequence[Any]) -> bool:
    """Boxes inside the tensor that do not overlap and have its volume leave nothing out."""
    if not chunks:  # then nobody has looked at the shape
        return False
    return sum(prod(extent) for _, _, extent in chunks) == prod(shape) and not _overlap(chunks)


def _overlap(chunks: Sequence[Any]) -> bool:
    """Whether two boxes share a place; those that cannot meet along the first dimension are not compared."""
    boxes = sorted([(o, o + n) for o, n in zip(offset, extent, strict=True)] for _, offset, extent in chunks)
    if not boxes[0]:
        return len(boxes) > 1  # scalars
    open_boxes: list[list[tuple[int, int]]] = []
    for box in boxes:
        open_boxes = [other for other in open_boxes if other[0][1] > box[0][0]]
        if any(all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)) for other in open_boxes):
            return True
        open_boxes.append(box)
    return False
