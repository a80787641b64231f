"""Tokens per second of one rank's loader on shards in the page cache, beside the machine's memory bandwidth.

    python -m tests.benchmarks.bench_loader

Everything is the run's own code: sources, order, thread, batches. The repetitions of all rows are interleaved,
so that a busy moment of the machine hits every row alike. Each file stands in its manifest several times:
the order is then that of a large corpus, and the bytes fit into memory.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from llamatrain.config.data import DataConfig, SourceConfig
from llamatrain.data.loader import Loader
from llamatrain.data.order import DataState, SampleOrder, round_weights
from llamatrain.data.shards import Manifest, ShardInfo, write_manifest
from llamatrain.data.sources import Source, open_sources

WEIGHTS = {  # the paper's table 1
    "commoncrawl": 0.67,
    "c4": 0.15,
    "github": 0.045,
    "wikipedia": 0.045,
    "books": 0.045,
    "arxiv": 0.025,
    "stackexchange": 0.02,
}
GLOBAL_BATCH = 2_048  # the paper's 4M tokens
SEQ_LEN = 2_048
WARM_UP_SAMPLES = 512  # of rank 0; they touch every file
MEAN_DOCUMENT = 600  # tokens
CASES = [  # (world size, micro-batch, document mask)
    (1, 1, False),
    (1, 4, False),
    (1, 16, False),
    (8, 16, False),
    (64, 16, False),
    (64, 1, False),
    (512, 4, False),
    (512, 1, False),
    (2_048, 1, False),
    (8, 16, True),
    (512, 4, True),
]


def write_source(directory: Path, name: str, *, shards: int, tokens: int, listed: int) -> None:
    """A data set of noise whose manifest names every file `listed` times."""
    directory.mkdir()
    random = np.random.default_rng(len(name))
    noise = random.integers(0, 32_000, tokens, dtype=np.uint16)
    starts = np.sort(random.choice(tokens, tokens // MEAN_DOCUMENT, replace=False)).astype(np.uint64)
    starts[0] = 0
    infos = []
    for number in range(shards):
        np.roll(noise, number).tofile(directory / f"{number}.bin")
        starts.tofile(directory / f"{number}.idx")
        infos.append(ShardInfo(f"{number}.bin", tokens, len(starts), 0, "", f"{number}.idx", ""))
    write_manifest(
        Manifest(directory, name, "uint16", "", 32_000, 1, 2, True, True, splits={"train": tuple(infos * listed)})
    )


def copy_bandwidth() -> float:
    """Bytes per second numpy moves when it copies: read plus written."""
    source = np.ones(1 << 24)  # 128 MiB, beyond any cache
    target = np.zeros_like(source)
    begin = time.perf_counter()
    target[:] = source
    return 2 * source.nbytes / (time.perf_counter() - begin)


def loader_speed(sources: list[Source], world: int, micro: int, mask: bool, tokens: int) -> float:
    """Tokens per second of rank 0 over about `tokens` tokens, once the files are open."""
    order = SampleOrder(
        [source.name for source in sources],
        [source.windows for source in sources],
        seed=0,
        segments=(state := DataState.start(round_weights(WEIGHTS))).segments,
    )
    steps = max(4, tokens // (SEQ_LEN * GLOBAL_BATCH // world))
    with Loader(
        sources,
        order,
        state,
        seq_len=SEQ_LEN,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro,
        world_size=world,
        document_mask=mask,
    ) as loader:
        for _ in range(max(2, WARM_UP_SAMPLES * world // GLOBAL_BATCH)):
            next(loader)
        begin, count = time.perf_counter(), 0
        for _ in range(steps):
            for micro_batch in next(loader).micro_batches():
                count += micro_batch.inputs.numel()
        return count / (time.perf_counter() - begin)


def row(name: str, values: list[float]) -> str:
    return f"| {name} | {min(values):,.1f} | {statistics.median(values):,.1f} | {max(values):,.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=14, help="files, over the seven sources")
    parser.add_argument("--shard-tokens", type=int, default=50_000_000)
    parser.add_argument("--listed", type=int, default=4, help="times each file stands in its manifest")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="tokens of a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in WEIGHTS:
            shards = max(1, arguments.shards // len(WEIGHTS))
            write_source(
                Path(folder) / name,
                name,
                shards=shards,
                tokens=arguments.shard_tokens,
                listed=arguments.listed,
            )
        entries = {name: SourceConfig(f"{folder}/{name}", weight) for name, weight in WEIGHTS.items()}
        sources = open_sources(DataConfig(sources=entries, seq_len=SEQ_LEN), vocab_size=32_000)
        for path in Path(folder).glob("*/*.bin"):
            path.read_bytes()  # into the page cache
        speeds: dict[tuple[int, int, bool], list[float]] = {case: [] for case in CASES}
        bandwidths = []
        for _ in range(arguments.repetitions):
            bandwidths.append(copy_bandwidth() / 1e9)
            for case in CASES:
                speeds[case].append(loader_speed(sources, *case, arguments.tokens) / 1e6)
    print("| one process | min | median | max |\n|---|---|---|---|")
    for (world, micro, mask), values in speeds.items():
        masked = ", document mask" if mask else ""
        print(row(f"million tokens/s: rank 0 of {world:,}, micro-batch {micro}{masked}", values))
    print(row("memory copy, GB/s (read + written)", bandwidths))


if __name__ == "__main__":
    main()
