"""What to convert into what."""

from dataclasses import dataclass

from llamatrain.config.model import LONGEST_SEQUENCE
from llamatrain.errors import ConfigError

LLAMATRAIN, HUGGING_FACE, META = FORMS = ("llamatrain", "huggingface", "meta")
STORED = "stored"
DTYPES = (STORED, "fp32", "bf16", "fp16")
MOST_SHARDS = 256


@dataclass
class ConvertConfig:
    input: str | None = None  # a run or checkpoint, a directory of Hugging Face's or of Meta's; found out by looking
    output: str | None = None  # directory to be made
    to: str | None = None  # llamatrain | huggingface | meta
    dtype: str = STORED  # fp32 | bf16 | fp16, or as they are stored; llamatrain's are always fp32
    shards: int = 1  # meta: model-parallel shards, consolidated.NN.pth
    max_shard_gib: float = 5.0  # huggingface, llamatrain: largest file of weights
    tokenizer: str | None = None  # a SentencePiece model; null: the one beside the weights
    max_seq_len: int | None = None  # length the model may be run with; null: what the input says (meta: 2048)
    verify_hashes: bool = True  # of a llamatrain checkpoint
    overwrite: bool = False  # replace the output of an earlier conversion


def check_convert(config: ConvertConfig) -> None:
    """Raises ConfigError."""
    if not config.input:
        raise ConfigError("there is nothing to convert: give input=DIRECTORY")
    if not config.output:
        raise ConfigError("output is not set: output=DIRECTORY")
    if config.to not in FORMS:
        raise ConfigError(f"to={config.to}: choose one of {', '.join(FORMS)}")
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype={config.dtype}: choose one of {', '.join(DTYPES)}")
    if config.to == LLAMATRAIN and config.dtype not in (STORED, "fp32"):
        raise ConfigError(f"dtype={config.dtype}: llamatrain's checkpoints are fp32, from which training computes bf16")
    if not 1 <= config.shards <= MOST_SHARDS:
        raise ConfigError(f"shards={config.shards}: must lie in [1, {MOST_SHARDS}]")
    if config.shards > 1 and config.to != META:
        raise ConfigError(f"shards={config.shards}: only to=meta has model-parallel shards; max_shard_gib cuts others")
    if not config.max_shard_gib > 0:
        raise ConfigError(f"max_shard_gib={config.max_shard_gib}: must be above 0")
    if config.max_seq_len is not None and not 1 <= config.max_seq_len <= LONGEST_SEQUENCE:
        raise ConfigError(f"max_seq_len={config.max_seq_len}: must lie in [1, {LONGEST_SEQUENCE}]")
