"""Tensors into and out of checkpoint directories.

A tensor is stored as one or more chunks, boxes of its global shape, each an entry of a safetensors file; the
manifest maps names to chunks. So the reader need not know how many processes wrote: it copies from every chunk
the part it needs, after checking that the chunks cover the tensor whole. Tensors come in groups (`model`,
`optimizer`, `rng`), each in files of its own, so that who wants the weights reads nothing else.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llamatrain.checkpoint import commit
from llamatrain.checkpoint.commit import Manifest
from llamatrain.config import ModelConfig
from llamatrain.config.build import build
from llamatrain.errors import CheckpointError, ConfigError, DataError
from llamatrain.model.attention import resolve_backend
from llamatrain.model.llama import Llama
from llamatrain.tokenizer import TOKENIZER_FILE, Tokenizer

TensorGroups = Mapping[str, Mapping[str, Tensor]]
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.uint8)}


def save(root: Path, step: int, groups: TensorGroups, content: Mapping[str, Any]) -> Path:
    """Write and commit the checkpoint of `step` under `root`.

    `groups` are named tensors (float32, bfloat16 or uint8); `content` is what else the manifest shall hold, plain
    JSON values. Raises CheckpointError if the disk does not take it; what was there before stays.
    """
    temporary = commit.begin(root, step)
    try:
        tensors = {name: _write_group(temporary, name, group) for name, group in groups.items()}
        return commit.commit(temporary, {**content, "step": step, "tensors": tensors})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{temporary}: the checkpoint of step {step} could not be written ({error}); earlier ones are whole"
        ) from error


def _write_group(directory: Path, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    file = f"{group}.rank00000.safetensors"
    entries, payload = {}, {}
    for name, tensor in tensors.items():
        local = tensor.detach().cpu().contiguous()
        payload[name] = local
        chunk = {"offset": [0] * local.ndim, "shape": list(local.shape), "file": file, "key": name}
        dtype = str(local.dtype).removeprefix("torch.")
        entries[name] = {"dtype": dtype, "shape": list(local.shape), "chunks": [chunk]}
    save_file(payload, directory / file)
    return entries


def open_checkpoint(checkpoint: Path, *, groups: Sequence[str] | None = None, hashes: bool = True) -> Manifest:
    """Read the manifest and prove that the files of `groups` (None: all) are whole. Raises CheckpointError."""
    manifest = commit.read_manifest(checkpoint)
    try:
        for group in manifest["tensors"] if groups is None else groups:
            commit.verify_files(checkpoint, manifest, prefix=f"{group}.", hashes=hashes)
            for name, entry in manifest["tensors"][group].items():
                _check_coverage(checkpoint, name, entry, manifest["files"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: the manifest lacks a field ({error})") from None
    return manifest


def _check_coverage(checkpoint: Path, name: str, entry: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    shape, chunks = entry["shape"], entry["chunks"]
    inside = all(
        len(chunk["offset"]) == len(chunk["shape"]) == len(shape)
        and all(
            o >= 0 and n >= 0 and o + n <= s for o, n, s in zip(chunk["offset"], chunk["shape"], shape, strict=True)
        )
        for chunk in chunks
    )
    # Boxes inside the tensor that do not overlap and have its volume leave nothing out.
    whole = inside and sum(prod(chunk["shape"]) for chunk in chunks) == prod(shape) and not _overlap(chunks)
    if not whole:
        raise CheckpointError(f"{checkpoint}: the chunks of {name} do not cover it whole")
    for chunk in chunks:
        if chunk["file"] not in files:
            raise CheckpointError(f"{checkpoint}: {name} lies in {chunk['file']}, which the manifest does not list")


def _overlap(chunks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two boxes share a place; those that cannot meet along the first dimension are not compared."""
    boxes = sorted([(o, o + n) for o, n in zip(chunk["offset"], chunk["shape"], strict=True)] for chunk in chunks)
    if boxes and not boxes[0]:
        return len(boxes) > 1  # scalars
    open_boxes: list[list[tuple[int, int]]] = []
    for box in boxes:
        open_boxes = [other for other in open_boxes if other[0][1] > box[0][0]]
        if any(all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)) for other in open_boxes):
            return True
        open_boxes.append(box)
    return False


class Reader:
    """Fills tensors from an opened checkpoint."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self.checkpoint = checkpoint
        self._groups = manifest["tensors"]

    def names(self, group: str) -> set[str]:
        return set(self._groups.get(group, ()))

    def fill(self, group: str, targets: Mapping[str, Tensor], *, partly: bool = False) -> None:
        """Fill every tensor of `targets` in place. Raises CheckpointError.

        Shapes and dtypes must be exactly those of the checkpoint, and so must the names, unless only a part of
        the group is wanted.
        """
        entries, missing = self._groups[group], sorted(targets.keys() - self.names(group))
        extra = [] if partly else sorted(self.names(group) - targets.keys())
        if missing or extra:
            raise CheckpointError(
                f"{self.checkpoint}: it is of another model: "
                + "; ".join(f"{what} {names[0]}" for what, names in (("lacks", missing), ("has", extra)) if names)
            )
        for name, target in targets.items():
            entry = entries[name]
            if list(target.shape) != entry["shape"] or target.dtype != DTYPES.get(entry["dtype"]):
                raise CheckpointError(
                    f"{self.checkpoint}: it is of another model: {name} is {entry['dtype']} {entry['shape']} there, "
                    f"{str(target.dtype).removeprefix('torch.')} {list(target.shape)} here"
                )
        self._copy_chunks(entries, targets)

    @torch.no_grad()
    def _copy_chunks(self, entries: Mapping[str, Any], targets: Mapping[str, Tensor]) -> None:
        by_file: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
        for name in targets:
            for chunk in entries[name]["chunks"]:
                by_file.setdefault(chunk["file"], []).append((name, chunk))
        for file, chunks in by_file.items():
            path = self.checkpoint / file
            try:
                with safe_open(path, framework="pt") as stored:
                    for name, chunk in chunks:
                        tensor = stored.get_tensor(chunk["key"])
                        if list(tensor.shape) != chunk["shape"] or tensor.dtype != targets[name].dtype:
                            raise CheckpointError(f"{path}: {chunk['key']} is not the chunk of {name} in the manifest")
                        box = tuple(slice(o, o + n) for o, n in zip(chunk["offset"], chunk["shape"], strict=True))
                        targets[name][box].copy_(tensor)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error})") from None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint directory itself, or the newest of a run directory. Raises ConfigError."""
    if (path / commit.MANIFEST_FILE).is_file():
        return path
    checkpoints = commit.list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise ConfigError(f"checkpoint={path}: neither a checkpoint nor a run directory with one")
    return checkpoints[0]


def load_model_for_inference(
    path: str | Path, device: torch.device, *, compute_dtype: torch.dtype
) -> tuple[Llama, Tokenizer]:
    """The weights of a checkpoint (or of the newest in a run directory) as a model in evaluation mode.

    The attention backend is chosen for this device, whatever the run was trained with.

    Returns the model and the run's tokenizer. Raises CheckpointError, and DataError for another tokenizer.
    """
    checkpoint = find_checkpoint(Path(path))
    manifest = open_checkpoint(checkpoint, groups=["model"])
    try:
        config = replace(build(ModelConfig, manifest["model"]), attention=resolve_backend("auto", device))
        tokenizer_sha256 = manifest["tokenizer_sha256"]
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{checkpoint}: the manifest's model cannot be built ({error})") from None
    tokenizer = Tokenizer(checkpoint.parent.parent / TOKENIZER_FILE)
    if tokenizer.sha256 != tokenizer_sha256:
        raise DataError(
            f"{tokenizer.path}: not the tokenizer {checkpoint} was trained with (SHA-256 {tokenizer_sha256[:12]}…); "
            "put that one back"
        )
    with torch.device("meta"):
        model = Llama(config, compute_dtype=compute_dtype)
    model.to_empty(device=device)
    model.rebuild_rope_tables()
    Reader(checkpoint, manifest).fill("model", dict(model.named_parameters()))
    return model.eval(), tokenizer
