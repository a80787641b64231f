"""fastText models: loading them, and a page as the one line they take.

fastText reads one line of words parted by white space and NUL. Three texts mean something else to it than to a reader,
and any page may hold them: a newline ends the line, the word `</s>` ends it too (the rest of the page would not be
seen), and a word that begins with `__label__` is an answer, not text.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamatrain.errors import ConfigError, DataError

LABEL = "__label__"
_COMMAND_WORDS = re.compile(f"</s>|{LABEL}")

Predict = Callable[[str, int, float, str], list[tuple[float, str]]]


def fasttext_module(*, training: bool = False) -> Any:
    """The module `fasttext`. Raises ConfigError where it is missing or, for training, where it can only predict."""
    try:
        import fasttext
    except ImportError:
        raise ConfigError("fastText is not installed: pip install 'llamatrain[data]'") from None
    if training and not hasattr(fasttext, "train_supervised"):
        raise ConfigError(
            "the installed module fasttext can only predict (fasttext-predict puts itself in its place): "
            "pip install --force-reinstall --no-deps fasttext-numpy2-wheel"
        )
    return fasttext


def load_model(path: Path) -> Any:
    """A model file, .bin or .ftz. Raises ConfigError and DataError."""
    fasttext = fasttext_module()
    if not path.is_file():
        raise DataError(f"{path}: there is no fastText model")
    try:
        return fasttext.load_model(str(path))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise DataError(f"{path}: not a fastText model ({error})") from None


def predictor(model: Any) -> Predict:
    """The model's own function (line, how many labels, threshold, "strict") -> (probability, label), best first.

    The one beneath `model.predict`, which fails under numpy 2 in some builds.
    """
    predict: Predict = model.f.predict
    return predict


def one_line(text: str) -> str:
    """The text as one line that fastText reads whole, ended as its predictor wants it: words of neighbouring lines
    stay apart, and what is no Unicode (lone surrogates) becomes a question mark."""
    if "\n" in text:
        text = text.replace("\n", " ")
    if "</s>" in text or LABEL in text:
        text = _COMMAND_WORDS.sub(" ", text)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-8", "replace").decode()
    return text + "\n"
