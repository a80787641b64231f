"""Tensors into and out of checkpoint directories.

A tensor is stored as one or more chunks, boxes of its global shape, each an entry of a safetensors file; the
manifest maps names to chunks. So the reader need not know how many processes wrote: it copies from every chunk
the part it needs, after checking that the chunks cover the tensor whole. Tensors come in groups (`model`,
`optimizer`, `rng`), each in files of its own, so that who wants the weights reads nothing else.
"""

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
from llamatrain.errors import CheckpointError, ConfigError
from llamatrain.model.attention import resolve_backend
from llamatrain.model.llama import Llama

TensorGroups = Mapping[str, Mapping[str, Tensor]]
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.uint8)}
TOKENIZER_FILE = "tokenizer.model"


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
        and all(o >= 0 and o + n <= s for o, n, s in zip(chunk["offset"], chunk["shape"], shape, strict=True))
        for chunk in chunks
    )
    distinct = len({tuple(chunk["offset"]) for chunk in chunks}) == len(chunks)
    whole = sum(prod(chunk["shape"]) for chunk in chunks) == prod(shape)
    if not (inside and distinct and whole):
        raise CheckpointError(f"{checkpoint}: the chunks of {name} do not cover it whole")
    for chunk in chunks:
        if chunk["file"] not in files:
            raise CheckpointError(f"{checkpoint}: {name} lies in {chunk['file']}, which the manifest does not list")


def load_group(checkpoint: Path, manifest: Manifest, group: str, targets: Mapping[str, Tensor]) -> None:
    """Fill every tensor of `targets` in place from the checkpoint. Raises CheckpointError.

    Names, shapes and dtypes must be exactly those of the checkpoint.
    """
    entries = manifest["tensors"][group]
    missing, extra = sorted(targets.keys() - entries.keys()), sorted(entries.keys() - targets.keys())
    if missing or extra:
        raise CheckpointError(
            f"{checkpoint}: it is of another model: "
            + "; ".join(f"{what} {names[0]}" for what, names in (("lacks", missing), ("has", extra)) if names)
        )
    for name, target in targets.items():
        entry = entries[name]
        if list(target.shape) != entry["shape"] or target.dtype != DTYPES.get(entry["dtype"]):
            raise CheckpointError(
                f"{checkpoint}: it is of another model: {name} is {entry['dtype']} {entry['shape']} there, "
                f"{str(target.dtype).removeprefix('torch.')} {list(target.shape)} here"
            )
    _copy_chunks(checkpoint, entries, targets)


@torch.no_grad()
def _copy_chunks(checkpoint: Path, entries: Mapping[str, Any], targets: Mapping[str, Tensor]) -> None:
    by_file: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name in targets:
        for chunk in entries[name]["chunks"]:
            by_file.setdefault(chunk["file"], []).append((name, chunk))
    for file, chunks in by_file.items():
        try:
            with safe_open(checkpoint / file, framework="pt") as reader:
                for name, chunk in chunks:
                    stored = reader.get_tensor(chunk["key"])
                    if list(stored.shape) != chunk["shape"] or stored.dtype != targets[name].dtype:
                        raise CheckpointError(
                            f"{checkpoint / file}: {chunk['key']} is not the chunk of {name} in the manifest"
                        )
                    box = tuple(slice(o, o + n) for o, n in zip(chunk["offset"], chunk["shape"], strict=True))
                    targets[name][box].copy_(stored)
        except SafetensorError as error:
            raise CheckpointError(f"{checkpoint / file}: cannot be read ({error})") from None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint directory itself, or the newest of a run directory. Raises CheckpointError."""
    if (path / commit.MANIFEST_FILE).is_file():
        return path
    checkpoints = commit.list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise CheckpointError(f"{path}: neither a checkpoint nor a run directory with one")
    return checkpoints[0]


def load_model_for_inference(
    path: str | Path, device: torch.device, *, compute_dtype: torch.dtype
) -> tuple[Llama, ModelConfig, Path]:
    """The weights of a checkpoint (or of the newest in a run directory) as a model in evaluation mode.

    The attention backend is chosen for this device, whatever the run was trained with.

    Returns the model, its configuration, and the path of the run's tokenizer. Raises CheckpointError.
    """
    checkpoint = find_checkpoint(Path(path))
    manifest = open_checkpoint(checkpoint, groups=["model"])
    try:
        config = replace(build(ModelConfig, manifest["model"]), attention=resolve_backend("auto", device))
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{checkpoint}: the manifest's model cannot be built ({error})") from None
    with torch.device("meta"):
        model = Llama(config, compute_dtype=compute_dtype)
    model.to_empty(device=device)
    model.rebuild_rope_tables()
    load_group(checkpoint, manifest, "model", dict(model.named_parameters()))
    return model.eval(), config, checkpoint.parent.parent / TOKENIZER_FILE
