"""Train the language model that scores pages: SentencePiece pieces and a Kneser-Ney 5-gram model (CCNet, section 3.3).

    python -m data_tools.train_ngrams input=TEXTS output=DIRECTORY language=en cutoffs_input=PAGES

It writes LANGUAGE.sp.model, LANGUAGE.arpa.gz and LANGUAGE.ngrams.json, which says how they were made and holds the
percentiles of the perplexity over `cutoffs_input`: give web pages of the language, deduplicated, as they will be
filtered. cc_net's table of cut-offs holds for its own models only; those were trained on the openings of Wikipedia
articles, a million a language.

KenLM's `lmplz` counts where it is installed (trainer=lmplz; it works on disk), else our own trainer, in memory; they
agree to the digits that ARPA shows. Where KenLM's `build_binary` is installed too, LANGUAGE.binary is written beside:
the filter takes it, and every process loads it at once instead of in half a minute.
"""

import gzip
import os
import re
import shutil
import subprocess
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.documents import (
    Corpus,
    ReadOptions,
    byte_bar,
    check_read_options,
    find_inputs,
    input_list,
    inputs_identity,
    read_record,
)
from data_tools.encoding import is_held_out
from data_tools.kneser_ney import BEGIN, END, SPECIAL_WORDS, estimate, write_arpa
from data_tools.language_model import (
    NGRAM_SUFFIXES,
    PIECES_SUFFIX,
    RECORD_SUFFIX,
    check_newlines,
    kenlm_module,
    load_pieces,
    normalised_lines,
    page_scorer,
)
from data_tools.train_tokenizer import LineSample, train_pieces, usable_pieces
from llamatrain.cli import run_command
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import sha256_of_file, write_bytes_atomically, write_json_atomically

TRAINERS = ("auto", "own", "lmplz")
CUTOFF_CHARACTERS = 100_000  # of a document, that its perplexity is measured on here
CUTOFF_BYTES = 500_000_000  # of all of them
HELD_OUT_SALT = "language model"
# cc_net's settings for its pieces; the number of threads changes the bytes of the model.
PIECES: dict[str, Any] = {
    "model_type": "unigram",
    "hard_vocab_limit": True,
    "num_threads": 16,
    "max_sentence_length": 4192,
}


@dataclass
class TrainNgramsSettings:
    input: Any = "???"  # texts to train on: a file, directory or glob pattern, or a list of them
    output: str = "???"  # directory for the model's files
    language: str = "en"  # names the files
    cutoffs_input: Any = None  # pages to take percentiles over; null: documents held out of input
    cutoffs_documents: int = 10_000  # of them, a uniform sample
    held_out_fraction: float = 0.02  # of the documents of input, kept out of training where cutoffs_input is null
    newlines: str = "line"  # line: a page's lines are sentences | glue: as cc_net, the page is one line
    vocab_size: int = 65536  # pieces (cc_net)
    character_coverage: float = 0.9995  # cc_net
    pieces_lines: int = 1_000_000  # to train pieces on, a uniform sample
    sample_bytes: int = 200_000_000  # of normalised lines to count, a uniform sample; trainer=own: 30 times in memory
    order: int = 5  # words of the longest n-gram (cc_net)
    trainer: str = "auto"  # auto: lmplz where it is installed, else own | own | lmplz
    lmplz: str = "lmplz"  # the program
    build_binary: str = "build_binary"  # the program; where it is not installed, no LANGUAGE.binary is written
    lmplz_memory: str = "50%"  # its -S
    seed: int = 0  # of the samples
    format: str = "auto"  # auto (by suffix) | text | jsonl
    text_field: str = "text"  # JSON lines: the field with the text
    document_separator: str | None = None  # text files: splits them into documents; null: a file is one
    overwrite: bool = False  # replace a model of other settings


def check_settings(settings: TrainNgramsSettings) -> None:
    """Raises ConfigError."""
    if settings.output in ("", "???"):
        raise ConfigError("output is not set: output=DIRECTORY")
    if not re.fullmatch(r"[A-Za-z][\w-]*", settings.language):
        raise ConfigError(f"language={settings.language}: give a code such as en; it names the files")
    for name in ("cutoffs_documents", "vocab_size", "pieces_lines", "sample_bytes"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be at least 1")
    for name in ("held_out_fraction", "character_coverage"):
        if not 0 < getattr(settings, name) <= 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be above 0, and 1 at most")
    if not 2 <= settings.order <= 6:
        raise ConfigError(f"order={settings.order}: must be 2 to 6, what KenLM is built for")
    if settings.trainer not in TRAINERS:
        raise ConfigError(f"trainer={settings.trainer}: choose one of {', '.join(TRAINERS)}")
    check_newlines(settings.newlines)


@dataclass
class Samples:
    lines: list[bytes]  # normalised, to train on
    documents: list[bytes]  # to measure percentiles on
    counts: dict[str, int]


def _read(settings: TrainNgramsSettings, corpus: Corpus, pages: Corpus | None) -> Samples:
    counts = dict.fromkeys(("documents", "documents_invalid", "documents_held_out", "lines", "lines_sampled"), 0)
    lines = LineSample(max_lines=1 << 62, max_bytes=settings.sample_bytes, seed=settings.seed)
    documents = LineSample(max_lines=settings.cutoffs_documents, max_bytes=CUTOFF_BYTES, seed=settings.seed)
    for text in _texts(corpus, "reading", counts):
        if pages is None and is_held_out(text, salt=HELD_OUT_SALT, fraction=settings.held_out_fraction):
            counts["documents_held_out"] += 1
            documents.add(text[:CUTOFF_CHARACTERS].encode())
            continue
        for line in normalised_lines(text, settings.newlines):
            counts["lines"] += 1
            lines.add(line.encode())
    if pages is not None:
        for text in _texts(pages, "reading pages", {"documents": 0, "documents_invalid": 0}):
            documents.add(text[:CUTOFF_CHARACTERS].encode())
    sampled = Samples(lines.lines(), documents.lines(), counts)
    counts["lines_sampled"] = len(sampled.lines)
    if not sampled.lines:
        raise DataError(f"input={','.join(input_list(settings.input))}: there is no text to train on")
    if not sampled.documents:
        raise DataError(
            "there is no document to take percentiles over: give pages with cutoffs_input=PATH, more documents, "
            "or a larger held_out_fraction"
        )
    return sampled


def _texts(corpus: Corpus, label: str, counts: dict[str, int]) -> Iterator[str]:
    with byte_bar(label, corpus.bytes_total) as bar:
        for document in corpus.documents():
            counts["documents"] += 1
            counts["documents_invalid"] += not document.valid
            if document.valid and document.text:
                yield document.text
            bar.update(corpus.bytes_read - bar.n)
        bar.update(corpus.bytes_total - bar.n)


def _train_pieces(lines: list[bytes], settings: TrainNgramsSettings) -> bytes:
    sample = LineSample(max_lines=settings.pieces_lines, max_bytes=1 << 62, seed=settings.seed)
    for line in lines:
        for piece in usable_pieces(line.decode()):
            sample.add(piece)
    options = {**PIECES, "character_coverage": settings.character_coverage}
    return train_pieces(sample.lines(), options, vocab_size=settings.vocab_size, seed=settings.seed)


def _count_and_write(lines: list[bytes], pieces: Path, ngrams: Path, settings: TrainNgramsSettings) -> None:
    """The n-gram model by our own trainer."""
    encode = load_pieces(pieces).encode_as_pieces
    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    for word in SPECIAL_WORDS:
        numbers[word]
    tokens = array("i")
    for line in lines:
        tokens.append(BEGIN)
        tokens.extend(map(numbers.__getitem__, _words(encode(line.decode()))))
        tokens.append(END)
    orders = estimate(np.frombuffer(tokens, dtype=np.int32), words=len(numbers), order=settings.order)
    for number, order in enumerate(orders, start=1):
        how = "" if order.estimated else " (too few n-grams to estimate them)"
        discounts = " ".join(f"{discount:.4f}" for discount in order.discounts)
        print(f"{number}-grams {len(order.probability):>12,}  discounts {discounts}{how}", flush=True)
    write_arpa(ngrams, orders, list(numbers))


def _words(pieces: list[str]) -> list[str]:
    """The pieces; characters no piece holds come as they stand, and might spell <s>."""
    return [piece for piece in pieces if piece not in SPECIAL_WORDS]


def _run_lmplz(lines: list[bytes], pieces: Path, ngrams: Path, settings: TrainNgramsSettings) -> None:
    encode = load_pieces(pieces).encode_as_pieces
    text = ngrams.with_name(f".{ngrams.name}.pieces.tmp")
    try:
        with open(text, "w", encoding="utf-8", newline="\n") as file:
            for line in lines:
                file.write(" ".join(_words(encode(line.decode()))) + "\n")
        options = ["-o", str(settings.order), "--discount_fallback", "-S", settings.lmplz_memory, "-T", str(text)]
        with open(text, "rb") as file, gzip.GzipFile(ngrams, "wb", compresslevel=3, mtime=0) as compressed:
            program = subprocess.Popen([settings.lmplz, *options], stdin=file, stdout=subprocess.PIPE)
            assert program.stdout is not None
            shutil.copyfileobj(program.stdout, compressed, 1 << 20)
        if program.wait() != 0:
            raise DataError(f"{settings.lmplz}: failed with status {program.returncode}; its messages stand above")
    finally:
        text.unlink(missing_ok=True)


def _build_binary(ngrams: Path, binary: Path, settings: TrainNgramsSettings) -> None:
    """The model in the form KenLM maps into memory, where its program for that is installed."""
    program = shutil.which(settings.build_binary)
    if program is None:
        print(f"{settings.build_binary} is not installed: every process will read {ngrams.name} by itself")
        return
    temporary = binary.with_name(f".{binary.name}.{os.getpid()}.tmp")
    try:
        done = subprocess.run([program, str(ngrams), str(temporary)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DataError(f"{program}: failed with status {done.returncode}: {done.stderr.strip()[-500:]}")
        os.replace(temporary, binary)
    finally:
        temporary.unlink(missing_ok=True)


def _chosen_trainer(settings: TrainNgramsSettings) -> str:
    """own or lmplz. Raises ConfigError."""
    found = shutil.which(settings.lmplz) is not None
    if settings.trainer == "lmplz" and not found:
        raise ConfigError(f"lmplz={settings.lmplz}: no such program; build it from KenLM, or set trainer=own")
    return settings.trainer if settings.trainer != "auto" else "lmplz" if found else "own"


def percentiles(values: list[float]) -> list[float]:
    """The percentiles 0, 1, … 100."""
    return [float(f"{value:.6g}") for value in np.percentile(values, range(101))]


def _is_there_already(stem: Path, identity: dict[str, Any], *, overwrite: bool) -> bool:
    """True: the same model is there. Raises DataError when another one is, unless it may be replaced."""
    files = {suffix: Path(f"{stem}{suffix}") for suffix in (PIECES_SUFFIX, ".arpa.gz")}
    there = [file for file in files.values() if file.exists()]
    if not there:
        return False
    record = read_record(Path(f"{stem}{RECORD_SUFFIX}"))
    differing = [key for key, value in identity.items() if record.get(key) != value]
    hashes = record.get("sha256", {})
    if not differing and all(f.exists() and hashes.get(s) == sha256_of_file(f) for s, f in files.items()):
        return True
    if overwrite or not record:  # without a record it was never finished
        return False
    what = f"made with another {', '.join(differing)}" if differing else "altered since it was made"
    raise DataError(f"{there[0]}: there is a model {what}; set overwrite=true to replace it, or another output")


def train_ngrams(settings: TrainNgramsSettings) -> None:
    """Write the model's files, or say that they are there. Raises ConfigError and DataError."""
    check_settings(settings)
    kenlm_module()
    options = ReadOptions(
        format=settings.format, text_field=settings.text_field, document_separator=settings.document_separator
    )
    check_read_options(options)
    files = find_inputs(input_list(settings.input))
    pages = find_inputs(input_list(settings.cutoffs_input)) if settings.cutoffs_input is not None else None
    trainer = _chosen_trainer(settings)
    identity = asdict(settings) | {"trainer": trainer, "pieces": PIECES, **inputs_identity(files)}
    identity |= {"cutoffs_files": inputs_identity(pages) if pages is not None else None}
    for machine_setting in ("input", "cutoffs_input", "output", "overwrite", "lmplz", "lmplz_memory", "build_binary"):
        del identity[machine_setting]
    stem = Path(settings.output) / settings.language
    if _is_there_already(stem, identity, overwrite=settings.overwrite):
        print(f"{stem}.arpa.gz: the model of these settings and inputs is there already")
        return
    samples = _read(settings, Corpus(files, options), Corpus(pages, options) if pages is not None else None)
    for name, value in samples.counts.items():
        print(f"{name:>18} {value:>16,}")
    try:
        _write_model(stem, samples, identity, settings)
    except OSError as error:
        raise DataError(f"{stem}: cannot be written ({error.strerror})") from None


def _write_model(stem: Path, samples: Samples, identity: dict[str, Any], settings: TrainNgramsSettings) -> None:
    pieces, ngrams, record = (Path(f"{stem}{suffix}") for suffix in (PIECES_SUFFIX, ".arpa.gz", RECORD_SUFFIX))
    stem.parent.mkdir(parents=True, exist_ok=True)
    for old in (RECORD_SUFFIX, PIECES_SUFFIX, *NGRAM_SUFFIXES):  # the record first: what is left is not finished
        Path(f"{stem}{old}").unlink(missing_ok=True)
    print(f"training {settings.vocab_size} pieces", flush=True)
    write_bytes_atomically(pieces, _train_pieces(samples.lines, settings))
    print(f"counting n-grams with {identity['trainer']}", flush=True)
    temporary = ngrams.with_name(f".{ngrams.name}.{os.getpid()}.tmp.gz")
    try:
        count = _run_lmplz if identity["trainer"] == "lmplz" else _count_and_write
        count(samples.lines, pieces, temporary, settings)
        os.replace(temporary, ngrams)
    finally:
        temporary.unlink(missing_ok=True)
    _build_binary(ngrams, Path(f"{stem}.binary"), settings)
    score = page_scorer(pieces, ngrams, newlines=settings.newlines)
    found = [value for text in samples.documents if (value := score(text.decode())) is not None]
    if not found:
        raise DataError("the documents to take percentiles over hold no text")
    cutoffs = percentiles(found)
    hashes = {PIECES_SUFFIX: sha256_of_file(pieces), ".arpa.gz": sha256_of_file(ngrams)}
    made = {"counts": samples.counts, "sha256": hashes, "cutoffs_over": len(found), "percentiles": cutoffs}
    write_json_atomically(record, identity | made)
    where = "cutoffs_input" if settings.cutoffs_input is not None else "documents held out of input"
    print(f"perplexity over {len(found):,} {where}: 30 % below {cutoffs[30]:.1f}, 60 % below {cutoffs[60]:.1f}")
    print(f"wrote {ngrams}")


def main() -> None:
    run_command(TrainNgramsSettings, "data_tools/train_ngrams", train_ngrams, help_text=__doc__)


if __name__ == "__main__":
    main()
