"""LLaMA (paper, section 2.2): pre-norm blocks of RMSNorm, rotary attention and SwiGLU, no biases.

Parameters are named as in the released files. They are fp32; `compute_dtype` is the dtype of the activations,
and each layer takes its weight in the dtype of its input, so there is no autocast (where FSDP hands over bf16
weights the cast does nothing). Norms and rotations compute in fp32 inside.

The weights are not drawn here: `llamatrain.model.init.init_weights` does that, or a checkpoint is loaded. A
model built on the meta device needs `to_empty` and then `rebuild_rope_tables`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamatrain.config.model import ModelConfig
from llamatrain.model.attention import Attend
from llamatrain.model.elementwise import EAGER, Elementwise
from llamatrain.model.loss import linear_cross_entropy_sum
from llamatrain.model.rope import rope_tables
from llamatrain.model.sharing import ALONE, Alone, on_this_rank


class Linear(nn.Linear):
    """y = x W^T in the dtype of x."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: init_weights or a checkpoint fills it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, on_this_rank(self.weight).to(x.dtype))


class Head(Linear):
    """Logits, or the loss where targets are given: a module of its own, since sharding gathers weights for modules."""

    sharing, elementwise = ALONE, EAGER

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        return logits_or_loss(x, self.weight, targets, self.sharing, self.elementwise)


class Embedding(nn.Module):
    """A row of the weight [V, D] per token; the memory is left as it is: init_weights or a checkpoint fills it."""

    sharing, elementwise = ALONE, EAGER  # the latter for a head that is tied to it

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor, *, dtype: torch.dtype) -> Tensor:
        return self.sharing.embed(tokens, on_this_rank(self.weight), dtype=dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), rounded to x's dtype before the product."""

    elementwise = EAGER

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.elementwise.while_training().rms_norm(x, on_this_rank(self.weight), self.eps)


class KVCache:
    """Keys and values of the tokens seen so far, allocated once for `max_len` tokens; for generation."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_heads: int | None = None,
    ) -> None:
        """kv_heads: those of this rank, where ranks share layers."""
        self._config, self._kv_heads = config, kv_heads or config.kv_heads
        shape = (config.n_layers, 2, batch, max_len, self._kv_heads, config.head_dim)
        self._store = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # tokens that every layer holds; the model raises it after a forward

    def of_rows(self, rows: Tensor, *, max_len: int) -> "KVCache":
        """A cache of its own for some of the rows int64 [N], each as often as it is named."""
        store = self._store
        picked = KVCache(
            self._config,
            batch=len(rows),
            max_len=max_len,
            dtype=store.dtype,
            device=store.device,
            kv_heads=self._kv_heads,
        )
        for layer, given in zip(picked._store, store, strict=True):
            layer[:, :, : self.length] = given[:, rows, : self.length]
        picked.length = self.length
        return picked

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [B, T, Hkv, K] after the `length` tokens; the layer's keys and values so far."""
        end = self.length + k.shape[1]
        keys, values = self._store[layer]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]


class Attention(nn.Module):
    """Rotary self-attention; with n_kv_heads < n_heads, groups of query heads share a key-value head."""

    sharing, elementwise = ALONE, EAGER

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.attend = layer, config.head_dim, Attend(config.attention)
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
        x = self.sharing.gather(x)
        # Heads are counted from the projections: under tensor parallelism each rank has a part of them.
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = self.elementwise.while_training().rope(q, k, cos, sin)  # [B, T, H, K], [B, T, Hkv, K]
        query_offset = 0
        if cache is not None:
            query_offset = cache.length
            k, v = cache.extend(self.layer, k, v)
        out = self.attend(q, k, v, doc_lengths=doc_lengths, query_offset=query_offset)
        return self.sharing.scatter(self.wo(out.flatten(-2)))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    sharing, elementwise = ALONE, EAGER

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_width)
        self.w2 = Linear(config.ffn_width, config.dim)
        self.w3 = Linear(config.dim, config.ffn_width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sharing.gather(x)
        return self.sharing.scatter(self.w2(self.elementwise.while_training().swiglu(self.w1(x), self.w3(x))))


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


class SharedSequences(Protocol):
    """Ranks that share each sequence."""

    def own(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """Of something whole along `dim`, a token each, what this rank has of it."""


class Llama(nn.Module):
    """The whole model. To run, config.attention must be a backend that `resolve_backend` gave, not auto."""

    rope_cos: Tensor  # [max_seq_len, K/2]
    rope_sin: Tensor

    # The ranks that share each sequence; set by llamatrain.parallel.context.
    context: "SharedSequences | None" = None

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        # A pipeline stage has None for what lies on others.
        self.tok_embeddings: Embedding | None = Embedding(config.vocab_size, config.dim)
        # Keyed by the layer's number: the names stay when a pipeline stage keeps only some of the layers.
        self.layers = nn.ModuleDict({str(i): Block(config, layer=i) for i in range(config.n_layers)})
        self.norm: RMSNorm | None = RMSNorm(config.dim, eps=config.norm_eps)
        self.output = None if config.tied_embeddings else Head(config.dim, config.vocab_size)
        self.rebuild_rope_tables()

    def rebuild_rope_tables(self) -> None:
        """Make the RoPE tables, which no checkpoint has and `to_empty` loses, on the parameters' device."""
        config, device = self.config, next(self.parameters()).device
        cos, sin = rope_tables(config.head_dim, max_seq_len=config.max_seq_len, theta=config.rope_theta)
        self.register_buffer("rope_cos", cos.to(device), persistent=False)
        self.register_buffer("rope_sin", sin.to(device), persistent=False)

    def new_cache(self, *, batch: int, max_len: int) -> KVCache:
        """An empty cache, of the heads that this rank has."""
        ranks = next(module.sharing.size for module in self.modules() if isinstance(module, Attention))
        return KVCache(
            self.config,
            batch=batch,
            max_len=max_len,
            dtype=self.compute_dtype,
            device=self.rope_cos.device,
            kv_heads=self.config.kv_heads // ranks,
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        hidden: Tensor | None = None,
        doc_lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] in compute_dtype for the token after each of `tokens` int64 [B, T].

        With `targets` int64 [B, T], which are those tokens where they are known, the sum of their losses in nats
        (an fp32 scalar): the logits are then never whole in memory. doc_lengths: see `attention`. cache: the tokens
        follow those in it, and are added to it. at int64 [N]: which of the B*T tokens logits are wanted for; the result
        is then [1, N, V]. Where ranks share sequences, `tokens` and `targets` are whole and the result is of this
        rank's tokens. On a pipeline stage, `hidden` [B, T, D] is what the stage before has made of the tokens, and all
        stages but the last return the same instead of logits or loss.
        Raises ValueError beyond max_seq_len.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens are more than model.max_seq_len={self.config.max_seq_len}")
        cos, sin = self.rope_cos[start:end], self.rope_sin[start:end]
        if self.context is not None:
            tokens, cos, sin = self.context.own(tokens), self.context.own(cos, dim=0), self.context.own(sin, dim=0)
            targets = None if targets is None else self.context.own(targets)
        if self.tok_embeddings is not None:
            h: Tensor = self.tok_embeddings(tokens, dtype=self.compute_dtype)  # [B, T, D]
        else:
            assert hidden is not None, "a stage after the first needs `hidden`"
            h = hidden
        for block in self.layers.values():
            h = block(h, cos, sin, doc_lengths=doc_lengths, cache=cache)
        if cache is not None:
            cache.length = end
        if self.norm is None:
            return h
        h = self.norm(h)
        if at is not None:
            h = h.flatten(0, 1)[at][None]
        if self.output is None:
            assert self.tok_embeddings is not None, "a tied head lies where the embedding does"
            head = self.tok_embeddings
            return logits_or_loss(h, head.weight, targets, head.sharing, head.elementwise)
        out: Tensor = self.output(h, targets)
        return out


def logits_or_loss(
    h: Tensor, weight: Tensor, targets: Tensor | None, sharing: Alone, elementwise: Elementwise
) -> Tensor:
    """h W^T [B, T, V] in h's dtype (of this rank's part of V), or the sum of the targets' losses under it."""
    h, weight = sharing.gather(h), on_this_rank(weight).to(h.dtype)
    if targets is None:
        return sharing.logits(F.linear(h, weight))
    shards, functions = sharing.vocabulary(weight), elementwise.while_training()
    compiled = None if functions is EAGER or shards is not None else functions.cross_entropy
    return linear_cross_entropy_sum(h, weight, targets, shards=shards, compiled=compiled)
