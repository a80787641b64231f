"""StackExchange dumps (section 2.1 of the paper): a question and its answers as one document, best answer first.

    https://archive.org/download/stackexchange   a .7z a site; unpack it, Posts.xml is read (also .zst, .gz, .bz2)

"We kept the data from the 28 largest websites, removed the HTML tags from text and sorted the answers by score (from
highest to lowest)." The setting `largest=28` picks the sites.

A site's file is ordered by number, so an answer stands far behind its question, and Stack Overflow has 60 million
rows: posts go to disk first, into a partition for each range of questions' numbers, and then partition after
partition is joined. Memory is bounded by `buffer_bytes` and one partition, disk by the file's own size, and questions
come out by number whatever the size. A small site never touches the disk.

A row is dropped as
    broken_xml, too_large   see data_tools.sources.xml_records
    broken_row              no number, score or, of an answer, question that is a number
    post_type               neither question nor answer: a tag's description, an election … (PostTypeId 3 and more)
    duplicate               a second row of the same number
    orphan_answer           its question is not in the file
    no_answer               a question nobody answered, where `unanswered` is off
    empty                   no text in it
"""

import marshal
import re
import struct
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from data_tools.cleaning.posts_html import post_text
from data_tools.progress import advance_share
from data_tools.records import SAMPLE_CHARACTERS, Dropped, Record
from data_tools.sources.xml_records import UNREADABLE, Header, row_format, unpacked_chunks, xml_records
from llamatrain.errors import ConfigError, DataError

SOURCE = "stackexchange"
SUFFIXES = ("Posts.xml", "Posts.xml.zst", "Posts.xml.gz", "Posts.xml.bz2")  # beside it lie Users.xml, Votes.xml …
FORMAT = row_format("posts", "row")
READING = 0.5  # of the work with a file; the rest is joining
QUESTION, ANSWER = "1", "2"  # PostTypeId
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_SITE = re.compile(r"(.+?)[-_.]?Posts\.xml.*")
_LENGTH = struct.Struct("<I")


@dataclass
class StackExchangeSettings:
    unanswered: bool = True  # keep questions without answers (RedPajama does; the paper does not say)
    code_fences: bool = False  # ``` around code blocks (RedPajama sets none)
    max_document_bytes: int = 4 << 20  # of a row's XML; the sites allow 30,000 characters a post
    temporary: str | None = None  # directory for the partitions, the size of the largest input; null: the system's
    ids_per_partition: int = 1 << 16  # numbers of questions; about 90 MB of posts, and three times that of memory
    buffer_bytes: int = 64 << 20  # of posts held before they are written
    max_partition_bytes: int = 1 << 30  # more is refused: lower ids_per_partition


class _Post(NamedTuple):
    id: int
    question: int  # the answered question's number; of a question its own
    score: int
    title: str
    body: str  # HTML
    tags: str
    date: str
    licence: str


def check_settings(settings: StackExchangeSettings) -> None:
    """Raises ConfigError."""
    for name in ("max_document_bytes", "ids_per_partition", "buffer_bytes", "max_partition_bytes"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be at least 1")
    if settings.temporary is not None and not Path(settings.temporary).is_dir():
        raise ConfigError(f"temporary={settings.temporary}: no such directory; create it, or name another")


def read(path: Path, name: str, settings: StackExchangeSettings) -> Iterator[Record | Dropped]:
    """A site's questions by number, each with its answers by score. Raises DataError, after what was whole, when the
    file cannot be read to its end."""
    check_settings(settings)
    damage: DataError | None = None
    with tempfile.TemporaryDirectory(prefix="stackexchange-", dir=settings.temporary) as folder:
        partitions = _Partitions(Path(folder), settings)
        try:
            for item in xml_records(path, name, FORMAT, settings.max_document_bytes, share=READING):
                post = item if isinstance(item, Header | Dropped) else _post(item, name)
                if isinstance(post, _Post):
                    partitions.add(post)
                elif isinstance(post, Dropped):
                    yield post
        except DataError as error:
            damage = error
        count = len(partitions)
        for posts in partitions.all():
            yield from _threads(posts, name, settings)
            advance_share((1 - READING) / count)
    if damage is not None:
        raise damage


def count_rows(path: Path) -> int:
    """The rows of a Posts.xml. Raises DataError."""
    mark, total, tail = b"<row ", 0, b""
    try:
        for chunk in unpacked_chunks(path):
            piece = tail + chunk
            total += piece.count(mark)
            tail = piece[-(len(mark) - 1) :]
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); fetch the file again") from error
    return total


class _Partitions:
    """Posts by ranges of their question's number: in memory up to a bound, beyond it in files."""

    def __init__(self, folder: Path, settings: StackExchangeSettings) -> None:
        self._folder = folder
        self._settings = settings
        self._buffers: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._buffered = 0
        self._written: set[int] = set()

    def add(self, post: _Post) -> None:
        data = marshal.dumps(tuple(post))
        buffer = self._buffers[post.question // self._settings.ids_per_partition]
        buffer += _LENGTH.pack(len(data)) + data
        self._buffered += _LENGTH.size + len(data)
        if self._buffered > self._settings.buffer_bytes:
            self._write()

    def __len__(self) -> int:
        return len(self._written | self._buffers.keys())

    def _write(self) -> None:
        try:
            for number, buffer in self._buffers.items():
                with open(self._folder / f"{number}.posts", "ab") as file:
                    file.write(buffer)
                self._written.add(number)
        except OSError as error:
            raise DataError(
                f"{self._folder}: cannot write the posts to join ({error}); temporary=DIRECTORY names a place with "
                "room for the largest input"
            ) from error
        self._buffers.clear()
        self._buffered = 0

    def all(self) -> Iterator[list[_Post]]:
        """Partition after partition, by number; each is forgotten once it was given."""
        for number in sorted(self._written | self._buffers.keys()):
            file = self._folder / f"{number}.posts"
            buffer = self._buffers.pop(number, bytearray())
            size = len(buffer) + (file.stat().st_size if number in self._written else 0)
            if size > self._settings.max_partition_bytes:
                raise DataError(
                    f"the posts of {self._settings.ids_per_partition} questions are {size} bytes, more than "
                    f"max_partition_bytes={self._settings.max_partition_bytes}: lower ids_per_partition"
                )
            stored = file.read_bytes() if number in self._written else b""
            file.unlink(missing_ok=True)
            yield self._posts(stored + buffer if buffer else stored)

    def _posts(self, data: bytes) -> list[_Post]:
        posts: list[_Post] = []
        position = 0
        view = memoryview(data)
        while position < len(data):
            start = position + _LENGTH.size
            position = start + _LENGTH.unpack_from(data, position)[0]
            posts.append(_Post(*marshal.loads(view[start:position])))
        return posts


def _post(row: ElementTree.Element, name: str) -> _Post | Dropped:
    """A row as a post, or why it is none."""
    number, kind, body = row.get("Id", ""), row.get("PostTypeId", ""), row.get("Body", "")
    identity = f"{name}#{number or 'unnumbered'}"
    parent = row.get("ParentId", "") if kind == ANSWER else number
    score = row.get("Score", "")
    if row.tag != "row" or not all(_NUMBER.fullmatch(text) for text in (number, parent, score)) or number[0] == "-":
        if row.tag == "row" and kind not in (QUESTION, ANSWER) and _NUMBER.fullmatch(number):
            return _drop("post_type", identity, body)
        return _drop("broken_row", identity, body)
    if kind not in (QUESTION, ANSWER):
        return _drop("post_type", identity, body)
    return _Post(
        id=int(number),
        question=int(parent),
        score=int(score),
        title=row.get("Title", ""),
        body=body,
        tags=" ".join(re.findall(r"[^<>|\s]+", row.get("Tags", ""))),
        date=row.get("CreationDate", ""),
        licence=row.get("ContentLicense", ""),
    )


def _drop(reason: str, identity: str, text: str) -> Dropped:
    return Dropped(reason, identity, len(text.encode("utf-8", "surrogatepass")), text[:SAMPLE_CHARACTERS])


def _threads(posts: list[_Post], name: str, settings: StackExchangeSettings) -> Iterator[Record | Dropped]:
    """The documents of a partition's posts, by the questions' numbers."""
    questions: dict[int, _Post] = {}
    answers: defaultdict[int, dict[int, _Post]] = defaultdict(dict)
    for post in posts:
        kept = questions if post.id == post.question else answers[post.question]
        if post.id in kept:
            yield _drop("duplicate", f"{name}#{post.id}", post.body)
        else:
            kept[post.id] = post
    for number in sorted(questions.keys() | answers.keys()):
        given = sorted(answers[number].values(), key=lambda post: (-post.score, post.id))
        if number not in questions:
            yield from (_drop("orphan_answer", f"{name}#{post.id}", post.body) for post in given)
        else:
            yield from _thread(questions[number], given, name, settings)


def _thread(
    question: _Post, answers: list[_Post], name: str, settings: StackExchangeSettings
) -> Iterator[Record | Dropped]:
    texts: list[str] = []
    for answer in answers:
        text = post_text(answer.body, fences=settings.code_fences)
        if text:
            texts.append(f"A: {text}")
        else:
            yield _drop("empty", f"{name}#{answer.id}", answer.body)
    asked = "\n\n".join(filter(None, (question.title.strip(), post_text(question.body, fences=settings.code_fences))))
    if not texts and (not asked or not settings.unanswered):
        yield _drop("no_answer" if asked else "empty", f"{name}#{question.id}", question.title + question.body)
        return
    site = _site(name)
    provenance = {"file": name, "date": question.date, "tags": question.tags, "score": str(question.score)}
    if "." in site:
        provenance["url"] = f"https://{site}/questions/{question.id}"
    if question.licence:
        provenance["licence"] = question.licence
    yield Record(
        text="\n\n".join([f"Q: {asked}", *texts]),
        id=f"{name}#{question.id}",
        source=SOURCE,
        provenance=provenance,
        counts={"answers": len(texts)},
    )


def _site(name: str) -> str:
    """beer.stackexchange.com of beer.stackexchange.com/Posts.xml and of beer.stackexchange.com-Posts.xml.zst."""
    *folders, file = name.split("/")
    match = _SITE.fullmatch(file)
    return match[1] if match else folders[-1] if folders else ""
