"""Prepared sources as a mixture to train on, with the paper's proportions.

    python -m data_tools.mix input=DIRECTORIES output=FOLDER [weight.NAME=PERCENT …]
    python -m llamatrain.train --config-dir FOLDER data=mixture …

Prints the mixture as the paper's Table 1 does (share of the samples, epochs at `train_tokens`, size of the text), with
tokens and bytes per token. A data set is known by the `source` in its dataset.json: it takes the share of the one of
the paper's sources that it is named after (github, or wikipedia-de). Data sets of one source divide its share as they
have tokens, so that all are seen equally often. Any other source needs weight.NAME=PERCENT.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_tools.documents import input_list
from llamatrain.cli import run_command
from llamatrain.data.order import round_weights
from llamatrain.data.shards import DTYPES, INDEX_DTYPE, MANIFEST_FILE, SPLITS, Manifest, check_sizes, read_manifest
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import write_bytes_atomically

PAPER_TOKENS = 1_400_000_000_000  # of the 33B and 65B models
PAPER_PERCENT = {  # sampling proportions of Table 1
    "common_crawl": 67.0,
    "c4": 15.0,
    "github": 4.5,
    "wikipedia": 4.5,
    "books": 4.5,
    "arxiv": 2.5,
    "stackexchange": 2.0,
}


@dataclass
class MixSettings:
    input: Any = "???"  # a directory of data sets, or a list: where a dataset.json is, or above
    output: str | None = None  # folder for data/NAME.yaml, for --config-dir; null: print the table only
    name: str = "mixture"  # for data=NAME
    train_tokens: int = PAPER_TOKENS  # length of the training, for the epochs
    weight: dict[str, float] = field(default_factory=dict)  # NAME: percent of the samples
    overwrite: bool = False  # replace another mixture of this name


def check_settings(settings: MixSettings) -> None:
    """Raises ConfigError."""
    if settings.train_tokens < 1:
        raise ConfigError(f"train_tokens={settings.train_tokens}: must be at least 1")
    if not re.fullmatch(r"[\w-]+", settings.name):
        raise ConfigError(f"name={settings.name}: give letters, digits, - and _ only")
    for name, weight in settings.weight.items():
        if weight < 0:
            raise ConfigError(f"weight.{name}={weight}: must not be negative; 0 leaves it out")


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    path: Path
    weight: float
    share: float  # of the samples, as training rounds it
    epochs: float
    tokens: int  # to train on
    text_bytes: int  # of those tokens
    shard_bytes: int  # of the data set's files, both splits
    byte_share: float | None  # of its tokens, those of a single byte that is no line feed; None: not counted

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens


# Which source has which share


def group_of(name: str) -> str:
    """The paper's source that a name stands for, alone or with a part after it (Stack-Exchange, wikipedia_de).

    Any other name stands for itself, or what is before its number where data sets have the same (web-2).
    """
    for known in PAPER_PERCENT:
        spelled = known.replace("_", "[-_ ]?").replace("kex", "k[-_ ]?ex")
        if re.fullmatch(rf"{spelled}([^A-Za-z0-9].*)?", name, re.IGNORECASE):
            return known
    return re.sub(r"-\d+$", "", name)


def weights_of(tokens: Mapping[str, int], percent: Mapping[str, float]) -> dict[str, float]:
    """Percent of the samples for each source, by its tokens; `percent` is what was said of some. Raises ConfigError.

    A percent of a group is that of all its sources that have none of their own.
    """
    all_groups = {name: group_of(name) for name in tokens}
    own = {name for name in percent if name in tokens and all(all_groups[o] != name for o in tokens if o != name)}
    groups = {name: group for name, group in all_groups.items() if name not in own}
    known = {**PAPER_PERCENT, **percent}
    for name, group in groups.items():
        if group not in known:
            raise ConfigError(
                f"{name}: none of the paper's sources ({', '.join(PAPER_PERCENT)}); give it a share: "
                f"weight.{group}=PERCENT"
            )
    for name in percent:
        if name not in tokens and name not in groups.values():
            raise ConfigError(f"weight.{name}: there is no such source; there are {', '.join(tokens)}")
    weights = {}
    for name, count in tokens.items():
        whole = sum(tokens[other] for other in groups if groups[other] == all_groups[name])
        weights[name] = float(percent[name]) if name in own else known[groups[name]] * count / whole
    if not any(weights.values()):
        raise ConfigError("every weight is 0: at least one must be above 0")
    return weights


def epochs_of(tokens: Mapping[str, int], weights: Mapping[str, float], train_tokens: int) -> dict[str, float]:
    """How often each source is seen: its share of the training over its tokens."""
    parts = round_weights(weights)
    return {n: parts.get(n, 0) / sum(parts.values()) * train_tokens / count for n, count in tokens.items()}


# The data sets


def find_data_sets(inputs: list[str]) -> dict[str, Manifest]:
    """By name, in the order of the paper and then as given. Raises DataError."""
    directories: list[Path] = []
    for text in inputs:
        found = sorted(path.parent for depth in ("", "*/", "*/*/") for path in Path(text).glob(depth + MANIFEST_FILE))
        if not found:
            raise DataError(f"input={text}: no {MANIFEST_FILE} there; name directories that data_tools.prepare wrote")
        directories += [directory for directory in found if directory not in directories]
    manifests = [read_manifest(directory) for directory in directories]
    order = {name: position for position, name in enumerate(PAPER_PERCENT)}
    manifests.sort(key=lambda manifest: order.get(group_of(manifest.source), len(order)))
    _check_alike(manifests)
    sources = [re.sub(r"[^\w-]", "_", manifest.source) for manifest in manifests]
    named: dict[str, Manifest] = {}
    for position, (name, manifest) in enumerate(zip(sources, manifests, strict=True)):
        number = sources[: position + 1].count(name)
        named[f"{name}-{number}" if sources.count(name) > 1 else name] = manifest
    if len(named) < len(manifests):
        raise DataError(f"input: {', '.join(sources)}: names that cannot be told apart; give source= other names")
    return named


def _check_alike(manifests: list[Manifest]) -> None:
    first = manifests[0]
    for manifest in manifests:
        if manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise DataError(
                f"{manifest.directory} and {first.directory} were tokenized with different tokenizers "
                f"(SHA-256 {manifest.tokenizer_sha256[:12]}… and {first.tokenizer_sha256[:12]}…): use the same for both"
            )
        if manifest.tokens("train") == 0:
            raise DataError(f"{manifest.directory}: has no tokens to train on; leave it out of input")
        check_sizes(manifest)


def table_of(manifests: Mapping[str, Manifest], percent: Mapping[str, float], train_tokens: int) -> list[Row]:
    tokens = {name: manifest.tokens("train") for name, manifest in manifests.items()}
    weights = weights_of(tokens, percent)
    epochs, parts = epochs_of(tokens, weights, train_tokens), round_weights(weights)
    return [
        Row(
            name=name,
            path=manifest.directory,
            weight=weights[name],
            share=parts.get(name, 0) / sum(parts.values()),
            epochs=epochs[name],
            tokens=tokens[name],
            text_bytes=manifest.text_bytes("train"),
            shard_bytes=_shard_bytes(manifest),
            byte_share=_byte_share(manifest),
        )
        for name, manifest in manifests.items()
    ]


def _shard_bytes(manifest: Manifest) -> int:
    width = DTYPES[manifest.dtype].itemsize
    shards = [shard for split in SPLITS for shard in manifest.shards(split)]
    return sum(shard.tokens * width + shard.documents * INDEX_DTYPE.itemsize for shard in shards)


def _byte_share(manifest: Manifest) -> float | None:
    counts = manifest.documents
    if "byte_tokens" not in counts:
        return None
    return (counts["byte_tokens"] - counts["newline_tokens"]) / sum(manifest.tokens(split) for split in SPLITS)


# What is written and shown


def decimal(number: float, unit: str = "") -> str:
    """Three digits with a decimal prefix, as the paper has sizes: 3.30 TB, 783 GB."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            digits = 2 if abs(number) < 9.995 * size else 1 if abs(number) < 99.95 * size else 0
            return f"{number / size:.{digits}f} {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def epochs_shown(epochs: float) -> str:
    """With two digits, or a decimal prefix where that would be too long for its column."""
    return f"{epochs:.2f}" if epochs < 9999.995 else decimal(epochs)


def rescaling(rows: list[Row]) -> list[str]:
    """In words, where the weights do not add up to 100: what was asked for as a percent becomes another."""
    whole = sum(row.weight for row in rows)
    if abs(whole - 100) < 0.005:
        return []
    there = {group_of(row.name) for row in rows}
    missing = [name for name in PAPER_PERCENT if name not in there]
    because = f"not there: {', '.join(missing)}; " if missing else ""
    return [
        f"Weights: {because}they add up to {whole:.6g} %, so each share is its weight divided by {whole / 100:.4g}."
    ]


def describe(rows: list[Row], train_tokens: int) -> list[str]:
    """The table's lines."""
    width = max(len("Dataset"), *(len(row.name) for row in rows))
    head = f"{'Dataset':<{width}} {'Sampling prop.':>15} {'Epochs':>8} {'Disk size':>10}"
    lines = [f"{head} {'Tokens':>10} {'Bytes/token':>12} {'Byte tokens':>12} {'Shards':>10}"]
    for row in rows:
        sizes = f"{decimal(row.text_bytes, 'B'):>10} {decimal(row.tokens):>10} {row.bytes_per_token:>12.2f}"
        epochs = f"{row.share:>15.2%} {epochs_shown(row.epochs):>8}"
        fallback = "–" if row.byte_share is None else f"{row.byte_share:.2%}"
        lines.append(f"{row.name:<{width}} {epochs} {sizes} {fallback:>12} {decimal(row.shard_bytes, 'B'):>10}")
    text, tokens = sum(row.text_bytes for row in rows), sum(row.tokens for row in rows)
    shards = decimal(sum(row.shard_bytes for row in rows), "B")
    total = f"{decimal(text, 'B'):>10} {decimal(tokens):>10} {text / tokens:>12.2f} {'':>12} {shards:>10}"
    lines.append(f"{'all':<{width}} {1:>15.2%} {epochs_shown(train_tokens / tokens):>8} {total}")
    note = "Disk size: of the text, as in the paper; byte tokens: but for line feeds."
    return [*lines, *rescaling(rows), f"Epochs at {train_tokens:,} tokens of training. {note}"]


def mixture_yaml(rows: list[Row], train_tokens: int) -> str:
    """The data configuration."""
    comment = "".join(f"# {line}\n" for line in ["Written by python -m data_tools.mix", *describe(rows, train_tokens)])
    entries = {row.name: {"path": str(row.path), "weight": round(row.weight, 9)} for row in rows}
    sources = "".join(
        "  " + yaml.safe_dump({name: entry}, default_flow_style=None, allow_unicode=True, width=10**6)
        for name, entry in entries.items()
    )
    return f"{comment}defaults: [default]\nsources:\n{sources}"


def mix(settings: MixSettings) -> None:
    """Print the table, and write the configuration. Raises ConfigError and DataError."""
    check_settings(settings)
    manifests = find_data_sets(input_list(settings.input))
    rows = table_of(manifests, settings.weight, settings.train_tokens)
    print("\n".join(describe(rows, settings.train_tokens)))
    if settings.output is None:
        return
    path = Path(settings.output) / "data" / f"{settings.name}.yaml"
    content = mixture_yaml(rows, settings.train_tokens).encode()
    try:
        if path.exists() and path.read_bytes() != content and not settings.overwrite:
            raise DataError(f"{path}: there is another mixture; set overwrite=true to replace it, or another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    print(f"wrote {path}: python -m llamatrain.train --config-dir {settings.output} data={settings.name} …")


def main() -> None:
    run_command(MixSettings, "data_tools/mix", mix, help_text=__doc__)


if __name__ == "__main__":
    main()
