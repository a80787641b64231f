"""A scorer as a model of lm-evaluation-harness 0.4.

Every rank shows the harness a model of one rank, so all get the same requests and make the same calls, as the scorer
wants it. Context and continuation become tokens as they do for the tasks here (`evaluation.tokens`), so on the same
prompts both have the same scores.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from llamatrain.evaluation.model_scorer import ModelScorer
from llamatrain.evaluation.scoring import Generation
from llamatrain.evaluation.tokens import encode_pair

MAX_NEW_TOKENS = 256  # where a task does not say, as for the harness's own models


class HarnessModel(TemplateLM):
    """See `lm_eval.api.model.LM`."""

    def __init__(self, scorer: ModelScorer, *, seed: int = 0) -> None:
        super().__init__()
        self.scorer, self.seed = scorer, seed

    @property
    def eot_token_id(self) -> int:
        return self.scorer.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self.scorer.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.scorer.tokenizer.encode(string, bos=add_special_tokens is not False)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        encoded = encode_pair(self.scorer.tokenizer, context, continuation)
        return encoded.context, encoded.continuation

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = self.scorer.token_likelihoods(pairs, description="harness")
        return [(score.log_probability, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        scores = self.scorer.document_likelihoods([request.args[0] for request in requests], description="harness")
        return [score.log_probability for score in scores]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [_generation(*request.args) for request in requests]
        return [texts[0] for texts in self.scorer.generations(asked, seed=self.seed, description="harness")]


def _generation(context: str, settings: dict[str, Any]) -> Generation:
    """A request of the harness; of its settings those that Hugging Face's models heed too."""
    stop = settings.get("until") or ()
    sampled = settings.get("do_sample") is not False
    return Generation(
        context,
        max_new_tokens=int(settings.get("max_gen_toks", MAX_NEW_TOKENS)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        temperature=float(settings.get("temperature", 0.0)) if sampled else 0.0,
        top_p=float(settings.get("top_p", 1.0)),
    )
