"""Print samples of a run as text, to see what came in when a loss or a gradient went wrong.

python -m data_tools.show_samples run_dir=RUN_DIR samples=480-487

Samples are numbered from 0 over the whole run, as its messages name them; both ends of a range are shown. Where they
lie follows from the settings of the run's last start and the mixture in its newest checkpoint; the data sets must still
be there.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llamatrain.checkpoint import commit
from llamatrain.cli import run_command
from llamatrain.config import RunConfig
from llamatrain.config.build import build
from llamatrain.data.order import DataState, SampleOrder, Segment, round_weights
from llamatrain.data.shards import open_document_starts, open_tokens
from llamatrain.data.sources import Source, open_sources
from llamatrain.errors import ConfigError
from llamatrain.tokenizer import TOKENIZER_FILE, Tokenizer


@dataclass
class ShowSamplesSettings:
    run_dir: str = "???"
    samples: str = "???"  # FIRST-LAST, or one
    tokens: int = 0  # of each sample, only the first so many; 0: all


def show_samples(settings: ShowSamplesSettings) -> None:
    """Print them. Raises ConfigError, or DataError for data sets that are gone or changed."""
    for name in ("run_dir", "samples"):
        if getattr(settings, name) in ("", "???"):
            raise ConfigError(f"{name} is not set: run_dir=RUN_DIR samples=FIRST-LAST")
    if settings.tokens < 0:
        raise ConfigError(f"tokens={settings.tokens}: must not be negative; 0 shows all")
    first, last = sample_range(settings.samples)
    config = read_config(settings.run_dir)
    sources = open_sources(replace(config.data, verify_hashes=False), vocab_size=None)
    order = SampleOrder(
        [source.name for source in sources],
        [source.windows for source in sources],
        seed=config.data.seed,
        segments=mixture(config, Path(settings.run_dir)),
    )
    tokenizer = Tokenizer(Path(settings.run_dir) / TOKENIZER_FILE)
    where = order.locate(np.arange(first, last + 1))
    columns = (column.tolist() for column in (where.source, where.epoch, where.shard, where.window))
    for sample, (place, epoch, shard, window) in enumerate(zip(*columns, strict=True), start=first):
        source = sources[place]
        begin = window * source.seq_len
        end = begin + (min(settings.tokens, source.seq_len) or source.seq_len)
        file = source.manifest.shards(source.split)[shard].file
        print(f"===== sample {sample}: source {source.name}, epoch {epoch}, {file}, tokens {begin} to {end - 1}")
        for document, offset, text in pieces(source, shard, begin, end, tokenizer):
            print(f"----- document {document}" + (f", from its token {offset} on" if offset else ""))
            print(text)


def sample_range(samples: str) -> tuple[int, int]:
    """First and last of FIRST-LAST, or of one number. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", samples.strip())
    if found is None:
        raise ConfigError(f"samples={samples}: give a range as FIRST-LAST, like samples=480-487, or one number")
    first = int(found[1])
    last = int(found[2] or first)
    if last < first:
        raise ConfigError(f"samples={samples}: the range is empty; samples={last}-{first}")
    return first, last


def read_config(run_dir: str) -> RunConfig:
    """The configuration of the run's last start, as its journal has it. Raises ConfigError."""
    path = Path(run_dir) / "journal.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return build(RunConfig, next(event["config"] for event in reversed(events) if event["event"] == "start"))
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: {path} cannot be read ({error.strerror}); is that a run's folder?"
        ) from None
    except (ValueError, KeyError, TypeError, StopIteration):
        raise ConfigError(f"{path}: no run's journal, or of a run that has not started") from None


def mixture(config: RunConfig, run_dir: Path) -> tuple[Segment, ...]:
    """The run's mixture from its beginning on: as its newest checkpoint has it, or as it would start."""
    for checkpoint in commit.list_checkpoints(run_dir / "checkpoints"):
        return DataState.from_json(commit.read_manifest(checkpoint)["data"]["state"]).segments
    weights = {name: source.weight for name, source in config.data.sources.items()}
    return DataState.start(round_weights(weights)).segments


def pieces(source: Source, shard: int, begin: int, end: int, tokenizer: Tokenizer) -> Iterator[tuple[int, int, str]]:
    """The documents in tokens [begin, end) of a shard: (number in the shard, its token to begin with, the text)."""
    info = source.manifest.shards(source.split)[shard]
    tokens = open_tokens(source.manifest, info)
    starts = open_document_starts(source.manifest, info)
    # in the dtype of starts: for another, searchsorted would convert all of them
    low, high = np.searchsorted(starts, np.array((begin, end), starts.dtype), side="left").tolist()
    if low == len(starts) or int(starts[low]) > begin:
        low -= 1  # the document that began before
    for document in range(low, high):
        start = int(starts[document])
        stop = int(starts[document + 1]) if document + 1 < len(starts) else end
        text = tokenizer.decode(tokens[max(start, begin) : min(stop, end)].tolist())
        yield document, max(start, begin) - start, text


def main() -> None:
    run_command(ShowSamplesSettings, "data_tools/show_samples", show_samples, help_text=__doc__)


if __name__ == "__main__":
    main()
