"""The data sets a run reads, opened and checked against each other and against the model. No torch."""

from dataclasses import dataclass
from functools import cached_property

from llamatrain.config.data import DataConfig
from llamatrain.data.shards import Manifest, check_hashes, check_sizes, read_manifest, windows_per_shard
from llamatrain.errors import DataError


@dataclass(frozen=True)
class Source:
    """One corpus of the mixture, cut into windows of `seq_len` tokens shard by shard."""

    name: str
    weight: float
    manifest: Manifest
    split: str
    seq_len: int

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """Windows of each shard; a window is one sample."""
        return tuple(windows_per_shard(self.manifest, self.split, self.seq_len))

    @property
    def leftover_tokens(self) -> int:
        """Tokens at the ends of shards that no sample has as an input."""
        return self.manifest.tokens(self.split) - sum(self.windows) * self.seq_len

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"data.sources.{self.name}: {self.manifest.tokens(self.split):,} tokens in "
            f"{len(self.windows):,} shards, {sum(self.windows):,} samples of {self.seq_len:,} tokens, "
            f"{self.leftover_tokens:,} tokens left over at the shards' ends"
        )


def open_sources(
    config: DataConfig,
    *,
    vocab_size: int | None,
    split: str = "train",
    share: tuple[int, int] = (0, 1),
) -> list[Source]:
    """Read and check the manifests of all sources of a weight above 0; only verifying hashes reads tokens.

    `vocab_size` is the model's; None leaves its check out. Of many ranks, each verifies the hashes of its share (rank,
    world size). The tokenizer is another check, `check_tokenizers`.
    Raises DataError naming the source and what does not fit.
    """
    sources = []
    for name, entry in config.sources.items():
        if entry.weight > 0:
            try:
                manifest = read_manifest(entry.path)
                check_sizes(manifest, [split])
                if config.verify_hashes:
                    check_hashes(manifest, [split], share=share)
            except DataError as error:
                raise DataError(f"data.sources.{name}: {error}") from None
            sources.append(Source(name, entry.weight, manifest, split, config.seq_len))
    for source in sources:
        if vocab_size is not None and source.manifest.vocab_size > vocab_size:
            raise DataError(
                f"data.sources.{source.name}: {source.manifest.directory} was tokenized with "
                f"{source.manifest.vocab_size} token ids, more than model.vocab_size={vocab_size}: "
                f"set model.vocab_size={source.manifest.vocab_size}"
            )
    return sources


def check_tokenizers(sources: list[Source], given: str) -> None:
    """Raises DataError if the sources were not all tokenized with the tokenizer of SHA-256 `given`."""
    for source in sources:
        used, first = source.manifest.tokenizer_sha256, sources[0]
        if used != first.manifest.tokenizer_sha256:
            raise DataError(
                f"data.sources.{source.name} and data.sources.{first.name} were tokenized with different "
                f"tokenizers (SHA-256 {used[:12]}… and {first.manifest.tokenizer_sha256[:12]}…): "
                "tokenize both with the same one"
            )
        if used != given:
            raise DataError(
                f"data.sources.{source.name} was tokenized with another tokenizer (SHA-256 {used[:12]}…) "
                f"than data.tokenizer ({given[:12]}…): set data.tokenizer to the one it was made with"
            )
