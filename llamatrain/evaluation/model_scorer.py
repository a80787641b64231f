"""A model as a scorer: texts become tokens, tokens batches, batches forwards, and the answers come back in order.

Batches are planned over all requests of a call (`evaluation.prefixes`), the same plan on every rank and for any number
of ranks. Ranks that have different data take the batches in turn and go in lockstep (`evaluation.lockstep`), so sharded
weights may be gathered; ranks that share layers all compute the same. The answers are then exchanged: every rank
returns them all. As a batch is the same wherever it is computed, so are its numbers.

Before it is used, the model must be as `parallel.answering` leaves it.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from llamatrain.config.parallel import Layout
from llamatrain.distributed import World
from llamatrain.errors import ConfigError
from llamatrain.evaluation.lockstep import Lockstep
from llamatrain.evaluation.prefixes import KEPT_TOKENS, Batch, Piece, plan
from llamatrain.evaluation.scoring import Generation, Likelihood, LikelihoodScore, NotFinite
from llamatrain.evaluation.tokens import Ending, encode_pair, pieces_of, room_for
from llamatrain.model.decoding import write_on
from llamatrain.model.generation import NOT_FINITE, are_finite, next_tokens, uniform
from llamatrain.model.llama import Llama
from llamatrain.tokenizer import Tokenizer

log = logging.getLogger("llamatrain")

LOGITS_IN_FP32 = 1024  # tokens whose logits are in fp32 at a time
CPU_BATCH_TOKENS = 1024  # more makes nothing faster on a CPU, and fills up more
LEAST_BATCH_TOKENS, CUDA_BATCH_TOKENS = 512, 2**15  # more would not help a GPU
MEMORY_TAKEN = 0.5  # of what is free on a GPU
SHOWN = 100  # characters of a text in a message
WIDTHS_ALIVE = 12  # tensors of the model's width that a forward without gradients has at once, about

Job = TypeVar("Job")
TokenRequest = tuple[Sequence[int], Sequence[int]]  # context, not empty; continuation


class _Row(NamedTuple):
    """A text to be written."""

    place: int  # of its request
    sample: int
    prompt: tuple[int, ...]
    new_tokens: int  # at most
    temperature: float
    top_p: float

    @property
    def length(self) -> int:
        return len(self.prompt) + self.new_tokens


class ModelScorer:
    """See `evaluation.scoring.Scorer`. All ranks make the same calls with the same requests."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        device: torch.device,
        world: World | None = None,
        layout: Layout | None = None,
        max_batch_tokens: int | None = None,
        keep_going: Callable[[], bool] = lambda: True,
    ) -> None:
        """layout: of the ranks, none of them a pipeline's. max_batch_tokens: that go through the model at a time; of
        eight times as many keys and values are kept. None: as many as are good for the device. keep_going: asked every
        few forwards by all ranks, and must say the same to all; if it says no, the call under way raises
        `lockstep.Interrupted`. Raises ConfigError."""
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.world = world or World()
        self.layout = layout or Layout(dp_shard=self.world.size)
        if self.layout.pp > 1:
            raise ConfigError("the stages of a pipeline cannot be evaluated: load the checkpoint with tp instead")
        self.merged = 0  # continuations that took in a token of their context, of all so far
        self.shortened = 0
        self.max_batch_tokens = min(self.world.gather(max_batch_tokens or good_batch_tokens(model, device)))
        self._keep_going = keep_going

    @property
    def max_length(self) -> int:
        """Tokens that the model can be given."""
        return self.model.config.max_seq_len

    # ------------------------------------------------------------------ texts

    def likelihoods(self, requests: Sequence[Likelihood], *, description: str = "") -> list[LikelihoodScore]:
        contexts: dict[str, list[int]] = {}
        pairs, merged = [], 0
        for request in requests:
            if request.context not in contexts:
                contexts[request.context] = self.tokenizer.encode(request.context)
            alone = contexts[request.context]
            encoded = encode_pair(self.tokenizer, request.context, request.continuation, alone=alone)
            merged += encoded.merged
            pairs.append((encoded.context, encoded.continuation))
        self.merged += merged
        self._tell(description, merged, "continuations begin with a token that their context ends in")
        return self.token_likelihoods(pairs, description=description)

    def document_likelihoods(self, texts: Sequence[str], *, description: str = "") -> list[LikelihoodScore]:
        bos = [self.tokenizer.bos_id]
        pairs = [(bos, self.tokenizer.encode(text)) for text in texts]
        return self.token_likelihoods(pairs, description=description)

    def generations(self, requests: Sequence[Generation], *, seed: int = 0, description: str = "") -> list[list[str]]:
        bos, rows, endings, shortened = self.tokenizer.bos_id, [], [], 0
        for place, request in enumerate(requests):
            context = [bos, *self.tokenizer.encode(request.context)]
            prompt, new_tokens = room_for(context, request.max_new_tokens, most=self.max_length)
            shortened += len(prompt) < len(context)
            endings.append(Ending(self.tokenizer, prompt, request.stop))
            # the likeliest tokens are the same in every sample
            samples = request.samples if request.temperature > 0 else min(1, request.samples)
            rows += [
                _Row(place, sample, tuple(prompt), new_tokens, request.temperature, request.top_p)
                for sample in range(samples)
            ]
        self._tell_shortened(description, shortened)
        written = self._answers(
            self._batches_of_rows(rows),
            lambda batch, step: [
                ((row.place, row.sample), None if tokens is None else endings[row.place].text(tokens))
                for row, tokens in zip(batch, self._write(batch, endings, seed, step), strict=True)
            ],
            cost=lambda batch: sum(row.new_tokens for row in batch),
            description=description or "generations",
        )
        if unfit := [place for (place, _), text in written.items() if text is None]:
            raise NotFinite(_not_finite("logits after", requests[min(unfit)].context))
        return [
            [written[place, sample if request.temperature > 0 else 0] for sample in range(request.samples)]
            for place, request in enumerate(requests)
        ]

    # ------------------------------------------------------------------ tokens

    def token_likelihoods(self, requests: Sequence[TokenRequest], *, description: str = "") -> list[LikelihoodScore]:
        """Of continuations after contexts, both as tokens."""
        asked: list[Piece] = []
        pieces: list[range] = []  # of each request
        shortened = set()  # contexts: several continuations may have the same
        for context, continuation in requests:
            if len(continuation) <= self.max_length < len(context) + len(continuation) - 1:
                shortened.add(tuple(context))
            found = pieces_of(context, continuation, most=self.max_length)
            pieces.append(range(len(asked), len(asked) + len(found)))
            asked += found
        self._tell_shortened(description, len(shortened))
        scored = self._answers(
            plan(asked, max_tokens=self.max_batch_tokens),
            lambda batch, step: self._score(batch, asked, step),
            cost=lambda batch: sum(batch.forwards),
            description=description or "likelihoods",
        )
        self._check_finite(requests, pieces, scored)
        return [
            LikelihoodScore(
                log_probability=sum((scored[number][0] for number in numbers), start=0.0),
                tokens=sum(len(asked[number].targets) for number in numbers),
                greedy=all(scored[number][1] for number in numbers),
            )
            for numbers in pieces
        ]

    def _check_finite(
        self, requests: Sequence[TokenRequest], pieces: Sequence[range], scored: dict[int, tuple[float, bool]]
    ) -> None:
        for (context, continuation), numbers in zip(requests, pieces, strict=True):
            if not all(math.isfinite(scored[number][0]) for number in numbers):
                text = self.tokenizer.decode([*context, *continuation])
                raise NotFinite(_not_finite("log-likelihood at the end of", text))

    @torch.no_grad()
    def _score(self, batch: Batch, asked: Sequence[Piece], step: Lockstep) -> list[tuple[int, tuple[float, bool]]]:
        """By piece: the log-probability of its targets in nats, and whether each is the likeliest."""
        cache, shared = None, batch.shared
        if shared:
            cache = self.model.new_cache(batch=len(batch.beginnings), max_len=shared)
            tokens = self._padded(batch.beginnings)
            step.forward(tokens, cache=cache, at=torch.zeros_like(tokens[0, :1]))  # one logit, for nobody
            rows = torch.tensor(batch.beginning_of, device=self.device)
            cache = cache.of_rows(rows, max_len=max(len(row.inputs) for row in batch.rows))
        tokens = self._padded([row.inputs[shared:] for row in batch.rows])
        at: list[int] = []
        targets: list[int] = []
        numbers: list[int] = []
        for place, row in enumerate(batch.rows):
            begin = place * tokens.shape[1] - shared
            for number in row.pieces:
                piece = asked[number]
                at += range(begin + piece.first, begin + len(piece.inputs))
                targets += piece.targets
                numbers.append(number)
        logits = step.forward(tokens, cache=cache, at=torch.tensor(at, device=self.device))[0]
        losses, likeliest = self._of_targets(logits, torch.tensor(targets, device=self.device))
        answers, begin = [], 0
        for number in numbers:
            end = begin + len(asked[number].targets)
            answers.append((number, (sum(losses[begin:end]), all(likeliest[begin:end]))))
            begin = end
        return answers

    def _of_targets(self, logits: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
        """Of logits [N, V]: log-probability of each target [N], and whether no id of the tokenizer is likelier."""
        values, likeliest = [], []
        for some, wanted in zip(logits.split(LOGITS_IN_FP32), targets.split(LOGITS_IN_FP32), strict=True):
            full = some.float()
            values.append(full.gather(1, wanted[:, None])[:, 0] - full.logsumexp(1))
            likeliest.append(full[:, : self.tokenizer.vocab_size].argmax(1) == wanted)
        return torch.cat(values).tolist(), torch.cat(likeliest).tolist()

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows as int64 [N, longest], filled up with 0 at their ends."""
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.device)

    def _batches_of_rows(self, rows: list[_Row]) -> list[list[_Row]]:
        """Texts of the same sampling and about the same length, the longest first."""
        batches: list[list[_Row]] = []
        most = self.max_batch_tokens * KEPT_TOKENS  # of each text one token at a time goes through the model
        order = sorted(rows, key=lambda row: (row.temperature, row.top_p, -len(row.prompt), row.place, row.sample))
        for row in order:
            last = batches[-1] if batches else []
            same = bool(last) and (last[0].temperature, last[0].top_p) == (row.temperature, row.top_p)
            longest = max([row.length, *(other.length for other in last)])
            if not same or (len(last) + 1) * longest > most:
                batches.append(last := [])
            last.append(row)
        return sorted(batches, key=lambda batch: -len(batch) * max(row.length for row in batch))

    def _write(self, batch: list[_Row], endings: list[Ending], seed: int, step: Lockstep) -> list[list[int] | None]:
        """The tokens of each; None if there were logits that are no numbers."""
        unfit: set[int] = set()

        def choose(logits: Tensor, rows: list[int], written: list[int]) -> Tensor:
            finite = are_finite(logits)
            unfit.update(row for row, fit in zip(rows, finite.tolist(), strict=True) if not fit)
            logits = logits.where(finite[:, None], 0.0)  # the other ranks go on in step
            draws = [
                uniform(seed, batch[row].place, batch[row].sample, token)
                for row, token in zip(rows, written, strict=True)
            ]
            return next_tokens(logits, temperature=batch[0].temperature, top_p=batch[0].top_p, draws=draws)

        texts = write_on(
            self.model,
            [row.prompt for row in batch],
            max_new_tokens=[row.new_tokens for row in batch],
            choose=choose,
            ended=lambda row, tokens: row in unfit or endings[batch[row].place].reached(tokens),
            vocab_size=self.tokenizer.vocab_size,
            forward=step.forward,
        )
        return [None if row in unfit else tokens for row, tokens in enumerate(texts)]

    def _tell_shortened(self, description: str, count: int) -> None:
        self.shortened += count
        self._tell(description, count, f"contexts lost their front: the model has {self.max_length} tokens")

    def _tell(self, description: str, count: int, what: str) -> None:
        if count and self.world.leads:
            log.info("%s: %d %s", description or "requests", count, what)

    # ------------------------------------------------------------------ ranks

    def _answers(
        self,
        batches: Sequence[Job],
        work: Callable[[Job, Lockstep], Iterable[tuple[Any, Any]]],
        *,
        cost: Callable[[Job], int],
        description: str,
    ) -> dict[Any, Any]:
        """What `work` says of all batches, on every rank: ranks with data of their own take them in turn.

        `cost` of a batch is in tokens, for the bar.
        """
        ranks = self.world.size // self.layout.tp
        own, layer_rank = divmod(self.world.rank, self.layout.tp)
        step = Lockstep(self.model, self.world, apart=ranks > 1, keep_going=self._keep_going)
        answers: dict[Any, Any] = {}
        quiet = None if self.world.leads else True
        total = sum(map(cost, batches))
        with tqdm(total=total, desc=description, unit="tok", unit_scale=True, leave=False, disable=quiet) as bar:
            try:
                for begin in range(0, len(batches), ranks):
                    if begin + own < len(batches):
                        answers.update(work(batches[begin + own], step))
                    bar.update(sum(map(cost, batches[begin : begin + ranks])))
                step.catch_up()
            except torch.OutOfMemoryError:
                raise ConfigError(
                    f"{description}: batches of max_batch_tokens={self.max_batch_tokens} do not fit into the device's "
                    "memory: set a smaller max_batch_tokens"
                ) from None
        for others in self.world.gather(answers if layer_rank == 0 else {}):
            answers.update(others)
        return answers


def _not_finite(what: str, text: str) -> str:
    end = text if len(text) <= SHOWN else f"…{text[-SHOWN:]}"
    return f"no finite {what} {end!r}: {NOT_FINITE}"


def good_batch_tokens(model: Llama, device: torch.device) -> int:
    """Tokens of a batch that keep a device busy; on CUDA as many as have room in half of its free memory."""
    if device.type != "cuda":
        return CPU_BATCH_TOKENS
    config, size = model.config, torch.finfo(model.compute_dtype).bits // 8
    keys_and_values = 2 * config.n_layers * config.kv_heads * config.head_dim
    at_once = WIDTHS_ALIVE * config.dim + 3 * config.ffn_width + config.vocab_size
    a_token = size * ((KEPT_TOKENS + 1) * keys_and_values + at_once)  # the beginnings' own are kept for a moment too
    free, _ = torch.cuda.mem_get_info(device)
    return max(LEAST_BATCH_TOKENS, min(CUDA_BATCH_TOKENS, int(MEMORY_TAKEN * free / a_token)))
