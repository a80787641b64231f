"""How well the model predicts documents: perplexity per token and bits per byte of text, by source and over all.

Sources are the files of a directory (.jsonl with a field `text`, or .txt, each a document; also .gz and .zst), or data
sets of token shards, whose documents are decoded with their own tokenizer: bits per byte compare models of different
tokenizers, perplexities do not. Every token of a document is scored once, the first one after BOS.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from llamatrain.data.shards import MANIFEST_FILE, check_sizes, open_document_starts, open_tokens, read_manifest
from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation.question_files import file_content, read_questions
from llamatrain.evaluation.results import Metric, TaskResult
from llamatrain.evaluation.scoring import Scorer
from llamatrain.evaluation.statistics import ratio
from llamatrain.evaluation.task import Conditions, Kind
from llamatrain.tokenizer import TOKENIZER_FILE, Tokenizer

TABLES = (".jsonl", ".json", ".parquet")


@dataclass
class Settings:
    text: str = "text"  # path of the field
    split: str = "validation"  # of token shards


def check(settings: Settings) -> None:
    """Raises ConfigError."""
    if not settings.text:
        raise ConfigError("text: name the field that holds a document's text")


def score(settings: Settings, files: dict[str, Path], scorer: Scorer, conditions: Conditions) -> TaskResult:
    """Metrics `perplexity` and `bits_per_byte`, and `perplexity.<source>`, `bits_per_byte.<source>`."""
    documents = {
        name: list(islice(_documents(settings, path), conditions.max_questions))
        for name, path in sources(files["documents"]).items()
    }
    texts = [text for found in documents.values() for text in found]
    if not texts:
        raise DataError(f"{files['documents']}: there is no document in it")
    scores = scorer.document_likelihoods(texts, description="documents")
    rows = [(-s.log_probability, float(s.tokens), float(len(t.encode()))) for s, t in zip(scores, texts, strict=True)]
    metrics = _metrics("", rows)
    items = []
    first = 0
    for name, found in documents.items():
        own = rows[first : first + len(found)]
        first += len(found)
        metrics |= _metrics(f".{name}", own)
        for number, (nats, tokens, size) in enumerate(own, start=1):
            item = {"question": f"{name}, document {number}", "source": name, "nats": nats}
            items.append({**item, "tokens": int(tokens), "bytes": int(size)})
    return TaskResult(metrics, items)


def _metrics(suffix: str, rows: list[tuple[float, float, float]]) -> dict[str, Metric]:
    nats, tokens, sizes = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
    per_token = ratio(nats, tokens)
    low, high = [None if end is None else math.exp(end) for end in (per_token.low, per_token.high)]
    return {
        f"perplexity{suffix}": Metric(math.exp(per_token.value), low, high, per_token.questions),
        f"bits_per_byte{suffix}": ratio(nats, sizes, scale=1 / math.log(2)),
    }


def sources(path: Path) -> dict[str, Path]:
    """The sources at a path, by name. Raises DataError."""
    if not path.is_dir() or (path / MANIFEST_FILE).exists():
        return {_stem(path): path}
    found = sorted(
        entry
        for entry in path.iterdir()
        if entry.name[0] != "." and (entry.is_file() or (entry / MANIFEST_FILE).exists())
    )
    if not found:
        raise DataError(f"{path}: there is no source in it")
    by_name: dict[str, Path] = {}
    for entry in found:
        other = by_name.setdefault(_stem(entry), entry)
        if other is not entry:
            raise DataError(f"{path}: {other.name} and {entry.name} are both called {_stem(entry)}: rename one")
    return by_name


def _stem(path: Path) -> str:
    if path.is_dir():
        return path.absolute().name  # of a link its own
    name = path.name.removesuffix(".zst").removesuffix(".gz")
    return Path(name).stem


def _documents(settings: Settings, path: Path) -> Iterator[str]:
    if path.is_dir():
        yield from _decoded(path, settings.split)
    elif Path(path.name.removesuffix(".zst").removesuffix(".gz")).suffix in TABLES:
        for record in read_questions(path):
            if text := record.text(settings.text):
                yield text
    else:
        try:
            text = file_content(path).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"{path}: no UTF-8") from None
        if text:
            yield text


def _decoded(directory: Path, split: str) -> Iterator[str]:
    """The documents of a split of token shards."""
    manifest = read_manifest(directory)
    if not manifest.tokens(split):
        filled = [name for name in manifest.splits if manifest.tokens(name)]
        raise DataError(
            f"{directory}: its split {split} has no tokens, or there is none; those with tokens are "
            f"{', '.join(filled) or 'none'}; task_settings.perplexity.split=NAME takes another"
        )
    check_sizes(manifest, [split])
    tokenizer = Tokenizer(directory / TOKENIZER_FILE)
    for shard in manifest.shards(split):
        tokens, starts = open_tokens(manifest, shard), open_document_starts(manifest, shard)
        for first, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if text := tokenizer.decode(tokens[int(first) : int(end)].tolist()):
                yield text


KIND = Kind(Settings, score, check)
