"""Pages by how surprising they are to a language model of their language: head, middle, tail (CCNet, section 3.3).

The perplexity below which 30 % of pages lie parts head from middle, 60 % middle from tail. The cut-offs belong to the
model: data_tools.train_ngrams writes them beside it, and cc_net's cutoff.csv holds for cc_net's own models. LLaMA's
paper does not say which buckets were kept; RedPajama kept head and middle. A page is dropped as
    perplexity_head, perplexity_middle, perplexity_tail  its bucket is not one of those to keep
    perplexity_all    there is no model, or no cut-off, for its language, and the bucket `all` is not to be kept
    perplexity_empty  it holds nothing a perplexity could be measured on

Unlike cc_net, which rounds the perplexity to one digit before it compares, the number itself is compared.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.documents import read_record
from data_tools.language_model import (
    NGRAM_SUFFIXES,
    PIECES_SUFFIX,
    RECORD_SUFFIX,
    Scorer,
    check_newlines,
    kenlm_module,
    page_scorer,
)
from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError, DataError

BUCKETS = ("head", "middle", "tail", "all")
COMES_AFTER = ("language",)  # which says whose model a page is measured by


@dataclass
class PerplexitySettings:
    models: str = "???"  # directory: LANGUAGE.sp.model beside LANGUAGE.arpa.gz, .arpa, .binary or .arpa.bin
    cutoffs: str | None = None  # null: LANGUAGE.ngrams.json beside the model | cc_net's cutoff.csv
    head_percentile: int = 30  # of perplexity: below is head (cc_net)
    tail_percentile: int = 60  # below is middle, the rest tail (cc_net)
    newlines: str = "line"  # as the model was made: line | glue (cc_net's models, and its cutoff.csv)
    keep: list[str] = field(default_factory=lambda: ["head", "middle"])  # of head, middle, tail, all (no model)


def check_settings(settings: PerplexitySettings) -> None:
    """Raises ConfigError."""
    check_newlines(settings.newlines)
    if not 0 <= settings.head_percentile <= settings.tail_percentile <= 100:
        raise ConfigError(
            f"head_percentile={settings.head_percentile}, tail_percentile={settings.tail_percentile}: "
            "must be percentiles, 0 to 100, the head's not above the tail's"
        )
    for bucket in settings.keep:
        if bucket not in BUCKETS:
            raise ConfigError(f"keep: there is no bucket {bucket!r}; choose of {', '.join(BUCKETS)}")
    if settings.cutoffs is not None and settings.newlines != "glue":
        raise ConfigError(f"cutoffs={settings.cutoffs}: cc_net's cut-offs are of glued lines: set newlines=glue")


@dataclass(frozen=True)
class LanguageModel:
    pieces: Path
    ngrams: Path
    cutoffs: tuple[float, float] | None  # head below the first, middle below the second


def find_models(settings: PerplexitySettings) -> dict[str, LanguageModel]:
    """The models of a directory by language. Raises ConfigError and DataError."""
    directory = Path(settings.models)
    if settings.models in ("", "???") or not directory.is_dir():
        raise ConfigError(
            f"models={settings.models}: no such directory; make one with python -m data_tools.train_ngrams"
        )
    table = _read_table(Path(settings.cutoffs), settings) if settings.cutoffs is not None else None
    models = {}
    for pieces in sorted(directory.glob(f"*{PIECES_SUFFIX}")):
        language = pieces.name.removesuffix(PIECES_SUFFIX)
        ngrams = [path for suffix in NGRAM_SUFFIXES if (path := directory / f"{language}{suffix}").exists()]
        if not ngrams:
            raise DataError(f"{pieces}: there is no {language}.arpa.gz beside it: its training was not finished")
        cutoffs = _recorded_cutoffs(directory / f"{language}{RECORD_SUFFIX}", settings) if table is None else None
        models[language] = LanguageModel(pieces, ngrams[0], cutoffs if table is None else table.get(language))
    if not models:
        raise DataError(f"models={settings.models}: no *{PIECES_SUFFIX} is there")
    return models


def _recorded_cutoffs(path: Path, settings: PerplexitySettings) -> tuple[float, float]:
    record = read_record(path)
    percentiles = record.get("percentiles")
    if not isinstance(percentiles, list) or len(percentiles) != 101:
        raise DataError(f"{path}: no percentiles are there; train the model again, or name a table with cutoffs=PATH")
    if record.get("newlines") != settings.newlines:
        raise ConfigError(
            f"newlines={settings.newlines}: {path.name} says that this model's cut-offs are of newlines="
            f"{record.get('newlines')}; set that"
        )
    return float(percentiles[settings.head_percentile]), float(percentiles[settings.tail_percentile])


def _read_table(path: Path, settings: PerplexitySettings) -> dict[str, tuple[float, float]]:
    """cc_net's table: a row a percentile, which its first column names, a column a language."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            languages, *rows = list(csv.reader(file))
            by_percentile = {int(row[0]): [float(value) for value in row[1:]] for row in rows if row}
        head, tail = by_percentile[settings.head_percentile], by_percentile[settings.tail_percentile]
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise DataError(
            f"cutoffs={path}: not a table as cc_net's, with a row for each percentile of head_percentile="
            f"{settings.head_percentile} and tail_percentile={settings.tail_percentile} ({error})"
        ) from None
    return dict(zip(languages[1:], zip(head, tail, strict=True), strict=True))


def perplexity_filter(settings: PerplexitySettings) -> Callable[[Record], Record | Dropped]:
    """Sets `scores["perplexity"]` and `provenance["bucket"]` by `record.language`.

    Raises ConfigError and DataError. A language's model is loaded with its first page, where it may raise DataError.
    """
    check_settings(settings)
    kenlm_module()
    models = find_models(settings)
    scorers: dict[str, Scorer] = {}
    kept = frozenset(settings.keep)

    def bucket_of(record: Record) -> str:
        model = models.get(record.language or "")
        if model is None:
            return "all"
        if (score := scorers.get(model.pieces.name)) is None:
            score = page_scorer(model.pieces, model.ngrams, newlines=settings.newlines)
            scorers[model.pieces.name] = score
        perplexity = score(record.text)
        if perplexity is None:
            return "empty"
        record.scores["perplexity"] = perplexity
        if model.cutoffs is None:
            return "all"
        return "head" if perplexity < model.cutoffs[0] else "middle" if perplexity < model.cutoffs[1] else "tail"

    def keep(record: Record) -> Record | Dropped:
        bucket = bucket_of(record)
        if bucket not in kept:
            return Dropped.of(record, f"perplexity_{bucket}")
        record.provenance["bucket"] = bucket
        return record

    return keep
