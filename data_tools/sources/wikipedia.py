"""Wikipedia's pages-articles dumps (section 2.1 of the paper: 20 languages, June to August 2022).

    https://dumps.wikimedia.org/enwiki/latest/enwiki-latest-pages-articles-multistream.xml.bz2   and its parts

A dump may be plain or packed as .bz2 (one stream or many), .gz or .zst, and is read page by page. Its header tells the
language and what files and categories are called in it. An article's text begins with its title; data_tools.cleaning.
wikitext says what becomes of the markup.

A page is dropped as
    broken_xml, too_large   see data_tools.sources.xml_records
    broken_page             no title, or no number of the page or its namespace
    other_language          its Wikipedia is not one of `languages`
    namespace               not an article: a talk page, template, category …
    redirect                only the name of another article
    not_wikitext            JSON, CSS or a script in place of an article
    disambiguation          a list of articles of the same name
    empty                   less than `min_characters` of text once clean
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from data_tools.cleaning.wikitext import clean_wikitext
from data_tools.cleaning.wikitext_languages import LANGUAGES, REDIRECT, Site, site_of
from data_tools.records import SAMPLE_CHARACTERS, Dropped, Record
from data_tools.sources.xml_records import Header, element_format, xml_records
from llamatrain.errors import ConfigError, DataError

SOURCE = "wikipedia"
SUFFIXES = (".xml", ".bz2", ".gz", ".zst")  # a part is called …pages-articles1.xml-p1p41242.bz2
INDEX = "-multistream-index"  # in the name of a file that only lists where pages begin
FORMAT = element_format("mediawiki", "page")
_DATABASE = re.compile(r"([a-z][a-z_]*)wiki")  # enwiki, be_x_oldwiki; not enwiktionary
_CODE = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*|simple")  # of a Wikipedia: de, be-x-old
_FILE_DATABASE = re.compile(r"([a-z][a-z_]*)wiki-")  # enwiki-20220801-pages-articles.xml.bz2
_XML_LANGUAGE = re.compile(rb"""<mediawiki[^<>]*\sxml:lang=["']([A-Za-z-]{1,20})["']""")


@dataclass
class WikipediaSettings:
    languages: list[str] = field(default_factory=lambda: list(LANGUAGES))  # the paper's 20; none: every language
    language: str | None = None  # of all input; null: the dump says it
    title: bool = True  # the text begins with the article's title and a blank line (ours: the paper does not say)
    disambiguation_pages: bool = False  # keep them (ours: they are lists of links, no prose)
    trailing_sections: bool = False  # keep "References", "See also" … (ours: lists of books and links, no prose)
    text_templates: bool = True  # keep the words of {{lang}}, {{convert}} … (ours: without them sentences have holes)
    min_characters: int = 1  # of clean text without the title
    max_document_bytes: int = 16 << 20  # of a page's XML; MediaWiki's own limit is 2 MiB of wikitext


@dataclass(frozen=True)
class _Wiki:
    """One dump, by its header."""

    language: str
    site: Site
    article_url: str  # "" where the header does not tell


def check_settings(settings: WikipediaSettings) -> None:
    """Raises ConfigError."""
    for name in ("min_characters", "max_document_bytes"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be at least 1")
    for language in [*settings.languages, *([settings.language] if settings.language is not None else [])]:
        if not _CODE.fullmatch(language):
            raise ConfigError(f"languages: {language!r} is no code of a Wikipedia; write it as in its address: de, en")


def read(path: Path, name: str, settings: WikipediaSettings) -> Iterator[Record | Dropped]:
    """The articles of a dump in its order. Raises DataError, after what was whole, when the file cannot be read."""
    check_settings(settings)
    if INDEX in path.name:
        raise DataError(f"{path}: the index of a multistream dump, not the dump; leave it out of the input")
    wiki = _wiki_of(b"", name, settings)
    for item in xml_records(path, name, FORMAT, settings.max_document_bytes):
        if isinstance(item, Header):
            wiki = _wiki_of(item.data, name, settings)
        elif isinstance(item, Dropped):
            yield item
        else:
            yield _article(item, name, wiki, settings)


def _wiki_of(header: bytes, name: str, settings: WikipediaSettings) -> _Wiki:
    info = _siteinfo(header)
    namespaces = {
        int(node.get("key", "")): node.text or "" for node in info.iter("namespace") if node.get("key", "").isdecimal()
    }
    language = settings.language or _language(info.findtext("dbname", ""), header, name)
    base = urlsplit(info.findtext("base", ""))
    folder = base.path.rpartition("/")[0]
    url = f"{base.scheme}://{base.netloc}{folder}/" if base.scheme in ("http", "https") else ""
    return _Wiki(language, site_of(language, namespaces), url)


def _siteinfo(header: bytes) -> ElementTree.Element:
    start, end = header.find(b"<siteinfo>"), header.find(b"</siteinfo>")
    try:
        return ElementTree.fromstring(header[start:end] + b"</siteinfo>" if 0 <= start < end else b"<siteinfo/>")
    except ElementTree.ParseError:
        return ElementTree.Element("siteinfo")


def _language(database: str, header: bytes, name: str) -> str:
    """By the dump's own name of its database, else its language, else the file's name; "" where nothing tells."""
    if match := _DATABASE.fullmatch(database):
        return match[1].replace("_", "-")
    if stated := _XML_LANGUAGE.search(header):
        return stated[1].decode().lower()
    match = _FILE_DATABASE.match(Path(name).name)
    return match[1].replace("_", "-") if match else ""


def _article(page: ElementTree.Element, name: str, wiki: _Wiki, settings: WikipediaSettings) -> Record | Dropped:
    title, number, namespace = page.findtext("title", "").strip(), page.findtext("id", ""), page.findtext("ns", "0")
    revisions = page.findall("revision")
    revision = revisions[-1] if revisions else page
    text = revision.findtext("text", "")
    identity = f"{name}#{number}"
    reason = _reason(page, revision, title, text, wiki, settings)
    if not title or not number.isdecimal() or not namespace.removeprefix("-").isdecimal():
        reason, identity = "broken_page", f"{name}#{title or number or 'unnamed'}"
    size = len(text.encode("utf-8", "surrogatepass"))
    if reason:
        return Dropped(reason, identity, size, text[:SAMPLE_CHARACTERS])
    clean = clean_wikitext(
        text, wiki.site, trailing_sections=settings.trailing_sections, text_templates=settings.text_templates
    )
    if len(clean) < settings.min_characters:
        return Dropped("empty", identity, size, text[:SAMPLE_CHARACTERS])
    provenance = {"file": name, "title": title, "date": revision.findtext("timestamp", "")}
    if wiki.article_url:
        provenance["url"] = wiki.article_url + quote(title.replace(" ", "_"), safe="/:(),'!*")
    return Record(
        text=f"{title}\n\n{clean}" if settings.title else clean,
        id=identity,
        source=SOURCE,
        provenance=provenance,
        language=wiki.language or None,
        counts={"bytes_wikitext": size},
    )


def _reason(
    page: ElementTree.Element,
    revision: ElementTree.Element,
    title: str,
    text: str,
    wiki: _Wiki,
    settings: WikipediaSettings,
) -> str:
    """Why the page is no article to keep, or ""."""
    if settings.languages and wiki.language not in settings.languages:
        return "other_language"
    if page.findtext("ns", "0") != "0":
        return "namespace"
    if page.find("redirect") is not None or REDIRECT.match(text):
        return "redirect"
    if revision.findtext("model", "wikitext") != "wikitext":
        return "not_wikitext"
    if not settings.disambiguation_pages and _lists_meanings(title, text, wiki.site):
        return "disambiguation"
    return ""


def _lists_meanings(title: str, text: str, site: Site) -> bool:
    if title.lower().endswith((site.disambiguation_title, "(disambiguation)")) or "__DISAMBIG__" in text:
        return True
    return site.disambiguation_template.search(text) is not None
