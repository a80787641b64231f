"""What shape the model has (paper, section 2.2 and Table 2)."""

from dataclasses import dataclass

from llamatrain.errors import ConfigError

LONGEST_SEQUENCE = 2**24  # tokens; the tables of rotary angles are as long
ATTENTION_BACKENDS = ("auto", "xformers", "sdpa", "reference")


@dataclass
class ModelConfig:
    """Shape and constants of a LLaMA. Defaults are those of the 7B model."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    ffn_dim: int | None = None  # None: two thirds of 4*dim, rounded up to a multiple of ffn_multiple_of
    ffn_multiple_of: int = 256
    vocab_size: int = 32000
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    init_std: float = 0.02
    init_depth_scaled: bool = True  # output projections of attention and feed-forward times 1/sqrt(2*n_layers)
    attention: str = "auto"  # xformers | sdpa | reference; auto: on CUDA the faster of the first two by timing

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_width(self) -> int:
        """Width of the SwiGLU feed-forward: 2/3 of 4*dim (paper, section 2.2), rounded up as in the released code."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        width = 8 * self.dim // 3
        return -(-width // self.ffn_multiple_of) * self.ffn_multiple_of


def check_model(model: ModelConfig) -> None:
    """Refuse a shape that cannot be built. Raises ConfigError."""
    for name in ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len", "ffn_multiple_of"):
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name}={getattr(model, name)}: must be at least 1")
    if model.max_seq_len > LONGEST_SEQUENCE:
        raise ConfigError(f"model.max_seq_len={model.max_seq_len}: must be at most {LONGEST_SEQUENCE}")
    if model.ffn_dim is not None and model.ffn_dim < 1:
        raise ConfigError(f"model.ffn_dim={model.ffn_dim}: must be at least 1, or null to derive it from model.dim")
    if model.dim % model.n_heads:
        unit = 2 * model.n_heads  # heads of an even width
        nearest = max(1, round(model.dim / unit)) * unit
        raise ConfigError(
            f"model.dim={model.dim} does not divide into model.n_heads={model.n_heads} heads; "
            f"the nearest that does is model.dim={nearest}"
        )
    if model.head_dim % 2:
        raise ConfigError(
            f"model.dim={model.dim} / model.n_heads={model.n_heads} gives heads of width {model.head_dim}; "
            "rotary embeddings need an even width"
        )
    if model.kv_heads < 1 or model.n_heads % model.kv_heads:
        divisors = [n for n in range(1, model.n_heads + 1) if model.n_heads % n == 0]
        raise ConfigError(
            f"model.n_kv_heads={model.kv_heads} must divide model.n_heads={model.n_heads}: one of {divisors}"
        )
    if model.attention not in ATTENTION_BACKENDS:
        raise ConfigError(f"model.attention={model.attention}: choose one of {', '.join(ATTENTION_BACKENDS)}")
    if not model.rope_theta > 0 or not model.norm_eps > 0 or not model.init_std > 0:
        raise ConfigError("model.rope_theta, model.norm_eps and model.init_std must be above 0")
