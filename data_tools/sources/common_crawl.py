"""Pages of Common Crawl: its text (WET) as CCNet took it, or its archive (WARC) through an HTML extractor.

In a WET file Common Crawl has put the text of a page into a `conversion` record; the first line is the page's title.
In a WARC file `response` records hold HTTP responses, of which the good ones that are HTML or plain text are pages.
Headers are found by name: CCNet counted them, and lost the digest and length of every page when a header for the
language was added in 2020. A file may hold both kinds of records; requests, metadata and the like are no pages.

CCNet's rules of a page (its `process_wet_file`): the lines are stripped, the title is taken out of the text, and what
is left must have 300 characters. Here it must also end: `max_characters` bounds it.

Drop reasons. Of records: broken_header, broken_length (see `warc.py`), broken_digest (the block is not what was
written), broken_http (no HTTP response, or one that cannot be decoded to its end; what the crawler says it has cut off
is `truncated`), broken_encoding (no UTF-8, or too many characters that its encoding does not have), too_large,
segmented (one of several records of a page), revisit (no content: as before). Of pages: not_http (dns:, metadata:,
...), http_status (another than 200), not_text (images, scripts, ...), truncated (cut off by the crawler, if those are
unwanted), too_nested (see `cleaning/html.py`), too_short, too_long.
"""

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.records import SAMPLE_CHARACTERS, Dropped, Record
from data_tools.sources.warc import Broken, WarcRecord, warc_records
from llamatrain.errors import ConfigError

SUFFIXES = (".wet", ".wet.gz", ".warc", ".warc.gz", ".wet.zst", ".warc.zst")
TITLES = ("separate", "keep")
PAGE_TYPES = ("conversion", "response", "resource")
OTHER_PAGES = {"revisit": "revisit", "continuation": "segmented"}
HTML_TYPES = ("text/html", "application/xhtml+xml")
_DIGESTS = ("sha1", "sha256", "md5")


@dataclass(frozen=True)
class CommonCrawlSettings:
    min_characters: int = 300  # CCNet's min_len; of the text without its title, before any line is removed
    max_characters: int = 1_000_000  # ours: a page for people is shorter; C4's code says 190,000
    max_record_bytes: int = 1 << 24  # ours; of a record and of a page unpacked. The crawler cuts pages at 1 or 5 MiB
    # "separate": the title is kept beside the text, as CCNet does; "keep": it is the first line of the text.
    title: str = "separate"
    keep_truncated: bool = True  # pages that the crawler cut off; CCNet could not tell
    verify_digests: bool = True  # records whose block has another digest than its header says are dropped
    main_content: bool = True  # of HTML without navigation and the like; false: all a page shows, as WET has it
    max_damaged: float = 0.01  # ours: of a page's characters that its encoding could not read


def check_common_crawl_settings(settings: CommonCrawlSettings) -> None:
    """Raises ConfigError."""
    if settings.min_characters < 1:
        raise ConfigError(f"min_characters={settings.min_characters}: give at least 1")
    if settings.max_characters < settings.min_characters:
        raise ConfigError(f"max_characters={settings.max_characters}: less than min_characters")
    if settings.max_record_bytes < 1:
        raise ConfigError(f"max_record_bytes={settings.max_record_bytes}: give at least 1")
    if settings.title not in TITLES:
        raise ConfigError(f"title={settings.title}: choose one of {', '.join(TITLES)}")
    if not 0 <= settings.max_damaged <= 1:
        raise ConfigError(f"max_damaged={settings.max_damaged}: a fraction between 0 and 1")


def read(path: Path, name: str, settings: CommonCrawlSettings) -> Iterator[Record | Dropped]:
    """The pages of a WET or WARC file, in its order; their ids are `NAME#NUMBER OF THE RECORD`.

    Raises DataError naming the file when it is no archive or stops in the middle.
    """
    check_common_crawl_settings(settings)
    for item in warc_records(path, max_block_bytes=settings.max_record_bytes):
        identifier = f"{name}#{item.number}"
        if isinstance(item, Broken):
            yield Dropped.of_bytes(item.reason, identifier, item.beginning, size=item.length)
            continue
        kind = item.headers.get("warc-type", "").lower()
        if kind in PAGE_TYPES:
            page = _page(item, kind, settings)
            yield (
                _checked(page, identifier, item, settings)
                if isinstance(page, _Page)
                else _dropped(page, item, identifier)
            )
        elif kind in OTHER_PAGES:
            yield _dropped(OTHER_PAGES[kind], item, identifier)


@dataclass(frozen=True, slots=True)
class _Page:
    title: str
    language: str  # as the page or the crawler says
    text: str


def _page(record: WarcRecord, kind: str, settings: CommonCrawlSettings) -> _Page | str:
    """The page of a record, or why it is dropped."""
    if not record.headers.get("warc-target-uri", "").strip("<>").lower().startswith(("http://", "https://")):
        return "not_http"
    if "warc-segment-number" in record.headers:
        return "segmented"
    if "warc-truncated" in record.headers and not settings.keep_truncated:
        return "truncated"
    if record.block is None:
        return "too_large"
    if settings.verify_digests and not _digest_holds(record.block, record.headers.get("warc-block-digest", "")):
        return "broken_digest"
    if kind == "conversion":
        return _wet_page(record, record.block)
    return _response_page(record, kind, record.block, settings)


def _digest_holds(block: bytes, digest: str) -> bool:
    """Whether the block has the digest; one of an algorithm that is not known is taken as right."""
    algorithm, _, value = digest.partition(":")
    if algorithm.lower() not in _DIGESTS or not value:
        return True
    actual = hashlib.new(algorithm.lower(), block, usedforsecurity=False).digest()
    return value.lower() == actual.hex() or value.upper().rstrip("=") == base64.b32encode(actual).decode().rstrip("=")


def _wet_page(record: WarcRecord, block: bytes) -> _Page | str:
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError:
        return "broken_encoding"
    title, _, rest = "\n".join(map(str.strip, text.split("\n"))).partition("\n")
    return _Page(title, record.headers.get("warc-identified-content-language", ""), rest.strip("\n"))


def _response_page(record: WarcRecord, kind: str, block: bytes, settings: CommonCrawlSettings) -> _Page | str:
    # WET needs none of this.
    from data_tools.cleaning import html
    from data_tools.sources.http_response import HttpResponse, read_response

    if kind == "response":
        response = read_response(block, max_body_bytes=settings.max_record_bytes)
    else:
        media_type = record.headers.get("content-type", "").partition(";")[0].strip().lower()
        response = HttpResponse(200, media_type, None, block)
    if response is None or (response.cut and "warc-truncated" not in record.headers):
        return "broken_http"
    if response.status != 200:
        return "http_status"
    if response.media_type not in (*HTML_TYPES, "text/plain"):
        return "not_text"
    if response.body is None:
        return "too_large"
    text = html.decode_page(response.body, response.charset)
    if text.count("\ufffd") > settings.max_damaged * len(text):
        return "broken_encoding"
    if response.media_type == "text/plain":
        if text.lstrip().startswith("<"):  # XML, scripts
            return "not_text"
        return _Page("", "", html.tidy_lines(text))
    if html.is_too_nested(text):
        return "too_nested"
    page = html.read_html(text, main_content=settings.main_content)
    return _Page(page.title, page.language, page.text)


def _checked(page: _Page, identifier: str, record: WarcRecord, settings: CommonCrawlSettings) -> Record | Dropped:
    provenance = {
        "url": record.headers["warc-target-uri"].strip("<>"),
        "date": record.headers.get("warc-date", ""),
        "digest": record.headers.get("warc-block-digest") or record.headers.get("warc-payload-digest", ""),
        "title": page.title,
        "declared_language": page.language,
        "truncated": record.headers.get("warc-truncated", ""),
    }
    text = f"{page.title}\n{page.text}" if settings.title == "keep" and page.title else page.text
    document = Record(text, identifier, "common_crawl", {key: value for key, value in provenance.items() if value})
    if len(page.text) < settings.min_characters:
        return Dropped.of(document, "too_short")
    if len(page.text) > settings.max_characters:
        return Dropped.of(document, "too_long")
    return document


def _dropped(reason: str, record: WarcRecord, identifier: str) -> Dropped:
    return Dropped(reason, identifier, record.length, record.headers.get("warc-target-uri", "")[:SAMPLE_CHARACTERS])
