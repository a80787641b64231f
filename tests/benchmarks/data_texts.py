"""The texts that the stages of data_tools are timed on: real ones, where the shared data is at hand.

English text without them is the documentation of the running Python's standard library; its code is there always. A
raw dump (a web archive, wikitext, posts, TeX) that is not there has no stand-in: made-up markup would be timed, and
tell nothing of real one. No torch.
"""

import bz2
import contextlib
import gzip
import io
import json
import os
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import zstandard

from data_tools.records import Record
from data_tools.sources import common_crawl
from data_tools.sources.http_response import read_response
from data_tools.sources.warc import WarcRecord, warc_records
from data_tools.stdlib_corpus import DOCS_FILE, StdlibCorpusSettings, stdlib_corpus
from tests.real_text import novels, shared_data

PAGE_CHARACTERS = 5_000  # of English text, cut into pages of about the length of a web page
PARAGRAPH_CHARACTERS = 120  # mean line of a novel that has a line a paragraph, as pages have; others have 70
ARCHIVES = ("aut-example.warc.gz", "dolma-sample-0000.warc.gz", "resiliparse-warcfile.warc.gz")
WIKIPEDIA = "enwiki-pages-articles-shortened.xml.bz2"
POSTS = "beer.stackexchange.com-Posts.xml.zst"
TESTS = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True)
class Text:
    """Documents, and what they are in words for the table."""

    kind: str
    documents: list[str]

    @property
    def bytes(self) -> int:
        return sum(len(document.encode()) for document in self.documents)

    @property
    def line_bytes(self) -> float:
        """Mean length of its lines."""
        return self.bytes / sum(document.count("\n") + 1 for document in self.documents)

    def first(self, limit: int) -> "Text":
        """The first documents of about so many bytes in all."""
        taken, size = [], 0
        for document in self.documents:
            if size >= limit:
                break
            taken.append(document)
            size += len(document.encode())
        return Text(self.kind, taken)


class Texts:
    """What is at hand on this machine; each is read once, when it is asked for. None: not here."""

    def __init__(self, data: Path | None) -> None:
        self.data = data

    @classmethod
    def here(cls) -> "Texts":
        return cls(shared_data())

    def _raw(self, *parts: str) -> Path | None:
        path = self.data.joinpath("raw", *parts) if self.data else None
        return path if path is not None and path.exists() else None

    def _archives(self) -> list[Path]:
        paths = [self._raw("commoncrawl", name) for name in ARCHIVES]
        return [path for path in paths if path is not None]

    @cached_property
    def _english(self) -> tuple[str, list[str]]:
        archive = self.data / "corpora" / "english_novels" / "english_novels.tar.zst" if self.data else None
        if archive is None or not archive.exists():
            return "Python's documentation", _stdlib_docs()
        texts = ["\n".join(text.splitlines()) for text in novels(archive, 98)]
        return "novels", [text for text in texts if _mean_line(text) > PARAGRAPH_CHARACTERS]

    @cached_property
    def books(self) -> Text:
        """Whole novels, a paragraph a line."""
        return Text(*self._english)

    @cached_property
    def english(self) -> tuple[Text, Text]:
        """Pages to measure on and others, of other books, to train on."""
        kind, books = self._english
        half = max(1, len(books) // 2)
        return Text(kind, _pages(books[:half])), Text(kind, _pages(books[half:] or books))

    @cached_property
    def web(self) -> tuple[Text, Text] | None:
        """Pages of real web archives, to measure on and to train on: all the text they show, as WET files have it."""
        settings = common_crawl.CommonCrawlSettings(main_content=False)
        texts = [
            item.text
            for path in self._archives()
            for item in common_crawl.read(path, path.name, settings)
            if isinstance(item, Record)
        ]
        return (Text("web pages", texts[::2]), Text("web pages", texts[1::2])) if texts else None

    @cached_property
    def html(self) -> list[bytes] | None:
        """HTML pages as they came."""
        pages = []
        for path in self._archives():
            for record in warc_records(path, max_block_bytes=1 << 24):
                if isinstance(record, WarcRecord) and record.headers.get("warc-type") == "response" and record.block:
                    response = read_response(record.block, max_body_bytes=1 << 24)
                    if response and response.status == 200 and response.media_type == "text/html" and response.body:
                        pages.append(response.body)
        return pages or None

    @cached_property
    def wikitext(self) -> Text | None:
        """Articles in MediaWiki's markup."""
        if (path := self._raw("wikipedia", WIKIPEDIA)) is None:
            return None
        with bz2.open(path) as file:
            texts = [element.text or "" for _, element in ElementTree.iterparse(file) if element.tag.endswith("}text")]
        return Text("English Wikipedia", [text for text in texts if text[:9].upper() != "#REDIRECT"])

    @cached_property
    def posts(self) -> Text | None:
        """Questions and answers in HTML."""
        if (path := self._raw("stackexchange", POSTS)) is None:
            return None
        with open(path, "rb") as file:
            content = zstandard.ZstdDecompressor().stream_reader(file).read()
        return Text("posts", [row.get("Body") or "" for row in ElementTree.parse(io.BytesIO(content)).getroot()])

    @cached_property
    def papers(self) -> list[dict[str, str]] | None:
        """The TeX files of each paper."""
        if (folder := self._raw("arxiv")) is None:
            return None
        papers = [_tex_files(path) for path in sorted(folder.glob("*.gz"))]
        return papers or None

    @cached_property
    def code(self) -> Text:
        """The standard library's modules, without its tests."""
        root = Path(sysconfig.get_path("stdlib"))
        paths = sorted(path for path in root.rglob("*.py") if not {*path.relative_to(root).parts} & {*TESTS})
        return Text("Python's library", [path.read_text("utf-8", errors="replace") for path in paths])


def _tex_files(path: Path) -> dict[str, str]:
    """Of a paper as arXiv packs it: a tar of several files, or one alone."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            members = [member for member in archive if member.isfile() and member.name.endswith((".tex", ".sty"))]
            files = [(member.name, archive.extractfile(member)) for member in members]
            return {name: file.read().decode("utf-8", "replace") for name, file in files if file}
    except tarfile.ReadError:
        return {f"{path.stem}.tex": gzip.decompress(path.read_bytes()).decode("utf-8", "replace")}


def _mean_line(text: str) -> float:
    lines = [line for line in text.split("\n") if line]
    return len(text) / max(1, len(lines))


def _pages(books: Iterable[str]) -> list[str]:
    """The books in pieces of about PAGE_CHARACTERS, cut between lines."""
    pages = []
    for book in books:
        lines: list[str] = []
        size = 0
        for line in filter(None, map(str.strip, book.split("\n"))):
            lines.append(line)
            size += len(line) + 1
            if size >= PAGE_CHARACTERS:
                pages.append("\n".join(lines))
                lines, size = [], 0
        if lines:
            pages.append("\n".join(lines))
    return pages


def _stdlib_docs() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            stdlib_corpus(StdlibCorpusSettings(output=folder))
        with open(Path(folder) / DOCS_FILE, "rb") as file:
            lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
            return [json.loads(line)["text"] for line in lines]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What commands of data_tools print, bars too, has no place between the rows of a table."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
