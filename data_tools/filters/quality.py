"""Pages like those Wikipedia refers to: a linear classifier, references against random pages (paper, section 2.1).

data_tools.train_quality trains it. A page is dropped as
    quality  the probability of being a reference is below the threshold

The paper discards "pages not classified as references", so the threshold is 0.5; RedPajama took 0.25.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_tools.fasttext_model import LABEL, load_model, one_line, predictor
from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError

POSITIVE, NEGATIVE = "reference", "random"


@dataclass
class QualitySettings:
    model: str = "???"  # of data_tools.train_quality
    threshold: float = 0.5  # of the probability (the paper: "classified as"; RedPajama: 0.25)
    label: str = POSITIVE  # of the pages to keep, without __label__ (RedPajama's model: wiki)


def quality_score(settings: QualitySettings) -> Callable[[str], float]:
    """text -> probability of `label`, 0 to 1. Raises ConfigError and DataError."""
    if settings.model in ("", "???"):
        raise ConfigError("model is not set: name a model of python -m data_tools.train_quality")
    if not 0 <= settings.threshold <= 1:
        raise ConfigError(f"threshold={settings.threshold}: must be between 0 and 1")
    model = load_model(Path(settings.model))
    labels, wanted = model.get_labels(), LABEL + settings.label
    if wanted not in labels:
        found = ", ".join(label.removeprefix(LABEL) for label in labels[:10])
        raise ConfigError(f"label={settings.label}: {settings.model} knows {found}; set label to one of them")
    predict, count = predictor(model), len(labels)

    def score(text: str) -> float:
        for probability, label in predict(one_line(text), count, 0.0, "strict"):
            if label == wanted:
                return min(probability, 1.0)  # fastText adds a little to avoid log(0)
        return 0.0  # a page without a known word has no answer

    return score


def quality_filter(settings: QualitySettings) -> Callable[[Record], Record | Dropped]:
    """Sets `scores["quality"]`. Raises ConfigError and DataError; the filter raises nothing."""
    score, threshold = quality_score(settings), settings.threshold

    def keep(record: Record) -> Record | Dropped:
        record.scores["quality"] = score(record.text)
        return record if record.scores["quality"] >= threshold else Dropped.of(record, "quality")

    return keep
