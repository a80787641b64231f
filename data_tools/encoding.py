"""From a stream of documents to a stream of token sequences in the same order, by one process or several."""

import hashlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from data_tools.cached_encoding import CachedEncoder
from data_tools.documents import Document
from llamatrain.errors import DataError
from llamatrain.tokenizer import SPACE_MARK, Tokenizer

HOLDOUT_KEYS = ("text", "id", "group")
SPACE_MARK_CHOICES = ("keep", "drop")
BATCH_CHARACTERS = 1 << 20  # of text, that a worker gets at a time
PENDING_PER_WORKER = 2  # batches under way; bounds the memory


@dataclass(frozen=True)
class EncodeOptions:
    tokenizer: str
    dtype: str
    add_bos: bool
    add_eos: bool
    validation_fraction: float
    holdout_by: str
    holdout_salt: str
    drop_space_mark: bool


@dataclass(frozen=True)
class Encoded:
    """What became of one document."""

    dropped: str | None  # dropped_empty | dropped_invalid | dropped_space_mark; None: kept
    tokens: bytes = b""  # little-endian, in the dtype of the shard
    text_bytes: int = 0
    byte_tokens: int = 0  # of the tokens, those that are a single byte (<0x0A>)
    newline_tokens: int = 0  # of the byte tokens, the line feeds: LLaMA's vocabulary has no piece of them
    held_out: bool = False
    has_space_mark: bool = False


def is_held_out(key: str, *, salt: str, fraction: float) -> bool:
    """Whether the documents of this key belong to validation.

    They do if the 64-bit BLAKE2b of salt, zero byte and key, as a big-endian number, is below fraction *
    2^64. It depends on nothing else, so equal keys fall on the same side in every corpus and run.
    """
    digest = hashlib.blake2b(salt.encode() + b"\0" + key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < int(fraction * 2**64)


def encode_document(document: Document, encoder: CachedEncoder, options: EncodeOptions) -> Encoded:
    """Raises DataError when the document has no key to hold it out by."""
    if not document.valid:
        return Encoded("dropped_invalid")
    if not document.text:
        return Encoded("dropped_empty")
    has_space_mark = SPACE_MARK in document.text
    if has_space_mark and options.drop_space_mark:
        return Encoded("dropped_space_mark", has_space_mark=True)
    key = {"text": document.text, "id": document.id, "group": document.group}[options.holdout_by]
    if key is None:
        raise DataError(f"document {document.id}: no group to hold it out by; set group_field=NAME or holdout_by=text")
    tokens = encoder.encode(document.text, bos=options.add_bos, eos=options.add_eos)
    byte_tokens, newline_tokens = encoder.count_bytes(tokens)
    return Encoded(
        dropped=None,
        tokens=tokens,
        text_bytes=len(document.text.encode("utf-8")),
        byte_tokens=byte_tokens,
        newline_tokens=newline_tokens,
        held_out=is_held_out(key, salt=options.holdout_salt, fraction=options.validation_fraction),
        has_space_mark=has_space_mark,
    )


def encode_stream(documents: Iterable[Document], options: EncodeOptions, *, workers: int) -> Iterator[Encoded]:
    """One Encoded for each document, in order; with more than one worker, encoded in other processes."""
    if workers == 1:
        encoder = CachedEncoder(Tokenizer(options.tokenizer), options.dtype)
        for document in documents:
            yield encode_document(document, encoder, options)
        return
    # spawn: a forked child would inherit the locks of the progress bar's thread
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(options,))
    try:
        pending: deque[Future[list[Encoded]]] = deque()
        for batch in _batches(documents):
            pending.append(pool.submit(_encode_batch, batch))
            if len(pending) >= PENDING_PER_WORKER * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "an encoding process died, of memory perhaps; start again to go on, with fewer workers=N"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Worker:
    """The state of an encoding process."""

    encoder: CachedEncoder
    options: EncodeOptions


def _start_worker(options: EncodeOptions) -> None:
    _Worker.encoder = CachedEncoder(Tokenizer(options.tokenizer), options.dtype)
    _Worker.options = options
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # A worker whose parent was killed would wait for its next batch for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_batch(documents: list[Document]) -> list[Encoded]:
    return [encode_document(document, _Worker.encoder, _Worker.options) for document in documents]
