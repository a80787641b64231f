"""From any form into any: what lies at a path, and a directory that is written whole or not at all.

The output is made beside its place, synced, and renamed. It carries a record of what it was made from, by which
`overwrite` knows that it replaces the output of a conversion and nothing else.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llamatrain.arithmetic import parameter_count
from llamatrain.checkpoint.interchange import huggingface, meta, own
from llamatrain.checkpoint.interchange.source import Cast, Source, log, parameter_bytes
from llamatrain.config.convert import HUGGING_FACE, LLAMATRAIN, META, ConvertConfig
from llamatrain.errors import CheckpointError, ConfigError, DataError
from llamatrain.files import fsync_path, write_json_atomically
from llamatrain.tokenizer import TOKENIZER_FILE, Tokenizer
from llamatrain.version import VERSION

RECORD_FILE = "conversion.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMED = 3  # of files in the way, in a message
ROOM = 1.01  # of what the weights take, for all the rest


def convert(settings: ConvertConfig) -> Path:
    """Do what the settings, which are checked, say; the output's path. Raises LlamatrainError, leaving no output."""
    assert settings.input is not None and settings.output is not None and settings.to is not None
    output = Path(settings.output).absolute()
    refuse_output(output, Path(settings.input).absolute(), overwrite=settings.overwrite)
    source = open_source(Path(settings.input), max_seq_len=settings.max_seq_len)
    tokenizer = tokenizer_of(source, settings)
    dtype = torch.float32 if settings.to == LLAMATRAIN else DTYPES.get(settings.dtype)
    weights = Cast(source, dtype)
    if settings.to == META:
        meta.check_shards(source.model, settings.shards)
        if tokenizer.vocab_size < source.model.vocab_size:
            log.warning(
                "the model has %d ids, the tokenizer %d: Meta's own program takes the tokenizer's number, and will "
                "refuse these weights",
                source.model.vocab_size,
                tokenizer.vocab_size,
            )
        total = meta.written_bytes(weights, settings.shards)
    else:
        total = sum(parameter_bytes(weights).values())
    if settings.verify_hashes:
        source.verify_hashes()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with made_whole(output) as directory:
            refuse_too_large(output, total)  # now that it holds no more what a killed conversion left
            with tqdm(
                total=total, desc=f"to {settings.to}", unit="B", unit_scale=True, unit_divisor=1024, disable=None
            ) as bar:
                write(directory, weights, tokenizer, settings, told=bar.update)
            refuse_output(output, source.path.absolute(), overwrite=settings.overwrite)  # what came there meanwhile
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written ({error}); nothing is left of it") from error
    return output


def open_source(path: Path, *, max_seq_len: int | None) -> Source:
    """What lies at a path. Raises ConfigError if that is nothing known, CheckpointError if it cannot be used."""
    if own.looks_like(path):
        return own.open_source(path, max_seq_len=max_seq_len)
    if meta.looks_like(path):
        return meta.open_source(path, max_seq_len=max_seq_len)
    if huggingface.looks_like(path):
        return huggingface.open_source(path, max_seq_len=max_seq_len)
    if not path.exists():
        raise ConfigError(f"input={path}: there is no such directory")
    raise ConfigError(
        f"input={path}: neither a checkpoint or run of llamatrain (checkpoint.json, checkpoints/), nor a directory of "
        "Hugging Face (config.json), nor Meta's files (params.json, consolidated.NN.pth)"
    )


def write(
    directory: Path, weights: Cast, tokenizer: Tokenizer, settings: ConvertConfig, *, told: Callable[[int], Any]
) -> None:
    """Write the form that is asked for into an empty directory, and the record. `told` hears the bytes of weights."""
    largest = int(settings.max_shard_gib * 2**30)
    if settings.to == LLAMATRAIN:
        own.write(directory, weights, tokenizer, largest_file=largest, told=told)
    elif settings.to == HUGGING_FACE:
        huggingface.write(directory, weights, tokenizer, largest_file=largest, told=told)
    else:
        meta.write(directory, weights, shards=settings.shards, told=told)
    shutil.copyfile(tokenizer.path, directory / TOKENIZER_FILE)
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    content = {**record_of(weights.source, tokenizer, settings), "files": files}
    write_json_atomically(directory / RECORD_FILE, content)


def tokenizer_of(source: Source, settings: ConvertConfig) -> Tokenizer:
    """The tokenizer that goes with the weights. Raises DataError if there is none or it does not fit them."""
    path = Path(settings.tokenizer) if settings.tokenizer else source.tokenizer
    if path is None:
        raise DataError(
            f"{source.path}: there is no SentencePiece {TOKENIZER_FILE} beside the weights, and models with another "
            "kind of tokenizer are not taken; if it lies elsewhere, tokenizer=PATH names it"
        )
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > source.model.vocab_size:
        raise DataError(
            f"{path}: it has {tokenizer.vocab_size} ids, the model {source.model.vocab_size}: it is not this model's"
        )
    return tokenizer


def record_of(source: Source, tokenizer: Tokenizer, settings: ConvertConfig) -> dict[str, Any]:
    """What was converted into what, by which version."""
    return {
        "llamatrain": VERSION,
        "from": {"path": str(source.path.absolute()), **source.origin},
        "to": settings.to,
        "dtype": "fp32" if settings.to == LLAMATRAIN else settings.dtype,
        "parameters": parameter_count(source.model),
        "tokenizer_sha256": tokenizer.sha256,
    }


# ---------------------------------------------------------------------- the output's directory


def refuse_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Raises ConfigError if something lies there that is not to be replaced, or if it is the input's own place."""
    real, origin = Path(os.path.realpath(output)), Path(os.path.realpath(source))
    if real == origin or real in origin.parents:
        raise ConfigError(f"output={output}: the input lies there; choose another output")
    if not os.path.lexists(output):
        return
    if not output.is_dir() or output.is_symlink():
        raise ConfigError(f"output={output}: there is something else than a directory; choose another output")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"output={output}: it is there already; overwrite=true replaces it")
    if why := not_written(output):
        raise ConfigError(
            f"output={output}: overwrite=true replaces what this command wrote, and {why}; nothing was removed: move "
            "it away yourself, or choose another output"
        )


def not_written(output: Path) -> str | None:
    """In words, what of a directory is by its record not of a conversion; None if all of it is."""
    try:
        written = json.loads((output / RECORD_FILE).read_text(encoding="utf-8"))["files"]
        files = {output / name for name in [RECORD_FILE, *written]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return f"no {RECORD_FILE} there lists that"
    known = files | {folder for file in files for folder in file.parents}
    others = sorted(path for path in output.rglob("*") if path not in known and path.parent in known)
    if not others:
        return None
    told = ", ".join(str(path.relative_to(output)) for path in others[:NAMED])
    return f"more than that is there: {told}{f' and {len(others) - NAMED} more' if len(others) > NAMED else ''}"


def refuse_too_large(output: Path, total: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if total * ROOM > free:
        raise CheckpointError(
            f"{output}: the weights take {total / 2**30:,.2f} GiB, and {free / 2**30:,.2f} GiB are free there"
        )


@contextmanager
def made_whole(output: Path) -> Iterator[Path]:
    """An empty directory that takes the output's place, synced, if what is done with it succeeds, else is removed."""
    temporary, replaced = (output.with_name(f".{output.name}.{state}") for state in ("unfinished", "replaced"))
    temporary.mkdir(exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"output={output}: another conversion is writing there") from None
        try:
            for path in temporary.iterdir():  # what a killed one left
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield temporary
            for path in temporary.rglob("*"):
                fsync_path(path)
            fsync_path(temporary)
            shutil.rmtree(replaced, ignore_errors=True)
            if output.exists():
                os.rename(output, replaced)
            os.rename(temporary, output)
            fsync_path(output.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(lock)
