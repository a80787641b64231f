"""Pages are normalised as cc_net does, their perplexity is KenLM's, and the buckets follow the cut-offs."""

import json
import random
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.filters.perplexity import PerplexitySettings, perplexity_filter
from data_tools.language_model import load_ngrams, load_pieces, normalised_lines, page_scorer
from data_tools.records import Dropped, Record
from data_tools.train_ngrams import TrainNgramsSettings, train_ngrams
from llamatrain.errors import ConfigError, DataError
from tests.data.small_language import jumbled, page, small_models, write_pages
from tests.real_text import needed_data, novels

pytest.importorskip("kenlm")


def _record(text: str, language: str | None = "en") -> Record:
    return Record(text=text, id="a", source="test", language=language)


def _bucket(result: Record | Dropped) -> str:
    return result.reason if isinstance(result, Dropped) else result.provenance["bucket"]


# Normalising

# What cc_net's normalisation is, step by step and slowly: strip, lower case, no accents, digits to 0, punctuation to
# ASCII, no control characters.
PUNCTUATION = dict(
    zip("，。、∶：？！；～（）〈〉【】％–━►´’", ",.,::?!;~()<>[]%---''", strict=True),
    **dict.fromkeys("„”“«»」「《》", '"'),
    **{"１": '"', "—": " - ", "．": ". ", "…": "..."},
)


def _as_cc_net(text: str) -> str:
    text = unicodedata.normalize("NFD", text.strip().lower())
    text = "".join(character for character in text if unicodedata.category(character) != "Mn")
    text = "".join(PUNCTUATION.get(character, character) for character in re.sub(r"\d", "0", text))
    return re.sub("[\x00-\x1f\x7f-\x9f]", "", text)


CHARACTERS = st.one_of(
    st.characters(exclude_categories=("Cs",)),
    st.sampled_from("".join(PUNCTUATION) + "ÉéßΣςσİıǅ٣१½e\u0301\u0323\u0302가\u1100\n\t\r \x85\u2028\x1c"),
)


@settings(max_examples=300, deadline=None)
@given(text=st.text(CHARACTERS, max_size=40))
def test_a_glued_page_is_exactly_cc_nets(text: str) -> None:
    wanted = _as_cc_net(text)
    assert normalised_lines(text, "glue") == ([wanted] if wanted else [])


@settings(max_examples=300, deadline=None)
@given(text=st.text(CHARACTERS, max_size=40))
def test_lines_are_cc_nets_form_of_each_with_tabs_as_spaces(text: str) -> None:
    lines = [re.sub("[\t\v\f\r\x1c-\x1f]", " ", line) for line in text.strip().split("\n")]
    assert normalised_lines(text, "line") == [form for line in lines if (form := _as_cc_net(line).strip())]


def test_a_line_break_does_not_glue_words_unless_asked() -> None:
    # cc_net normalises the whole page, which deletes the breaks, and then splits at the breaks it has no more.
    text = "Hello World\nNext\tline 12"
    assert normalised_lines(text, "line") == ["hello world", "next line 00"]
    assert normalised_lines(text, "glue") == ["hello worldnextline 00"]


# Perplexity


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models(tmp_path_factory.getbasetemp() / "small_language")


@pytest.fixture
def own_models(models: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(models, tmp_path / "models"))


def test_perplexity_is_kenlms_by_piece_with_the_end_of_each_line(models: Path) -> None:
    pieces, ngrams = load_pieces(models / "en.sp.model"), load_ngrams(models / "en.arpa.gz")
    score = page_scorer(models / "en.sp.model", models / "en.arpa.gz", newlines="line")
    text = page(3)
    log10, length = 0.0, 0
    for line in normalised_lines(text, "line"):
        words = pieces.encode_as_pieces(line)
        found = [value for value, _, _ in ngrams.full_scores(" ".join(words))]
        assert len(found) == len(words) + 1
        log10, length = log10 + sum(found), length + len(found)
    assert score(text) == pytest.approx(10 ** (-log10 / length), rel=1e-6)
    assert score("") is None and score("\n \x00\n") is None


def test_a_bad_text_surprises_more_than_a_good_one(models: Path) -> None:
    for newlines in ("line", "glue"):
        score = page_scorer(models / "en.sp.model", models / "en.arpa.gz", newlines=newlines)
        good, bad, foreign = score(page(2000)), score(jumbled(2000)), score("不锈钢精密铸造件 " * 9)
        assert good is not None and bad is not None and foreign is not None
        assert 1 < good < bad / 2 and bad < foreign


@pytest.mark.slow
def test_a_model_of_real_novels_prefers_another_novel_to_its_words_jumbled(tmp_path: Path) -> None:
    data = needed_data()
    *texts, held_out = novels(data / "corpora" / "english_novels" / "english_novels.tar.zst", 4)
    (french,) = novels(data / "corpora" / "eltec" / "eltec_fra.tar.zst", 1)
    pages = [held_out[start : start + 5000] for start in range(0, 200_000, 5000)]
    documents = [text[start : start + 5000] for text in texts for start in range(0, len(text), 5000)]
    train_ngrams(
        TrainNgramsSettings(
            input=str(write_pages(tmp_path / "texts.jsonl", documents)),
            cutoffs_input=str(write_pages(tmp_path / "pages.jsonl", pages)),
            output=str(tmp_path / "models"),
            vocab_size=2000,
            trainer="own",
        )
    )
    score = page_scorer(tmp_path / "models" / "en.sp.model", tmp_path / "models" / "en.arpa.gz", newlines="line")
    words = held_out[:50_000].split()
    random.Random(0).shuffle(words)
    known, new, mixed, foreign = (
        score(text) or 0 for text in (texts[0][:50_000], held_out[:50_000], " ".join(words), french[:50_000])
    )
    assert known < 10 < 60 < new < 150 < mixed < foreign


# Buckets


def _cutoffs(models: Path) -> list[float]:
    return json.loads((models / "en.ngrams.json").read_text())["percentiles"]  # type: ignore[no-any-return]


def test_buckets_follow_the_recorded_percentiles(models: Path) -> None:
    keep = perplexity_filter(PerplexitySettings(models=str(models)))
    percentiles = _cutoffs(models)
    found = []
    for seed in range(1000, 1060):  # the pages the percentiles are of
        record = _record(page(seed))
        bucket = _bucket(keep(record))
        perplexity = record.scores["perplexity"]
        wanted = "head" if perplexity < percentiles[30] else "middle" if perplexity < percentiles[60] else "tail"
        assert bucket.removeprefix("perplexity_") == wanted
        assert bucket.startswith("perplexity_") == (wanted == "tail")
        found.append(wanted)
    assert [found.count(bucket) for bucket in ("head", "middle", "tail")] == [18, 18, 24]


def test_which_buckets_are_kept_and_where_they_end_are_settings(models: Path) -> None:
    record = _record(page(1000))
    for keep, wanted in ((["tail"], "tail"), (["head"], "perplexity_tail"), ([], "perplexity_tail")):
        chosen = PerplexitySettings(models=str(models), keep=keep, head_percentile=0, tail_percentile=0)
        assert _bucket(perplexity_filter(chosen)(record)) == wanted
    all_head = PerplexitySettings(models=str(models), head_percentile=100, tail_percentile=100)
    assert _bucket(perplexity_filter(all_head)(_record(page(1001)))) in ("head", "perplexity_tail")


def test_a_language_without_a_model_goes_by_its_own_rule(models: Path) -> None:
    for language in ("fr", None):
        dropped = perplexity_filter(PerplexitySettings(models=str(models)))(_record(page(1), language))
        assert _bucket(dropped) == "perplexity_all"
        keep = perplexity_filter(PerplexitySettings(models=str(models), keep=["head", "all"]))
        assert _bucket(keep(_record(page(1), language))) == "all"


def test_a_page_with_nothing_to_measure_is_dropped(models: Path) -> None:
    keep = perplexity_filter(PerplexitySettings(models=str(models), keep=["head", "middle", "tail", "all"]))
    assert _bucket(keep(_record(" \n\x07\n"))) == "perplexity_empty"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=()), max_size=50))
def test_no_text_is_too_strange(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    directory = small_models(tmp_path_factory.getbasetemp() / "small_language")
    keep = KEEP.setdefault(directory, perplexity_filter(PerplexitySettings(models=str(directory))))
    record = _record(text)
    result = keep(record)
    assert result is record or isinstance(result, Dropped)
    assert record.scores.get("perplexity", 2) > 1


KEEP: dict[Path, Any] = {}


# cc_net's table


def _table(path: Path, head: float, tail: float) -> str:
    path.write_text(f",de,en\n0,1,2\n30,370,{head}\n60,590,{tail}\n")
    return str(path)


def test_cc_nets_table_gives_the_cut_offs_of_its_own_models(models: Path, tmp_path: Path) -> None:
    score = page_scorer(models / "en.sp.model", models / "en.arpa.gz", newlines="glue")
    perplexity = score(page(5))
    assert perplexity is not None
    # cc_net rounds to one digit first: a page just below the cut-off would fall into the next bucket.
    for head, tail, bucket in (
        (perplexity + 0.001, perplexity + 1, "head"),
        (perplexity, perplexity + 0.001, "middle"),
        (perplexity - 1, perplexity, "perplexity_tail"),
    ):
        cutoffs = _table(tmp_path / "cutoff.csv", head, tail)
        keep = perplexity_filter(PerplexitySettings(models=str(models), cutoffs=cutoffs, newlines="glue"))
        assert _bucket(keep(_record(page(5)))) == bucket


def test_a_language_that_the_table_does_not_hold_has_no_cut_off(own_models: Path, tmp_path: Path) -> None:
    for name in ("sp.model", "arpa.gz"):
        (own_models / f"en.{name}").rename(own_models / f"eo.{name}")
    cutoffs = _table(tmp_path / "cutoff.csv", 1, 2)
    keep = perplexity_filter(PerplexitySettings(models=str(own_models), cutoffs=cutoffs, newlines="glue"))
    record = _record(page(5), "eo")
    assert _bucket(keep(record)) == "perplexity_all" and record.scores["perplexity"] > 1


def test_the_real_table_of_cc_net_is_read() -> None:
    data = needed_data()
    from data_tools.filters.perplexity import _read_table

    table = _read_table(data / "raw" / "commoncrawl" / "cc_net-cutoff.csv", PerplexitySettings())
    assert len(table) == 48
    assert [table[code] for code in ("en", "de", "fr", "es")] == [(340, 520), (370, 590), (180, 330), (180, 290)]


# What is refused


def test_settings_that_cannot_work_are_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("no,table\nhere")
    (tmp_path / "empty").mkdir()
    good = _table(tmp_path / "cutoff.csv", 1, 2)
    for changes, message in (
        ({"models": "???"}, "models=.*no such directory"),
        ({"models": str(tmp_path / "empty")}, r"no \*\.sp\.model is there"),
        ({"keep": ["best"]}, "no bucket 'best'"),
        ({"head_percentile": 70}, "head_percentile=70"),
        ({"newlines": "join"}, "newlines=join"),
        ({"newlines": "glue"}, r"cut-offs are of newlines=line"),
        ({"cutoffs": good}, "set newlines=glue"),
        ({"cutoffs": str(tmp_path / "bad.csv"), "newlines": "glue"}, "not a table as cc_net's"),
        ({"cutoffs": good, "newlines": "glue", "head_percentile": 31}, "head_percentile=31"),
    ):
        values: dict[str, Any] = {"models": str(models), **changes}
        with pytest.raises((ConfigError, DataError), match=message):
            perplexity_filter(PerplexitySettings(**values))


def test_a_model_that_is_not_whole_is_named(own_models: Path) -> None:
    (own_models / "en.ngrams.json").write_text("{}")
    with pytest.raises(DataError, match=r"en\.ngrams\.json: no percentiles"):
        perplexity_filter(PerplexitySettings(models=str(own_models)))
    (own_models / "en.arpa.gz").unlink()
    with pytest.raises(DataError, match=r"there is no en\.arpa\.gz beside it"):
        perplexity_filter(PerplexitySettings(models=str(own_models)))
    (own_models / "en.sp.model").write_bytes(b"no model")
    (own_models / "en.arpa").write_bytes(b"no model")
    for load, name in ((load_pieces, "en.sp.model"), (load_ngrams, "en.arpa")):
        with pytest.raises(DataError, match=re.escape(name)):
            load(own_models / name)
