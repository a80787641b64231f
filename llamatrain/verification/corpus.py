"""A data set of random words, so that layouts can be verified where there is no data yet."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from llamatrain.data.shards import Manifest, ShardWriter, token_dtype, write_manifest
from llamatrain.tokenizer import TOKENIZER_FILE, Tokenizer

DOCUMENTS = 400
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_corpus(directory: Path, *, vocab_size: int) -> None:
    """Tokenizer and shard of a few hundred documents of very different lengths; the same at every call."""
    directory.mkdir(parents=True)
    texts = list(_texts())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    (directory / TOKENIZER_FILE).write_bytes(model.getvalue())
    tokenizer = Tokenizer(directory / TOKENIZER_FILE)
    writer = ShardWriter(directory, "train-00000", token_dtype(tokenizer.vocab_size))
    for text in texts:
        writer.add(tokenizer.encode(text, bos=True, eos=True), text_bytes=len(text))
    write_manifest(
        Manifest(
            directory=directory,
            source="synthetic",
            dtype=token_dtype(tokenizer.vocab_size),
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            add_bos=True,
            add_eos=True,
            splits={"train": (writer.commit(),), "validation": ()},
        )
    )


def _texts() -> Iterator[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(200)]
    for _ in range(DOCUMENTS):
        yield " ".join(rng.choices(words, k=rng.choice((2, 5, 12, 40, 90))))
