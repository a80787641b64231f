"""StackExchange dumps: Posts.xml written here as the sites export it, joined in bounded memory, and the real ones."""

import bz2
import gzip
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_tools import compression
from data_tools.cleaning.posts_html import MOST_TAGS, post_text
from data_tools.engine.components import reader_of
from data_tools.engine.inputs import input_files
from data_tools.engine.settings import PrepareSettings
from data_tools.records import Dropped, Record
from data_tools.sources.stackexchange import SUFFIXES, StackExchangeSettings, count_rows, read
from llamatrain.errors import ConfigError, DataError
from tests.real_text import needed_data


def row(number: object, kind: object, body: str, *, parent: object = None, score: object = 0, title: str = "") -> str:
    attributes = {"Id": number, "PostTypeId": kind, "ParentId": parent, "CreationDate": "2022-06-06T00:00:00.000"}
    attributes |= {"Score": score, "Body": body, "Title": title or None, "Tags": "<a><b-c>" if title else None}
    given = {key: value for key, value in attributes.items() if value is not None}
    return "  <row " + " ".join(f"{key}={quoteattr(str(value))}" for key, value in given.items()) + " />\n"


def question(number: int, title: str = "Why?", body: str = "<p>Why is it so?</p>\n", score: int = 1) -> str:
    return row(number, 1, body, title=title, score=score)


def answer(number: int, parent: int, body: str = "<p>Because.</p>\n", score: object = 0) -> str:
    return row(number, 2, body, parent=parent, score=score)


def posts(*rows: str) -> str:
    return '<?xml version="1.0" encoding="utf-8"?>\n<posts>\n' + "".join(rows) + "</posts>"


def written(directory: Path, text: str, name: str = "beer.stackexchange.com-Posts.xml") -> Path:
    path = directory / name
    path.write_bytes(text.encode("utf-8-sig"))
    return path


def items(path: Path, **settings: object) -> list[Record | Dropped]:
    return list(read(path, path.name, StackExchangeSettings(**settings)))  # type: ignore[arg-type]


def until_error(path: Path, **settings: object) -> tuple[list[Record | Dropped], str]:
    found: list[Record | Dropped] = []
    try:
        for item in read(path, path.name, StackExchangeSettings(**settings)):  # type: ignore[arg-type]
            found.append(item)
    except DataError as error:
        return found, str(error)
    raise AssertionError(f"{path} was read to its end")


def outcome(found: list[Record | Dropped]) -> list[str]:
    return [item.reason if isinstance(item, Dropped) else item.text for item in found]


def test_a_question_and_its_answers_are_one_document(tmp_path: Path) -> None:
    path = written(tmp_path, posts(question(1, "Is 1 < 2?", "<p>Is it?</p>"), answer(2, 1, "<p>Yes.</p><p>Sure.</p>")))
    found = items(path)
    assert outcome(found) == ["Q: Is 1 < 2?\n\nIs it?\n\nA: Yes.\n\nSure."]
    record = found[0]
    assert isinstance(record, Record)
    assert (record.id, record.source, record.counts) == (f"{path.name}#1", "stackexchange", {"answers": 1})
    assert record.provenance == {
        "file": path.name,
        "date": "2022-06-06T00:00:00.000",
        "tags": "a b-c",
        "score": "1",
        "url": "https://beer.stackexchange.com/questions/1",
    }


def test_answers_are_sorted_by_score_as_a_number(tmp_path: Path) -> None:
    """RedPajama compares scores as text, and puts 9 before 100 before 10 before -1."""
    scores = [10, 9, -1, 100, -20, 0, 9]
    rows = [answer(10 + n, 1, f"<p>{score}/{n}</p>", score) for n, score in enumerate(scores)]
    text = outcome(items(written(tmp_path, posts(question(1), *rows))))[0]
    assert [part.split("A: ")[-1] for part in text.split("\n\n")[2:]] == [
        "100/3",
        "10/0",
        "9/1",
        "9/6",
        "0/5",
        "-1/2",
        "-20/4",
    ]


def test_only_questions_and_answers_are_taken(tmp_path: Path) -> None:
    """RedPajama does not look at PostTypeId, so that the description of a tag becomes a question."""
    rows = [row(n, kind, "<p>x</p>", title="T") for n, kind in enumerate((3, 4, 5, 6, 7, 17, ""), 10)]
    found = items(written(tmp_path, posts(question(1), *rows, answer(2, 1))))
    assert outcome(found) == ["post_type"] * 7 + ["Q: Why?\n\nWhy is it so?\n\nA: Because."]


def test_what_goes_in_comes_out_or_is_dropped_under_its_reason(tmp_path: Path) -> None:
    rows = [
        question(1),
        question(1, "Again?"),
        answer(2, 1),
        answer(2, 1),
        answer(3, 99),
        answer(4, 1, "<p><img src='x.png' alt='enter image description here'></p>"),
        question(5, "", ""),
        row(6, 2, "<p>x</p>", parent="x"),
        row("x", 1, "<p>x</p>", title="T"),
        answer(7, 1, score="9" * 30),
        answer(8, 1, score="many"),
        question(9, "Alone?"),
        row(-3, 1, "x"),
    ]
    found = items(written(tmp_path, posts(*rows)))
    assert Counter(item.reason for item in found if isinstance(item, Dropped)) == {
        "broken_row": 5,
        "duplicate": 2,
        "orphan_answer": 1,
        "empty": 2,
    }
    records = [item for item in found if isinstance(item, Record)]
    assert [record.id.partition("#")[2] for record in records] == ["1", "9"]
    answered = items(written(tmp_path, posts(*rows)), unanswered=False)
    assert [item.id[-2:] for item in answered if isinstance(item, Dropped) and item.reason == "no_answer"] == ["#9"]


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "Posts.xml": bytes,
    "Posts.xml.gz": gzip.compress,
    "Posts.xml.bz2": bz2.compress,
    "Posts.xml.zst": zstandard.compress,
}
SITE = posts(*(question(n) + answer(n + 100, n, f"<p>{n}</p>") for n in range(1, 20)))


@pytest.mark.parametrize("name", PACKINGS)
def test_every_packing_and_a_file_cut_short(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = PACKINGS[name](SITE.encode())
    path.write_bytes(whole)
    expected = items(path)
    assert len(expected) == 19 and count_rows(path) == 38
    for end in (0, 3, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:end])
        found, message = until_error(path)
        assert str(path) in message
        kept = [item for item in found if isinstance(item, Record) and item.counts["answers"]]
        assert kept == expected[: len(kept)]


def test_the_sites_name_is_the_files_or_its_folders(tmp_path: Path) -> None:
    path = written(tmp_path, posts(question(1)))
    urls = {
        "beer.stackexchange.com/Posts.xml": "https://beer.stackexchange.com/questions/1",
        "dump/beer.stackexchange.com-Posts.xml.zst": "https://beer.stackexchange.com/questions/1",
        "stackoverflow.com-Posts.xml": "https://stackoverflow.com/questions/1",
        "Posts.xml": None,
    }
    for name, url in urls.items():
        record = next(read(path, name, StackExchangeSettings()))
        assert isinstance(record, Record) and record.provenance.get("url") == url


BROKEN = [
    '  <row Id="7" PostTypeId="1" Body="no end\n',
    '  <row Id="7" PostTypeId="1" Body="&nosuch;" />\n',
    '  <row Id="7" PostTypeId="1" Body="a < b" />\n',
    '  <rw Id="7" />\n',
    '  <row Id="7" Id="8" />\n',
    "  <row Id='7' Body='\x00' />\n",
    "text\n",
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_damaged_row_is_dropped_and_costs_no_other(tmp_path: Path, broken: str) -> None:
    rows = [question(1), answer(2, 1), broken, question(3), answer(4, 3)]
    found = items(written(tmp_path, posts(*rows)))
    assert {item.reason for item in found if isinstance(item, Dropped)} == {"broken_xml"}
    records = [item for item in found if isinstance(item, Record)]
    wanted = 2 if not broken.startswith("text") else 1  # text behind a row spoils that row
    assert sum(record.counts["answers"] for record in records) == wanted
    assert [record.id[-2:] for record in records] == ["#1", "#3"]


def test_entities_declared_by_a_file_never_expand(tmp_path: Path) -> None:
    levels = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(10))
    text = posts(question(1), row(2, 1, "x").replace('"x"', '"&l10;"'), question(3))
    text = text.replace("<posts>", f'<!DOCTYPE posts [<!ENTITY l0 "lol">{levels}]>\n<posts>')
    found = items(written(tmp_path, text))
    assert Counter(outcome(found)) == {"broken_xml": 1, "Q: Why?\n\nWhy is it so?": 2}


def test_of_a_sites_files_only_the_posts_are_read() -> None:
    names = [
        "x/Posts.xml",
        "x/Users.xml",
        "x/PostHistory.xml",
        "x/PostLinks.xml",
        "beer.stackexchange.com-Posts.xml.zst",
    ]
    assert [name.endswith(SUFFIXES) for name in names] == [True, False, False, False, True]


def test_a_site_packed_as_7z_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "beer.stackexchange.com.7z"
    path.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    assert "unpack it (7z x beer.stackexchange.com.7z)" in until_error(path)[1]
    with pytest.raises(DataError, match="unpack it"):
        count_rows(path)


def test_documents_do_not_depend_on_how_the_join_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers anywhere in the file, also before their question and in partitions of one number each."""
    chance = random.Random(1)
    rows = [question(n * 3, f"Title {n}?") for n in range(60)]
    rows += [answer(1000 + n, chance.randrange(70) * 3, f"<p>{n}</p>", chance.randrange(-9, 120)) for n in range(200)]
    chance.shuffle(rows)
    path = written(tmp_path, posts(*rows))
    expected = items(path)
    assert [item.id for item in expected if isinstance(item, Record)] == [f"{path.name}#{n * 3}" for n in range(60)]
    assert (
        sum(item.counts["answers"] for item in expected if isinstance(item, Record))
        + sum(isinstance(item, Dropped) for item in expected)
        == 200
    )
    for ids, buffer in ((1, 1), (7, 500), (1 << 16, 1000), (50, 1 << 20)):
        assert items(path, ids_per_partition=ids, buffer_bytes=buffer, temporary=str(tmp_path)) == expected
    for size in (1, 5, 100):
        monkeypatch.setattr(compression, "READ_BYTES", size)
        assert items(path) == expected
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # the partitions are gone


def test_memory_is_bounded_however_far_answers_are_from_their_questions(tmp_path: Path) -> None:
    """RedPajama holds every answer of a site in one dict, and warns of running out of memory."""
    path = tmp_path / "Posts.xml"
    body = f"<p>{'words' * 2000}</p>"
    with open(path, "w") as file:
        file.write("<posts>\n")
        file.writelines(question(n, body=body) for n in range(500))
        file.writelines(answer(10_000 + n, n, body) for n in range(500))
        file.write("</posts>")
    assert path.stat().st_size > 10e6
    tracemalloc.start()
    settings = StackExchangeSettings(ids_per_partition=20, buffer_bytes=1 << 19, temporary=str(tmp_path))
    found = sum(1 for item in read(path, "Posts.xml", settings) if isinstance(item, Record) and item.counts["answers"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == 500
    assert peak < 2.5e6


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, SITE)
    with pytest.raises(ConfigError, match="ids_per_partition=0"):
        items(path, ids_per_partition=0)
    with pytest.raises(ConfigError, match=r"temporary=.*no such directory"):
        items(path, temporary=str(tmp_path / "none"))
    with pytest.raises(DataError, match="lower ids_per_partition"):
        items(path, max_partition_bytes=1000)
    assert outcome(items(path, max_document_bytes=100)) == ["too_large"] * 38


def largest(count: int, files: Path | list[str], output: Path) -> list[str]:
    """Names of the files that prepare reads with largest=COUNT."""
    given = [str(files)] if isinstance(files, Path) else files
    settings = PrepareSettings(input=given, output=str(output), reader="stackexchange", largest=count)
    return [file.name for file in input_files(settings, reader_of("stackexchange", {}))]


@pytest.mark.parametrize("read_bytes", [7, 1 << 20])
def test_the_largest_sites_are_picked_by_their_posts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    """By rows, also where a tag lies across two chunks; of equals the first by name."""
    monkeypatch.setattr(compression, "READ_BYTES", read_bytes)
    for name, count in {"a": 3, "b": 7, "c": 40, "d": 7}.items():
        (tmp_path / "dumps" / name).mkdir(parents=True)
        written(tmp_path / "dumps" / name, posts(*(question(n) for n in range(count))), "Posts.xml")
    assert largest(3, tmp_path / "dumps", tmp_path / "out") == ["b/Posts.xml", "c/Posts.xml", "d/Posts.xml"]
    assert largest(2, tmp_path / "dumps", tmp_path / "out") == ["b/Posts.xml", "c/Posts.xml"]
    assert largest(4, tmp_path / "dumps", tmp_path / "out")[0] == "a/Posts.xml"


HTML = {
    "paragraphs": ("<p>a\nb</p>\n\n<p>c</p>\n", "a b\n\nc"),
    "code block": ("<p>a:</p>\n<pre><code>def f():\n    if x:\n\n\n        y &lt; 1\n</code></pre>\n<p>b</p>", None),
    "code at the beginning": ("<pre><code>    indented\n</code></pre>", "    indented"),
    "inline code": ("<p>call <code>f(x)</code>, then</p>", "call f(x), then"),
    "link": ('<p><a href="http://x.org" rel="nofollow">here</a>.</p>', "here."),
    "list": ("<ul><li>a</li><li><p>b</p></li></ul><p>c</p>", "- a\n- b\n\nc"),
    "ordered list": ("<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>", "1. a\n  - b\n2. c"),
    "empty item": ("<ul><li></li></ul><p>a</p>", "a"),
    "breaks": ("<p>a<br>b<br/>c</p><hr><p>d</p>", "a\nb\nc\n\nd"),
    "quote and heading": ("<h2>A</h2><blockquote><p>b</p></blockquote>", "A\n\nb"),
    "marks": ("<p><strong>a</strong> <em>b</em><kbd>c</kbd><s>d</s></p>", "a bcd"),
    "raised": ("<p>10<sup>6</sup> m<sup>2</sup> 1<sup>st</sup> H<sub>2</sub>O</p>", "10⁶ m² 1st H2O"),
    "table": ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>", "a | b\n1 | 2"),
    "picture": ('<p>a <img src="x.png" alt="enter image description here"> b</p>', "a b"),
    "comment": ("<!-- language: lang-py --><p>a<!-- b -->c</p>", "ac"),
    "script": ("<p>a</p><script>b</script><style>c</style>", "a"),
    "entities": ("<p>a&nbsp;&amp; &lt;b&gt;&#xA;c</p>", "a & <b> c"),
    "mathematics": ("<p>$x_1 &lt; y$</p>", "$x_1 < y$"),
    "unclosed": ("<p>a <b>b<p>c <code>d", "a b\n\nc d"),
    "no HTML": (" plain ", "plain"),
    "nothing": ("<p> </p>", ""),
}


@pytest.mark.parametrize("name", HTML)
def test_html_becomes_text(name: str) -> None:
    body, text = HTML[name]
    assert post_text(body) == (text if text is not None else "a:\n\ndef f():\n    if x:\n\n\n        y < 1\n\nb")


def test_fences_are_set_where_asked() -> None:
    assert post_text("<p>a</p><pre><code>b\n</code></pre>", fences=True) == "a\n\n```\nb\n```"


BOMBS = ["<b>", "<div>", "<ul><li>", "<sup>", "<table><tr><td>", "<blockquote>", "<a href=x>", "<"]


@pytest.mark.parametrize("tag", BOMBS)
def test_tags_without_end_are_read_in_bounded_time(tag: str) -> None:
    assert len(post_text(tag * (MOST_TAGS // 4) + "x" + "<p>" * (MOST_TAGS // 4) + "y")) < 10 * MOST_TAGS
    assert post_text(tag * 100_000 + "x")


@given(
    st.lists(st.sampled_from(["<p>", "</p>", "<li>", "<ul>", "</ul>", "<pre>", "</pre>", "a", " ", "<br>", "&", "< "]))
)
def test_any_mixture_of_tags_is_read(parts: list[str]) -> None:
    text = post_text("".join(parts))
    assert text == text.strip("\n")
    assert text.count("a") == parts.count("a")


def real(name: str) -> Path:
    return needed_data() / "raw" / "stackexchange" / name


SAMPLES = {
    "beer.stackexchange.com-Posts.xml.zst": (2354, 663, 1572, {"post_type": 119}),
    "coffee.stackexchange.com-Posts.xml": (592, 225, 327, {"post_type": 40}),
    "meta.music.stackexchange.com-Posts.xml.zst": (1937, 708, 1209, {"post_type": 6, "empty": 14}),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_real_sites(name: str) -> None:
    rows, questions, answers, dropped = SAMPLES[name]
    path = real(name)
    found = items(path)
    records = [item for item in found if isinstance(item, Record)]
    assert count_rows(path) == rows == len(records) + answers + sum(dropped.values())
    assert (len(records), sum(record.counts["answers"] for record in records)) == (questions, answers)
    assert Counter(item.reason for item in found if isinstance(item, Dropped)) == dropped
    texts = {record.id.partition("#")[2]: record.text for record in records}
    if name.startswith("meta.music"):
        assert "\\relative c' {\n  << { c4 c c c8 c c4 bes8 aes4. aes8 aes } \\\\\n     { g8( aes f g4)" in texts["643"]
    if name.startswith("coffee"):
        assert "for a certified Espresso:\n\n- Water pressure: 9 bar ± 1\n- Percolation time" in texts["296"]


def test_the_largest_of_the_real_sites(tmp_path: Path) -> None:
    names = largest(2, [str(real(name)) for name in SAMPLES], tmp_path)
    assert [name.partition(".")[0] for name in names] == ["beer", "meta"]
