"""A checkpoint's weights as a model that generates, with the tokenizer it was trained with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from llamatrain.arithmetic import parameter_shapes
from llamatrain.checkpoint import commit, store
from llamatrain.config import ModelConfig
from llamatrain.config.build import build
from llamatrain.config.model import check_model
from llamatrain.distributed import World
from llamatrain.errors import CheckpointError, ConfigError, DataError
from llamatrain.model.llama import Llama
from llamatrain.tokenizer import TOKENIZER_FILE, Tokenizer


def load_model_for_inference(
    path: str | Path,
    device: torch.device,
    *,
    compute_dtype: torch.dtype,
    build_part: Callable[[ModelConfig], Llama] | None = None,
    world: World | None = None,
) -> tuple[Llama, Tokenizer]:
    """The weights of a checkpoint (or of the newest in a run directory) as a model in evaluation mode.

    Attention is torch's own, which runs on every device, whatever the run was trained with. build_part: makes what
    this rank has of the model, in memory without values; None: all of it, in `compute_dtype`. With a world all its
    ranks call this, and divide the work of proving that the files are whole.

    Returns the model and the run's tokenizer. Raises CheckpointError, and DataError for another tokenizer.
    """
    checkpoint = commit.find_checkpoint(Path(path))
    manifest = store.open_checkpoint(checkpoint, groups=["model"], world=world)
    described = {name: tuple(entry["shape"]) for name, entry in manifest["tensors"]["model"].items()}
    try:
        config = replace(build(ModelConfig, manifest["model"]), attention="sdpa")
        check_model(config)
        if config.n_layers > len(described) or parameter_shapes(config) != described:
            raise ConfigError("its tensors are of another")
        tokenizer_sha256 = str(manifest["tokenizer_sha256"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: the manifest's model cannot be built ({error})") from None
    tokenizer = Tokenizer(checkpoint.parent.parent / TOKENIZER_FILE)
    if tokenizer.sha256 != tokenizer_sha256:
        raise DataError(
            f"{tokenizer.path}: not the tokenizer {checkpoint} was trained with (SHA-256 {tokenizer_sha256[:12]}…); "
            "put that one back"
        )
    if build_part is not None:
        model = build_part(config)
    else:
        with torch.device("meta"):
            model = Llama(config, compute_dtype=compute_dtype)
        model.to_empty(device=device)
        model.rebuild_rope_tables()
    store.Reader(checkpoint, manifest).fill("model", dict(model.named_parameters()))
    return model.eval(), tokenizer
