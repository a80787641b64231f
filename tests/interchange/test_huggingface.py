"""Hugging Face's directories: Transformers computes the same logits, and what it may mean otherwise is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamatrain.checkpoint.inference import load_model_for_inference
from llamatrain.errors import CheckpointError
from tests.conftest import TINY_VOCAB
from tests.interchange.converting import CPU, SHAPES, assert_same_weights, built, change_json, converted, loaded
from tests.interchange.test_pickles import Evil


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same_logits_and_back(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    ours = built(**SHAPES[name])
    there = converted(checkpoint(**SHAPES[name]), tmp_path / "there", "huggingface", max_shard_gib=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(there)
    tokens = torch.randint(TINY_VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = ours(tokens)
        assert (theirs(tokens).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        for parameter in theirs.parameters():  # other weights, written by transformers
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
        back = converted(tmp_path / "theirs", tmp_path / "back", "llamatrain", tokenizer=str(there / "tokenizer.model"))
        wanted = theirs(tokens).logits
        assert (loaded(back)(tokens) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
def test_transformers_writes_on_as_generate_does(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llamatrain.model.generation import generate

    run = checkpoint(n_kv_heads=2)
    there = converted(run, tmp_path / "there", "huggingface")
    ours, tokenizer = load_model_for_inference(run, CPU, compute_dtype=torch.float32)
    prompt = " The year was 1984"
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(there), AutoTokenizer.from_pretrained(there)
    inputs = their_tokenizer(prompt, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == tokenizer.encode(prompt, bos=True)
    continued = theirs.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()
    ids = tokenizer.encode(prompt, bos=True)
    wanted = generate(
        ours, [ids], max_new_tokens=20, temperature=0, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
    )
    assert continued == ids + wanted[0]


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"model_type": "mistral"}, r'model_type is "mistral"'),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, 'rope_parameters is of type "yarn"'),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2}}, 'rope_parameters has "factor"'),
        ({"rope_parameters": "partial_rotary_factor"}, "must be an object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"rope_theta": 1e4}, "are not the same"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"hidden_size": 128, "head_dim": 32}, r"is \[520, 64\], and \[520, 128\]"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"hidden_size": "64"}, 'hidden_size is "64"'),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    ],
)
def test_what_this_program_does_not_compute_is_refused_by_name(
    there: Path, tmp_path: Path, changes: dict[str, Any], refusal: str
) -> None:
    change_json(there / "config.json", **changes)
    with pytest.raises(CheckpointError, match=refusal):
        converted(there, tmp_path / "back", "llamatrain")
    assert not (tmp_path / "back").exists()


def test_settings_that_are_not_known_are_told(there: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_json(there / "config.json", some_vendor_version="1.2")
    converted(there, tmp_path / "back", "llamatrain")
    assert "taken to have no part in the computation: some_vendor_version" in caplog.text


def test_an_index_that_points_elsewhere_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    there = converted(checkpoint(), tmp_path / "there", "huggingface", max_shard_gib=1e-4)
    index = there / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for file, refusal in (
        ("../x.safetensors", r"is to lie in '\.\./x"),
        ("model.pkl", "is to lie in 'model.pkl'"),
        ("x" * 300 + ".safetensors", "there is no such file"),
    ):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], "lm_head.weight": file}}))
        with pytest.raises(CheckpointError, match=refusal):
            converted(there, tmp_path / "back", "llamatrain")
    moved = {**good["weight_map"], "lm_head.weight": good["weight_map"]["model.embed_tokens.weight"]}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match=r"disagree about lm_head\.weight"):
        converted(there, tmp_path / "back", "llamatrain")


def test_old_pickled_weights_are_read_too(there: Path, tmp_path: Path) -> None:
    weights = load_file(there / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(weights, there / "pytorch_model.bin")
    (there / "model.safetensors").unlink()
    assert_same_weights(loaded(converted(there, tmp_path / "back", "llamatrain")), built())
    torch.save({**weights, "x": Evil(tmp_path / "ran")}, there / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        converted(there, tmp_path / "again", "llamatrain")


def test_links_are_followed_as_the_hubs_cache_is_made_of_them(
    exported: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in exported.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert_same_weights(loaded(converted(snapshot, tmp_path / "back", "llamatrain")), built())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"model\.safetensors|there is no"):
        converted(snapshot, tmp_path / "again", "llamatrain")
