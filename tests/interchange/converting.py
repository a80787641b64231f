"""Runs of a tiny model and conversions of them, for all tests of the forms."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from llamatrain.checkpoint import store
from llamatrain.checkpoint.inference import load_model_for_inference
from llamatrain.checkpoint.interchange.conversion import convert
from llamatrain.config.convert import ConvertConfig, check_convert
from llamatrain.model.llama import Llama
from llamatrain.tokenizer import Tokenizer
from tests.conftest import TINY_VOCAB
from tests.test_model import tiny

CPU = torch.device("cpu")
ROWS = TINY_VOCAB + 8  # of the embedding: the tokenizer has fewer ids than the model
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "tied": {"tied_embeddings": True},
    "wide": {"ffn_dim": 88, "n_kv_heads": 2},
}


def built(**changes: Any) -> Llama:
    return tiny(vocab_size=ROWS, **changes).eval()


def run_with(model: Llama, directory: Path, tokenizer: Path) -> Path:
    (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    content = {
        "tokens": 4096,
        "model": dataclasses.asdict(model.config),
        "tokenizer_sha256": Tokenizer(tokenizer).sha256,
    }
    groups = {"model": dict(model.named_parameters()), "optimizer": {"first.norm.weight": torch.ones(3)}}
    store.save(directory / "checkpoints", 7, groups, content)
    return directory


def converted(source: Path, output: Path, to: str, **changes: Any) -> Path:
    config = ConvertConfig(input=str(source), output=str(output), to=to, **changes)
    check_convert(config)
    return convert(config)


def loaded(path: Path) -> Llama:
    return load_model_for_inference(path, CPU, compute_dtype=torch.float32)[0]


def assert_same_weights(model: Llama, other: Llama, *, dtype: torch.dtype = torch.float32) -> None:
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name].to(dtype), theirs[name].to(dtype))] == []


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
