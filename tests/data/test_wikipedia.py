"""Wikipedia dumps: written here as MediaWiki exports them, broken in every way, and the real ones of shared data."""

import bz2
import gzip
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
import zstandard

from data_tools import compression
from data_tools.records import Dropped, Record
from data_tools.sources.wikipedia import SUFFIXES, WikipediaSettings, read
from llamatrain.errors import ConfigError, DataError
from tests.real_text import needed_data

NAMESPACES = {0: "", 1: "Talk", 6: "File", 14: "Category"}


def header(*, dbname: str = "enwiki", language: str = "en", files: str = "File") -> str:
    spaces = "".join(
        f'      <namespace key="{key}" case="first-letter">{files if key == 6 else name}</namespace>\n'
        for key, name in NAMESPACES.items()
    )
    return (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" '
        f'xml:lang="{language}">\n  <siteinfo>\n    <sitename>Wikipedia</sitename>\n    <dbname>{dbname}</dbname>\n'
        f"    <base>https://{language}.wikipedia.org/wiki/Main_Page</base>\n    <namespaces>\n{spaces}"
        "    </namespaces>\n  </siteinfo>\n"
    )


def page(title: str, text: str, *, number: int = 1, space: int = 0, redirect: str = "", model: str = "wikitext") -> str:
    target = f'    <redirect title="{redirect}" />\n' if redirect else ""
    return (
        f"  <page>\n    <title>{escape(title)}</title>\n    <ns>{space}</ns>\n    <id>{number}</id>\n{target}"
        f"    <revision>\n      <id>{number + 1000}</id>\n      <timestamp>2022-08-01T00:00:00Z</timestamp>\n"
        f"      <model>{model}</model>\n      <format>text/x-wiki</format>\n"
        f'      <text bytes="{len(text)}" xml:space="preserve">{escape(text)}</text>\n    </revision>\n  </page>\n'
    )


FOOTER = "</mediawiki>\n"
ARTICLES = [page(f"Title {n}", f"'''Article''' [[number]] {n}.", number=n) for n in range(1, 8)]
DUMP = header() + "".join(ARTICLES) + FOOTER


def items(path: Path, **settings: object) -> list[Record | Dropped]:
    return list(read(path, path.name, WikipediaSettings(**settings)))  # type: ignore[arg-type]


def written(directory: Path, text: str, name: str = "enwiki-pages-articles.xml") -> Path:
    path = directory / name
    path.write_bytes(text.encode("utf-8"))
    return path


def until_error(path: Path, **settings: object) -> tuple[list[Record | Dropped], str]:
    found: list[Record | Dropped] = []
    try:
        for item in read(path, path.name, WikipediaSettings(**settings)):  # type: ignore[arg-type]
            found.append(item)
    except DataError as error:
        return found, str(error)
    raise AssertionError(f"{path} was read to its end")


def multistream(text: str) -> bytes:
    """As Wikipedia packs: a stream for the header, one for each few pages, one for the end."""
    parts = text.split("  <page>")
    streams = [parts[0], *("  <page>" + part for part in parts[1:])]
    return b"".join(bz2.compress(stream.encode()) for stream in streams)


PACKINGS: dict[str, Callable[[str], bytes]] = {
    "x.xml": lambda text: text.encode(),
    "bom.xml": lambda text: text.encode("utf-8-sig"),
    "wide.xml": lambda text: text.encode("utf-16"),
    "latin.xml": lambda text: f'<?xml version="1.0" encoding="ISO-8859-1"?>\n{text}'.encode("latin-1"),
    "x.xml.bz2": multistream,
    "wide.xml.bz2": lambda text: bz2.compress(text.encode("utf-16")),
    "x.xml.gz": lambda text: gzip.compress(text.encode()),
    "x.xml.zst": lambda text: zstandard.compress(text[:900].encode()) + zstandard.compress(text[900:].encode()),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_every_packing_and_encoding_gives_the_same_articles(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PACKINGS[name](DUMP.replace("Article", "Café")))
    found = items(path)
    assert [item.text for item in found] == [f"Title {n}\n\nCafé number {n}." for n in range(1, 8)]
    assert [item.id for item in found] == [f"{name}#{n}" for n in range(1, 8)]


def test_a_record_tells_where_it_is_from(tmp_path: Path) -> None:
    text = header() + page("C++ & more", "Text.", number=42) + FOOTER
    record = items(written(tmp_path, text))[0]
    assert isinstance(record, Record)
    assert (record.source, record.language, record.counts) == ("wikipedia", "en", {"bytes_wikitext": 5})
    assert record.provenance == {
        "file": "enwiki-pages-articles.xml",
        "title": "C++ & more",
        "date": "2022-08-01T00:00:00Z",
        "url": "https://en.wikipedia.org/wiki/C%2B%2B_%26_more",
    }


def test_what_is_no_article_is_dropped_under_its_reason(tmp_path: Path) -> None:
    pages = [
        page("Kept", "Text."),
        page("Talk:Kept", "Text.", space=1),
        page("Old", "#REDIRECT [[Kept]]", redirect="Kept"),
        page("Older", "#redirect: [[Kept]]"),
        page("Alt", "#WEITERLEITUNG [[Kept]]"),
        page("Data", "{}", model="json"),
        page("Mercury", "'''Mercury''' may be:\n* [[Mercury (planet)]]\n{{disambiguation}}"),
        page("Smith", "{{hndis|Smith, John}}\n* [[John Smith]]"),
        page("Venus (disambiguation)", "* [[Venus]]"),
        page("Mars", "{{other uses}}It is red {{disambiguation needed}}."),
        page("Empty", "{{x}}\n[[File:y.jpg]]"),
        page("", "No title."),
        page("No number", "Text.").replace("<id>1</id>", ""),
    ]
    found = items(written(tmp_path, header() + "".join(pages) + FOOTER))
    assert [item.reason if isinstance(item, Dropped) else item.text for item in found] == [
        "Kept\n\nText.",
        "namespace",
        "redirect",
        "redirect",
        "redirect",
        "not_wikitext",
        "disambiguation",
        "disambiguation",
        "disambiguation",
        "Mars\n\nIt is red.",
        "empty",
        "broken_page",
        "broken_page",
    ]
    kept = items(written(tmp_path, header() + pages[6] + FOOTER), disambiguation_pages=True)
    assert kept[0].text == "Mercury\n\nMercury may be:\nMercury (planet)"


DISAMBIGUATIONS = {
    "de": "{{Begriffsklärung}}",
    "fr": "{{Homonymie de personnes}}",
    "ru": "{{неоднозначность|фамилия}}",
    "sr": "{{Вишезначна одредница}}",
    "cs": "{{Rozcestník - příjmení}}",
    "nl": "{{dp}}",
    "sv": "{{Gren|Orter}}",
    "hu": "{{Egyért}}",
}


@pytest.mark.parametrize("language", DISAMBIGUATIONS)
def test_lists_of_meanings_are_known_by_each_languages_template(tmp_path: Path, language: str) -> None:
    text = (
        header(dbname=f"{language}wiki", language=language)
        + page("X", f"* [[X]]\n{DISAMBIGUATIONS[language]}")
        + FOOTER
    )
    assert [type(item) for item in items(written(tmp_path, text))] == [Dropped]


def test_settings_choose_title_sections_and_length(tmp_path: Path) -> None:
    path = written(tmp_path, header() + page("T", "Text.\n== References ==\nBook.") + FOOTER)
    assert items(path)[0].text == "T\n\nText."
    assert items(path, title=False, trailing_sections=True)[0].text == "Text.\n\nReferences\n\nBook."
    assert items(path, min_characters=6)[0].id == "enwiki-pages-articles.xml#1"
    assert isinstance(items(path, min_characters=6)[0], Dropped)
    with pytest.raises(ConfigError, match="min_characters=0"):
        items(path, min_characters=0)


def test_the_language_is_the_dumps_own_before_its_files_name(tmp_path: Path) -> None:
    body = page("T", "a [[Bild:x.jpg|b]]") + FOOTER
    german = items(written(tmp_path, header(dbname="dewiki", language="en") + body))[0]
    assert isinstance(german, Record) and (german.language, german.text) == ("de", "T\n\na")
    by_xml = items(written(tmp_path, header(dbname="mirror", language="sv") + body))[0]
    assert isinstance(by_xml, Record) and by_xml.language == "sv"
    by_name = items(written(tmp_path, f"<mediawiki>{body}", "frwiki-20220801-pages-articles1.xml-p1p2"))[0]
    assert isinstance(by_name, Record) and by_name.language == "fr"
    given = items(written(tmp_path, header() + body), language="pl")[0]
    assert isinstance(given, Record) and given.language == "pl"


def test_a_wikipedia_outside_the_papers_twenty_is_dropped_unless_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, header(dbname="simplewiki") + ARTICLES[0] + FOOTER)
    assert [item.reason for item in items(path) if isinstance(item, Dropped)] == ["other_language"]
    assert items(path, languages=["simple"])[0].text == "Title 1\n\nArticle number 1."
    assert isinstance(items(path, languages=[])[0], Record)


def test_the_dumps_own_names_of_namespaces_are_used(tmp_path: Path) -> None:
    text = header(dbname="ltgwiki", language="ltg", files="Fails") + page("T", "a [[Fails:x.jpg|b]]") + FOOTER
    assert items(written(tmp_path, text), languages=[])[0].text == "T\n\na"


BROKEN = {
    "no end": ARTICLES[2].replace("  </page>\n", ""),
    "no beginning": ARTICLES[2].replace("<page>", "<pge>"),
    "bad tag inside": ARTICLES[2].replace("</title>", "</titel>"),
    "bare ampersand": ARTICLES[2].replace("Article", "Q&A"),
    "unknown entity": ARTICLES[2].replace("Article", "&lol9;"),
    "bare <": ARTICLES[2].replace("Article", "a < b"),
    "control character": ARTICLES[2].replace("Article", "\x01"),
    "own document type": ARTICLES[2].replace("<title>", '<!DOCTYPE x [<!ENTITY a "b">]><title>'),
    "deep nesting": ARTICLES[2].replace("<title>", "<a>" * 20_000 + "</a>" * 20_000 + "<title>"),
    "text between": "what is this\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_page_is_dropped_and_costs_no_other(tmp_path: Path, name: str) -> None:
    text = header() + "".join([*ARTICLES[:2], BROKEN[name], *ARTICLES[3:]]) + FOOTER
    found = items(written(tmp_path, text))
    assert [item.id[-2:] for item in found if isinstance(item, Record)] == ["#1", "#2", "#4", "#5", "#6", "#7"]
    dropped = [item for item in found if isinstance(item, Dropped)]
    assert {item.reason for item in dropped} == {"broken_xml"}
    offset = int(dropped[0].id.partition("@")[2])
    assert text.encode()[offset:].startswith(dropped[0].text[:50].encode())


def test_bytes_that_are_no_utf8_drop_their_page_only(tmp_path: Path) -> None:
    path = tmp_path / "x.xml"
    path.write_bytes(DUMP.encode().replace(b"Article''' [[number]] 3", b"Caf\xe9"))
    assert Counter(type(item) for item in items(path)) == {Record: 6, Dropped: 1}


def test_entities_declared_by_a_dump_never_expand(tmp_path: Path) -> None:
    """The billion laughs: ten levels of ten times the one below would be 10 GB."""
    levels = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(10))
    bomb = f'<?xml version="1.0"?>\n<!DOCTYPE mediawiki [<!ENTITY l0 "lol">{levels}]>\n'
    path = written(tmp_path, bomb + header() + ARTICLES[0].replace("Article", "&l10;") + ARTICLES[1] + FOOTER)
    assert [item.reason if isinstance(item, Dropped) else item.id[-2:] for item in items(path)] == ["broken_xml", "#2"]


def test_a_page_beyond_the_limit_is_passed_over_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "x.xml.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write((header() + ARTICLES[0]).encode() + b"<page><title>bomb</title>")
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b"</page>" + (ARTICLES[1] + FOOTER).encode())
    tracemalloc.start()
    found = items(path, max_document_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [item.reason if isinstance(item, Dropped) else item.id[-2:] for item in found] == ["#1", "too_large", "#2"]
    assert isinstance(found[1], Dropped) and found[1].bytes == (64 << 20) + 32 and found[1].text.startswith("<page>")
    assert peak < 12 << 20


@pytest.mark.parametrize("name", PACKINGS)
def test_a_file_that_ends_in_the_middle_gives_what_was_whole_and_then_fails(tmp_path: Path, name: str) -> None:
    whole = PACKINGS[name](DUMP)
    path = tmp_path / name
    for end in range(0, len(whole) - len(FOOTER) * 2, max(1, len(whole) // 12)):
        path.write_bytes(whole[:end])
        found, message = until_error(path)
        assert str(path) in message
        assert [item.text for item in found if isinstance(item, Record)] == [
            f"Title {n}\n\nArticle number {n}." for n in range(1, 1 + sum(isinstance(item, Record) for item in found))
        ]


def test_damage_inside_a_packed_file_fails_the_file(tmp_path: Path) -> None:
    packed = bytearray(multistream(DUMP))
    packed[len(packed) // 2] ^= 0xFF
    path = tmp_path / "x.xml.bz2"
    path.write_bytes(packed)
    found, message = until_error(path)
    assert len(found) >= 1 and "copy it again" in message


CODEC = b'<?xml version="1.0" encoding="zip"?><mediawiki></mediawiki>'  # of Python, of bytes to bytes
HEADLESS = b'<mediawiki><siteinfo><namespaces><namespace key="x">y</namespace></namespaces></siteinfo><page>'


@pytest.mark.parametrize("content", [b"", b"no dump at all", b"\x00\xff" * 100, CODEC, HEADLESS])
def test_a_file_that_is_no_dump_fails(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.xml"
    path.write_bytes(content)
    assert not [item for item in until_error(path)[0] if isinstance(item, Record)]


def test_files_are_known_by_the_names_wikipedia_gives_them(tmp_path: Path) -> None:
    for name in ("enwiki-20220801-pages-articles1.xml-p1p41242.bz2", "bgwiki-latest-pages-articles.xml"):
        assert name.endswith(SUFFIXES)
    path = tmp_path / "enwiki-20220801-pages-articles-multistream-index1.txt-p1p41242.bz2"
    path.write_bytes(bz2.compress(b"602:10:AccessibleComputing\n"))
    assert "leave it out of the input" in until_error(path)[1]


def test_an_archive_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "enwiki.xml.7z"
    path.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    assert "unpack it (7z x enwiki.xml.7z)" in until_error(path)[1]


@pytest.mark.parametrize("size", [1, 7, 64, 65, 333])
def test_pages_do_not_depend_on_where_the_file_is_cut_for_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = tmp_path / "x.xml"
    path.write_bytes((header() + ARTICLES[0] + BROKEN["no end"] + ARTICLES[3] + FOOTER + DUMP).encode("utf-16"))
    expected = items(path)
    monkeypatch.setattr(compression, "READ_BYTES", size)
    assert items(path) == expected
    assert len(expected) == 3 + 7  # a second dump behind the first is read with its own header


def real(name: str) -> Path:
    return needed_data() / "raw" / "wikipedia" / name


MARKUP = ("[[", "]]", "{|", "|}", "''", "<ref", "<!--", "&nbsp;", "thumb|", "File:", "Category:", "__NOTOC__", "\n=")


def test_real_english_dump() -> None:
    found = items(real("enwiki-pages-articles-shortened.xml.bz2"))
    kept = {item.provenance["title"]: item.text for item in found if isinstance(item, Record)}
    reasons = Counter(item.reason for item in found if isinstance(item, Dropped))
    assert (len(kept), reasons) == (98, {"redirect": 99, "disambiguation": 8, "namespace": 1})
    raw = sum(item.counts["bytes_wikitext"] for item in found if isinstance(item, Record))
    assert raw == 5_720_460
    assert 0.47 < sum(len(text.encode()) for text in kept.values()) / raw < 0.52
    assert not [(title, mark) for title, text in kept.items() for mark in MARKUP if mark in text]
    assert "Ampère (1775–1836), French mathematician and physicist, considered the father" in kept["Ampere"]
    assert "2 × 10⁻⁷ newtons per metre of length" in kept["Ampere"]
    assert "\n  30 IF A > B THEN GOTO 60\n  40 LET B=B-A\n" in kept["Algorithm"]
    assert kept["Anarchism"].startswith("Anarchism\n\nAnarchism is a political philosophy that advocates self-governed")
    assert "References" not in kept["Anarchism"].split("\n")


def test_real_bulgarian_dump_in_utf16() -> None:
    found = items(real("bgwiki-pages-articles-shortened.xml.bz2"))
    assert [item.reason for item in found if isinstance(item, Dropped)] == ["namespace", "namespace"]
    record = next(item for item in found if isinstance(item, Record))
    assert record.language == "bg"
    assert record.text.startswith("Григориански календар\n\nГригорианският календар (понякога наричан и Грегориански")
    assert "Източници" not in record.text.split("\n") and not any(mark in record.text for mark in MARKUP)


def test_real_whole_dump_of_a_small_wikipedia() -> None:
    path = real("ltgwiki-pages-articles.xml.zst")
    assert {item.reason for item in items(path) if isinstance(item, Dropped)} == {"other_language"}
    found = items(path, languages=["ltg"])
    assert len(found) == 2004
    assert Counter(item.reason if isinstance(item, Dropped) else "kept" for item in found) == {
        "kept": 895,
        "namespace": 954,
        "redirect": 147,
        "empty": 8,
    }
    texts = [item.text for item in found if isinstance(item, Record)]
    assert "Cybla\n\nCybla — sola reitūs nu Ludzys mīsta, natuoļ da Krīvejis rūbeža, Cyblys nūvoda centrys." in texts
    assert sum(any(mark in text for mark in MARKUP) for text in texts) <= 5
