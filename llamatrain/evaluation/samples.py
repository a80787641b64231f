"""What the model writes after a few prompts, at each validation: samples.jsonl, a line for each.

The likeliest token is taken each time, so that two lines differ by what was learned between them and by nothing else.
Nothing is drawn, and weights are only read: training goes on as if there had been no samples.
"""

import logging
from collections.abc import Callable

import torch

from llamatrain.config import RunConfig
from llamatrain.config.parallel import Layout
from llamatrain.distributed import World
from llamatrain.errors import ConfigError
from llamatrain.evaluation.during_training import training_scorer
from llamatrain.evaluation.lockstep import Interrupted
from llamatrain.evaluation.scoring import Generation, NotFinite
from llamatrain.model.llama import Llama
from llamatrain.tokenizer import Tokenizer

log = logging.getLogger("llamatrain")


class Samples:
    """The prompts of a run. Raises ConfigError if one is too long to be written on."""

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, device: torch.device, world: World, layout: Layout
    ) -> None:
        self._scorer = training_scorer(config, tokenizer, device, world, layout)
        self._leads = world.leads
        self._prompts, self._new_tokens = config.evaluation.samples, config.evaluation.sample_tokens
        longest = max((len(tokenizer.encode(text, bos=True)) for text in self._prompts), default=0)
        most = config.model.max_seq_len
        if self._prompts and longest + self._new_tokens > most:
            fix = f"set evaluation.sample_tokens={most - longest} or shorten it" if longest < most else "shorten it"
            raise ConfigError(
                f"evaluation.samples: a prompt of {longest} tokens and evaluation.sample_tokens={self._new_tokens} do "
                f"not fit into model.max_seq_len={most}: {fix}"
            )

    def write(self, model: Llama, *, keep_going: Callable[[], bool] = lambda: True) -> list[dict[str, str]] | None:
        """Each prompt and what follows it, nothing if that is no text; all ranks call it, and have the same.

        The model is as `parallel.answering` makes it. None if `keep_going`, asked every few tokens, says no; it must
        say the same on all ranks.
        """
        scorer = self._scorer(model, keep_going=keep_going)
        requests = [Generation(text, self._new_tokens) for text in self._prompts]
        try:
            written = scorer.generations(requests, description="samples")
        except Interrupted:
            return None
        except NotFinite as error:
            if self._leads:
                log.warning("evaluation.samples: %s; nothing was written", error)
            return []
        return [{"prompt": text, "continuation": found[0]} for text, found in zip(self._prompts, written, strict=True)]
