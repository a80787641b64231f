"""Documents to token shards: encode, hold some out for validation, write a data set.

    python -m data_tools.tokenize_shards source=NAME input=CORPUS tokenizer=tokenizer.model output=DIRECTORY

The input is cut into parts, contiguous ranges of documents; a part ends with the document that brings its
training tokens to `shard_tokens`. After each part progress.json records what is committed, so that an
interrupted run goes on from there. The result is that of an unbroken run, byte for byte, with any number of
workers.
"""

import itertools
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_tools.cached_encoding import CachedEncoder
from data_tools.documents import (
    Corpus,
    ReadOptions,
    byte_bar,
    check_read_options,
    differing_keys,
    find_inputs,
    input_list,
    inputs_identity,
)
from data_tools.encoding import HOLDOUT_KEYS, SPACE_MARK_CHOICES, Encoded, EncodeOptions, encode_stream
from data_tools.locking import only_writer
from llamatrain.cli import run_command
from llamatrain.data.shards import (
    DTYPES,
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    ShardInfo,
    ShardWriter,
    check_sizes,
    read_manifest,
    token_dtype,
    write_manifest,
)
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import write_bytes_atomically, write_json_atomically
from llamatrain.tokenizer import TOKENIZER_FILE, Tokenizer
from llamatrain.version import VERSION

PROGRESS_FILE = "progress.json"
SHARD_FILE = re.compile(r"(train|validation)-\d{5,}\.(bin|idx)")
LEFT_OVER = re.compile(
    r"\.((train|validation)-\d{5,}\.(bin|idx)|(progress\.json|dataset\.json|tokenizer\.model)\.\d+)\.tmp"
)
IN_MANIFEST = ("source", "tokenizer_sha256", "add_bos", "add_eos")  # settings with a field of their own there
ODD = ("dropped_empty", "dropped_invalid", "with_space_mark", "dropped_space_mark")
TOKEN_COUNTS = ("byte_tokens", "newline_tokens")  # of the documents kept; a newline token is a byte token too
COUNTS = ("read", "kept", "train", "validation", *ODD, *TOKEN_COUNTS)


@dataclass
class TokenizeShardsSettings:
    source: str = "???"  # name of the corpus
    input: Any = "???"  # a file, directory or glob pattern, or a list of them
    tokenizer: str = "???"  # tokenizer.model
    output: str = "???"  # directory of the data set
    add_bos: bool = True
    add_eos: bool = True
    validation_fraction: float = 0.001  # share of the documents (or groups) held out
    holdout_by: str = "text"  # what is held out together: text (equal texts) | id | group
    holdout_salt: str = "llamatrain"  # another salt holds out others
    shard_tokens: int = 500_000_000  # training tokens per shard
    on_space_mark: str = "keep"  # documents with U+2581, which decode with a space for it: keep | drop
    workers: int | None = None  # encoding processes; null: one per CPU; the result is the same
    format: str = "auto"  # auto (by suffix) | text | jsonl
    text_field: str = "text"  # JSON lines: the fields to read
    id_field: str = "id"
    group_field: str = "group"
    document_separator: str | None = None  # text files: splits them into documents; null: a file is one
    overwrite: bool = False  # replace another data set at output; an unfinished one of these settings goes on


def check_settings(settings: TokenizeShardsSettings) -> None:
    """Raises ConfigError."""
    for name in ("source", "tokenizer", "output"):
        if getattr(settings, name) in ("", "???"):
            raise ConfigError(f"{name} is not set: {name}={'NAME' if name == 'source' else 'PATH'}")
    if not 0 <= settings.validation_fraction < 1:
        raise ConfigError(f"validation_fraction={settings.validation_fraction}: must lie in [0, 1)")
    if settings.holdout_by not in HOLDOUT_KEYS:
        raise ConfigError(f"holdout_by={settings.holdout_by}: choose one of {', '.join(HOLDOUT_KEYS)}")
    if settings.on_space_mark not in SPACE_MARK_CHOICES:
        raise ConfigError(f"on_space_mark={settings.on_space_mark}: choose one of {', '.join(SPACE_MARK_CHOICES)}")
    if settings.shard_tokens < 1:
        raise ConfigError(f"shard_tokens={settings.shard_tokens}: must be at least 1")
    if settings.workers is not None and settings.workers < 1:
        raise ConfigError(f"workers={settings.workers}: must be at least 1, or null for one per CPU")


@dataclass
class Progress:
    """What is on disk after a number of parts; what progress.json holds."""

    identity: dict[str, Any]
    parts: int
    counts: Counter[str]
    splits: dict[str, list[ShardInfo]]

    def write(self, directory: Path) -> None:
        splits = {split: [asdict(shard) for shard in shards] for split, shards in self.splits.items()}
        content = {
            "identity": self.identity,
            "parts": self.parts,
            "counts": dict(self.counts),
            "splits": splits,
        }
        write_json_atomically(directory / PROGRESS_FILE, content)

    @classmethod
    def read(cls, directory: Path) -> "Progress | None":
        """None when there is no such file. Raises DataError when it cannot be used."""
        path = directory / PROGRESS_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            splits = {name: [ShardInfo(**shard) for shard in shards] for name, shards in content["splits"].items()}
            return cls(content["identity"], content["parts"], Counter(content["counts"]), splits)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: cannot be used ({error}); remove it and set overwrite=true") from None


class _Part:
    """The shards of the part being written, one for each split that has a document in it."""

    def __init__(self, directory: Path, number: int, dtype: str) -> None:
        self._directory, self._number, self._dtype = directory, number, dtype
        self._writers: dict[str, ShardWriter] = {}
        self.counts: Counter[str] = Counter()

    @property
    def train_tokens(self) -> int:
        return self._writers["train"].tokens if "train" in self._writers else 0

    def add(self, document: Encoded) -> None:
        self.counts["read"] += 1
        self.counts["with_space_mark"] += document.has_space_mark
        if document.dropped is not None:
            self.counts[document.dropped] += 1
            return
        split = "validation" if document.held_out else "train"
        self.counts["kept"] += 1
        self.counts["byte_tokens"] += document.byte_tokens
        self.counts["newline_tokens"] += document.newline_tokens
        self.counts[split] += 1
        if split not in self._writers:
            self._writers[split] = ShardWriter(self._directory, f"{split}-{self._number:05d}", self._dtype)
        tokens = np.frombuffer(document.tokens, DTYPES[self._dtype])
        self._writers[split].add(tokens, text_bytes=document.text_bytes)

    def commit(self, progress: Progress) -> None:
        """Name the shards, then record them."""
        for split in SPLITS:
            if split in self._writers:
                progress.splits[split].append(self._writers.pop(split).commit())
        # an unfinished data set of an older release has not counted byte tokens from its start
        progress.counts.update({name: count for name, count in self.counts.items() if name in progress.counts})
        progress.parts += 1
        progress.write(self._directory)

    def discard(self) -> None:
        for writer in self._writers.values():
            writer.discard()


def tokenize_shards(settings: TokenizeShardsSettings) -> None:
    """Write the data set, go on with it, or say that it is there. Raises ConfigError and DataError."""
    check_settings(settings)
    options = ReadOptions(
        format=settings.format,
        text_field=settings.text_field,
        id_field=settings.id_field,
        group_field=settings.group_field,
        document_separator=settings.document_separator,
    )
    check_read_options(options)
    corpus = Corpus(find_inputs(input_list(settings.input)), options)
    tokenizer = Tokenizer(settings.tokenizer)
    directory = Path(settings.output)
    identity = _identity(settings, corpus, tokenizer)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with only_writer(directory):
            if _is_there_already(directory, identity, overwrite=settings.overwrite):
                print(f"{directory}: this data set is there already, complete; nothing to do")
                return
            progress = _start(directory, identity, tokenizer, overwrite=settings.overwrite)
            _write_parts(settings, corpus, tokenizer, progress)
            manifest = _finish(settings, tokenizer, progress)
    except OSError as error:
        raise DataError(f"{directory}: cannot be written ({error.strerror or error})") from None
    _print_summary(manifest)


def _identity(settings: TokenizeShardsSettings, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the bytes of the result; nothing of the machine."""
    without = ("input", "tokenizer", "output", "workers", "overwrite")
    return {
        **{key: value for key, value in asdict(settings).items() if key not in without},
        **inputs_identity(corpus.files),
        "tokenizer_sha256": tokenizer.sha256,
        "versions": {"llamatrain": VERSION, "sentencepiece": sentencepiece.__version__},
    }


def _is_there_already(directory: Path, identity: dict[str, Any], *, overwrite: bool) -> bool:
    """True: the same data set is there whole. Raises DataError when another is that may not be replaced."""
    if not (directory / MANIFEST_FILE).exists():
        return False
    try:
        manifest = read_manifest(directory)
        check_sizes(manifest)
        separate = {name: getattr(manifest, name) for name in IN_MANIFEST}
        found: dict[str, Any] = manifest.settings | separate
        # A newer program need not make a finished data set again.
        differing = [key for key in differing_keys(identity, found) if key != "versions"]
        problem = f"made with another {', '.join(differing)}" if differing else None
    except DataError as error:
        problem = f"damaged: {error}"
    if problem is None:
        (directory / PROGRESS_FILE).unlink(missing_ok=True)  # a crash between the last two writes leaves it
        return not overwrite
    if not overwrite:
        raise DataError(
            f"{directory}: there is a data set {problem}; set overwrite=true to replace it, or another output"
        )
    return False


def _start(directory: Path, identity: dict[str, Any], tokenizer: Tokenizer, *, overwrite: bool) -> Progress:
    """The progress to go on from, with everything it does not know of removed."""
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    progress = Progress.read(directory)
    if progress is not None and progress.parts == 0:
        progress.identity = identity  # nothing is committed: settings are free to be corrected
        progress.write(directory)
    problem = _obstacle(directory, identity, tokenizer, progress)
    if problem and not overwrite:
        raise DataError(f"{directory}: {problem}; set overwrite=true to start again, or another output")
    if progress is None or problem:
        progress = Progress(identity, 0, Counter(dict.fromkeys(COUNTS, 0)), {split: [] for split in SPLITS})
        progress.write(directory)
    _remove_unknown(directory, progress)
    return progress


def _obstacle(directory: Path, identity: dict[str, Any], tokenizer: Tokenizer, progress: Progress | None) -> str | None:
    """Why what lies in the directory cannot be gone on with; None if it can."""
    if progress is None:
        strangers = sorted(path.name for path in directory.iterdir() if SHARD_FILE.fullmatch(path.name))
        return f"holds {strangers[0]} but no {MANIFEST_FILE}" if strangers else None
    differing = differing_keys(identity, progress.identity)
    if differing:
        return f"there is an unfinished data set made with another {', '.join(differing)}"
    try:
        check_sizes(_manifest(directory, tokenizer, progress))
    except DataError as error:
        return f"there is an unfinished data set, damaged: {error}"
    return None


def _remove_unknown(directory: Path, progress: Progress) -> None:
    known: set[str] = set()
    for shards in progress.splits.values():
        known.update(itertools.chain.from_iterable((shard.file, shard.index_file) for shard in shards))
    for path in directory.iterdir():
        is_shard = SHARD_FILE.fullmatch(path.name) and path.name not in known
        if is_shard or LEFT_OVER.fullmatch(path.name):
            path.unlink()


def _write_parts(settings: TokenizeShardsSettings, corpus: Corpus, tokenizer: Tokenizer, progress: Progress) -> None:
    directory, dtype = Path(settings.output), token_dtype(tokenizer.vocab_size)
    skip = progress.counts["read"]
    if skip:
        print(f"{directory}: going on after {skip:,} documents in {progress.parts} finished parts", flush=True)
    options = EncodeOptions(
        tokenizer=settings.tokenizer,
        dtype=dtype,
        add_bos=settings.add_bos,
        add_eos=settings.add_eos,
        validation_fraction=settings.validation_fraction,
        holdout_by=settings.holdout_by,
        holdout_salt=settings.holdout_salt,
        drop_space_mark=settings.on_space_mark == "drop",
    )
    obstacle = CachedEncoder(tokenizer, dtype).obstacle
    if obstacle:
        print(f"{settings.tokenizer}: {obstacle}, so texts are encoded whole, several times slower", flush=True)
    part = _Part(directory, progress.parts, dtype)
    workers = settings.workers or os.cpu_count() or 1
    documents = itertools.islice(corpus.documents(), skip, None)
    try:
        with byte_bar(f"tokenizing {settings.source}", corpus.bytes_total) as bar:
            for encoded in encode_stream(documents, options, workers=workers):
                part.add(encoded)
                bar.update(corpus.bytes_read - bar.n)
                if part.train_tokens >= settings.shard_tokens:
                    part.commit(progress)
                    part = _Part(directory, progress.parts, dtype)
            bar.update(corpus.bytes_total - bar.n)
        if part.counts["read"]:
            part.commit(progress)
    finally:
        part.discard()


def _finish(settings: TokenizeShardsSettings, tokenizer: Tokenizer, progress: Progress) -> Manifest:
    directory = Path(settings.output)
    if progress.counts["kept"] == 0:
        (directory / PROGRESS_FILE).unlink()
        inputs, read = ",".join(input_list(settings.input)), progress.counts["read"]
        raise DataError(f"input={inputs}: no document was kept of {read}")
    manifest = _manifest(directory, tokenizer, progress)
    write_bytes_atomically(directory / TOKENIZER_FILE, tokenizer.path.read_bytes())
    write_manifest(manifest)
    (directory / PROGRESS_FILE).unlink()
    return manifest


def _manifest(directory: Path, tokenizer: Tokenizer, progress: Progress) -> Manifest:
    identity = progress.identity
    return Manifest(
        directory=directory,
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        splits={split: tuple(progress.splits[split]) for split in SPLITS},
        documents={name: progress.counts[name] for name in COUNTS if name in progress.counts},
        settings={key: value for key, value in identity.items() if key not in IN_MANIFEST},
        **{key: identity[key] for key in IN_MANIFEST},
    )


def _print_summary(manifest: Manifest) -> None:
    for name, count in manifest.documents.items():
        print(f"{'         ' if name in TOKEN_COUNTS else 'documents'} {name:<20} {count:>16,}")
    for split in SPLITS:
        sizes = f"{manifest.tokens(split):>18,} tokens {manifest.text_bytes(split):>18,} bytes of text"
        print(f"{split:<11}{sizes} in {len(manifest.shards(split))} shards")
    tokens, text_bytes = (sum(map(count, SPLITS)) for count in (manifest.tokens, manifest.text_bytes))
    print(f"{text_bytes / tokens:.2f} bytes of text per token{_byte_fallback(manifest.documents, tokens)}")
    if manifest.settings["validation_fraction"] > 0 and not manifest.shards("validation"):
        print("no document was held out: raise validation_fraction or set another holdout_salt")
    print(f"wrote {manifest.directory / MANIFEST_FILE}")


def _byte_fallback(counts: dict[str, int], tokens: int) -> str:
    """How much of the text the vocabulary has no piece for, but for the line feeds, which it never has."""
    if "byte_tokens" not in counts:
        return ""
    newlines, bytes_alone = counts["newline_tokens"], counts["byte_tokens"] - counts["newline_tokens"]
    return f"; byte tokens: {bytes_alone / tokens:.3%} of the tokens, and {newlines / tokens:.3%} line feeds"


def main() -> None:
    run_command(TokenizeShardsSettings, "data_tools/tokenize_shards", tokenize_shards, help_text=__doc__)


if __name__ == "__main__":
    main()
