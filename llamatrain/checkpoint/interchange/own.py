"""This program's checkpoints as a source, and an import as one: weights without optimizer, random state or data.

An import is a folder like a run's, `tokenizer.model` and `checkpoints/step-00000000/`, so that whatever takes a run's
folder takes it. Its weights are fp32, as training has them, in files that each count as a rank's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
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
    counted,
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
    files: Mapping[str, commit.FileEntry]  # with weights
    cut: bool  # of several ranks, so that each read opens many files
    ahead: dict[str, Tensor] = field(default_factory=dict)  # read with one that was asked for

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtypes[name]

    def read(self, name: str) -> Tensor:
        if name not in self.ahead:
            self.ahead.clear()
            self.ahead.update(self._read(self._layer_of(name) if self.cut else [name]))
        return self.ahead.pop(name)

    def _layer_of(self, name: str) -> list[str]:
        """The parameters of the same layer; of what is in none, that one."""
        return [other for other in self.dtypes if other.split(".")[:2] == name.split(".")[:2]]

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        shapes = parameter_shapes(self.model)
        tensors = {name: torch.empty(shapes[name], dtype=self.dtypes[name]) for name in names}
        self.reader.fill("model", tensors, partly=True)
        return tensors

    def verify_hashes(self) -> None:
        commit.verify_files(self.path, self.files)


def open_source(path: Path, *, max_seq_len: int | None) -> OwnSource:
    """A checkpoint, or the newest of a run, its hashes not compared; max_seq_len: another length than its own.

    Raises CheckpointError, and DataError for a tokenizer not its own.
    """
    checkpoint = commit.find_checkpoint(path, setting="input")
    manifest = store.open_checkpoint(checkpoint, groups=["model"], hashes=False)
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
        files={name: entry for name, entry in manifest["files"].items() if name.startswith("model.")},
        cut=any(len(list(islice(store.chunks_of(entry), 2))) > 1 for entry in entries.values()),
        dtypes={name: store.DTYPES[entry["dtype"]] for name, entry in entries.items()},
        tokenizer=tokenizer if tokenizer.is_file() else None,
        tokens=tokens,
        origin={"format": "llamatrain", "step": manifest["step"], "manifest_sha256": commit.manifest_hash(checkpoint)},
    )


def write(
    directory: Path, weights: Cast, tokenizer: Tokenizer, *, largest_file: int, told: Callable[[int], None]
) -> None:
    """Write a source's weights as an import, all but the tokenizer's file. `told` hears the bytes written."""
    source, root = weights.source, directory / CHECKPOINTS
    shapes = parameter_shapes(source.model)
    temporary = commit.begin(root, 0)
    tensors: dict[str, Any] = {}
    files = {}
    for part, names in enumerate(in_files(parameter_bytes(weights).items(), largest_file)):
        path = temporary / store.file_name("model", part)
        described = {name: (weights.dtype_of(name), shapes[name]) for name in names}
        safetensors_files.write(path, described, counted((weights.read(name) for name in names), told), {})
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
