"""What the model writes after a few prompts, at each validation: samples.jsonl, a line for each.

The likeliest token is taken each time, so that two lines differ by what was learned between them and by nothing else.
There is no key-value cache: every new token is a forward of the whole texts, filled up to one length that divides among
ranks which share sequences or layers. That costs a few dozen forwards of a few sentences, and is the same on every
layout but a pipeline, which the configuration refuses. All ranks write the same prompts in lockstep and agree on each
token, the likeliest that any of them has found.

Nothing is drawn, and weights are only read: training goes on as if there had been no samples.
"""

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from llamatrain.config import RunConfig
from llamatrain.config.parallel import Layout
from llamatrain.distributed import World
from llamatrain.errors import ConfigError
from llamatrain.model.llama import Llama
from llamatrain.run_directory import cut_lines
from llamatrain.tokenizer import Tokenizer

log = logging.getLogger("llamatrain")

NO_TOKEN = torch.iinfo(torch.int64).max


class Samples:
    """The prompts of a run. Raises ConfigError if one is too long to be written on."""

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, device: torch.device, world: World, layout: Layout
    ) -> None:
        self._tokenizer, self._device, self._world = tokenizer, device, world
        self._new_tokens = config.evaluation.sample_tokens
        self._texts = config.evaluation.samples
        self._prompts = [tokenizer.encode(text, bos=True) for text in self._texts]
        self._layer_rank, self._layer_ranks = world.rank % layout.tp, layout.tp
        parts = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
        longest, most = max(map(len, self._prompts), default=0), config.model.max_seq_len
        self._length = -(-(longest + self._new_tokens) // parts) * parts
        if self._prompts and self._length > most:
            room = most // parts * parts - longest
            fix = f"set evaluation.sample_tokens={room} or shorten it" if room > 0 else "shorten it"
            raise ConfigError(
                f"evaluation.samples: a prompt of {longest} tokens and evaluation.sample_tokens={self._new_tokens} do "
                f"not fit into model.max_seq_len={most}: {fix}"
            )

    @torch.no_grad()
    def write(self, model: Llama, *, keep_going: Callable[[], bool] = lambda: True) -> list[dict[str, Any]] | None:
        """Each prompt and what follows it; all ranks call it, and have the same.

        None if `keep_going`, asked before every token, says no; it must say the same on all ranks.
        """
        if not self._prompts:
            return []
        rows = torch.arange(len(self._prompts), device=self._device)
        lengths = torch.tensor([len(prompt) for prompt in self._prompts], device=self._device)
        tokens = torch.zeros(len(rows), self._length, dtype=torch.int64)
        for row, prompt in enumerate(self._prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        tokens, done = tokens.to(self._device), torch.zeros_like(lengths, dtype=torch.bool)
        model.eval()
        quiet = None if self._world.leads else True
        for _ in tqdm(range(self._new_tokens), desc="samples", unit="tok", leave=False, disable=quiet):
            if not keep_going():
                model.train()
                return None
            new = self._next(model, tokens, lengths - 1)
            tokens[rows, lengths] = torch.where(done, tokens[rows, lengths], new)
            lengths = lengths + ~done
            done |= new == self._tokenizer.eos_id
            if done.all():
                break
        model.train()
        texts = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        return [self._told(*one) for one in zip(self._texts, self._prompts, texts, done.tolist(), strict=True)]

    def _next(self, model: Llama, tokens: Tensor, last: Tensor) -> Tensor:
        """The likeliest token after position `last` [B] of each row of tokens [B, T]: int64 [B]."""
        logits = model(tokens)  # [B, this rank's of T, this rank's of V]
        own = torch.arange(tokens.shape[1], device=tokens.device)
        if model.context is not None:
            own = model.context.own(own[None])[0]
        place = own.new_full((tokens.shape[1],), -1)  # of each token on this rank; -1: it is on another
        place[own] = torch.arange(len(own), device=own.device)
        here = place[last]
        first = self._layer_rank * logits.shape[-1] if self._layer_ranks > 1 else 0
        scores = logits[torch.arange(len(here), device=here.device), here.clamp(min=0)].float()
        ids = torch.arange(first, first + scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(ids >= self._tokenizer.vocab_size, -torch.inf)
        score, found = scores.max(dim=-1)
        score, found = score.masked_fill(here < 0, -torch.inf), found + first
        if self._world.size > 1:
            best = score.clone()
            dist.all_reduce(best, dist.ReduceOp.MAX)
            found = found.masked_fill(score < best, NO_TOKEN)
            dist.all_reduce(found, dist.ReduceOp.MIN)
        return found

    def _told(self, text: str, prompt: list[int], tokens: list[int], ended: bool) -> dict[str, Any]:
        before = len(self._tokenizer.decode(prompt))
        return {"prompt": text, "continuation": self._tokenizer.decode(tokens)[before:], "ended": ended}


class SampleLog:
    """samples.jsonl, on rank 0. Lines after the last validation that the run has kept are cut: they come again."""

    def __init__(self, path: Path, *, validated_step: int | None) -> None:
        self._path = path
        self.back_to(validated_step)

    def back_to(self, validated_step: int | None) -> None:
        """Raises UnhealthyRun if a line is no record."""
        cut_lines(self._path, lambda record: validated_step is not None and record["step"] <= validated_step)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line, on disk when this returns; a disk that does not take it, loses it."""
        line = json.dumps(record).encode() + b"\n"
        try:
            with open(self._path, "ab", buffering=0) as file:
                end = file.tell()
                try:
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._path, end)
                    raise
        except OSError as error:
            log.warning("%s: the samples cannot be written (%s)", self._path, error)
