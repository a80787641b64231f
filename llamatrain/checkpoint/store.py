"""Tensors into and out of checkpoint directories, by all ranks together.

A tensor is stored as chunks, boxes of its global shape. A rank writes the boxes it has in memory, into one file for
each group of tensors (`model`, `optimizer`, `rng`), so that who wants the weights reads nothing else. Chunk
`[rank, offset, shape]` of tensor `name` is the entry `name` of `{group}.rank{rank:05d}.safetensors`, a second one of
the same rank `name#1`, and so on; the manifest lists them all. So the reader need not know how many ranks wrote, nor
how the tensors were cut: it copies from every chunk what falls into its own boxes, after the ranks have proved
together that the chunks cover every tensor whole.
"""

import errno
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llamatrain.checkpoint import commit
from llamatrain.checkpoint.boxes import cover, is_chunk
from llamatrain.checkpoint.commit import Manifest
from llamatrain.distributed import World, is_a_copy
from llamatrain.errors import CheckpointError
from llamatrain.flat import FlatPart, local_boxes

TensorGroups = Mapping[str, Mapping[str, Tensor | FlatPart]]
Boxes = dict[str, dict[str, list[tuple[Tensor, list[int]]]]]  # group, name: memory and where it begins
Entries = dict[str, dict[str, tuple[str, list[int], list[tuple[list[int], list[int]]]]]]  # see _entries
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.uint8)}

LARGEST_HEADER = 16 << 20  # bytes; of an entry it has some 150, and a file an entry for each tensor or part of one


def file_name(group: str, rank: int) -> str:
    """The file in which `rank` has its chunks of `group`."""
    return f"{group}.rank{rank:05d}.safetensors"


def entry_name(name: str, number: int) -> str:
    """The key of a rank's chunk `number` of a tensor, in the order of the manifest, in the rank's file."""
    return f"{name}#{number}" if number else name


# ---------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Share:
    """What one rank writes of a checkpoint."""

    boxes: Boxes
    entries: Entries

    @staticmethod
    def of(groups: TensorGroups) -> "Share":
        """Of named tensors (float32, bfloat16 or uint8) what is this rank's to write; their memory, not a copy.

        Of a DTensor each rank writes its local box, and of copies only the first; a plain tensor is written whole by
        the rank that passes it, so one rank alone may. Raises ValueError for a DTensor that is not reduced.
        """
        boxes = {group: _own_boxes(tensors) for group, tensors in groups.items()}
        return Share(boxes, _entries(groups, boxes))

    @property
    def bytes(self) -> int:
        return sum(box.nbytes for own in self.boxes.values() for parts in own.values() for box, _ in parts)


def save(
    root: Path, step: int, groups: TensorGroups, content: Mapping[str, Any], *, world: World | None = None
) -> Path:
    """Write and commit the checkpoint of `step` under `root`: `write` of each rank's `Share.of(groups)`."""
    return write(root, step, Share.of(groups), content, world=world)


def write(root: Path, step: int, share: Share, content: Mapping[str, Any], *, world: World | None = None) -> Path:
    """Write and commit the checkpoint of `step` under `root`; all ranks call it with the same step.

    `content`, of rank 0, is what else the manifest shall hold, plain JSON values. Raises CheckpointError on all ranks
    if the disk does not take what one of them writes; what was there before stays.
    """
    world = world or World()
    temporary = commit.temporary_directory(root, step)
    refusing = partial(_refusing, temporary, step, world.rank, share.bytes)

    def begin() -> None:
        with refusing():
            commit.begin(root, step)

    def finish() -> Path:
        tensors = _merge(temporary, [entries for entries, _ in shares or ()])
        files = {name: entry for _, sealed in shares or () for name, entry in sealed.items()}
        with refusing():
            return commit.commit(temporary, {**content, "step": step, "tensors": tensors}, files)

    try:
        world.decide(begin)
        with world.together(), refusing():
            own_files = _write(temporary, share.boxes, world.rank)
        shares = world.gather_to_leader((share.entries, own_files))
        return world.decide(finish)
    except CheckpointError:
        world.decide(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise


@contextmanager
def _refusing(temporary: Path, step: int, rank: int, needed: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{temporary}: the checkpoint of step {step} could not be written (rank {rank}: {error}"
            f"{_what_is_missing(temporary, needed, error)}); earlier ones are whole"
        ) from error


def _what_is_missing(temporary: Path, needed: int, error: Exception) -> str:
    """How much room a rank's files need, and how much there was, if that is what failed; safetensors has no errno."""
    if not any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
        return ""
    written = 0
    for path in temporary.glob("*"):
        with suppress(FileNotFoundError):  # another rank's, that has just got its name
            written += path.stat().st_size
    free = shutil.disk_usage(next(path for path in temporary.parents if path.exists())).free
    return (
        f"; it writes {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free beside {written / 2**20:,.1f} written"
    )


def _own_boxes(tensors: Mapping[str, Tensor | FlatPart]) -> dict[str, list[tuple[Tensor, list[int]]]]:
    """What this rank writes of each tensor, if anything."""
    boxes = {}
    for name, tensor in tensors.items():
        try:
            if isinstance(tensor, Tensor) and is_a_copy(tensor):
                continue
        except ValueError as error:
            raise ValueError(f"{name} is {error}: it cannot be stored") from None
        own = [box for box in local_boxes(tensor) if box[0].numel() or not prod(tensor.shape)]
        if own:
            boxes[name] = own
    return boxes


def _write(directory: Path, boxes: Boxes, rank: int) -> dict[str, commit.FileEntry]:
    """Write this rank's files and seal them; none for a group of which it has nothing."""
    files = {}
    for group, own in boxes.items():
        if own:
            path = directory / file_name(group, rank)
            entries = ((entry_name(name, n), box) for name, parts in own.items() for n, (box, _) in enumerate(parts))
            save_file({key: box.cpu().contiguous() for key, box in entries}, path)
            files[path.name] = commit.seal(path)
    return files


def _entries(groups: TensorGroups, boxes: Boxes) -> Entries:
    """Of each tensor that this rank has boxes of: dtype, shape of the whole; offset and shape of each box."""
    return {
        group: {
            name: (
                _dtype_name(groups[group][name].dtype),
                list(groups[group][name].shape),
                [(offset, list(box.shape)) for box, offset in parts],
            )
            for name, parts in own.items()
        }
        for group, own in boxes.items()
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _merge(temporary: Path, shares: Sequence[Entries]) -> dict[str, dict[str, Any]]:
    """The manifest's description of all tensors, from what each rank has written, in the order of ranks.

    Raises CheckpointError if a part was written twice or by nobody: at the next start it would be too late.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for rank, entries in enumerate(shares):
        for group, own in entries.items():
            merged = tensors.setdefault(group, {})
            for name, (dtype, shape, parts) in own.items():
                entry = merged.setdefault(name, {"dtype": dtype, "shape": shape, "chunks": []})
                entry["chunks"] += [[rank, offset, extent] for offset, extent in parts]
    for merged in tensors.values():
        for name, entry in merged.items():
            written = sum(prod(extent) for _, _, extent in entry["chunks"])
            if written != prod(entry["shape"]):
                raise CheckpointError(
                    f"{temporary}: the ranks wrote {written} elements of {name}, whose shape is {entry['shape']}; "
                    "earlier checkpoints are whole"
                )
            _shorten(entry)
    return tensors


def _shorten(entry: dict[str, Any]) -> None:
    """Where rank r has the r-th so many rows, as sharding over all ranks gives it, say just how many."""
    (_, _, extent), *_ = entry["chunks"]
    if extent:
        by_rule = {"shape": entry["shape"], "rows": extent[0]}
        if extent[0] and entry["chunks"] == list(chunks_of(by_rule)):
            del entry["chunks"]
            entry["rows"] = extent[0]


def chunks_of(entry: Mapping[str, Any], first: int = 0, last: int | None = None) -> Iterator[list[Any]]:
    """`[rank, offset, shape]` of a tensor's chunks; of those by rule, only what meets rows [first, last)."""
    if "rows" not in entry:
        yield from entry["chunks"]
        return
    (height, *width), rows = entry["shape"], entry["rows"]
    for rank in range(first // rows, -(-(height if last is None else min(last, height)) // rows)):
        begin = rank * rows
        yield [rank, [begin, *[0] * len(width)], [min(rows, height - begin), *width]]


# ---------------------------------------------------------------------- reading


def open_checkpoint(
    checkpoint: Path, *, groups: Sequence[str] | None = None, hashes: bool = True, world: World | None = None
) -> Manifest:
    """Read the manifest and prove that the files of `groups` (None: all) are whole and the chunks cover the tensors.

    With a world all ranks call it, divide the work, and raise the same CheckpointError. The manifest returned has no
    other groups than those that were proved.
    """
    world = world or World()
    with world.together():
        manifest = commit.read_manifest(checkpoint)
        tensors, files = manifest.get("tensors"), manifest["files"]
        wanted = list(tensors if groups is None else groups) if isinstance(tensors, dict) else []
        if not isinstance(tensors, dict) or not all(isinstance(tensors.get(group), dict) for group in wanted):
            raise CheckpointError(f"{checkpoint}: the manifest does not list the tensors of {', '.join(wanted)}")
        manifest["tensors"] = {group: tensors[group] for group in wanted}
        prefixes = tuple(f"{group}." for group in wanted)
        for name in [name for name in files if name.startswith(prefixes)][world.rank :: world.size]:
            commit.verify_file(checkpoint, name, files[name], hashes=hashes)
        named = [(group, name, tensors[group][name]) for group in wanted for name in tensors[group]]
        for group, name, entry in named[world.rank :: world.size]:
            _check_entry(checkpoint, group, name, entry, files)
    for group in wanted:  # or memory would be taken for what the files cannot hold
        described = sum(prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize for entry in tensors[group].values())
        if described > sum(entry["size"] for name, entry in files.items() if name.startswith(f"{group}.")):
            raise CheckpointError(f"{checkpoint}: the tensors of {group} cannot be read: its files are smaller")
    return manifest


def _check_entry(checkpoint: Path, group: str, name: str, entry: Any, files: Mapping[str, Any]) -> None:
    """Refuse a tensor's description that is malformed or whose chunks leave something out."""
    if not (isinstance(entry, dict) and isinstance(entry.get("shape"), list) and isinstance(entry.get("dtype"), str)):
        raise CheckpointError(f"{checkpoint}: the manifest lacks shape or dtype of {name}")
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{checkpoint}: {name} is of dtype {entry['dtype']}, a checkpoint has {', '.join(DTYPES)}"
        )
    shape, chunks = entry["shape"], entry.get("chunks")
    if "rows" in entry:
        possible = chunks is None and bool(shape) and all(type(n) is int and n >= 1 for n in (entry["rows"], *shape))
        possible = possible and shape[0] <= entry["rows"] * len(files)  # a file a chunk: not more than can be listed
        chunks = list(chunks_of(entry)) if possible else None
    if not (isinstance(chunks, list) and all(is_chunk(chunk, shape) for chunk in chunks) and cover(shape, chunks)):
        raise CheckpointError(f"{checkpoint}: the chunks of {name} do not cover it whole")
    for rank in {rank for rank, _, _ in chunks}:
        if file_name(group, rank) not in files:
            raise CheckpointError(
                f"{checkpoint}: {name} lies in {file_name(group, rank)}, which the manifest does not list"
            )


class Reader:
    """Fills tensors from an opened checkpoint. It makes no collective calls: ranks may fill what they like."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self.checkpoint = checkpoint
        self._groups = manifest["tensors"]

    def names(self, group: str) -> set[str]:
        return set(self._groups.get(group, ()))

    def fill(
        self,
        group: str,
        targets: Mapping[str, Tensor | FlatPart],
        *,
        everywhere: Set[str] | None = None,
        partly: bool = False,
    ) -> None:
        """Fill every tensor of `targets` in place, and of a spread one the part that is here. Raises CheckpointError.

        Shapes (of spread tensors the global ones) and dtypes must be exactly those of the checkpoint, and so must the
        names, unless only a part of the group is wanted. `everywhere`: the names that all ranks together fill, where
        this one has not all.
        """
        entries, wanted = self._groups.get(group, {}), targets.keys() | (everywhere or set())
        missing = sorted(wanted - self.names(group))
        extra = [] if partly else sorted(self.names(group) - wanted)
        if missing or extra:
            raise CheckpointError(
                f"{self.checkpoint}: it is of another model: "
                + "; ".join(f"{what} {names[0]}" for what, names in (("lacks", missing), ("has", extra)) if names)
            )
        for name, target in targets.items():
            entry = entries[name]
            if list(target.shape) != entry["shape"] or target.dtype != DTYPES.get(entry["dtype"]):
                raise CheckpointError(
                    f"{self.checkpoint}: it is of another model: {name} is {entry['dtype']} {entry['shape']} there, "
                    f"{_dtype_name(target.dtype)} {list(target.shape)} here"
                )
        self._copy_chunks(group, targets)

    @torch.no_grad()
    def _copy_chunks(self, group: str, targets: Mapping[str, Tensor | FlatPart]) -> None:
        by_rank: dict[int, list[tuple[str, list[int], list[int], _Part]]] = {}
        for name, target in targets.items():
            parts = [part for part in (_Part(*box) for box in local_boxes(target)) if not part.empty]
            rows = (parts[0].begin[0], parts[-1].end[0]) if parts and parts[0].begin else ()
            found = Counter[int]()  # chunks by rank
            for rank, offset, extent in chunks_of(self._groups[group][name], *rows):
                key = entry_name(name, found[rank])
                found[rank] += 1
                for part in parts:
                    if part.meets(offset, extent):
                        by_rank.setdefault(rank, []).append((key, offset, extent, part))
        for rank, chunks in by_rank.items():
            path = self.checkpoint / file_name(group, rank)
            try:
                _check_header(path)
                with safe_open(path, framework="pt") as stored:
                    for key, offset, extent, part in chunks:
                        if not part.read(stored, key, offset, extent):
                            raise CheckpointError(f"{path}: {key} is not the chunk that the manifest describes")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error})") from None


def _check_header(path: Path) -> None:
    """Refuse a safetensors header larger than any of ours: 100 MB, which safetensors takes, parse for 10 s to 2 GB."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_HEADER:
        raise CheckpointError(f"{path}: cannot be read (a header of {size} bytes)")


class _Part:
    """A box of a target that is in this rank's memory."""

    def __init__(self, memory: Tensor, begin: list[int]) -> None:
        self.memory, self.begin = memory, begin
        self.end = [b + n for b, n in zip(begin, memory.shape, strict=True)]
        self.empty = memory.numel() == 0

    def meets(self, offset: list[int], extent: list[int]) -> bool:
        """Whether a chunk has anything for this box."""
        dimensions = zip(self.begin, self.end, offset, extent, strict=True)
        return all(o < e and b < o + n for b, e, o, n in dimensions)

    def read(self, stored: Any, name: str, offset: list[int], extent: list[int]) -> bool:
        """Copy what a chunk has for this box; False if the file holds something of another shape or dtype."""
        chunk = stored.get_slice(name)
        if chunk.get_shape() != extent:
            return False
        dimensions = zip(self.begin, self.end, offset, extent, strict=True)
        common = [(max(b, o), min(e, o + n)) for b, e, o, n in dimensions]
        if [high - low for low, high in common] == extent:
            values = stored.get_tensor(name)  # also the only way to a scalar
        else:
            values = chunk[tuple(slice(low - o, high - o) for (low, high), o in zip(common, offset, strict=True))]
        if values.dtype != self.memory.dtype:
            return False
        here = tuple(slice(low - b, high - b) for (low, high), b in zip(common, self.begin, strict=True))
        self.memory[here].copy_(values)
        return True
