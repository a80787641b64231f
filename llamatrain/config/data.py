"""What the run reads: sources, their weights, and how tokens are cut into samples."""

from dataclasses import dataclass, field

from llamatrain.errors import ConfigError


@dataclass
class SourceConfig:
    """One corpus of the mixture."""

    path: str = "???"  # directory written by data_tools.tokenize_shards
    weight: float = 1.0  # share of the samples; weights are normalised to sum to 1


@dataclass
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: str | None = None  # tokenizer.model; None: the one beside the first source's manifest
    seq_len: int = 2048  # tokens per sample
    seed: int = 0  # keys the order of the windows
    document_mask: bool = False  # no attention across documents, and no loss on a document's first token
    prefetch_steps: int = 2  # optimizer steps read ahead by the background thread
    verify_hashes: bool = False  # hash every shard at start (sizes are always checked)


def check_data(data: DataConfig) -> None:
    """Raises ConfigError."""
    if data.seq_len < 1:
        raise ConfigError(f"data.seq_len={data.seq_len}: must be at least 1")
    if data.prefetch_steps < 1:
        raise ConfigError(f"data.prefetch_steps={data.prefetch_steps}: must be at least 1")
    if not data.sources:
        raise ConfigError(
            "data.sources is empty: name at least one with data.sources.NAME.path=DIRECTORY "
            "(a directory written by python -m data_tools.tokenize_shards)"
        )
    for name, source in data.sources.items():
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"data.sources.{name}: a source's name may hold letters, digits, - and _ only")
        if source.path in ("", "???"):
            others = [other for other, given in data.sources.items() if given.path not in ("", "???")]
            hint = f"; a weight must name one of the sources, {', '.join(others)}" if others else ""
            raise ConfigError(f"data.sources.{name}.path is not set: data.sources.{name}.path=DIRECTORY{hint}")
        if not 0 <= source.weight < float("inf"):
            raise ConfigError(f"data.sources.{name}.weight={source.weight}: must be a number of at least 0")
    if not any(source.weight > 0 for source in data.sources.values()):
        raise ConfigError("every data.sources.*.weight is 0: at least one must be above 0")
