"""Time and memory of conversions of random weights: Meta's → Hugging Face's → llamatrain → Meta's.

    python -m tests.benchmarks.bench_convert --model 1b --shards 8 --directory SCRATCH

Memory is what a conversion adds to its process's at most. SCRATCH takes 6 times the model in fp32 at most, and is left
empty.
"""

import argparse
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from data_tools.train_tokenizer import TrainTokenizerSettings, train_tokenizer
from llamatrain.arithmetic import parameter_count, parameter_shapes
from llamatrain.checkpoint.interchange import meta
from llamatrain.checkpoint.interchange.source import Cast, Source
from llamatrain.cli import config_directory
from llamatrain.config.build import build
from llamatrain.config.model import ModelConfig
from llamatrain.tokenizer import TOKENIZER_FILE
from tests.interchange.memory import memory_taken


@dataclass(frozen=True, kw_only=True)
class Drawn(Source):
    """Weights that lie nowhere."""

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.float16

    def read(self, name: str) -> Tensor:
        return torch.randn(parameter_shapes(self.model)[name], generator=torch.Generator().manual_seed(1)).half()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="300m")
    parser.add_argument("--shards", type=int, default=4, help="of the last; must divide the model's heads")
    parser.add_argument("--directory", type=Path, default=None)
    arguments = parser.parse_args()
    model = build(ModelConfig, yaml.safe_load((config_directory() / "model" / f"{arguments.model}.yaml").read_text()))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        root = Path(scratch)
        first = root / "first"
        text = str(Path(sysconfig.get_path("stdlib")) / "argparse.py")
        train_tokenizer(TrainTokenizerSettings(input=text, output=str(first), vocab_size=400))
        drawn = Drawn(path=first, model=model, tokenizer=first / TOKENIZER_FILE, origin={})
        meta.write(first, Cast(drawn), shards=2, told=lambda count: None)
        print(f"{parameter_count(model):,} parameters")
        measure(first, root / "second", "huggingface", gib=1.0)
        measure(root / "second", root / "third", "llamatrain", gib=2.0)
        measure(root / "third", root / "fourth", "meta", shards=arguments.shards)


def measure(source: Path, output: Path, to: str, *, shards: int = 1, gib: float = 5.0) -> None:
    began = time.perf_counter()
    peak = memory_taken(source, output, to, shards=shards, gib=gib)
    seconds = time.perf_counter() - began
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"to {to}: {seconds:.0f} s, {written / 2**30:.2f} GiB written, {peak / 2**20:.0f} MiB of memory", flush=True)


if __name__ == "__main__":
    main()
