"""Sampling text from a model: which token comes next, and prompts written on by that.

A draw is a function of a key (the seed, the prompt's place, the token's), so neither the prompts beside it nor the
order of work changes it.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from llamatrain.errors import ConfigError, UnhealthyRun
from llamatrain.model.decoding import write_on
from llamatrain.model.llama import Llama

NOT_FINITE = "the model's weights are not finite, or its activations overflow"


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
    have the probability top_p (1: from all). What is drawn for a prompt is a function of (seed, its place), whatever
    the others. Ids from vocab_size on, which the model may have and its tokenizer not, are never written. Raises
    ConfigError for no prompt, an empty one, or more tokens than the model's max_seq_len, UnhealthyRun for a model whose
    logits are no numbers.
    """
    _check_lengths(prompts, max_new_tokens, model.config.max_seq_len)

    def choose(logits: Tensor, rows: list[int], written: list[int]) -> Tensor:
        if not are_finite(logits).all():
            raise UnhealthyRun(f"no finite logits: {NOT_FINITE}")
        draws = [uniform(seed, row, 0, step) for row, step in zip(rows, written, strict=True)]
        return next_tokens(logits, temperature=temperature, top_p=top_p, draws=draws)

    return write_on(
        model,
        prompts,
        max_new_tokens=[max_new_tokens] * len(prompts),
        choose=choose,
        ended=lambda _, tokens: tokens[-1] == eos_id,
        vocab_size=vocab_size,
    )


def are_finite(logits: Tensor) -> Tensor:
    """Of each row of logits [B, V], whether tokens can be chosen by it: bool [B]. Ids that are barred are -inf."""
    return logits.amax(dim=-1).isfinite()  # NaN wins


def uniform(*key: int) -> float:
    """A number in [0, 1) that is a function of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def next_tokens(logits: Tensor, *, temperature: float, top_p: float, draws: Sequence[float]) -> Tensor:
    """One token per row of fp32 logits [B, V], by a number in [0, 1) for each: int64 [B].

    With the probabilities laid end to end in the order of ids, it is the token at that part of their sum.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    device = logits.device
    if torch.are_deterministic_algorithms_enabled():
        logits = logits.cpu()  # CUDA has no cumsum then
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        probabilities = keep_top_p(probabilities, top_p)
    ends = probabilities.double().cumsum(dim=-1)
    at = torch.tensor(draws, dtype=torch.float64, device=ends.device)[:, None] * ends[:, -1:]
    at = at.minimum(ends[:, -1:].nextafter(torch.zeros_like(at)))  # where rounding would take it past the last
    return torch.searchsorted(ends, at, right=True).squeeze(1).to(device)


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
