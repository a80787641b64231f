"""Directories as transformers' LlamaForCausalLM reads and writes them: config.json, safetensors files and their index.

Names and the rows of wq and wk differ from ours (`checkpoint.interop`). A configuration that asks for anything that
this program does not compute is refused by name, since the weights would load and be wrong.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamatrain.arithmetic import parameter_shapes
from llamatrain.checkpoint.interchange import pickles, safetensors_files
from llamatrain.checkpoint.interchange.hf_tokenizer import tokenizer_files
from llamatrain.checkpoint.interchange.source import (
    Cast,
    Region,
    Source,
    check_regions,
    check_shapes,
    checked_model,
    counted,
    in_files,
    log,
    number,
    parameter_bytes,
    read_json,
    shown,
    whole,
)
from llamatrain.checkpoint.interop import halves_to_pairs, hf_name, pairs_to_halves
from llamatrain.config.model import ModelConfig
from llamatrain.errors import CheckpointError
from llamatrain.files import sha256_of_json
from llamatrain.tokenizer import TOKENIZER_FILE, Tokenizer

CONFIG_FILE = "config.json"
SAFETENSORS, PICKLES, INDEX = "model.safetensors", "pytorch_model.bin", "{}.index.json"
HEAD = "lm_head.weight"

# What a value other than these would change in the computation. None: absent or null.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], ["LLaMAForCausalLM"], None),
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (1, 1.0, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
}
# What is read, and what has no part in the computation.
READ = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "rope_theta", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "head_dim",
    "initializer_range",
}  # fmt: skip
IDLE = {
    "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "pretraining_tp", "attention_dropout", "_name_or_path", "max_sequence_length", "return_dict", "output_attentions",
    "output_hidden_states", "torchscript", "id2label", "label2id", "chunk_size_feed_forward", "is_decoder",
    "problem_type", "_attn_implementation_autoset", "finetuning_task", "task_specific_params", "unk_token_id",
}  # fmt: skip


def looks_like(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSource(Source):
    """The weights of a directory."""

    regions: Mapping[str, Region]

    def dtype_of(self, name: str) -> torch.dtype:
        return self.regions[hf_name(name)].dtype

    def read(self, name: str) -> Tensor:
        return halves_to_pairs(name, self.regions[hf_name(name)].read(), self.model)


def open_source(path: Path, *, max_seq_len: int | None) -> HuggingFaceSource:
    """A directory of transformers, its configuration, sizes and shapes checked. Raises CheckpointError."""
    content = read_json(path / CONFIG_FILE)
    refuse_what_is_not_computed(content, path / CONFIG_FILE)
    files = _weight_files(path)
    regions = _regions(path, files)
    model = checked_model(model_of(content, path / CONFIG_FILE, max_seq_len), path / CONFIG_FILE, tensors=len(regions))
    left_out = {HEAD} if model.tied_embeddings else set()
    kept = {k: v for k, v in regions.items() if k not in left_out and not k.endswith("rotary_emb.inv_freq")}
    wanted = {hf_name(name): shape for name, shape in parameter_shapes(model).items()}
    check_shapes({name: region.shape for name, region in kept.items()}, wanted, path)
    sizes = {file: (path / file).stat().st_size for file in sorted({region.path.name for region in kept.values()})}
    tokenizer = path / TOKENIZER_FILE
    return HuggingFaceSource(
        path=path,
        model=model,
        regions=kept,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        origin={"format": "huggingface", "files": sizes, "config_sha256": sha256_of_json(content)},
    )


def refuse_what_is_not_computed(content: Mapping[str, Any], where: Path) -> None:
    """Raises CheckpointError naming what a config.json asks for and this program does not compute."""
    for key, possible in REQUIRED.items():
        value = content.get(key)
        if key == "rope_scaling" and isinstance(value, dict) and _rope_type(value) == "default":
            continue
        if not any(type(value) is type(choice) and value == choice for choice in possible):
            told = " or ".join(json.dumps(choice) for choice in possible if choice is not None) or "null"
            raise CheckpointError(
                f"{where}: {key} is {shown(value)}; this program computes models with {key} {told}, and "
                "with another the weights would give something else"
            )
    rope = content.get("rope_parameters")
    if rope is not None:
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: rope_parameters is {shown(rope)}, and must be an object")
        extra = sorted(rope.keys() - {"rope_type", "type", "rope_theta"})
        if extra and not (extra == ["partial_rotary_factor"] and rope["partial_rotary_factor"] in (None, 1)):
            raise CheckpointError(
                f"{where}: rope_parameters has {shown(extra[0])}, which this program does not compute"
            )
        if _rope_type(rope) != "default":
            raise CheckpointError(
                f'{where}: rope_parameters is of type {shown(_rope_type(rope))}; only "default" is computed'
            )
    if unknown := sorted(content.keys() - REQUIRED.keys() - READ - IDLE):
        log.warning("%s: taken to have no part in the computation: %s", where, ", ".join(unknown))


def _rope_type(content: Mapping[str, Any]) -> Any:
    return content.get("rope_type", content.get("type", "default"))


def model_of(content: Mapping[str, Any], where: Path, max_seq_len: int | None = None) -> ModelConfig:
    """The shape that a config.json describes. Raises CheckpointError."""
    dim, heads = whole(content, "hidden_size", where), whole(content, "num_attention_heads", where)
    kv_heads, width = whole(content, "num_key_value_heads", where, heads), whole(content, "intermediate_size", where)
    if heads and whole(content, "head_dim", where, dim // heads or 1) != dim // heads:
        raise CheckpointError(
            f"{where}: head_dim is {content['head_dim']}; this program computes hidden_size / num_attention_heads = "
            f"{dim // heads}"
        )
    tied = content.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise CheckpointError(f"{where}: tie_word_embeddings is {shown(tied)}, and must be true or false")
    rope = content.get("rope_parameters") or {}
    if "rope_theta" in rope and content.get("rope_theta") not in (None, rope["rope_theta"]):
        raise CheckpointError(f"{where}: rope_theta and rope_parameters.rope_theta are not the same")
    return ModelConfig(
        dim=dim,
        n_layers=whole(content, "num_hidden_layers", where),
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        ffn_dim=None if width == ModelConfig(dim=dim).ffn_width else width,
        vocab_size=whole(content, "vocab_size", where),
        max_seq_len=max_seq_len or whole(content, "max_position_embeddings", where, 2048),
        rope_theta=number({"rope_theta": content.get("rope_theta"), **rope}, "rope_theta", where, 10000.0),
        norm_eps=number(content, "rms_norm_eps", where, 1e-6),
        tied_embeddings=tied,
        init_std=number(content, "initializer_range", where, 0.02),
    )


def _weight_files(path: Path) -> dict[str, set[str] | None]:
    """The files with weights, and which tensors the index says are in each; None: there is no index."""
    for single in (SAFETENSORS, PICKLES):
        index = path / INDEX.format(single)
        if index.is_file():
            placed = read_json(index).get("weight_map")
            if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
                raise CheckpointError(f"{index}: it does not say in which files the tensors are")
            files: dict[str, set[str] | None] = {}
            for name, file in placed.items():
                if Path(file).name != file or not file.endswith(Path(single).suffix):
                    raise CheckpointError(f"{index}: {name} is to lie in {file!r}, no {Path(single).suffix} file there")
                own = files.setdefault(file, set())
                assert own is not None
                own.add(name)
            return files
        if (path / single).is_file():
            return {single: None}
    raise CheckpointError(f"{path}: there is no {SAFETENSORS}, no {PICKLES}, and no index of parts of one")


def _regions(path: Path, files: Mapping[str, set[str] | None]) -> dict[str, Region]:
    regions: dict[str, Region] = {}
    for file, names in sorted(files.items()):
        reader = safetensors_files if file.endswith(".safetensors") else pickles
        found = reader.read_header(path / file)
        check_regions(found)
        if names is not None and names != found.keys():
            raise CheckpointError(f"{path / file}: the index and the file disagree about {min(names ^ found.keys())}")
        regions |= found
    return regions


# ---------------------------------------------------------------------- writing


def config_of(model: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a model. The rotary base stands where transformers 4 and where 5 looks for it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def generation_config_of(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json; ids that the model has and the tokenizer has not are never drawn."""
    content: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if tokenizer.vocab_size < model.vocab_size:
        content["suppress_tokens"] = list(range(tokenizer.vocab_size, model.vocab_size))
    return content


def write(
    directory: Path, weights: Cast, tokenizer: Tokenizer, *, largest_file: int, told: Callable[[int], None]
) -> None:
    """Write a source's weights, its configuration and its tokenizer. `told` hears the bytes written."""
    model, shapes, sizes = weights.source.model, parameter_shapes(weights.source.model), parameter_bytes(weights)
    parts = list(in_files(sizes.items(), largest_file))
    files = [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = [SAFETENSORS]
    contents: dict[str, Any] = {
        CONFIG_FILE: config_of(model, tokenizer, weights.dtype_of("tok_embeddings.weight")),
        "generation_config.json": generation_config_of(model, tokenizer),
        **tokenizer_files(tokenizer, longest=model.max_seq_len),  # before the weights: it may be refused
    }
    if len(parts) > 1:
        placed = {hf_name(name): file for file, names in zip(files, parts, strict=True) for name in names}
        contents[INDEX.format(SAFETENSORS)] = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": placed,
        }
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    for file, names in zip(files, parts, strict=True):
        described = {hf_name(name): (weights.dtype_of(name), shapes[name]) for name in names}
        tensors = (pairs_to_halves(name, weights.read(name), model) for name in names)
        safetensors_files.write(directory / file, described, counted(tensors, told), {"format": "pt"})
