"""Train the classifier of data_tools.filters.quality: pages that Wikipedia refers to against random pages.

    python -m data_tools.train_quality positives=REFERENCED negatives=RANDOM output=quality.bin

`positives` are pages whose addresses data_tools.reference_urls finds in a dump, crawled and put through the same
stages as `negatives`, pages of the crawl at random. fastText learns a linear model over words, with RedPajama's
settings, which are fastText's own (the paper names none).

What RedPajama's code got wrong is done as meant here: a text counts once among the positives (its duplicates were
kept), the least length holds for both classes (for one alone, the classifier learns length), and a page that is
among the positives is no negative. Both classes are of one size, sampled uniformly, and a part is held out, on which
the accuracy is measured.

fastText 0.9.2 fills a tenth of its matrix for every thread, eleven at most, and leaves the rest as the memory was:
with few threads it may meet NaN and give up, and two runs give two models. Here that memory is zero. If NaN is met all
the same, which a high rate can do too, training is tried again at half the rate.
"""

import ctypes
import hashlib
import os
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.documents import (
    Corpus,
    InputFile,
    ReadOptions,
    byte_bar,
    check_read_options,
    find_inputs,
    input_list,
    inputs_identity,
    read_record,
)
from data_tools.fasttext_model import LABEL, fasttext_module, one_line
from data_tools.filters.quality import NEGATIVE, POSITIVE, QualitySettings, quality_score
from llamatrain.cli import run_command
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import sha256_of_file, write_json_atomically

PAPER_THRESHOLD, REDPAJAMA_THRESHOLD = 0.5, 0.25
ATTEMPTS = 5
M_PERTURB = -6  # of glibc's mallopt
FEWEST = 10  # documents of a class, to train on and to measure on


@dataclass
class TrainQualitySettings:
    positives: Any = "???"  # pages Wikipedia refers to: a file, directory or glob pattern, or a list of them
    negatives: Any = "???"  # pages at random
    output: str = "???"  # the model's file; OUTPUT.json tells how it was made
    min_characters: int = 1000  # of a document of either class (RedPajama, of positives)
    max_documents: int = 300_000  # of each class (RedPajama's number of crawled references)
    held_out_fraction: float = 0.1  # of the documents, to measure the accuracy on
    dim: int = 100  # this and the next three: fastText's defaults, RedPajama's settings
    lr: float = 0.1
    epochs: int = 5
    word_ngrams: int = 1
    threads: int = 1  # with more, two runs give two models
    seed: int = 0  # of the samples and of fastText
    format: str = "auto"  # auto (by suffix) | text | jsonl
    text_field: str = "text"  # JSON lines: the field with the text
    document_separator: str | None = None  # text files: splits them into documents; null: a file is one
    overwrite: bool = False  # replace a model of other settings


def check_settings(settings: TrainQualitySettings) -> None:
    """Raises ConfigError."""
    if settings.output in ("", "???"):
        raise ConfigError("output is not set: output=FILE")
    for name in ("max_documents", "dim", "epochs", "word_ngrams", "threads"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be at least 1")
    if not 0 < settings.held_out_fraction <= 0.5:
        raise ConfigError(f"held_out_fraction={settings.held_out_fraction}: must be above 0, and 0.5 at most")
    if settings.lr <= 0:
        raise ConfigError(f"lr={settings.lr}: must be above 0")


@dataclass
class Chosen:
    """The documents of a class that may be used, by digest; sorted, so the first of them are a uniform sample."""

    digests: NDArray[np.uint64]  # [N]
    counts: dict[str, int]


def _choose(corpus: Corpus, label: str, settings: TrainQualitySettings, *, but: NDArray[np.uint64]) -> Chosen:
    """The different texts that are long enough and not among `but`."""
    counts = dict.fromkeys(("documents", "invalid", "short", "duplicate", "positive_too", "not_sampled"), 0)
    found = array("Q")
    with byte_bar(f"reading {label}", corpus.bytes_total) as bar:
        for document in corpus.documents():
            counts["documents"] += 1
            if not document.valid:
                counts["invalid"] += 1
            elif len(document.text) < settings.min_characters:
                counts["short"] += 1
            else:
                found.append(_digest(document.text, settings.seed))
            bar.update(corpus.bytes_read - bar.n)
        bar.update(corpus.bytes_total - bar.n)
    digests = np.unique(np.frombuffer(found, dtype=np.uint64))
    counts["duplicate"] = len(found) - len(digests)
    others = digests[~np.isin(digests, but)]
    counts["positive_too"] = len(digests) - len(others)
    return Chosen(others, counts)


def _digest(text: str, seed: int) -> int:
    """Of the words: white space makes no other text."""
    content = " ".join(text.split()).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest(), "big")


def _chosen_texts(corpus: Corpus, chosen: NDArray[np.uint64], settings: TrainQualitySettings) -> Iterator[str]:
    wanted = set(chosen.tolist())
    for document in corpus.documents():
        if document.valid and len(document.text) >= settings.min_characters:
            digest = _digest(document.text, settings.seed)
            if digest in wanted:
                wanted.remove(digest)
                yield document.text


def _write_examples(path: Path, positives: Iterator[str], negatives: Iterator[str]) -> None:
    """One document of each class after the other: fastText learns in the order of the file."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for positive, negative in zip(positives, negatives, strict=True):
            file.write(f"{LABEL}{POSITIVE} {one_line(positive)}{LABEL}{NEGATIVE} {one_line(negative)}")


@contextmanager
def _zeroed_memory() -> Iterator[None]:
    """Memory comes zeroed meanwhile, where the C library is glibc (M_PERTURB; it fills with the value's complement)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_PERTURB, 255)
    try:
        yield
    finally:
        if mallopt:
            mallopt(M_PERTURB, 0)


def _fit(examples: Path, model_file: Path, settings: TrainQualitySettings) -> float:
    """Train and save; returns the learning rate that worked. Raises DataError."""
    fasttext = fasttext_module(training=True)
    rate = settings.lr
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _zeroed_memory():
                model = fasttext.train_supervised(
                    str(examples),
                    dim=settings.dim,
                    lr=rate,
                    epoch=settings.epochs,
                    wordNgrams=settings.word_ngrams,
                    thread=settings.threads,
                    seed=settings.seed,
                    verbose=2 if sys.stderr.isatty() else 0,
                )
        except RuntimeError as error:
            if "NaN" not in str(error):
                raise DataError(f"fastText refused the documents: {error}") from None
            print(f"fastText met NaN at lr={rate:g}; attempt {attempt} of {ATTEMPTS}", file=sys.stderr, flush=True)
            rate /= 2
            continue
        model.save_model(str(model_file))
        return rate
    raise DataError(f"fastText met NaN {ATTEMPTS} times; set a smaller lr than {settings.lr:g}, or give more documents")


def _measure(model: Path, positives: Iterator[str], negatives: Iterator[str]) -> dict[str, float]:
    """What the model says of held-out documents."""
    score = quality_score(QualitySettings(model=str(model)))
    of_positives = np.array([score(text) for text in positives])
    of_negatives = np.array([score(text) for text in negatives])
    measured = {"documents": float(len(of_positives) + len(of_negatives))}
    for threshold in (PAPER_THRESHOLD, REDPAJAMA_THRESHOLD):
        kept = float((of_positives >= threshold).mean()), float((of_negatives >= threshold).mean())
        measured[f"accuracy_{threshold}"] = (kept[0] + 1 - kept[1]) / 2
        measured[f"positives_kept_{threshold}"], measured[f"negatives_kept_{threshold}"] = kept
    return measured


def _is_there_already(model: Path, identity: dict[str, Any], *, overwrite: bool) -> bool:
    """True: the same model is there. Raises DataError when another one is, unless it may be replaced."""
    if not model.exists():
        return False
    record = read_record(_record_of(model))
    differing = [key for key, value in identity.items() if record.get(key) != value]
    if not differing and record.get("sha256") == sha256_of_file(model):
        return True
    if overwrite:
        return False
    what = f"made with another {', '.join(differing)}" if differing else "altered since it was made"
    raise DataError(f"{model}: there is a model {what}; set overwrite=true to replace it, or another output")


def _record_of(model: Path) -> Path:
    return model.with_name(f"{model.name}.json")


def train_quality(settings: TrainQualitySettings) -> None:
    """Write the model and its record, or say that they are there. Raises ConfigError and DataError."""
    check_settings(settings)
    fasttext_module(training=True)
    options = ReadOptions(
        format=settings.format, text_field=settings.text_field, document_separator=settings.document_separator
    )
    check_read_options(options)
    positives, negatives = _inputs("positives", settings.positives), _inputs("negatives", settings.negatives)
    identity = asdict(settings) | {
        "positives": inputs_identity(positives),
        "negatives": inputs_identity(negatives),
    }
    for machine_setting in ("output", "overwrite"):
        del identity[machine_setting]
    model = Path(settings.output)
    if _is_there_already(model, identity, overwrite=settings.overwrite):
        print(f"{model}: the model of these settings and inputs is there already")
        return
    try:
        model.parent.mkdir(parents=True, exist_ok=True)
        _train(model, Corpus(positives, options), Corpus(negatives, options), identity, settings)
    except OSError as error:
        raise DataError(f"{model}: cannot be written ({error.strerror})") from None


def _inputs(name: str, value: Any) -> list[InputFile]:
    try:
        return find_inputs(input_list(value))
    except ConfigError:
        raise ConfigError(f"{name}: give a path or a list of paths: {name}=PATH or '{name}=[PATH,PATH]'") from None


def _train(
    model: Path, positives: Corpus, negatives: Corpus, identity: dict[str, Any], settings: TrainQualitySettings
) -> None:
    ours = _choose(positives, "positives", settings, but=np.zeros(0, dtype=np.uint64))
    others = _choose(negatives, "negatives", settings, but=ours.digests)
    size = min(len(ours.digests), len(others.digests), settings.max_documents)
    is_held_out = np.arange(size) % round(1 / settings.held_out_fraction) == 0
    for name, chosen in (("positives", ours), ("negatives", others)):
        chosen.counts["not_sampled"] = chosen.counts["documents"] - size - sum(list(chosen.counts.values())[1:5])
        print(f"{name}: {size:,} used of", ", ".join(f"{key} {count:,}" for key, count in chosen.counts.items()))
    if is_held_out.sum() < FEWEST or size - is_held_out.sum() < FEWEST:
        raise DataError(
            f"{size} documents of each class are too few: at least {FEWEST} to train on and {FEWEST} held out are "
            f"needed, of min_characters={settings.min_characters} or more, and held_out_fraction="
            f"{settings.held_out_fraction:g} holds {is_held_out.sum()} out: give more documents"
            + (", or a larger held_out_fraction" if size >= 2 * FEWEST else "")
        )
    temporary = model.with_name(f".{model.name}.{os.getpid()}.tmp")
    examples = temporary.with_suffix(".txt")
    parts = ours.digests[:size], others.digests[:size]
    try:
        training = [digests[~is_held_out] for digests in parts]
        _write_examples(
            examples,
            _chosen_texts(positives, training[0], settings),
            _chosen_texts(negatives, training[1], settings),
        )
        rate = _fit(examples, temporary, settings)
        held_out = [digests[is_held_out] for digests in parts]
        measured = _measure(
            temporary,
            _chosen_texts(positives, held_out[0], settings),
            _chosen_texts(negatives, held_out[1], settings),
        )
        _record_of(model).unlink(missing_ok=True)
        os.replace(temporary, model)
    finally:
        temporary.unlink(missing_ok=True)
        examples.unlink(missing_ok=True)
    made = {"lr_used": rate, "of_each_class": size, "held_out": measured, "sha256": sha256_of_file(model)}
    write_json_atomically(_record_of(model), identity | made)
    for threshold in (PAPER_THRESHOLD, REDPAJAMA_THRESHOLD):
        print(
            f"threshold {threshold}: accuracy {measured[f'accuracy_{threshold}']:.1%} on "
            f"{measured['documents']:,.0f} held-out documents, keeps {measured[f'positives_kept_{threshold}']:.1%} of "
            f"the positives and {measured[f'negatives_kept_{threshold}']:.1%} of the negatives"
        )
    print(f"wrote {model}")


def main() -> None:
    run_command(TrainQualitySettings, "data_tools/train_quality", train_quality, help_text=__doc__)


if __name__ == "__main__":
    main()
