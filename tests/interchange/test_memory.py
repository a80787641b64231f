"""A conversion holds a few tensors, however large the model."""

from pathlib import Path

import pytest
import torch

from llamatrain.config.model import ModelConfig
from llamatrain.model.llama import Llama
from tests.interchange.converting import run_with
from tests.interchange.memory import memory_taken


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
def test_a_conversion_takes_less_memory_than_two_shards(tiny_tokenizer: Path, tmp_path: Path) -> None:
    config = ModelConfig(dim=512, n_layers=24, n_heads=8, vocab_size=2048, attention="sdpa")
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    run = run_with(model, tmp_path, tiny_tokenizer)
    total = sum(parameter.nbytes for parameter in model.parameters())
    del model
    shard = total // 4  # 83 MB
    assert shard > 80e6
    peaks = {}
    peaks["meta"] = memory_taken(run, tmp_path / "meta", "meta", shards=4)
    peaks["huggingface"] = memory_taken(tmp_path / "meta", tmp_path / "hf", "huggingface", gib=shard / 2**30)
    peaks["llamatrain"] = memory_taken(tmp_path / "hf", tmp_path / "own", "llamatrain", gib=shard / 2**30)
    print({to: f"{peak / 2**20:.0f} MiB of {shard / 2**20:.0f} MiB a shard" for to, peak in peaks.items()})
    assert all(peak < 2 * shard for peak in peaks.values()), peaks
