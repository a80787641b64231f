"""The data card shows what the ledger holds, and nothing in a document becomes markup, a link or a request."""

import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.card import markdown, page
from data_tools.card.charts import Bar, Column, bars, columns, merged
from data_tools.card.content import read_card, score_histograms
from data_tools.card.html import element, markup
from data_tools.card.rows import tiles
from data_tools.data_card import DataCardSettings, data_card
from data_tools.engine.ledger import FORMAT, Tally, size_of, write_entry
from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError, DataError

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;]]>--> \u202eevil\x1b[2J\n``` \n# no heading | ![x](http://x)"
ACTIVE_ELEMENTS = {"script", "img", "iframe", "link", "object", "embed", "a", "form", "base", "svg:a", "foreignobject"}


def entry(output: Path, stage: str, unit: str, tally: Tally, *, seconds: float = 0.5, **more: Any) -> None:
    files = {"inputs": [{"name": f"in/{unit}", "bytes": 2_000_000, "sha256": "0"}], "outputs": []}
    header = {"format": FORMAT, "stage": stage, "unit": unit, "version": "0.1", "config_sha256": "c" * 64}
    write_entry(output, {**header, **files, **tally.as_json(), **more})
    path = output / "timings" / stage / f"{unit}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cpu_seconds": seconds, "input_bytes": 1}))


def write_ledger(output: Path, texts: list[str], *, source: str = "common_crawl", reason: str = "too_short") -> None:
    """Two stages of two units: short texts are dropped, the first line of the others is cut; then some by score."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "plan.json").write_text(json.dumps({"stages": [{"name": name} for name in ("clean", "hash", "filter")]}))
    (output / "run.json").write_text(json.dumps({"settings": {"name": source}}))
    for unit in range(2):
        clean, hashes, filtered = Tally(), Tally(), Tally()
        for number, text in enumerate(texts[unit::2]):
            record = Record(
                text=text, id=f"{source}/{unit}-{number}", source=source, language="en" if number % 5 else "fr"
            )
            record.scores = {"language": 0.5 + number % 40 / 80, "perplexity": 20.0 + number % 97 * 31}
            clean.enter(size_of(text))
            if len(text) < 30:
                clean.drop(Dropped.of(record, reason), size_of(text), record)
                continue
            before, record.text = size_of(text), text.partition("\n")[2] or text
            record.counts = {"lines_first": 1}
            clean.cut("first_lines", before, size_of(record.text))
            clean.keep(record, size_of(record.text))
            filtered.enter(size_of(record.text))
            if record.scores["perplexity"] > 2000:
                filtered.drop(Dropped.of(record, "tail"), size_of(record.text), record)
            else:
                filtered.keep(record, size_of(record.text))
        hashes.facts = {"hashes": 100}
        clean.failed = [{"name": "in/cut.gz", "error": "truncated <b>gzip</b>"}] if unit else []
        for name, tally in (("clean", clean), ("hash", hashes), ("filter", filtered)):
            entry(output, name, f"{unit:05d}", tally)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    texts = [f"line one of {n}\n{HOSTILE}\n" + "words and more words\n" * (n % 60) for n in range(400)]
    write_ledger(tmp_path / "out", [*texts, HOSTILE[:29], HOSTILE[28:56], "short <b>"], reason="<i>|too_short")
    return tmp_path / "out"


class Elements(html.parser.HTMLParser):
    """The elements of a page, what stands in its attributes, and its text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_the_page_holds_the_numbers_of_the_ledger(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_card(DataCardSettings(output=str(prepared)))
    assert "does not add up" not in capsys.readouterr().out
    shown = Elements((prepared / "data_card.html").read_text())
    text = " ".join(shown.text)
    card = read_card(prepared)
    clean, _, last = card.stages
    assert card.name == "common_crawl" and [stage.name for stage in card.stages] == ["clean", "hash", "filter"]
    assert clean.total["in"]["documents"] == 403 and last.total["dropped"]["tail"]["documents"] > 0
    for number in (clean.total["in"]["documents"], last.total["kept"]["documents"]):
        assert f"{number:,}" in text
    assert "<i>|too_short" in text and "tail" in text and "first_lines" in text and "lines_first" in text
    assert "in/cut.gz" in text and "truncated <b>gzip</b>" in text
    assert " 4.0 " in text  # MB/s per core: two units of 2 MB, of half a second each
    assert "Every stage adds up" in text


def test_the_card_tells_what_it_was_made_from(tmp_path: Path) -> None:
    write_ledger(tmp_path, ["a line\nand a text that is long enough to be kept"] * 4)
    run = {
        "settings": {"name": "web"},
        "configs": {
            "clean": {
                "reader": "common_crawl",
                "read": {"min_characters": 300, "title": "keep"},
                "filters": [["ours", {}], ["language", {"threshold": 0.65, "model": {"content": [["lid.ftz", "0"]]}}]],
            },
            "mark": {"policy": "drop_all"},
        },
        "files": [[f"{number}.<i>.warc", 10**6, "/somewhere"] for number in range(60)],
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    data_card(DataCardSettings(output=str(tmp_path)))
    shown = " ".join(" ".join(Elements((tmp_path / "data_card.html").read_text()).text).split())
    for row in ("clean read.min_characters 300", "clean language.threshold 0.65", "clean language.model lid.ftz",
                "clean ours", "mark policy drop_all", "60 input files, 60.0 MB", "49.<i>.warc 1.00 MB",
                "and 10 more"):  # fmt: skip
        assert row in shown, row
    assert "/somewhere" not in shown and "50.<i>" not in shown
    written = (tmp_path / "data_card.md").read_text()
    assert "| clean | language.threshold | 0.65 |" in written and "| and 10 more |" in written


def test_nothing_of_a_document_is_markup_and_nothing_is_loaded(prepared: Path) -> None:
    content = page.render(read_card(prepared))
    shown = Elements(content)
    assert shown.open == [] and not ACTIVE_ELEMENTS & set(shown.tags)
    allowed = {"class", "charset", "name", "content", "http-equiv", "lang", "open", "x", "y", "x1", "x2", "y1", "y2",
               "width", "dir", "height", "viewbox", "role", "text-anchor"}  # fmt: skip
    assert {name for name, _ in shown.attributes} <= allowed
    assert not re.search(r"url\(|@import|https?:", content.partition("</style>")[0])
    assert any("<script>alert(1)</script>" in text for text in shown.text)  # shown, that is
    assert "\u202e" not in content and "\x1b" not in content and "\\u202e" in content and "\\x1b" in content
    assert any(name == "content" and value.startswith("default-src 'none'") for name, value in shown.attributes)


def test_the_markdown_keeps_documents_within_their_fences(prepared: Path) -> None:
    content = markdown.render(read_card(prepared))
    outside, fence = [], ""
    for line in content.splitlines():
        opened = re.match(r"(`{3,})text$", line)
        if not fence and opened:
            fence = opened[1]
        elif fence and line == fence:
            fence = ""
        elif not fence:
            outside.append(line)
    assert fence == ""
    assert not any("alert" in line or "no heading" in line for line in outside)
    assert not any(re.search(r"(?<!\\)<", line) for line in outside)
    headings = [line for line in outside if line.startswith("#")]
    assert "### Dropped by clean: \\<i\\>\\|too\\_short" in headings
    rows = [line for line in outside if line.startswith("|")]
    assert all(re.search(r"(?<!\\)\|$", row) for row in rows) and len(rows) > 20


@settings(max_examples=150, deadline=None)
@given(text=st.text(), attribute=st.text())
def test_any_text_is_shown_and_no_more(text: str, attribute: str) -> None:
    shown = Elements(element("p", text, "|", element("b", text), title=attribute))
    assert shown.tags == ["p", "b"] and shown.open == [] and len(shown.attributes) == 1
    markdown_line = markdown.text(text)
    assert "\n" not in markdown_line and not re.search(r"(?<!\\)(\\\\)*[<|`\[]", markdown_line)
    fenced = markdown.fenced(text).splitlines()
    assert fenced[0].strip("`") == "text" and fenced[-1] == fenced[0][:-4]
    assert fenced[-1] not in fenced[1:-1]


def test_markup_is_only_what_was_made_here() -> None:
    assert markup(["<", element("b", 1), ("&",)]) == "&lt;<b>1</b>&amp;"
    with pytest.raises(TypeError):
        markup(None)


def test_counts_that_do_not_add_up_are_told(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = prepared / "ledger" / "filter" / "00001.json"
    content = json.loads(path.read_text())
    content["in"]["documents"] -= 1
    path.write_text(json.dumps(content))
    data_card(DataCardSettings(output=str(prepared)))
    out = capsys.readouterr().out
    assert "does not add up: filter: documents" in out and "clean kept" in out
    assert "The counts do not add up" in (prepared / "data_card.html").read_text()
    assert "do not add up" in (prepared / "data_card.md").read_text()


def test_tokens_are_told_where_there_are_shards(prepared: Path, tiny_dataset: Callable[..., Path]) -> None:
    tiny_dataset("common_crawl", ["a text\n", "☃ another"] * 9, prepared / "shards")
    card = read_card(prepared)
    assert card.manifest is not None
    labels = dict(tiles(card))
    assert labels["tokens"] == f"{card.manifest.tokens('train'):,}" and labels["byte tokens"].endswith("%")


def test_what_is_no_preparation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no ledger there; name the output"):
        data_card(DataCardSettings(output=str(tmp_path)))
    with pytest.raises(ConfigError, match="output is not set"):
        data_card(DataCardSettings())
    entry(tmp_path, "clean", "00000", Tally())
    with pytest.raises(DataError, match="no document has gone through yet"):
        data_card(DataCardSettings(output=str(tmp_path)))
    (tmp_path / "ledger" / "clean" / "00000.json").write_text("{")
    with pytest.raises(DataError, match=r"00000\.json: cannot be read"):
        data_card(DataCardSettings(output=str(tmp_path)))


# Charts


@settings(max_examples=100, deadline=None)
@given(kept=st.dictionaries(st.integers(-100, 10**6), st.integers(1, 9), max_size=20), most=st.integers(1, 60))
def test_bins_are_joined_to_few_columns_that_cover_them_all(kept: dict[int, int], most: int) -> None:
    joined, together = merged({"kept": kept, "dropped": {}}, most=most)
    assert len(joined) <= most + 1 and (together == 1 or len(joined) > most // 2)
    assert sum(values["kept"] for _, values in joined) == sum(kept.values())
    assert all(any(edge <= index < edge + together for edge, _ in joined) for index in kept)


def test_scores_far_from_their_scale_are_still_drawn(tmp_path: Path) -> None:
    tally = Tally()
    for n, value in enumerate((-3.0, 0.5, 1.0, 1e300, float("nan"))):
        record = Record(text="text", id=str(n), source="s", scores={"odd": value, "perplexity": value})
        tally.enter(size_of("text"))
        tally.keep(record, size_of("text"))
    entry(tmp_path, "clean", "00000", tally)
    odd, perplexity = score_histograms(read_card(tmp_path).stages[0])
    for histogram, counted in ((odd, 4), (perplexity, 3)):
        assert 0 < len(histogram.columns) <= 61 and 0 < len(histogram.ticks) <= 12
        assert sum(column.values["kept"] for column in histogram.columns) == counted
        assert "<rect" in columns(histogram.columns, histogram.ticks)
    assert "1 not positive or no number" in odd.title and "2 not positive" in perplexity.title


def test_a_bar_is_as_long_as_its_value_and_a_column_as_tall() -> None:
    drawn = bars([Bar("a", {"kept": 30, "dropped": 10}, "40"), Bar("b", {"kept": 20, "dropped": -5}, "20")])
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn)]
    assert len(widths) == 3 and widths[0] == pytest.approx(3 * widths[1], abs=0.2)
    assert widths[0] == pytest.approx(1.5 * widths[2], abs=0.2)
    drawn = columns(
        [Column(0, 1, {"kept": 8}, "x"), Column(1, 2, {"kept": 4, "dropped": 4}, "y")], [(0, "0"), (2, "2")]
    )
    heights = [float(height) for height in re.findall(r' height="([\d.]+)"', drawn)]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2) and len(heights) == 3
    assert "nan" not in bars([]) + bars([Bar("none", {"kept": 0, "dropped": 0}, "0")]) + columns([], [])
