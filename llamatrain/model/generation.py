"""Sampling text from a model with a key-value cache, as in the released code.

Prompts of different lengths share a batch: the length all have is computed at once, then one position at a
time, where a row takes its own prompt token while it has one and a sampled one after.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llamatrain.errors import ConfigError
from llamatrain.model.llama import KVCache, Llama


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """The new tokens of each prompt: up to max_new_tokens, ending with eos_id where the model wrote it.

    temperature 0 takes the likeliest token; above, tokens are drawn from the fewest likeliest that together
    have the probability top_p (1: from all), by a generator seeded with `seed`. Ids from vocab_size on, which the
    model may have and its tokenizer not, are never written. Raises ConfigError for no
    prompt, an empty one, or more tokens than the model's max_seq_len.
    """
    _check_lengths(prompts, max_new_tokens, model.config.max_seq_len)
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    ends = [length + max_new_tokens for length in lengths]  # one past the last position of each row
    tokens, is_prompt = _padded(prompts, max(ends), device)
    cache = KVCache(model.config, batch=len(prompts), max_len=max(ends), dtype=model.compute_dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    last_position = torch.tensor(ends, device=device) - 1
    done = torch.zeros_like(last_position, dtype=torch.bool)
    for position in range(min(lengths), max(ends)):
        logits = model(tokens[:, cache.length : position], cache=cache)[:, -1, :vocab_size].float()  # [B, V]
        sampled = next_tokens(logits, temperature=temperature, top_p=top_p, generator=generator)
        tokens[:, position] = torch.where(is_prompt[:, position], tokens[:, position], sampled)
        if eos_id is not None:
            done |= ~is_prompt[:, position] & (sampled == eos_id)
        done |= last_position == position
        if done.all():
            break
    rows = zip(tokens.tolist(), lengths, ends, strict=True)
    return [_until_eos(row[length:end], eos_id) for row, length, end in rows]


def next_tokens(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row of fp32 logits [B, V]: int64 [B]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        probabilities = keep_top_p(probabilities, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def keep_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest likeliest tokens that together have the probability top_p.

    Nucleus sampling (arXiv 1904.09751): [B, V] to [B, V], not normalised again; the likeliest token always
    stays.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)


def _check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_seq_len: int) -> None:
    if not prompts or not all(prompts):
        raise ConfigError("every prompt needs at least one token (BOS)")
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > max_seq_len:
        room = max_seq_len - longest
        fix = f"set max_new_tokens={room} or shorten the prompt" if room > 0 else "shorten the prompt"
        raise ConfigError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} do not fit into the model's "
            f"max_seq_len={max_seq_len}: {fix}"
        )


def _padded(prompts: Sequence[Sequence[int]], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts in the front of int64 [B, length], and where they are, bool [B, length]."""
    tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
    is_prompt = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
        is_prompt[row, : len(prompt)] = True
    return tokens.to(device), is_prompt.to(device)


def _until_eos(tokens: list[int], eos_id: int | None) -> list[int]:
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
