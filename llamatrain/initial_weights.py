"""The weights that a run begins with: drawn by its seed, or those of another checkpoint (`init.from`).

Continued pretraining takes weights and nothing else: the optimizer, the schedule and the samples begin anew. Each rank
reads what it has of the weights, so a checkpoint of any mesh begins a run on any other. Which it was stands in the
run's config.yaml, by the hash of its manifest, and in the journal; a resumed run reads it no more.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llamatrain.arithmetic import parameter_shapes
from llamatrain.checkpoint import commit, store
from llamatrain.config import ModelConfig, RunConfig
from llamatrain.config.build import build
from llamatrain.config.init import CAN_DIFFER
from llamatrain.distributed import World
from llamatrain.errors import CheckpointError, ConfigError, DataError
from llamatrain.flat import FlatPart
from llamatrain.model.init import init_parameters
from llamatrain.run_directory import RunDirectory

log = logging.getLogger("llamatrain")


def find_origin(path: str) -> Path:
    """The checkpoint that `init.from` names. Raises ConfigError if there is none, saying what makes one."""
    return commit.find_checkpoint(Path(path), setting="init.from")


def origin_hash(config: RunConfig) -> str | None:
    """The hash of the manifest of what the run is to begin with; None if its weights are drawn."""
    return None if config.init.from_ is None else commit.manifest_hash(find_origin(config.init.from_))


def make_weights(
    config: RunConfig,
    parameters: Mapping[str, Tensor | FlatPart],
    *,
    tokenizer_sha256: str,
    directory: RunDirectory,
    world: World,
) -> None:
    """Fill what this rank has of the parameters; all ranks call it. Raises LlamatrainError."""
    if config.init.from_ is None:
        init_parameters(parameters, config.model, seed=config.train.seed)
        return
    asked = config.init.from_
    path, found = world.decide(lambda: ((origin := find_origin(asked)), commit.manifest_hash(origin)))
    if config.init.sha256 not in (None, found):
        raise CheckpointError(
            f"init.from={asked}: the manifest of {path.name} there has the hash {found}, and init.sha256 is "
            f"{config.init.sha256}; put that checkpoint back, or name its step"
        )
    manifest = store.open_checkpoint(path, groups=["model"], hashes=config.checkpoint.verify_hashes, world=world)
    with world.together():
        check_fits(config, manifest, path, tokenizer_sha256)
        store.Reader(path, manifest).fill("model", parameters, everywhere=set(parameter_shapes(config.model)))
    tokens = manifest.get("tokens", 0)
    directory.record("initial weights", path=str(path), manifest_sha256=found, tokens=tokens)
    log.info("beginning with the weights of %s (%s tokens; manifest %s…)", path, f"{tokens:,}", found[:12])


def check_fits(config: RunConfig, manifest: Mapping[str, Any], path: Path, tokenizer_sha256: str) -> None:
    """Refuse weights of another model, or of another tokenizer, naming every setting that would have to change."""
    try:
        model, sha256 = build(ModelConfig, manifest["model"]), manifest["tokenizer_sha256"]
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the manifest's model cannot be used ({error})") from None
    ours, theirs = _meaning(config.model), _meaning(model)
    differing = {key: value for key, value in theirs.items() if ours[key] != value and key not in config.init.allow}
    if differing:
        told = ", ".join(f"{key} is {ours[key]} here" for key in differing)
        others = " ".join(f"{key}={_typed(value)}" for key, value in differing.items())
        can = [key for key in differing if key in CAN_DIFFER]
        way = f"; where that is what you want, init.allow=[{','.join(can)}]" if len(can) == len(differing) else ""
        raise ConfigError(f"init.from={path}: its weights are of a model with {others} ({told}): set that{way}")
    if sha256 != tokenizer_sha256 and "data.tokenizer" not in config.init.allow:
        raise DataError(
            f"init.from={path}: its weights were trained with another tokenizer (SHA-256 {str(sha256)[:12]}…) than the "
            f"data was made with ({tokenizer_sha256[:12]}…), so its ids would mean other words; tokenize the data with "
            "that one (init.allow=[data.tokenizer] takes them all the same)"
        )


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """What must agree, by setting; widths as they are and not how they were typed."""
    return {
        "model.dim": model.dim,
        "model.n_layers": model.n_layers,
        "model.n_heads": model.n_heads,
        "model.n_kv_heads": model.kv_heads,
        "model.ffn_dim": model.ffn_width,
        "model.vocab_size": model.vocab_size,
        "model.tied_embeddings": model.tied_embeddings,
        "model.rope_theta": model.rope_theta,
        "model.norm_eps": model.norm_eps,
    }


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
