"""LLaMA (paper, section 2.2): pre-norm blocks of RMSNorm, rotary attention and SwiGLU, no biases.

Parameters are named as in the released files. They are fp32; `compute_dtype` is the dtype of the activations,
and each layer takes its weight in the dtype of its input, so there is no autocast (where FSDP hands over bf16
weights the cast does nothing). Norms and rotations compute in fp32 inside.

The weights are not drawn here: `llamatrain.model.init.init_weights` does that, or a checkpoint is loaded. A
model built on the meta device needs `to_empty` and then `rebuild_rope_tables`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamatrain.config.model import ModelConfig
from llamatrain.model.attention import attention
from llamatrain.model.rope import apply_rope, rope_tables


class Linear(nn.Linear):
    """y = x W^T in the dtype of x."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: init_weights or a checkpoint fills it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """A row of the weight per token."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: init_weights or a checkpoint fills it."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), rounded to x's dtype before the product."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        normed = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class KVCache:
    """Keys and values of the tokens seen so far, allocated once for `max_len` tokens; for generation."""

    def __init__(
        self, config: ModelConfig, *, batch: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.n_layers, 2, batch, max_len, config.kv_heads, config.head_dim)
        self._store = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # tokens that every layer holds; the model raises it after a forward

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [B, T, Hkv, K] after the `length` tokens; the layer's keys and values so far."""
        end = self.length + k.shape[1]
        keys, values = self._store[layer]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]


class Attention(nn.Module):
    """Rotary self-attention; with n_kv_heads < n_heads, groups of query heads share a key-value head."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.layer, self.backend, self.head_dim = layer, config.attention, config.head_dim
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        doc_lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        # Heads are counted from the projections: under tensor parallelism each rank has a part of them.
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)  # [B, T, H, K], [B, T, Hkv, K]
        query_offset = 0
        if cache is not None:
            query_offset = cache.length
            k, v = cache.extend(self.layer, k, v)
        out = attention(q, k, v, backend=self.backend, doc_lengths=doc_lengths, query_offset=query_offset)
        projected: Tensor = self.wo(out.flatten(-2))
        return projected


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_width)
        self.w2 = Linear(config.ffn_width, config.dim)
        self.w3 = Linear(config.dim, config.ffn_width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """One layer. Returns a new tensor: FSDP2 loses its backward hook on a view that is changed in place."""

    # Another way to the same numbers, for training; set by llamatrain.parallel.recompute, on single blocks.
    training_forward: "Callable[[Block, Tensor, Tensor, Tensor, Sequence[int] | None], Tensor] | None" = None

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer=layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        doc_lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        if self.training_forward is not None and cache is None and torch.is_grad_enabled():
            return self.training_forward(self, x, cos, sin, doc_lengths)
        return self.plain_forward(x, cos, sin, doc_lengths=doc_lengths, cache=cache)

    def plain_forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        doc_lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The block by its formula, differentiated by autograd where gradients are enabled."""
        h = x + self.attention(self.attention_norm(x), cos, sin, doc_lengths=doc_lengths, cache=cache)
        out: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


class Llama(nn.Module):
    """The whole model. To run, config.attention must be a backend that `resolve_backend` gave, not auto."""

    rope_cos: Tensor  # [max_seq_len, K/2]
    rope_sin: Tensor

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        # Keyed by the layer's number: the names stay when a pipeline stage keeps only some of the layers.
        self.layers = nn.ModuleDict({str(i): Block(config, layer=i) for i in range(config.n_layers)})
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.output = None if config.tied_embeddings else Linear(config.dim, config.vocab_size)
        self.rebuild_rope_tables()

    def rebuild_rope_tables(self) -> None:
        """Make the RoPE tables, which no checkpoint has and `to_empty` loses, on the parameters' device."""
        config, device = self.config, next(self.parameters()).device
        cos, sin = rope_tables(config.head_dim, max_seq_len=config.max_seq_len, theta=config.rope_theta)
        self.register_buffer("rope_cos", cos.to(device), persistent=False)
        self.register_buffer("rope_sin", sin.to(device), persistent=False)

    def forward(
        self, tokens: Tensor, *, doc_lengths: Sequence[int] | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits [B, T, V] in compute_dtype for the token after each of `tokens` int64 [B, T].

        doc_lengths: see `attention`. cache: the tokens follow those in it, and are added to it.
        Raises ValueError beyond max_seq_len.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens are more than model.max_seq_len={self.config.max_seq_len}")
        cos, sin = self.rope_cos[start:end], self.rope_sin[start:end]
        h = self.tok_embeddings(tokens).to(self.compute_dtype)  # [B, T, D]
        for block in self.layers.values():
            h = block(h, cos, sin, doc_lengths=doc_lengths, cache=cache)
        if cache is not None:
            cache.length = end
        return self._head(self.norm(h))

    def _head(self, h: Tensor) -> Tensor:
        if self.output is None:
            return F.linear(h, self.tok_embeddings.weight.to(h.dtype))
        logits: Tensor = self.output(h)
        return logits
