"""Safetensors files tensor by tensor: the header checked and read, or made before the first tensor is there.

Format: https://github.com/huggingface/safetensors#format: 8 bytes with the header's length, a JSON object of dtype,
shape and place of each tensor, then the tensors without gaps.
"""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamatrain.checkpoint.interchange.source import Region, memory_of, refuse_what_is_no_file
from llamatrain.checkpoint.store import LARGEST_HEADER
from llamatrain.errors import CheckpointError

CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALIGNMENT = 8


def read_header(path: Path) -> dict[str, Region]:
    """Where each tensor of a file lies. Raises CheckpointError for a header that is not to be trusted."""
    refuse_what_is_no_file(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(LARGEST_HEADER, size - 8):
                raise CheckpointError(f"{path}: cannot be read (a header of {length} bytes in a file of {size})")
            header = json.loads(file.read(length).decode(), object_pairs_hook=_without_repetition)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header cannot be read ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is no JSON object")
    header.pop("__metadata__", None)
    regions = {}
    for name, entry in header.items():
        regions[name] = _described(path, name, entry, 8 + length)
    reached = 8 + length
    for begin, end, name in sorted(
        (region.begin, region.begin + region.bytes, name) for name, region in regions.items()
    ):
        if begin != reached:
            raise CheckpointError(f"{path}: {name} begins at byte {begin}, what is before it ends at {reached}")
        reached = end
    if reached != size:
        raise CheckpointError(f"{path}: {size} bytes where its header describes {reached}; it is truncated or padded")
    return regions


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands there twice")
    return content


def _described(path: Path, name: str, entry: Any, start: int) -> Region:
    """A tensor's region by its entry in the header, whose tensors begin at byte `start`."""
    entry = entry if isinstance(entry, dict) else {}
    code, shape, places = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    lists = isinstance(shape, list) and isinstance(places, list) and len(places) == 2 and len(shape) <= 8
    if not lists or not all(type(n) is int and 0 <= n < 2**62 for n in (*shape, *places)):
        raise CheckpointError(f"{path}: the header does not describe {name} (dtype, shape, data_offsets)")
    if code not in CODES:
        raise CheckpointError(f"{path}: {name} is of dtype {code}; weights are of {', '.join(CODES)}")
    begin, end = places
    region = Region(path, start + begin, CODES[code], tuple(shape))
    if end - begin != region.bytes:
        raise CheckpointError(f"{path}: {name} is {code} {shape}, and has {end - begin} bytes")
    return region


def write(
    path: Path,
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write the tensors `described`, which come in that order, one at a time."""
    codes = {dtype: code for code, dtype in CODES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    reached = 0
    for name, (dtype, shape) in described.items():
        end = reached + prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), tensor in zip(described.items(), tensors, strict=True):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, described as {dtype} {shape}")
            file.write(memory_of(tensor.contiguous()))
