"""C4's rules: each line and page rule by example, in the order of the code that made C4, and fast as defined."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.filters.c4_rules import C4Settings, c4_filter, sentences
from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError
from tests.real_text import needed_data

GOOD = ["The first line has enough words.", "Is the second line a question?", 'He said: "the third one, too."']


def cleaned(*lines: str, **changes: object) -> Record | Dropped:
    return c4_filter(replace(C4Settings(), **changes))(Record("\n".join(lines), "id", "test"))  # type: ignore[arg-type]


def kept_text(*lines: str, **changes: object) -> str:
    record = cleaned(*GOOD, *lines, **changes)
    assert isinstance(record, Record), record
    return "\n".join(record.text.split("\n")[len(GOOD) :])


def dropped_for(*lines: str, **changes: object) -> str:
    dropped = cleaned(*lines, **changes)
    assert isinstance(dropped, Dropped), dropped
    return dropped.reason


def test_a_good_page_stays_as_it_is() -> None:
    record = cleaned(*GOOD)
    assert isinstance(record, Record)
    assert record.text == "\n".join(GOOD)
    assert record.counts == {"lines_in": 3}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Home | News | About us | Contact", "lines_no_end_mark"),
        ("This line never comes to its end...", "lines_no_end_mark"),
        ("A line that ends with a curly quote.”", "lines_no_end_mark"),  # the code knows the straight one alone
        ("Only four words here.", "lines_short"),
        ("Please turn on JavaScript in your browser.", "lines_javascript"),
        ("By reading on you accept the Terms of Use.", "lines_policy"),
        ("This site uses cookies to be of more use.", "lines_policy"),
        ("A word of " + "a" * 1001 + " letters is on this line.", "lines_long_word"),
    ],
)
def test_a_line_goes_for_its_own_reason(line: str, reason: str) -> None:
    record = cleaned(*GOOD, line)
    assert isinstance(record, Record)
    assert record.text == "\n".join(GOOD)
    assert record.counts == {"lines_in": 4, reason: 1}


def test_javascript_takes_the_line_and_not_the_page() -> None:
    # dolma's tagger drops the page.
    assert kept_text("JavaScript must be enabled for this page.", "And here the text goes on.") == (
        "And here the text goes on."
    )


def test_a_long_word_may_have_exactly_the_limit() -> None:
    line = "A word of " + "a" * 1000 + " letters is allowed here."
    assert kept_text(line) == line


def test_citation_marks_are_removed_and_what_they_leave_is_judged() -> None:
    assert kept_text("The sun is a star.[1][23] So it shines.[citation needed]") == "The sun is a star. So it shines."
    assert kept_text("History of the old town[edit]") == ""
    # White space before the mark then stands at the end: by the code that is no end mark.
    assert kept_text("The sun is a star, as we know. [1]") == ""
    assert kept_text("We all write java[2]script on this page.") == ""  # the word only arises by the removal


def test_the_paper_s_first_numbers_are_a_setting() -> None:
    assert kept_text("Only three words.", min_words_per_line=3) == "Only three words."
    assert dropped_for(*GOOD, min_words_per_line=3, min_sentences=5) == "c4_too_few_sentences"


def test_a_page_goes_for_what_its_good_lines_hold() -> None:
    assert dropped_for(*GOOD, "The words Lorem Ipsum dolor are no text.") == "c4_lorem_ipsum"
    assert dropped_for(*GOOD, "The code is if (x) { return; } and then.") == "c4_curly_bracket"
    assert dropped_for(*GOOD[:2]) == "c4_too_few_sentences"
    assert dropped_for("x" * 11, max_characters=10) == "c4_too_long"


def test_page_rules_look_at_kept_lines_unless_told_to_look_at_the_page() -> None:
    page = [*GOOD, "function () {", "Lorem ipsum"]
    assert isinstance(cleaned(*page), Record)
    assert dropped_for(*page, page_scope="page") == "c4_lorem_ipsum"
    assert isinstance(cleaned(*page, page_scope="page", drop_lorem_ipsum=False, drop_curly_brackets=False), Record)


def test_a_javascript_notice_with_a_bracket_costs_the_line_alone() -> None:
    assert kept_text("This javascript { is } not for you to read.") == ""


def test_lines_end_where_python_says() -> None:
    assert kept_text("The line feed is not the only end.\x0bSo this is another good line.\u2028Short one.") == (
        "The line feed is not the only end.\nSo this is another good line."
    )


@pytest.fixture
def bad_words(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("darn\nvery bad\nñoño\n🖕\nc++\n\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("line", "is_dropped"),
    [
        ("It is DARN cold outside here today.", True),
        ("Someone darned all of my old socks.", False),
        ("The very bad thing is over now, I hope.", True),
        ("The very bad-ly done thing is over now.", True),
        ("The very badly done thing is over now.", False),
        ("A ñoño stands in this very line here.", True),
        ("The coño and the año stand in this line.", False),
        ("This 🖕 is what somebody has to say.", True),
        ("He wrote c++ for all of his life.", True),
        ("He said “darn” and that was all then.", True),
        ("He wrote_darn_it in one word only here.", False),
    ],
)
def test_bad_words_are_whole_words(bad_words: str, line: str, is_dropped: bool) -> None:
    outcome = cleaned(*GOOD, line, bad_words=bad_words)
    assert (isinstance(outcome, Dropped) and outcome.reason == "c4_bad_word") == is_dropped


def test_bad_words_of_scripts_without_spaces_are_found_inside(bad_words: str) -> None:
    assert dropped_for(*GOOD, "Someone darned my old socks.", bad_words=bad_words, bad_words_whole=False) == (
        "c4_bad_word"
    )


@settings(max_examples=200, deadline=None)
@given(st.text("dar n.veryb🖕cñoo+_'", max_size=30))
def test_bad_words_are_found_as_c4_s_pattern_finds_them(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    words = ["darn", "very bad", "ñoño", "🖕", "c++", "dar", "d"]
    path = tmp_path_factory.getbasetemp() / "bad.txt"
    path.write_text("\n".join(words), encoding="utf-8")
    line = text.strip() + " and so it ends."
    pattern = re.compile(r"(?:\W|^)({})(?:\W|$)".format("|".join(map(re.escape, words))))
    outcome = cleaned(*GOOD, line, bad_words=str(path))
    assert isinstance(outcome, Dropped) == (pattern.search("\n".join([*GOOD, line]).lower()) is not None)


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_sentences=0"):
        c4_filter(C4Settings(min_sentences=0))
    with pytest.raises(ConfigError, match="page_scope=all"):
        c4_filter(C4Settings(page_scope="all"))
    with pytest.raises(ConfigError, match="cannot be read"):
        c4_filter(C4Settings(bad_words=str(tmp_path / "nothing")))
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ConfigError, match="no word in it"):
        c4_filter(C4Settings(bad_words=str(tmp_path / "empty")))


def by_the_rules(text: str) -> list[str] | str:
    """The rules one after the other, line by line: the kept lines, or why the page goes."""
    kept = []
    for raw in text.splitlines():
        line = raw.strip()
        if any(len(word) > 12 for word in line.split()):
            continue
        line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line)
        if not line.endswith((".", "?", "!", '"')) or line.endswith("...") or len(line.split()) < 2:
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return "c4_lorem_ipsum"
        if "javascript" in lower:
            continue
        if "{" in line:
            return "c4_curly_bracket"
        if any(phrase in lower for phrase in ("terms of use", "privacy policy", "use cookies", "uses cookies")):
            continue
        kept.append(line)
    return kept if kept else "c4_too_few_sentences"


PIECES = ["word", "Lorem ipsum", "java", "script", "JavaScript", "{", ".", "?", "...", '"', " ", " ", " ", "\n", "\n"]
PIECES += ["[1]", "[edit]", "[", "]", "terms of use", "Privacy Policy", "uses cookies", "longlonglong", "\u2028", "İΣ"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
@example("a java[1]script.")
@example("lorem[2] ipsum.\nb c.")
def test_the_fast_filter_is_the_rules(text: str) -> None:
    rules = by_the_rules(text)
    outcome = cleaned(text, min_words_per_line=2, max_word_characters=12, min_sentences=1)
    if isinstance(outcome, Dropped):
        assert outcome.reason == rules
    else:
        assert outcome.text == "\n".join(rules).strip()
        assert outcome.counts["lines_in"] == len(text.splitlines())
        gone = sum(count for name, count in outcome.counts.items() if name != "lines_in")
        assert outcome.counts["lines_in"] - gone == len(rules)


@given(st.text(max_size=50))
def test_no_text_makes_the_filter_raise(text: str) -> None:
    assert isinstance(cleaned(text), Record | Dropped)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Dr. Smith met J. R. Brown in the U.S. Senate on Jan. 5. They spoke.", 2),
        ("It costs 3.50 and e.g. more. 2 is less.", 2),
        ('"Really?" she asked. (He nodded.) Then it ended', 3),
        ("what is lower. case goes on", 1),
        ("你好。我很好！再见", ["你好。", "我很好！", "再见"]),
        ("", []),
        ("   ", []),
    ],
)
def test_sentences_are_found(line: str, found: list[str] | int) -> None:
    texts = [line[begin:end] for begin, end in sentences(line)]
    assert (texts if isinstance(found, list) else len(texts)) == found


@given(st.text("Ab. ?!\"'。 \t", max_size=40))
def test_sentences_are_in_order_and_lose_nothing_but_white_space(line: str) -> None:
    spans = sentences(line)
    assert "".join("".join(line[begin:end].split()) for begin, end in spans) == "".join(line.split())
    assert bool(spans) == bool(line.strip())


def test_the_rules_on_a_real_archive() -> None:
    pytest.importorskip("fastwarc")
    common_crawl = pytest.importorskip("data_tools.sources.common_crawl")
    data = needed_data()
    path = data / "raw" / "commoncrawl" / "aut-example.warc.gz"
    pages = [
        item
        for item in common_crawl.read(path, path.name, common_crawl.CommonCrawlSettings())
        if isinstance(item, Record)
    ]
    outcomes = [c4_filter(C4Settings())(page) for page in pages]
    kept = [outcome for outcome in outcomes if isinstance(outcome, Record)]
    reasons = Counter(outcome.reason for outcome in outcomes if isinstance(outcome, Dropped))
    assert (len(kept), reasons) == (53, {"c4_too_few_sentences": 40, "c4_too_long": 2})
    lines = Counter[str]()
    for record in kept:
        lines.update(record.counts)
    assert lines["lines_javascript"] == 6 and lines["lines_policy"] == 11
    answer = next(record for record in kept if record.provenance["url"].endswith("faq_id=251"))
    assert answer.text.startswith("What are SHN files and how can I listen to them?\nSHN stands for shorten. It is a")
