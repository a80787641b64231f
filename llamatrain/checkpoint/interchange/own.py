"""This program's checkpoints as a source, and an import as one: weights without optimizer, random state or data.

An import is a folder like a run's, `tokenizer.model` and `checkpoints/step-00000000/`, so that whatever takes a run's
folder takes it. Its weights are fp32, as training has them, in files that each count as a rank's.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamatrain.arithmetic import parameter_shapes
from llamatrain.checkpoint import commit, store
from llamatrain.checkpoint.interchange import safetensors_files
from llamatrain.checkpoint.interchange.source import (
    Cast,
    Source,
    check_shapes,
    checked_model,
    in_files,
    parameter_bytes,
)
from llamatrain.config.build import build
from llamatrain.config.model import ModelConfig
from llamatrain.errors import CheckpointError, ConfigError, DataError
from llamatrain.tokenizer import TOKENIZER_FILE, Tokenizer

IMPORTED = "imported"  # the manifest's field that says from what
CHECKPOINTS = "checkpoints"


def looks_like(path: Path) -> bool:
    return (path / commit.MANIFEST_FILE).is_file() or (path / CHECKPOINTS).is_dir()


@dataclass(frozen=True, kw_only=True)
class OwnSource(Source):
    """The weights of a checkpoint."""

    reader: store.Reader
    dtypes: Mapping[str, torch.dtype]

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtypes[name]

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(parameter_shapes(self.model)[name], dtype=self.dtypes[name])
        self.reader.fill("model", {name: tensor}, partly=True)
        return tensor


def open_source(path: Path, *, verify_hashes: bool, max_seq_len: int | None) -> OwnSource:
    """A checkpoint, or the newest of a run; max_seq_len: another length than its own.

    Raises CheckpointError, and DataError for a tokenizer not its own.
    """
    checkpoint = store.find_checkpoint(path)
    manifest = store.open_checkpoint(checkpoint, groups=["model"], hashes=verify_hashes)
    entries = manifest["tensors"]["model"]
    try:
        model = build(ModelConfig, manifest["model"])
        model = replace(model, max_seq_len=max_seq_len or model.max_seq_len)
        sha256, tokens = str(manifest["tokenizer_sha256"]), int(manifest.get("tokens", 0))
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: a field of the manifest cannot be used ({error})") from None
    checked_model(model, checkpoint / commit.MANIFEST_FILE, tensors=len(entries))
    check_shapes({name: tuple(entry["shape"]) for name, entry in entries.items()}, parameter_shapes(model), checkpoint)
    tokenizer = checkpoint.absolute().parent.parent / TOKENIZER_FILE
    if tokenizer.is_file() and Tokenizer(tokenizer).sha256 != sha256:
        raise DataError(
            f"{tokenizer}: not the tokenizer {checkpoint} was trained with (SHA-256 {sha256[:12]}…); put that one back"
        )
    return OwnSource(
        path=checkpoint,
        model=model,
        reader=store.Reader(checkpoint, manifest),
        dtypes={name: store.DTYPES[entry["dtype"]] for name, entry in entries.items()},
        tokenizer=tokenizer if tokenizer.is_file() else None,
        tokens=tokens,
        origin={"format": "llamatrain", "step": manifest["step"], "manifest_sha256": commit.manifest_hash(checkpoint)},
    )


def write(
    directory: Path, weights: Cast, tokenizer: Tokenizer, *, largest_file: int, told: Callable[[int], None]
) -> None:
    """Write a source's weights as an import. `told` hears the bytes written."""
    source, root = weights.source, directory / CHECKPOINTS
    shapes = parameter_shapes(source.model)
    temporary = commit.begin(root, 0)
    tensors: dict[str, Any] = {}
    files = {}
    for part, names in enumerate(in_files(parameter_bytes(weights).items(), largest_file)):
        path = temporary / store.file_name("model", part)
        described = {name: (weights.dtype_of(name), shapes[name]) for name in names}
        safetensors_files.write(path, described, _read(weights, names, told), {})
        files[path.name] = commit.seal(path)
        for name in names:
            dtype, shape = str(weights.dtype_of(name)).removeprefix("torch."), list(shapes[name])
            tensors[name] = {"dtype": dtype, "shape": shape, "chunks": [[part, [0] * len(shape), shape]]}
    content = {
        "step": 0,
        "tokens": source.tokens,
        "model": asdict(source.model),
        "tokenizer_sha256": tokenizer.sha256,
        IMPORTED: dict(source.origin),
        "tensors": {"model": tensors},
    }
    commit.commit(temporary, content, files)
    shutil.copyfile(tokenizer.path, directory / TOKENIZER_FILE)


def _read(weights: Cast, names: list[str], told: Callable[[int], None]) -> Iterator[Tensor]:
    for name in names:
        tensor = weights.read(name)
        yield tensor
        told(tensor.nbytes)
