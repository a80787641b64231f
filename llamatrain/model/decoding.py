"""Writing on from prompts with a key-value cache, many rows at once.

What all prompts of a batch begin with is computed once; then the length that all have; then one position at a time,
where a row takes its own prompt token while it has one and a chosen one after. Rows that have ended leave the batch
when half of it has, so that a few long answers do not cost what a whole batch does.

How a token is chosen and when a row ends is the caller's: a row's text does not depend on the rows beside it beyond
rounding, if its choices do not.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from llamatrain.model.llama import KVCache, Llama

Forward = Callable[..., Tensor]  # logits of (tokens, cache=, at=), as Llama gives them
# of logits fp32 [N, V], the rows they are of, and how many tokens each has so far: int64 [N]
Choose = Callable[[Tensor, list[int], list[int]], Tensor]


@torch.no_grad()  # not inference_mode: weights gathered in it could not be trained with afterwards
def write_on(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    choose: Choose,
    ended: Callable[[int, list[int]], bool],
    vocab_size: int | None = None,
    forward: Forward | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt: up to its max_new_tokens, or until `ended(row, its new tokens)` says so.

    Every prompt has a token at least, and prompt and new tokens fit into max_seq_len. `choose` sees the logits of ids
    below vocab_size only. `forward` is called in the model's place.
    """
    batch = _Batch(model, prompts, max_new_tokens, forward or model)
    new: list[list[int]] = [[] for _ in prompts]
    while batch.rows:
        logits = batch.step()[:, :vocab_size].float()
        writing = [row for row in batch.rows if batch.position >= len(prompts[row])]
        if writing:
            own = torch.tensor([batch.rows.index(row) for row in writing], device=logits.device)
            chosen = choose(logits[own], writing, [len(new[row]) for row in writing])
            batch.put(own, chosen)
            for row, token in zip(writing, chosen.tolist(), strict=True):
                new[row].append(token)
        over = {row for row in writing if len(new[row]) == max_new_tokens[row] or ended(row, new[row])}
        batch.end(over)
    return new


class _Batch:
    """Rows that are written on, each at the same position."""

    def __init__(
        self, model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], forward: Forward
    ) -> None:
        self.rows = list(range(len(prompts)))  # those that still write
        self._in_memory = list(self.rows)
        self._forward = forward
        length = max(len(prompt) + new for prompt, new in zip(prompts, max_new_tokens, strict=True))
        tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        self._tokens = tokens.to(model.rope_cos.device)
        self._length = length
        self.position = min(map(len, prompts)) - 1  # of the newest token that is known of all rows
        self._cache = self._shared(model, prompts)

    def _shared(self, model: Llama, prompts: Sequence[Sequence[int]]) -> KVCache:
        """A cache for all rows, in which is what several of them begin with; equal prompts are computed once."""
        first = {tuple(prompt): row for row, prompt in reversed(list(enumerate(prompts)))}
        distinct = sorted(first.values())
        alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
        common = min(sum(1 for _ in alike), self.position)
        if common == 0 or len(prompts) == 1:
            cache = model.new_cache(batch=len(distinct), max_len=self._length)
        else:
            cache = model.new_cache(batch=1, max_len=common)
            self._fill(cache, self._tokens[:1, :common])
            cache = cache.of_rows(torch.zeros_like(self._tokens[distinct, 0]), max_len=self._length)
        if len(distinct) < len(prompts):
            if common < self.position:
                self._fill(cache, self._tokens[distinct, common : self.position])
            places = [distinct.index(first[tuple(prompt)]) for prompt in prompts]
            cache = cache.of_rows(torch.tensor(places, device=self._tokens.device), max_len=self._length)
        return cache

    def _fill(self, cache: KVCache, tokens: Tensor) -> None:
        """Put tokens into a cache; the one logit is for nobody."""
        self._forward(tokens, cache=cache, at=torch.zeros_like(tokens[0, :1]))

    def step(self) -> Tensor:
        """Logits [N, V] of the next position of `rows`, which is then the position."""
        tokens = self._tokens[:, self._cache.length : self.position + 1]
        last = torch.arange(1, len(tokens) + 1, device=tokens.device) * tokens.shape[1] - 1
        logits = self._forward(tokens, cache=self._cache, at=last)[0]
        self.position += 1
        return logits[self._places(self.rows)] if len(self.rows) < len(self._in_memory) else logits

    def put(self, own: Tensor, tokens: Tensor) -> None:
        """Write a token at the position of some of `rows`, by their place among them."""
        places = self._places(self.rows)[own]
        self._tokens[places, self.position] = tokens

    def end(self, over: set[int]) -> None:
        if not over:
            return
        self.rows = [row for row in self.rows if row not in over]
        if self.rows and len(self.rows) <= len(self._in_memory) // 2:
            kept = self._places(self.rows)
            self._tokens = self._tokens[kept]
            self._cache = self._cache.of_rows(kept, max_len=self._length)
            self._in_memory = list(self.rows)

    def _places(self, rows: list[int]) -> Tensor:
        where = {row: place for place, row in enumerate(self._in_memory)}
        return torch.tensor([where[row] for row in rows], device=self._tokens.device)
