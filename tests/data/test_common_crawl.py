"""Common Crawl's files: pages of WET and of WARC, in any encoding, and what real archives give."""

import gzip
import zlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError, DataError
from tests.data.wet_writer import (
    DATE,
    chunked,
    http_response,
    outcomes,
    read_pages,
    read_records,
    record,
    sha1_digest,
    warc_page,
    warcinfo,
    wet_page,
    write_archive,
)
from tests.real_text import needed_data

pytest.importorskip("fastwarc")
pytest.importorskip("resiliparse")

HTML = b"<!doctype html><html lang=en><head><title>A\n title</title></head><body><p>Hello world.</p></body></html>"


# ---------------------------------------------------------------------------------------------- WET


@pytest.mark.parametrize("name", ["a.warc.wet", "a.warc.wet.gz", "a.warc.wet.zst"])
def test_a_wet_page_is_read_with_what_its_headers_say(tmp_path: Path, name: str) -> None:
    page = wet_page("A title", "  First line. \nSecond é.", url="http://a.com/x", language="eng,fra")
    (item,) = read_pages(write_archive(tmp_path / name, warcinfo(), page))
    assert isinstance(item, Record)
    assert item == Record(
        text="First line.\nSecond é.",
        id="dump/file#1",
        source="common_crawl",
        provenance={
            "url": "http://a.com/x",
            "date": DATE,
            "digest": sha1_digest("A title\n  First line. \nSecond é.\n".encode()),
            "title": "A title",
            "declared_language": "eng,fra",
        },
    )


def test_headers_are_found_by_name_with_and_without_the_one_for_the_language(tmp_path: Path) -> None:
    # cc_net takes the seventh and ninth header: since the dump 2020-34 a language, and no length.
    pages = [wet_page("T", "Text.", language=language) for language in (None, "eng")]
    items = read_pages(write_archive(tmp_path / "a.wet", *pages))
    assert outcomes(items) == ["Text.", "Text."]
    assert {item.provenance["digest"] for item in items if isinstance(item, Record)} == {sha1_digest(b"T\nText.\n")}
    assert [item.provenance.get("declared_language") for item in items if isinstance(item, Record)] == [None, "eng"]


def test_names_of_headers_have_no_case_and_values_may_go_on(tmp_path: Path) -> None:
    block = b"T\nText.\n"
    page = b"WARC/1.1\r\nwarc-type: Conversion\r\nWARC-TARGET-URI:\r\n http://a/\r\nCONTENT-length:%d\r\n\r\n%s\r\n\r\n"
    (item,) = read_pages(write_archive(tmp_path / "a.wet", page % (len(block), block)))
    assert isinstance(item, Record) and item.text == "Text." and item.provenance["url"] == "http://a/"


def test_the_title_may_be_kept(tmp_path: Path) -> None:
    assert read_records(tmp_path, wet_page("A title", "Text."), title="keep") == ["A title\nText."]


def test_the_length_is_that_of_the_text_without_its_title(tmp_path: Path) -> None:
    pages = [wet_page("A title", "x" * count) for count in (299, 300, 500, 501)]
    found = read_records(tmp_path, *pages, min_characters=300, max_characters=500)
    assert found == ["too_short", "x" * 300, "x" * 500, "too_long"]
    found = read_records(tmp_path, *pages, min_characters=300, max_characters=500, title="keep")
    assert found == ["too_short", f"A title\n{'x' * 300}", f"A title\n{'x' * 500}", "too_long"]


def test_a_page_that_is_no_utf8_or_another_than_was_written_is_dropped(tmp_path: Path) -> None:
    found = read_records(
        tmp_path,
        record("conversion", b"T\nna\xefve\n"),
        wet_page("T", "Changed.", digest=sha1_digest(b"T\nWritten.\n")),
        wet_page("T", "Hexadecimal.", digest="SHA1:92cd15e45ae3d5d0df8d0c3a1ab9f1ed5d8bb8ec"),
        wet_page("T", "Unknown.", digest="crc:abc"),
        wet_page("T", "Good."),
    )
    assert found == ["broken_encoding", "broken_digest", "broken_digest", "Unknown.", "Good."]
    assert read_records(tmp_path, wet_page("T", "C.", digest="sha1:AAAA"), verify_digests=False) == ["C."]


# ---------------------------------------------------------------------------------------------- WARC


def test_a_page_of_a_warc_is_its_main_text(tmp_path: Path) -> None:
    body = HTML.replace(b"<p>", b"<nav><a href=/>Home</a></nav><script>var x;</script><p>")
    page = warc_page(body, url="<https://a.com/x>")
    (item,) = read_pages(write_archive(tmp_path / "a.warc.gz", warcinfo(), page))
    assert isinstance(item, Record)
    assert item.text == "Hello world."
    assert item.provenance["url"] == "https://a.com/x"
    assert item.provenance["title"] == "A title"
    assert item.provenance["declared_language"] == "en"
    (item,) = read_pages(tmp_path / "a.warc.gz", main_content=False)
    assert item.text == "Home\n\nHello world."


RUSSIAN = "Привет, мир! Это страница на русском языке."
JAPANESE = "これは日本語のページです。文字コードを調べます。"


@pytest.mark.parametrize(
    ("text", "encoding", "header", "meta"),
    [
        (RUSSIAN, "utf-8", "utf-8", ""),
        (RUSSIAN, "utf-8", "iso-8859-1", ""),  # the header is wrong
        (RUSSIAN, "utf-8", "", "windows-1251"),  # the tag is wrong
        (RUSSIAN, "windows-1251", "windows-1251", ""),
        (RUSSIAN, "windows-1251", "", "windows-1251"),
        (RUSSIAN, "windows-1251", "", ""),  # nobody says so
        (RUSSIAN * 5, "koi8-r", "utf-8", ""),  # the header is wrong, and the bytes are no UTF-8
        (JAPANESE, "shift_jis", "shift_jis", ""),
        (JAPANESE, "euc-jp", "", "euc-jp"),
        ("Zażółć gęślą jaźń.", "iso-8859-2", "", "iso-8859-2"),  # too little to tell
        (JAPANESE, "iso2022_jp", "iso-2022-jp", ""),
        (JAPANESE, "utf-16", "", ""),  # with its mark
        ("Déjà vu, café – œuvre", "windows-1252", "iso-8859-1", ""),  # as all browsers read Latin-1
        ("Plain ASCII.", "ascii", "no-such-charset", ""),
    ],
)
def test_the_encoding_is_found(tmp_path: Path, text: str, encoding: str, header: str, meta: str) -> None:
    tag = f"<meta charset={meta}>" if meta else ""
    body = f"<html><head>{tag}<title>T</title></head><body><p>{text}</p></body></html>".encode(encoding)
    content_type = f"text/html; charset={header}" if header else "text/html"
    assert read_records(tmp_path, warc_page(body, content_type=content_type)) == [text]


def test_a_page_cut_within_a_character_or_with_a_wrong_byte_is_still_utf8(tmp_path: Path) -> None:
    cut = f"<html><body><p>{RUSSIAN}".encode()
    wrong = f"<html><body><p>{RUSSIAN * 5} it\x92s</p>".encode().replace(b"\xc2\x92", b"\x92")
    english = (
        b"<html><body><p>"
        + ("“It’s” – they’re here" * 3).encode()
        + b" and it\x92s English, for the most part.</p>" * 2
    )
    latin = "text/html; charset=iso-8859-1"  # which would read every byte, wrongly
    found = read_records(
        tmp_path, warc_page(cut[:-2]), warc_page(wrong), warc_page(english, content_type=latin), max_damaged=0.1
    )
    assert found[:2] == [RUSSIAN[:-2], f"{RUSSIAN * 5} it\ufffds"]
    assert found[2].startswith("“It’s” – they’re here") and "it\ufffds English" in found[2]
    assert read_records(tmp_path, warc_page(wrong), max_damaged=0.001) == ["broken_encoding"]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (chunked(HTML), ["Transfer-Encoding: chunked"]),
        (gzip.compress(HTML), ["Content-Encoding: gzip"]),
        (zlib.compress(HTML), ["Content-Encoding: deflate"]),
        (chunked(gzip.compress(HTML), 20), ["Transfer-Encoding: chunked", "Content-Encoding: gzip"]),
        # The crawler had undone them, and kept the headers.
        (HTML, ["Transfer-Encoding: chunked"]),
        (HTML, ["Content-Encoding: gzip"]),
        (HTML, ["Content-Encoding: br"]),
        (HTML, ["Content-Encoding: unheard-of"]),
        (chunked(HTML), ["Transfer-Encoding: chunked", "Content-Encoding: gzip"]),
        (gzip.compress(HTML), ["Transfer-Encoding: chunked", "Content-Encoding: gzip"]),
    ],
)
def test_encodings_are_undone_where_the_body_has_them(tmp_path: Path, body: bytes, headers: list[str]) -> None:
    assert read_records(tmp_path, warc_page(body, *headers)) == ["Hello world."]
    assert read_records(tmp_path, warc_page(body, *headers, line_end=b"\n")) == ["Hello world."]


def test_wrong_chunks_and_damaged_bodies_are_dropped(tmp_path: Path) -> None:
    wrong = chunked(HTML, 20).replace(b"14\r\n", b"zz\r\n").replace(b"zz\r\n", b"14\r\n", 1)
    found = read_records(
        tmp_path,
        warc_page(wrong, "Transfer-Encoding: chunked"),
        warc_page(chunked(HTML)[:60], "Transfer-Encoding: chunked"),
        warc_page(b"\x1f\x8b\x08\x00" + b"\xff" * 50, "Content-Encoding: gzip"),
        warc_page(b"\x00\x01" * 50, "Content-Encoding: unheard-of"),
        record("response", HTML),
        record("response", b""),
        warc_page(HTML),
    )
    assert found == ["broken_http"] * 6 + ["Hello world."]


LONG_HTML = b"<html><body>" + b"".join(b"<p>Line %d of a page.</p>" % n for n in range(500)) + b"</body></html>"


@pytest.mark.parametrize("body", [gzip.compress(LONG_HTML), zlib.compress(LONG_HTML), zlib.compress(LONG_HTML)[2:-4]])
def test_a_compressed_body_that_stops_in_the_middle_is_dropped(tmp_path: Path, body: bytes) -> None:
    """fastwarc takes the cut for the end."""
    encoding = "Content-Encoding: gzip" if body.startswith(b"\x1f\x8b") else "Content-Encoding: deflate"
    cut = body[: len(body) * 7 // 10]
    whole, *found = read_records(
        tmp_path,
        warc_page(body, encoding),
        warc_page(cut, encoding),
        warc_page(chunked(cut), "Transfer-Encoding: chunked", encoding),
        warc_page(body[:-9], encoding),  # all its text or nearly, without its end
    )
    assert whole.endswith("Line 499 of a page.")
    assert found == ["broken_http"] * 3


def test_a_compressed_body_that_the_crawler_cut_is_kept_and_marked(tmp_path: Path) -> None:
    cut = http_response(gzip.compress(LONG_HTML)[:-500], "Content-Encoding: gzip")
    page = record("response", cut, headers=(("WARC-Truncated", "length"),))
    (item,) = read_pages(write_archive(tmp_path / "a.warc", page))
    assert isinstance(item, Record) and item.provenance["truncated"] == "length"
    assert item.text.startswith("Line 0 of a page.") and "Line 499" not in item.text


def test_gzip_bodies_of_several_members_or_with_something_behind_are_whole(tmp_path: Path) -> None:
    half = len(LONG_HTML) // 2
    members = gzip.compress(LONG_HTML[:half]) + gzip.compress(LONG_HTML[half:])
    for body in (members, members + b"\0\0", members + b"\r\n"):
        (text,) = read_records(tmp_path, warc_page(body, "Content-Encoding: x-gzip"))
        assert text.endswith("Line 499 of a page.")


def test_a_chunked_body_whose_first_size_is_no_number_is_dropped(tmp_path: Path) -> None:
    sizes = chunked(HTML).split(b"\r\n", 1)
    end = b"\r\n0\r\n\r\n"
    found = read_records(
        tmp_path,
        warc_page(b"zz\r\n" + sizes[1], "Transfer-Encoding: chunked"),
        warc_page(b"-1\r\n" + HTML + end, "Transfer-Encoding: chunked"),
        warc_page(HTML + end, "Transfer-Encoding: chunked"),  # undone, and the page ends so
    )
    assert found == ["broken_http", "broken_http", "Hello world.\n\n0"]


def test_a_bomb_is_dropped_in_little_memory(tmp_path: Path) -> None:
    bomb = gzip.compress(b"<p>" + b"x" * 50_000_000)
    assert len(bomb) < 100_000
    assert read_records(tmp_path, warc_page(bomb, "Content-Encoding: gzip"), max_record_bytes=100_000) == ["too_large"]


def test_what_is_no_page_is_dropped_and_counted(tmp_path: Path) -> None:
    cut = (("WARC-Truncated", "length"),)
    found = read_records(
        tmp_path,
        warcinfo(),
        record("request", b"GET / HTTP/1.1\r\n\r\n"),
        record("metadata", b"fetchTimeMs: 3"),
        warc_page(HTML, status="HTTP/1.1 404 Not Found"),
        warc_page(HTML, content_type="image/png"),
        warc_page(b"\x89PNG\r\n\x1a\n" + b"\0" * 50, content_type=""),
        warc_page(b"<?xml version='1.0'?><a>b</a>", content_type="text/plain"),
        record("response", b"a.com 60 IN A 1.2.3.4", url="dns:a.com"),
        record("revisit", b""),
        record("continuation", b"rest", headers=(("WARC-Segment-Number", "2"),)),
        record("response", http_response(HTML), headers=(("WARC-Segment-Number", "1"),)),
        record("response", http_response(HTML), headers=cut),
        warc_page(b"<div>" * 600 + b"deep", status="HTTP/2 200"),
        keep_truncated=False,
    )
    assert found == [
        *("http_status", "not_text", "not_text", "not_text", "not_http", "revisit", "segmented", "segmented"),
        *("truncated", "too_nested"),
    ]


def test_pages_cut_by_the_crawler_are_kept_and_marked(tmp_path: Path) -> None:
    page = record("response", http_response(HTML), headers=(("WARC-Truncated", "length"),))
    (item,) = read_pages(write_archive(tmp_path / "a.warc", page))
    assert isinstance(item, Record) and item.provenance["truncated"] == "length"


def test_plain_text_and_resources_are_pages_too(tmp_path: Path) -> None:
    found = read_records(
        tmp_path,
        warc_page(b"  Plain\r\n\r\n\r\n\r\ntext. \r\n", content_type="text/plain"),
        record("resource", HTML, headers=(("Content-Type", "text/html; charset=utf-8"),)),
        warc_page(HTML, content_type=""),  # of no type: by its beginning
    )
    assert found == ["Plain\n\ntext.", "Hello world.", "Hello world."]


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_body_makes_reading_raise(tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.warc"
    write_archive(path, warc_page(body), warc_page(b"<html><body><p>" + body), record("response", body))
    assert len(read_pages(path)) == 3


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    wrong = ({"min_characters": 0}, {"max_characters": 0}, {"title": "no"}, {"max_damaged": 2}, {"max_record_bytes": 0})
    for changes in wrong:
        with pytest.raises(ConfigError, match=next(iter(changes))):
            read_pages(tmp_path, **changes)


# ---------------------------------------------------------------------------------------------- real files


def real(name: str) -> Path:
    return needed_data() / "raw" / "commoncrawl" / name


def test_a_real_archive_of_299_responses_has_95_pages() -> None:
    items = read_pages(real("aut-example.warc.gz"), min_characters=300)
    kept = [item for item in items if isinstance(item, Record)]
    assert Counter(item.reason for item in items if isinstance(item, Dropped)) == {
        "not_text": 86,
        "http_status": 47,
        "not_http": 38,
        "too_short": 33,
    }
    assert len(items) == 299 and len(kept) == 95
    assert sum(len(item.text) for item in kept) == pytest.approx(1_200_000, rel=0.01)
    question = next(item for item in kept if item.provenance["url"].endswith("faq.php?faq_id=257"))
    assert question.text.startswith(
        "Frequently Asked Questions\n\nWhy are there no shows by band X?\n\nWe'd like to make sure that a trade-"
    )
    assert not any(tag in item.text for item in kept for tag in ("<div", "</td>", "<script", "&nbsp;", "</span>"))


def test_a_real_page_as_wet_and_as_warc() -> None:
    (wet,) = read_pages(real("whirlwind.warc.wet.gz"))
    (warc,) = read_pages(real("whirlwind.warc.gz"))
    assert wet.provenance["title"] == warc.provenance["title"] == "Escopete - Biquipedia, a enciclopedia libre"
    assert wet.provenance["declared_language"] == "spa" and warc.provenance["declared_language"] == "an"
    sentence = "Iste articlo ye en proceso de cambio enta la ortografía oficial de Biquipedia"
    assert sentence in wet.text and sentence in warc.text
    assert len(warc.text) < len(wet.text) / 2  # without the navigation


def test_real_pages_in_old_encodings_are_read() -> None:
    items = read_pages(real("resiliparse-warcfile.warc.gz"))
    assert len(items) == 16 and all(isinstance(item, Record) for item in items)
    text = "\n".join(item.text for item in items)
    assert "Стратегия пожарной безопасности" in text  # windows-1251
    assert "当前位置" in text  # gb2312
    assert text.count("\ufffd") == 0


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("warcio-example.warc.gz", {"kept": 1, "revisit": 1}),
        ("warcio-example-bad-non-chunked.warc.gz", {"kept": 1, "revisit": 1}),  # one member for all records
        ("warcio-example-wrong-chunks.warc.gz", {"broken_digest": 1}),
        ("warcio-example-trunc.warc", {"broken_length": 1}),
        ("warcio-example-iana.org-chunked.warc", {"kept": 1}),
        ("cc_net-sample.warc.wet.txt", {"broken_length": 4}),  # its lengths count characters
        ("jwarc-cc.warc.gz", {"kept": 1}),
        ("iawc-html-lang-attribute.warc", {"too_short": 5}),
        ("iawc-text-extraction-test.warc", {"kept": 1, "not_text": 1}),
        ("dolma-sample-0000.warc.gz", {"kept": 22, "not_http": 2}),
    ],
)
def test_real_archives_with_faults_are_read_as_far_as_they_are_whole(name: str, found: dict[str, int]) -> None:
    assert Counter(item.reason if isinstance(item, Dropped) else "kept" for item in read_pages(real(name))) == found


def test_a_real_file_that_was_clipped_fails() -> None:
    # fastwarc gives the page cut off in the middle, and no error.
    with pytest.raises(DataError, match="truncated"):
        read_pages(real("resiliparse-clipped.warc.gz"))
