"""The batches of one rank, read ahead by a background thread.

Rank r of a run takes rows [r·per, (r+1)·per) of each step's G samples, per = G / world size, and a micro-
batch is consecutive rows of them: which tokens a step trains on depends neither on the number of ranks nor
on how their share is cut. Two things make it fast. Locating a sample alone costs a hundred times what
locating it among thousands does, so a few thousand of this rank's coming samples are located at once; that
being a pure function (order.py), the block is no state. And a step's whole share is one tensor, filled
straight from the memory maps (numpy converts to int64 without holding Python's lock) and copied to the
device in one piece.

Each batch carries the data state that follows it, so a checkpoint knows nothing of what was read ahead.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from queue import SimpleQueue
from typing import NamedTuple, Self

import numpy as np
import torch

from llamatrain.data.order import DataState, SampleOrder
from llamatrain.data.shards import Manifest, ShardInfo, open_document_starts, open_tokens
from llamatrain.data.sources import Source
from llamatrain.errors import DataError
from llamatrain.model.loss import IGNORE_INDEX

LOCATED_AHEAD = 4_096  # samples of this rank located at once
LOCATED_AHEAD_ALONE = 512  # the same when a step is one sample of this rank


class MicroBatch(NamedTuple):
    inputs: torch.Tensor  # int64 [B, T]
    targets: torch.Tensor  # int64 [B, T], IGNORE_INDEX where there is none
    doc_lengths: list[int] | None  # of the pieces of documents in the B·T inputs, one after the other


@dataclass
class Batch:
    """One rank's share of an optimizer step: R = G / world size samples."""

    samples: np.ndarray  # global sample numbers, int64 [R]
    sources: np.ndarray  # position of each sample's source in the order's names, int64 [R]
    rows: torch.Tensor  # int64 [R, T+1], or [R, T+1+T] with the targets apart when documents are masked
    seq_len: int  # T
    micro_batch: int  # B
    document_lengths: list[list[int]] | None  # by micro-batch, as in MicroBatch
    valid_targets: int  # targets that are not IGNORE_INDEX, in this rank's share
    state_after: DataState
    data_wait_s: float = 0.0  # how long the consumer waited for it

    @property
    def tokens(self) -> torch.Tensor:
        """The windows, int64 [R, T+1]."""
        return self.rows[:, : self.seq_len + 1]

    @property
    def targets(self) -> torch.Tensor:
        """The token after each input, int64 [R, T]."""
        return self.rows[:, -self.seq_len :]

    def micro_batches(self) -> Iterator[MicroBatch]:
        inputs = self.tokens[:, :-1].split(self.micro_batch)
        targets = self.targets.split(self.micro_batch)
        yield from map(MicroBatch, inputs, targets, self.document_lengths or repeat(None))


def document_pieces(starts: np.ndarray, first: int, seq_len: int) -> tuple[list[int], list[int]]:
    """(lengths of the pieces of documents in inputs [first, first + seq_len), targets that begin a document).

    `starts` are a shard's document starts, in tokens, ascending. Target t is token first + 1 + t.
    """
    # in the dtype of starts: for another, searchsorted would convert all of them
    low, high = np.searchsorted(starts, np.array((first + 1, first + seq_len + 1), starts.dtype))
    begins = sorted({start - first for start in starts[low:high].tolist()})  # a set: documents may be empty
    inner = begins[:-1] if begins and begins[-1] == seq_len else begins
    lengths = [end - begin for begin, end in zip([0, *inner], [*inner, seq_len], strict=True)]
    return lengths, [begin - 1 for begin in begins]


class Loader:
    """Iterates over this rank's batches, step after step, without end; a context manager that ends its thread."""

    def __init__(
        self,
        sources: Sequence[Source],
        order: SampleOrder,
        state: DataState,
        *,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch_steps: int = 2,
        device: torch.device | str = "cpu",
        document_mask: bool = False,
    ) -> None:
        """Starts reading at once, from `state` on. `sources` are the order's, in its order."""
        self._per_rank, remainder = divmod(global_batch, world_size)
        if remainder or self._per_rank % micro_batch or not 0 <= rank < world_size:
            raise ValueError(f"{global_batch=} does not divide into {micro_batch=} on {rank=} of {world_size=}")
        if [source.name for source in sources] != list(order.names) or any(s.seq_len != seq_len for s in sources):
            raise ValueError("the sources are not the order's, or cut to another seq_len")
        self._sources = sources
        self._order = order
        self._state = state
        self._seq_len = seq_len
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._first_row = rank * self._per_rank
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())  # this thread's, for the other one
        self._document_mask = document_mask
        # memory maps by (source, shard), opened when first needed
        self._tokens: dict[tuple[int, int], np.ndarray] = {}
        self._starts: dict[tuple[int, int], np.ndarray] = {}
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._ready: SimpleQueue[Batch | BaseException] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()  # one entry for each batch that may be read ahead
        for _ in range(prefetch_steps):
            self._room.put(None)
        self._thread = threading.Thread(target=self._read_ahead, name="llamatrain-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next step's batch, on the device. Raises what went wrong in reading it."""
        if self._closed.is_set():
            raise ValueError("the loader is closed")
        begin = time.perf_counter()
        item = self._failure or self._ready.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        self._room.put(None)
        item.rows = item.rows.to(self._device, non_blocking=True)
        item.data_wait_s = time.perf_counter() - begin
        return item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; it finishes the step it is reading."""
        self._closed.set()
        self._room.put(None)  # wakes it
        self._thread.join()

    def _read_ahead(self) -> None:
        try:
            if self._device.type == "cuda":  # or every rank's pinning would open a context on device 0
                torch.cuda.set_device(self._device)
            batches = self._batches()
            while True:
                self._room.get()
                if self._closed.is_set():
                    return
                self._ready.put(next(batches))
        except BaseException as error:
            self._ready.put(error)

    def _batches(self) -> Iterator[Batch]:
        """Batches on the host, for ever."""
        per = self._per_rank
        ahead = LOCATED_AHEAD_ALONE if per == 1 else LOCATED_AHEAD
        steps = max(1, ahead // per)
        rows = self._first_row + np.arange(per)
        mine = np.arange(steps)[:, None] * self._global_batch + rows  # [steps, R]
        ends = np.arange(1, steps + 1) * self._global_batch
        while True:
            samples = self._state.sample_at(mine)
            where = self._order.locate(samples.ravel())
            places = list(zip(where.source.tolist(), where.shard.tolist(), strict=True))
            firsts = (where.window * self._seq_len).tolist()  # tokens
            following = self._state.sample_at(ends).tolist()
            for step in range(steps):
                part = slice(step * per, (step + 1) * per)
                after = replace(self._state, next_sample=following[step])
                yield self._assemble(samples[step], where.source[part], places[part], firsts[part], after)
            self._state = after

    def _assemble(
        self,
        samples: np.ndarray,
        sources: np.ndarray,
        places: list[tuple[int, int]],
        firsts: list[int],
        state_after: DataState,
    ) -> Batch:
        """Copy the windows, which begin at token `firsts` of the shards at `places`, into one tensor."""
        width = self._seq_len + 1
        columns = width + self._seq_len if self._document_mask else width
        pinned = self._device.type == "cuda"
        rows = torch.empty((len(samples), columns), dtype=torch.int64, pin_memory=pinned)
        host = rows.numpy()
        for row, (place, first) in enumerate(zip(places, firsts, strict=True)):
            if place not in self._tokens:
                self._tokens[place] = open_tokens(*self._shard(place))
            host[row, :width] = self._tokens[place][first : first + width]
        self._check_ids(host[:, :width], places, firsts)
        valid, lengths = host.shape[0] * self._seq_len, None
        if self._document_mask:
            host[:, width:] = host[:, 1:width]
            lengths, ignored = self._mask_documents(host[:, width:], places, firsts)
            valid -= ignored
        return Batch(samples, sources, rows, self._seq_len, self._micro_batch, lengths, valid, state_after)

    def _check_ids(self, tokens: np.ndarray, places: list[tuple[int, int]], firsts: list[int]) -> None:
        """Raises DataError for an id outside the vocabulary, which on CUDA would end the process without a word."""
        known = min(source.manifest.vocab_size for source in self._sources)
        if tokens.max() < known:
            return
        row, column = np.argwhere(tokens >= known)[0].tolist()
        manifest, shard = self._shard(places[row])
        raise DataError(
            f"{manifest.directory / shard.file}: token {firsts[row] + column} is id {tokens[row, column]}, there are "
            f"{known}; the file is damaged: copy it again, or tokenize the corpus again"
        )

    def _mask_documents(
        self, targets: np.ndarray, places: list[tuple[int, int]], firsts: list[int]
    ) -> tuple[list[list[int]], int]:
        """Ignore targets that begin a document; (lengths of the pieces by micro-batch, number ignored)."""
        lengths: list[list[int]] = [[] for _ in range(len(firsts) // self._micro_batch)]
        ignored: list[int] = []  # positions in the flattened targets
        for row, (place, first) in enumerate(zip(places, firsts, strict=True)):
            if place not in self._starts:
                self._starts[place] = open_document_starts(*self._shard(place))
            pieces, begins = document_pieces(self._starts[place], first, self._seq_len)
            if min(pieces) < 1:
                manifest, shard = self._shard(place)
                raise DataError(
                    f"{manifest.directory / shard.index_file}: starts of documents do not ascend; the file is damaged: "
                    "copy it again, or tokenize the corpus again"
                )
            lengths[row // self._micro_batch] += pieces
            ignored += [row * self._seq_len + begin for begin in begins]
        targets[np.divmod(np.array(ignored, np.int64), self._seq_len)] = IGNORE_INDEX
        return lengths, len(ignored)

    def _shard(self, place: tuple[int, int]) -> tuple[Manifest, ShardInfo]:
        source = self._sources[place[0]]
        return source.manifest, source.manifest.shards(source.split)[place[1]]
