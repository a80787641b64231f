"""Train the tokenizer: SentencePiece BPE with the settings of LLaMA's tokenizer.model (paper, section 2.1).

    python -m data_tools.train_tokenizer input=CORPUS output=DIRECTORY vocab_size=32000

SentencePiece loads all it is given into memory and skips lines it dislikes without an error, so the lines are
prepared here: a uniform sample bounded in lines and bytes, and every line in a form that is used.
The same input and settings give the same model, byte for byte.
"""

import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from data_tools.documents import (
    Corpus,
    ReadOptions,
    byte_bar,
    check_read_options,
    differing_keys,
    find_inputs,
    input_list,
    inputs_identity,
    read_record,
)
from llamatrain.cli import run_command
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import sha256_of_file, write_bytes_atomically, write_json_atomically
from llamatrain.tokenizer import TOKENIZER_FILE

RECORD_FILE = "tokenizer.json"
MAX_LINE_BYTES = 4192  # SentencePiece skips longer ones
RESERVED = re.compile("[\0\u2585]")  # SentencePiece skips lines that hold one of these
# The trainer spec inside LLaMA's tokenizer.model, but for its 80 threads: their number changes the bytes of
# the model, which records it, and nothing else.
LLAMA_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.99995,
    "input_sentence_size": 200_000_000,
    "shuffle_input_sentence": True,
    "max_sentence_length": MAX_LINE_BYTES,
    "max_sentencepiece_length": 16,
    "seed_sentencepiece_size": 1_000_000,
    "num_threads": 16,
    "split_by_unicode_script": True,
    "split_by_whitespace": True,
    "split_by_number": True,
    "split_digits": True,
    "treat_whitespace_as_suffix": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "hard_vocab_limit": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "unk_surface": " \u2047 ",
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
}


@dataclass
class TrainTokenizerSettings:
    input: Any = "???"  # a file, directory or glob pattern, or a list of them
    output: str = "???"  # directory for tokenizer.model and tokenizer.json
    vocab_size: int = 32000
    sample_lines: int = 10_000_000  # lines to train on at most
    sample_bytes: int = 1_000_000_000  # bytes to train on at most; memory: about 20 times as much
    seed: int = 0  # of the sample
    format: str = "auto"  # auto (by suffix) | text | jsonl
    text_field: str = "text"  # JSON lines: the field with the text
    document_separator: str | None = None  # text files: splits them into documents; null: a file is one
    overwrite: bool = False  # replace a tokenizer of other settings


def check_settings(settings: TrainTokenizerSettings) -> None:
    """Raises ConfigError."""
    if settings.output in ("", "???"):
        raise ConfigError("output is not set: output=DIRECTORY")
    for name in ("vocab_size", "sample_lines", "sample_bytes"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be at least 1")


@dataclass
class LineCounts:
    """What became of the lines."""

    documents: int = 0
    documents_invalid: int = 0  # lone surrogates: dropped
    lines: int = 0
    lines_empty: int = 0
    lines_split: int = 0  # too long, or holding a reserved character
    pieces_from_split: int = 0
    pieces: int = 0  # what was there to sample from
    bytes: int = 0
    sampled: int = 0
    sampled_bytes: int = 0


class LineSample:
    """A uniform sample of a stream, bounded in lines and bytes.

    Each line draws a number, and the lines of the smallest numbers that keep both bounds stay. A line above a
    number once dropped never enters: a later short line would else slip in where a long one did not fit.
    """

    def __init__(self, *, max_lines: int, max_bytes: int, seed: int) -> None:
        self.max_lines = max_lines
        self.max_bytes = max_bytes
        self.bytes = 0
        self._random = random.Random(seed)
        self._bound = 1.0
        self._heap: list[tuple[float, int, bytes]] = []  # (-drawn, number in the stream, line)
        self._seen = 0

    def add(self, line: bytes) -> None:
        drawn = self._random.random()
        self._seen += 1
        if drawn >= self._bound:
            return
        heapq.heappush(self._heap, (-drawn, self._seen, line))
        self.bytes += len(line)
        while len(self._heap) > self.max_lines or self.bytes > self.max_bytes:
            negative, _, dropped = heapq.heappop(self._heap)
            self._bound = -negative
            self.bytes -= len(dropped)

    def lines(self) -> list[bytes]:
        """The sampled lines in the order of the stream."""
        return [line for _, _, line in sorted(self._heap, key=lambda entry: entry[1])]


def usable_pieces(line: str) -> list[bytes]:
    """The line as pieces SentencePiece takes: parted at reserved characters, and none over MAX_LINE_BYTES.

    Long lines are cut after a space where there is one, else between characters. The pieces joined are the
    line without its reserved characters.
    """
    pieces: list[bytes] = []
    for part in RESERVED.split(line):
        rest = part.encode("utf-8")
        while len(rest) > MAX_LINE_BYTES:
            cut = rest.rfind(b" ", 0, MAX_LINE_BYTES) + 1
            if cut == 0:
                cut = MAX_LINE_BYTES
                while rest[cut] & 0xC0 == 0x80:  # inside a character
                    cut -= 1
            pieces.append(rest[:cut])
            rest = rest[cut:]
        if rest:
            pieces.append(rest)
    return pieces


def _sample_corpus(corpus: Corpus, settings: TrainTokenizerSettings) -> tuple[list[bytes], LineCounts]:
    counts = LineCounts()
    sample = LineSample(max_lines=settings.sample_lines, max_bytes=settings.sample_bytes, seed=settings.seed)
    with byte_bar("reading", corpus.bytes_total) as bar:
        for document in corpus.documents():
            counts.documents += 1
            counts.documents_invalid += not document.valid
            for piece in _pieces(document.text, counts) if document.valid else ():
                sample.add(piece)
            bar.update(corpus.bytes_read - bar.n)
        bar.update(corpus.bytes_total - bar.n)
    lines = sample.lines()
    counts.sampled, counts.sampled_bytes = len(lines), sample.bytes
    return lines, counts


def _pieces(text: str, counts: LineCounts) -> Iterator[bytes]:
    for line in text.split("\n"):
        counts.lines += 1
        counts.lines_empty += not line
        pieces = usable_pieces(line)
        if len(pieces) > 1 or RESERVED.search(line):
            counts.lines_split += 1
            counts.pieces_from_split += len(pieces)
        counts.pieces += len(pieces)
        counts.bytes += sum(len(piece) for piece in pieces)
        yield from pieces


def train_pieces(lines: Iterable[bytes], options: Mapping[str, Any], *, vocab_size: int, seed: int) -> bytes:
    """A SentencePiece model's file. Raises DataError, saying which vocab_size would do."""
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise _explained(str(error), vocab_size) from None
    return model.getvalue()


def _explained(message: str, vocab_size: int) -> DataError:
    if too_large := re.search(r"set it to a value <= (\d+)", message):
        return DataError(
            f"vocab_size={vocab_size} is more than this text can fill: give more text, "
            f"or set vocab_size={too_large[1]} or less"
        )
    if re.search(r"smaller than required_chars", message):
        required = max(int(number) for number in re.findall(r"\d+", message.rpartition("required_chars")[2]))
        return DataError(
            f"vocab_size={vocab_size} has no room for the bytes and characters of this text: "
            f"set vocab_size={required} or more"
        )
    return DataError(f"SentencePiece refused vocab_size={vocab_size} for this text: {message}")


def _is_there_already(directory: Path, identity: dict[str, Any], *, overwrite: bool) -> bool:
    """True: the same tokenizer is there. Raises DataError when another one is, unless it may be replaced."""
    model, record = directory / TOKENIZER_FILE, directory / RECORD_FILE
    if not model.exists():
        return False
    found = read_record(record)
    differing = differing_keys(identity, found)
    if not differing and found.get("sha256") == sha256_of_file(model):
        return True
    if overwrite:
        return False
    what = f"made with another {', '.join(differing)}" if differing else "altered since it was made"
    raise DataError(f"{model}: there is a tokenizer {what}; set overwrite=true to replace it, or another output")


def train_tokenizer(settings: TrainTokenizerSettings) -> None:
    """Write tokenizer.model and its record, or say that they are there. Raises ConfigError and DataError."""
    check_settings(settings)
    options = ReadOptions(
        format=settings.format, text_field=settings.text_field, document_separator=settings.document_separator
    )
    check_read_options(options)
    files = find_inputs(input_list(settings.input))
    identity = {
        "vocab_size": settings.vocab_size,
        "sample_lines": settings.sample_lines,
        "sample_bytes": settings.sample_bytes,
        "seed": settings.seed,
        **asdict(options),
        **inputs_identity(files),
        "trainer": LLAMA_SETTINGS,
        "sentencepiece": sentencepiece.__version__,
    }
    directory = Path(settings.output)
    if _is_there_already(directory, identity, overwrite=settings.overwrite):
        print(f"{directory / TOKENIZER_FILE}: the tokenizer of these settings and inputs is there already")
        return
    lines, counts = _sample_corpus(Corpus(files, options), settings)
    if not lines:
        raise DataError(f"input={','.join(input_list(settings.input))}: there is no text to train on")
    for name, value in asdict(counts).items():
        print(f"{name:>18} {value:>16,}")
    print(f"training {settings.vocab_size} pieces on {counts.sampled_bytes:,} bytes", flush=True)
    try:
        directory.mkdir(parents=True, exist_ok=True)  # before the work: it may be refused
        model = train_pieces(lines, LLAMA_SETTINGS, vocab_size=settings.vocab_size, seed=settings.seed)
        write_bytes_atomically(directory / TOKENIZER_FILE, model)
        record = {**identity, "sha256": sha256_of_file(directory / TOKENIZER_FILE), "counts": asdict(counts)}
        write_json_atomically(directory / RECORD_FILE, record)
    except OSError as error:
        raise DataError(f"{directory}: cannot be written ({error.strerror})") from None
    print(f"wrote {directory / TOKENIZER_FILE}")


def main() -> None:
    run_command(TrainTokenizerSettings, "data_tools/train_tokenizer", train_tokenizer, help_text=__doc__)


if __name__ == "__main__":
    main()
