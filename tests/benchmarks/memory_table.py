"""Memory of a device by formula, for the sizes of the paper on GPUs of several sizes: the table of docs/parallelism.md.

    python -m tests.benchmarks.memory_table [--seq-len 2048] [--micro-batch 1]

bf16, compiled, sharded over all ranks or over those of one copy (dp_shard), nothing else shared.
"""

import argparse

from llamatrain.config import DataConfig, RunConfig, TrainConfig
from llamatrain.config.parallel import ParallelConfig
from llamatrain.memory import training_memory
from tests.benchmarks.report import table
from tests.benchmarks.workload import preset

SHAPES = (("7b", 8), ("13b", 8), ("33b", 8), ("33b", 16), ("65b", 16), ("65b", 32), ("65b", 64))
CHOICES = ("none", "block_backward", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=1)
    arguments = parser.parse_args()
    rows = []
    for name, shards in SHAPES:
        tokens = shards * arguments.micro_batch * arguments.seq_len
        config = RunConfig(
            model=preset(name, attention="sdpa"),
            data=DataConfig(seq_len=arguments.seq_len),
            train=TrainConfig(
                micro_batch=arguments.micro_batch, global_batch_tokens=4 * tokens, precision="bf16", compile=True
            ),
            parallel=ParallelConfig(dp_shard=shards),
        )
        sizes = [sum(training_memory(config, choice, world_size=shards).values()) / 2**30 for choice in CHOICES]
        rows.append([name, str(shards), *(f"{size:.1f}" for size in sizes)])
    print(table(["model", "dp_shard", *(f"{choice}, GiB" for choice in CHOICES)], rows))


if __name__ == "__main__":
    main()
