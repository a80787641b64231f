"""Exact deduplication of any number of 64-bit hashes in a fixed amount of memory, as three stages over files.

1. *hash*: each unit of work writes the hashes of its items (lines, documents) as a file of sorted runs (HashWriter). A
   run holds every distinct hash once, whether it came more than once, and for each item in order which hash it has.
2. *mark*: a partition is a range of hash values. Being sorted, each run has a partition's hashes side by side, so
   they are read, sorted together, and for every distinct hash of every run one bit is written: its items stay or go
   (mark_partition). A partition too large for `memory_bytes` is done range by range; partitions only spread the work.
3. *apply*: a unit gathers its bits from the partitions and has a keep-mask over its items in their order (KeepMask).

That is a radix sort on disk whose last pass is a merge of sorted runs. Nothing is approximate but the hash: among n
distinct items n^2 / 2^65 pairs are expected to be taken for equal (1e9: 0.03; 1e11: 270). A value that is everywhere
("Home") counts once a run, so it cannot fill a partition.

Policies: `drop_all` drops every copy of what occurs twice or more (CCNet, arXiv:1911.00359 §3.1 as its code does it);
`keep_first` keeps the first in the order of the units.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_tools.progress import advance_share
from llamatrain.errors import DataError

U64 = np.dtype("<u8")
U32 = np.dtype("<u4")
U8 = np.dtype("u1")
POLICIES = ("drop_all", "keep_first")
BYTES_PER_ITEM = 64  # of memory at the peak of sorting, in both stages; tests/data/test_exact_dedup.py measures it
MAGIC_HASHES, MAGIC_MARKS = 0x6873_6168_6D6C_6C01, 0x6B72_616D_6D6C_6C01
SPAN = 1 << 64

Array = np.ndarray[Any, Any]


class Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


def items_in(memory_bytes: int) -> int:
    return max(1, memory_bytes // BYTES_PER_ITEM)


# ---------------------------------------------------------------------- hash


class HashWriter:
    """Writes hashes into `file` as sorted runs; `finish` writes the footer. The caller opens, syncs and renames.

    A run: distinct hashes u64, bits of those that came twice, for each item the index of its hash u32; each part is
    padded to 8 bytes. The footer: (items, distinct) u64 of each run, number of runs, magic.
    """

    def __init__(self, file: Writable, *, memory_bytes: int) -> None:
        self._file = file
        self._limit = min(items_in(memory_bytes), (1 << 32) - 1)
        self._buffer = np.empty(min(self._limit, 1 << 16), U64)
        self._filled = 0
        self._runs: list[tuple[int, int]] = []

    def add(self, hashes: Array) -> None:
        while len(hashes):
            taken = hashes[: self._limit - self._filled]
            end = self._filled + len(taken)
            if end > len(self._buffer):
                self._buffer = np.resize(self._buffer, min(self._limit, max(end, 2 * len(self._buffer))))
            self._buffer[self._filled : end] = taken
            self._filled, hashes = end, hashes[len(taken) :]
            if self._filled == self._limit:
                self._write_run()

    def finish(self) -> dict[str, int]:
        """How many items, distinct within their runs, and runs there are."""
        if self._filled:
            self._write_run()
        footer = np.array([*(number for run in self._runs for number in run), len(self._runs), MAGIC_HASHES], U64)
        self._file.write(footer.tobytes())
        items, distinct = (sum(run[part] for run in self._runs) for part in (0, 1))
        return {"items": items, "distinct_in_runs": distinct, "runs": len(self._runs)}

    def _write_run(self) -> None:
        hashes = self._buffer[: self._filled]
        order = np.argsort(hashes)
        in_order = hashes[order]
        starts = np.empty(len(hashes), bool)
        starts[0] = True
        np.not_equal(in_order[1:], in_order[:-1], out=starts[1:])
        distinct = in_order[starts]
        del in_order
        twice = np.diff(np.flatnonzero(starts), append=len(hashes)) > 1
        inverse = np.empty(len(hashes), U32)
        inverse[order] = np.cumsum(starts, dtype=U32) - U32.type(1)
        for part in (distinct, np.packbits(twice), inverse):
            self._file.write(part.tobytes())
            self._file.write(b"\0" * (-part.nbytes % 8))
        self._runs.append((len(hashes), len(distinct)))
        self._filled = 0


@dataclass(frozen=True)
class Run:
    """Where a run lies in its file."""

    items: int
    distinct: int
    offset: int

    @property
    def twice_offset(self) -> int:
        return self.offset + 8 * self.distinct

    @property
    def inverse_offset(self) -> int:
        return self.twice_offset + _padded(-(-self.distinct // 8))

    @property
    def end(self) -> int:
        return self.inverse_offset + _padded(4 * self.items)


def _padded(size: int) -> int:
    return size + -size % 8


class PieceFile:
    """A file that is read in pieces, and open only for that: there may be more files than a process may open."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor. Raises DataError."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def damaged(self) -> DataError:
        return DataError(f"{self.path}: is cut short or damaged; remove it, and the unit is made again")

    def piece(self, descriptor: int, offset: int, count: int, dtype: np.dtype[Any] = U64) -> Array:
        """`count` numbers. Raises DataError when the file ends before."""
        result = np.empty(count, dtype)
        view = memoryview(result.data).cast("B") if count else memoryview(b"")
        done = 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done:]], offset + done)
            if got == 0:
                raise self.damaged()
            done += got
        return result


class HashFile(PieceFile):
    """A file of HashWriter."""

    def __init__(self, path: Path) -> None:
        """Raises DataError when the file is not whole."""
        super().__init__(path)
        with self.opened() as descriptor:
            size = os.fstat(descriptor).st_size
            count, magic = self.piece(descriptor, size - 16, 2).tolist() if size >= 16 else (0, 0)
            if magic != MAGIC_HASHES or 16 * count + 16 > size:
                raise self.damaged()
            sizes = self.piece(descriptor, size - 16 - 16 * count, 2 * count).tolist()
        self.runs: list[Run] = []
        offset = 0
        for items, distinct in zip(sizes[::2], sizes[1::2], strict=True):
            self.runs.append(Run(items, distinct, offset))
            offset = self.runs[-1].end
        if offset != size - 16 - 16 * count:
            raise self.damaged()

    def position(self, run: Run, bound: int) -> int:
        """How many of the run's distinct hashes lie below `bound`: a search in the file, a few small reads."""
        if bound >= SPAN:
            return run.distinct
        low, high = 0, run.distinct
        with self.opened() as descriptor:
            while high - low > 512:
                middle = (low + high) // 2
                if int(self.piece(descriptor, run.offset + 8 * middle, 1)[0]) < bound:
                    low = middle + 1
                else:
                    high = middle
            left = self.piece(descriptor, run.offset + 8 * low, high - low)
        return low + int(np.searchsorted(left, np.uint64(bound)))

    def distinct(self, run: Run, start: int, end: int) -> Array:
        with self.opened() as descriptor:
            return self.piece(descriptor, run.offset + 8 * start, end - start)

    def twice(self, run: Run, start: int, end: int) -> Array:
        first = start // 8
        with self.opened() as descriptor:
            packed = self.piece(descriptor, run.twice_offset + first, -(-end // 8) - first, U8)
        return np.unpackbits(packed)[start - 8 * first : end - 8 * first].view(bool)

    def inverse(self, run: Run) -> Array:
        with self.opened() as descriptor:
            return self.piece(descriptor, run.inverse_offset, run.items, U32)


# ---------------------------------------------------------------------- mark


def bounds_of(partition: int, partitions: int) -> tuple[int, int]:
    """The hash values [low, high) of a partition."""
    return partition * SPAN // partitions, (partition + 1) * SPAN // partitions


def mark_partition(
    files: Sequence[HashFile], file: Writable, *, partition: int, partitions: int, policy: str, memory_bytes: int
) -> dict[str, int]:
    """Write the partition's bits for all runs of the files (in the order of the units); returns counts.

    The file is a sequence of ranges of hash values: for each, the bits of every run, padded to bytes. The footer: for
    each range its upper bound - 1 and, for each run, the offset of its bits; then the first run of each file; then the
    numbers of files, runs and ranges, and magic, all u64.
    """
    runs = [(source, run) for source in files for run in source.runs]
    low, high = bounds_of(partition, partitions)
    width = high - low
    starts = [source.position(run, low) for source, run in runs]
    footer: list[int] = []
    offset, counts = 0, {"distinct_in_runs": 0, "distinct": 0, "kept_in_runs": 0, "ranges": 0}
    todo = [high]
    while todo:
        upper = todo[-1]
        ends = [source.position(run, upper) for source, run in runs]
        count = sum(ends) - sum(starts)
        if count > items_in(memory_bytes) and upper - low > 1:
            todo.append((low + upper) // 2)
            continue
        keep, distinct = _marks(runs, starts, ends, policy)
        offsets, at = [], 0
        for start, end in zip(starts, ends, strict=True):
            bits = np.packbits(keep[at : at + end - start]).tobytes()
            file.write(bits)
            offsets.append(offset)
            offset, at = offset + len(bits), at + end - start
        footer += [upper - 1, *offsets]
        counts["distinct_in_runs"] += count
        counts["distinct"] += distinct
        counts["kept_in_runs"] += int(np.count_nonzero(keep))
        counts["ranges"] += 1
        advance_share((upper - low) / width)
        low, starts = upper, ends
        todo.pop()
    file.write(b"\0" * (-offset % 8))
    first_runs = accumulate((len(source.runs) for source in files[:-1]), initial=0)
    footer += [*first_runs, len(files), len(runs), counts["ranges"], MAGIC_MARKS]
    file.write(np.array(footer, U64).tobytes())
    return counts


def _marks(runs: Sequence[tuple[HashFile, Run]], starts: list[int], ends: list[int], policy: str) -> tuple[Array, int]:
    """For the hashes [start, end) of all runs, one after the other: whether each stays; and how many are distinct."""
    parts = list(zip(runs, starts, ends, strict=True))
    hashes = np.empty(sum(ends) - sum(starts), U64)
    at = 0
    for (source, run), start, end in parts:
        hashes[at : at + end - start] = source.distinct(run, start, end)
        at += end - start
    if not len(hashes):
        return np.empty(0, bool), 0
    order = np.argsort(hashes, kind="stable")  # of equal hashes that of the earliest run comes first
    in_order = hashes[order]
    first = np.empty(len(hashes), bool)
    first[0] = True
    np.not_equal(in_order[1:], in_order[:-1], out=first[1:])
    del hashes, in_order
    distinct = int(np.count_nonzero(first))
    keep = np.empty(len(first), bool)
    if policy == "keep_first":
        keep[order] = first
        return keep, distinct
    alone = first.copy()
    alone[:-1] &= first[1:]  # nothing equal follows
    keep[order] = alone
    del order
    at = 0
    for (source, run), start, end in parts:
        keep[at : at + end - start] &= ~source.twice(run, start, end)
        at += end - start
    return keep, distinct


class MarkFile(PieceFile):
    """A file of mark_partition."""

    def __init__(self, path: Path) -> None:
        """Raises DataError when the file is not whole."""
        super().__init__(path)
        with self.opened() as descriptor:
            size = os.fstat(descriptor).st_size
            last = self.piece(descriptor, size - 32, 4).tolist() if size >= 32 else [0] * 4
        files, runs, ranges, magic = map(int, last)
        self._runs, self._ranges = runs, ranges
        self._first_runs = size - 32 - 8 * files  # where these numbers begin
        self._table = self._first_runs - 8 * self._ranges * (self._runs + 1)
        if magic != MAGIC_MARKS or self._table < 0:
            raise self.damaged()

    def first_run(self, file: int) -> int:
        with self.opened() as descriptor:
            return int(self.piece(descriptor, self._first_runs + 8 * file, 1)[0])

    def bits(self, number: int, source: HashFile, run: Run, low: int) -> Iterator[Array]:
        """The bits of the run that is the `number`-th of all, from the hash `low` on, range by range."""
        start = source.position(run, low)
        with self.opened() as descriptor:
            for index in range(self._ranges):
                row = self._table + 8 * index * (self._runs + 1)
                end = source.position(run, int(self.piece(descriptor, row, 1)[0]) + 1)
                offset = int(self.piece(descriptor, row + 8 * (1 + number), 1)[0])
                packed = self.piece(descriptor, offset, -(-(end - start) // 8), U8)
                yield np.unpackbits(packed)[: end - start].view(bool)
                start = end


# ---------------------------------------------------------------------- apply


class KeepMask:
    """Whether each item of a unit stays, in the order of the items."""

    def __init__(self, source: HashFile, *, marks: Sequence[Path], number: int, policy: str) -> None:
        """`marks`: the files of all partitions, in order; `number`: which of the files marked `source` is."""
        self._pieces = self._masks(source, marks, number, policy)
        self._rest = np.empty(0, bool)

    def take(self, count: int) -> Array:
        """The next items' bits. Raises DataError when there are not so many."""
        if count <= len(self._rest):
            taken, self._rest = self._rest[:count], self._rest[count:]
            return taken
        parts = [self._rest]
        missing = count - len(self._rest)
        while missing > 0:
            piece = next(self._pieces, None)
            if piece is None:
                raise DataError("the hashes are of fewer items than the documents hold; make the hash stage again")
            parts.append(piece[:missing])
            self._rest = piece[missing:]
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def finish(self) -> None:
        """Raises DataError when items are left over."""
        if len(self._rest) or next(self._pieces, None) is not None:
            raise DataError("the hashes are of more items than the documents hold; make the hash stage again")

    @staticmethod
    def _masks(source: HashFile, marks: Sequence[Path], number: int, policy: str) -> Iterator[Array]:
        files = [MarkFile(path) for path in marks]
        for index, run in enumerate(source.runs, start=files[0].first_run(number)):
            bits: list[Array] = []
            for partition, file in enumerate(files):
                bits += file.bits(index, source, run, bounds_of(partition, len(marks))[0])
            inverse = source.inverse(run)
            keep = np.concatenate(bits)[inverse]
            if policy == "keep_first":
                earliest = np.empty(run.distinct, U32)
                earliest[inverse[::-1]] = np.arange(run.items, dtype=U32)[::-1]
                first = np.zeros(run.items, bool)
                first[earliest] = True
                keep &= first
            yield keep
