"""Loss on held-out documents: token-exact, per source and over all, with bits per byte and a baseline.

Every token of a source's validation split (or of its first `evaluation.max_tokens`) is a target exactly once: the
split is cut into windows of seq_len as in training, and the last window of each shard is filled up with ignored
targets. The baseline is the entropy of the targets' own unigram distribution: what a model that knows only how
often each token occurs would reach.

Ranks take batches in turn, and the tallies are added up at the end. A rank without a batch in the last round makes a
forward of ignored targets, as sharded weights are gathered by all.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llamatrain.config import RunConfig
from llamatrain.config.parallel import Layout
from llamatrain.data.loader import IGNORE_INDEX, document_pieces
from llamatrain.data.shards import Manifest, ShardInfo, check_sizes, open_document_starts, open_tokens
from llamatrain.data.sources import Source
from llamatrain.distributed import World
from llamatrain.errors import DataError
from llamatrain.model.llama import Llama
from llamatrain.observe.records import Record
from llamatrain.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SPLIT = "validation"
Forward = Callable[..., Tensor]  # the sum of losses of (inputs, targets=, doc_lengths=), as Llama gives it


@dataclass
class Tally:
    """Sums over targets; adding two gives the tally of both."""

    loss: float = 0.0  # nats
    targets: int = 0
    text_bytes: int = 0
    occurrences: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of each token id

    def __add__(self, other: "Tally") -> "Tally":
        width = max(len(self.occurrences), len(other.occurrences))
        padded = [np.pad(t.occurrences, (0, width - len(t.occurrences))) for t in (self, other)]
        return Tally(
            self.loss + other.loss,
            self.targets + other.targets,
            self.text_bytes + other.text_bytes,
            padded[0] + padded[1],
        )

    def metrics(self, task: str) -> Record:
        """The record's fields `eval/<task>/…`: loss and unigram entropy in nats per token, bits per byte of text."""
        return {
            f"eval/{task}/loss": self.loss / self.targets,
            f"eval/{task}/bits_per_byte": self.loss / math.log(2) / max(1, self.text_bytes),
            f"eval/{task}/unigram_entropy": unigram_entropy(self.occurrences),
            f"eval/{task}/tokens": self.targets,
        }


def unigram_entropy(occurrences: np.ndarray) -> float:
    """Entropy -sum p ln p of the distribution with these counts; nats."""
    p = occurrences[occurrences > 0] / occurrences.sum()
    return float(-(p * np.log(p)).sum())


class Window(NamedTuple):
    """A sample of a validation split."""

    inputs: np.ndarray  # int64 [T]
    targets: np.ndarray  # int64 [T], IGNORE_INDEX where there is none
    document_lengths: list[int]  # of the pieces of documents in the inputs
    text_bytes: int  # of text that the targets stand for, the masked ones too


class Place(NamedTuple):
    """Where a window lies."""

    shard: ShardInfo
    first: int  # token of the shard
    targets: int  # fewer than seq_len at a shard's end and at the last of the tokens asked for


def places(manifest: Manifest, *, seq_len: int, max_tokens: int | None) -> Iterator[Place]:
    """The windows of a validation split in order, up to its first `max_tokens` targets; nothing is read."""
    remaining = math.inf if max_tokens is None else max_tokens
    for shard in manifest.shards(SPLIT):
        for first in range(0, shard.tokens - 1, seq_len):
            if remaining <= 0:
                return
            targets = int(min(seq_len, shard.tokens - 1 - first, remaining))
            remaining -= targets
            yield Place(shard, first, targets)


def windows(
    manifest: Manifest, found: Iterable[Place], *, seq_len: int, document_mask: bool, bytes_per_token: np.ndarray
) -> Iterator[Window]:
    """The windows at some places. With `document_mask` the first token of a document is no target."""
    for shard, first, given in found:
        piece = open_tokens(manifest, shard)[first : first + given + 1].astype(np.int64)
        inputs, targets = np.zeros(seq_len, np.int64), np.full(seq_len, IGNORE_INDEX, np.int64)
        inputs[:given] = piece[:given]
        targets[:given] = piece[1:]
        text_bytes, lengths = int(bytes_per_token[piece[1:]].sum()), [seq_len]
        if document_mask:
            lengths, begins = document_pieces(open_document_starts(manifest, shard), first, seq_len)
            targets[begins] = IGNORE_INDEX
        yield Window(inputs, targets, lengths, text_bytes)


class Validation:
    """The validation splits of a run's sources. Raises DataError if validation is asked for and there is none."""

    def __init__(
        self,
        config: RunConfig,
        sources: list[Source],
        tokenizer: Tokenizer,
        device: torch.device,
        world: World,
        layout: Layout,
    ) -> None:
        self._settings = config.evaluation
        self._seq_len = config.data.seq_len
        self._document_mask = config.data.document_mask
        self._bytes_per_token = tokenizer.bytes_per_token
        self._device = device
        self._world = world
        self._ranks, self._share = layout.data_parallel, layout.share(world.rank)
        self._manifests = {source.name: source.manifest for source in sources if source.manifest.tokens(SPLIT) > 1}
        if not self._settings.every_steps:
            return
        for source in sources:
            if source.name not in self._manifests:
                log.warning("data.sources.%s holds out no documents: it is not validated", source.name)
            check_sizes(source.manifest, [SPLIT])
        if not self._manifests:
            raise DataError(
                "evaluation.every_steps is set and no source has a validation split: tokenize with "
                "validation_fraction above 0, or set evaluation.every_steps=0"
            )

    def evaluate(
        self, model: Llama, forward: Forward | None = None, *, keep_going: Callable[[], bool] = lambda: True
    ) -> Record | None:
        """`eval/validation.<source>/…` of every source, and `eval/validation/…` over all their targets.

        Every rank calls it, and has the same record. `forward` is called in the model's place, where that is one stage
        of several. None if `keep_going`, asked before every round of batches, says no; it must say the same on all
        ranks.
        """
        record: Record = {}
        pooled = Tally()
        model.eval()
        for name, manifest in self._manifests.items():
            tally = self._tally(forward or model, name, manifest, keep_going)
            if tally is None:
                break
            record.update(tally.metrics(f"validation.{name}"))
            pooled += tally
        else:
            record.update(pooled.metrics("validation"))
        model.train()
        return record if "eval/validation/loss" in record else None

    @torch.no_grad()
    def _tally(self, forward: Forward, name: str, manifest: Manifest, keep_going: Callable[[], bool]) -> Tally | None:
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        occurrences, text_bytes = np.zeros(len(self._bytes_per_token), np.int64), 0
        coming = places(manifest, seq_len=self._seq_len, max_tokens=self._settings.max_tokens)
        total = min(manifest.tokens(SPLIT) - 1, self._settings.max_tokens or manifest.tokens(SPLIT))
        share = self._settings.micro_batch
        first = self._share.data_rank * share
        with tqdm(total=total, desc=f"validating {name}", unit="tok", leave=False, disable=None) as bar:
            while found := list(islice(coming, share * self._ranks)):
                if not keep_going():
                    return None
                batch = list(
                    windows(
                        manifest,
                        found[first : first + share],
                        seq_len=self._seq_len,
                        document_mask=self._document_mask,
                        bytes_per_token=self._bytes_per_token,
                    )
                )
                loss += self._loss(forward, batch or [_nothing(self._seq_len)])
                for window in batch:
                    valid = window.targets[window.targets != IGNORE_INDEX]
                    occurrences += np.bincount(valid, minlength=len(occurrences))
                    text_bytes += window.text_bytes
                bar.update(sum(place.targets for place in found))
        counted = np.append(occurrences, text_bytes) * self._share.counts_targets
        counts = self._world.sum(torch.from_numpy(counted).to(self._device)).tolist()
        occurrences = np.array(counts[:-1], np.int64)
        loss = self._world.sum(loss * self._share.has_loss)
        return Tally(loss.item(), int(occurrences.sum()), counts[-1], occurrences)

    def _loss(self, forward: Forward, batch: list[Window]) -> Tensor:
        """Sum of the token losses of some windows."""
        inputs = torch.from_numpy(np.stack([window.inputs for window in batch])).to(self._device)
        targets = torch.from_numpy(np.stack([window.targets for window in batch])).to(self._device)
        lengths = [n for window in batch for n in window.document_lengths]
        return forward(inputs, targets=targets, doc_lengths=lengths if self._document_mask else None)


def _nothing(seq_len: int) -> Window:
    """A window without a target."""
    return Window(np.zeros(seq_len, np.int64), np.full(seq_len, IGNORE_INDEX, np.int64), [seq_len], 0)
