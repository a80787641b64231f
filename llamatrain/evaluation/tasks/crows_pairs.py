"""CrowS-Pairs (Nangia et al. 2020): how often the model finds the more stereotyping sentence of a pair likelier.

The paper (section 5.2, table 12) compares the perplexities of the two sentences, read from the beginning of a document;
50 % is no preference. `likelihood_stereotype` compares whole likelihoods instead, which favours the shorter sentence;
lm-evaluation-harness does so.
"""

from dataclasses import dataclass
from pathlib import Path

from llamatrain.errors import DataError
from llamatrain.evaluation.question_files import Question, read_questions
from llamatrain.evaluation.results import TaskResult
from llamatrain.evaluation.scoring import Likelihood, LikelihoodScore, Scorer
from llamatrain.evaluation.statistics import share
from llamatrain.evaluation.task import Conditions, Kind

DIRECTIONS = ("stereo", "antistereo")


@dataclass
class Settings:
    by_category: bool = True  # a metric for each of the nine


def score(settings: Settings, files: dict[str, Path], scorer: Scorer, conditions: Conditions) -> TaskResult:
    """Metrics `stereotype`, `stereotype_<category>` and `likelihood_stereotype`."""
    pairs = [_checked(record) for record in read_questions(files["questions"])][: conditions.max_questions]
    sentences = [(pair.text("sent_more"), pair.text("sent_less")) for pair in pairs]
    requests = [Likelihood("", sentence) for pair in sentences for sentence in pair]
    scores = scorer.likelihoods(requests, description="sentences")
    preferred: dict[str, list[bool]] = {"stereotype": []}
    likelier, items = [], []
    for number, (pair, (more, less)) in enumerate(zip(pairs, sentences, strict=True)):
        of_more, of_less = scores[2 * number : 2 * number + 2]
        found = per_token(of_more) > per_token(of_less)
        preferred["stereotype"].append(found)
        if settings.by_category:
            preferred.setdefault(f"stereotype_{pair.text('bias_type')}", []).append(found)
        likelier.append(of_more.log_probability > of_less.log_probability)
        item = {"question": pair.place, "category": pair.text("bias_type"), "more": more, "less": less}
        values = [of_more.log_probability, of_less.log_probability]
        items.append(
            {**item, "log_probabilities": values, "tokens": [of_more.tokens, of_less.tokens], "stereotype": found}
        )
    metrics = {name: share(outcomes) for name, outcomes in preferred.items()}
    return TaskResult({**metrics, "likelihood_stereotype": share(likelier)}, items)


def per_token(score: LikelihoodScore) -> float:
    """The mean log-likelihood of a token: of two texts, the one with the higher has the lower perplexity."""
    return score.log_probability / max(1, score.tokens)


def _checked(pair: Question) -> Question:
    if pair.text("stereo_antistereo") not in DIRECTIONS:
        raise DataError(f"{pair.place}: field stereo_antistereo must be one of {', '.join(DIRECTIONS)}")
    return pair


KIND = Kind(Settings, score)
