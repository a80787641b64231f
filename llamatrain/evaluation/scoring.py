"""What a task asks of a model and what it gets: the one interface between tasks and models. No torch.

A task never sees tokens, ranks or batches. The model behind it is `evaluation.model_scorer`, or in tests a function.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llamatrain.errors import UnhealthyRun


@dataclass(frozen=True)
class Likelihood:
    """How likely is `continuation` after `context`? An empty context is the beginning of a document (BOS)."""

    context: str
    continuation: str


@dataclass(frozen=True)
class LikelihoodScore:
    log_probability: float  # of the whole continuation; nats
    tokens: int  # of the continuation
    greedy: bool  # each of its tokens is the likeliest


@dataclass(frozen=True)
class Generation:
    """What does the model write after `context`? It ends before the first of `stop`, at EOS, or by length."""

    context: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0
    samples: int = 1


class NotFinite(UnhealthyRun):
    """The model's answers are no numbers. All ranks raise it at once."""


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of `stop`."""
    return text[: min((text.find(mark) for mark in stop if mark in text), default=len(text))]


class Scorer(Protocol):
    """A model that answers. The answers stand in the order of the requests, and do not depend on how they are batched
    beyond rounding, nor on the number of ranks."""

    shortened: int  # contexts so far that lost their front, since the model is not long enough

    def likelihoods(self, requests: Sequence[Likelihood], *, description: str = "") -> list[LikelihoodScore]: ...

    def document_likelihoods(self, texts: Sequence[str], *, description: str = "") -> list[LikelihoodScore]:
        """Of whole documents from BOS on, longer ones in windows: every token is scored exactly once."""
        ...

    def generations(self, requests: Sequence[Generation], *, seed: int = 0, description: str = "") -> list[list[str]]:
        """`samples` texts of each request; a sample is a function of (seed, place of the request, sample)."""
        ...
