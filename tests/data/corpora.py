"""Small corpora written for tests, and data sets read back."""

import json
from pathlib import Path
from typing import Any

from data_tools.documents import Corpus, Document, ReadOptions, find_inputs
from llamatrain.data.shards import open_document_starts, open_tokens, read_manifest
from llamatrain.tokenizer import Tokenizer


def documents_in(*inputs: Path | str, **options: Any) -> list[Document]:
    return list(Corpus(find_inputs([str(text) for text in inputs]), ReadOptions(**options)).documents())


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def texts_of(directory: Path, split: str) -> list[str]:
    manifest = read_manifest(directory)
    tokenizer = Tokenizer(directory / "tokenizer.model")
    texts = []
    for shard in manifest.shards(split):
        tokens, starts = open_tokens(manifest, shard), open_document_starts(manifest, shard).astype(int)
        ends = [*starts[1:], shard.tokens]
        texts += [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
    return texts


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
