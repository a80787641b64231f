"""Papers from arXiv's source dump: tars of .gz members, each a paper's files in a tar or its only TeX file.

Nothing is written to disk. A paper is unpacked in memory, within bounds: TeX files are kept up to a size, all else
(figures) is read past. A single .gz, .tar.gz or .tex file is read as one paper. What is not read as a paper, or not
kept, is Dropped as

    pdf_only, postscript_only      arXiv has no TeX of it
    unknown_member                 the dump holds something else under this name
    unsafe_path                    a name outside of the dump (`../`, absolute)
    link, not_a_file               a link or a device
    too_large                      the packed paper is larger than max_member_bytes
    bomb                           unpacked it exceeds max_unpacked_bytes or max_ratio
    broken_gzip, broken_tar        it cannot be unpacked
    no_tex, no_section, inputs_too_large, expansion_too_large, empty      see data_tools.cleaning.latex

Inside of a paper, files with unsafe names, links and files too large are left out and counted. Text is UTF-8, else the
encoding the paper declares to `inputenc`, else Latin-1, in which every file of old papers can be read.
"""

import io
import posixpath
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_tools.cleaning.latex import PaperOptions, Unfit, clean_paper
from data_tools.records import Dropped, Record
from data_tools.sources.packed import is_unsafe, members
from llamatrain.errors import ConfigError, DataError

SUFFIXES = (".tar", ".gz", ".tgz", ".tex", ".pdf")
PAPER_SUFFIXES = (".gz", ".tgz", ".tex")
TEXT_SUFFIXES = (".tex", ".ltx", ".latex", ".txt", ".sty", ".def", ".inc", ".tikz", "")
ENCODINGS = {
    "latin1": "latin-1",
    "latin2": "iso8859-2",
    "latin5": "iso8859-9",
    "latin9": "iso8859-15",
    "ansinew": "cp1252",
    "cp1250": "cp1250",
    "cp1251": "cp1251",
    "cp1252": "cp1252",
    "koi8-r": "koi8-r",
    "applemac": "mac-roman",
}
BLOCK_BYTES = 1 << 18
TAR_BLOCK = 512
GZIP = b"\x1f\x8b"
MOST_GZIP_MEMBERS = 1000  # concatenated to one stream
RATIO_FROM_BYTES = 1 << 20  # a smaller paper is no bomb, whatever its ratio

_INPUT_ENCODING = re.compile(rb"\\usepackage\s{0,9}\[\s{0,9}([a-z0-9-]{1,20})\s{0,9}\]\s{0,9}\{inputenc\}")
_NEW_ID = re.compile(r"\d{4}\.\d{4,5}(?:v\d+)?")
_OLD_ID = re.compile(r"([a-z-]+(?:\.[A-Z]{2})?)(\d{7}(?:v\d+)?)")


@dataclass
class ArxivSettings:
    # LLaMA 2.1: "everything before the first section" is removed; abstract: kept from the abstract on
    start: str = "section"  # section | abstract
    without_heading: str = "drop"  # papers with no heading at all: drop | keep
    appendix: str = "keep"  # keep (the paper does not name it) | cut (as RedPajama does)
    max_member_bytes: int = 256 << 20  # of a packed paper
    max_unpacked_bytes: int = 1 << 30  # of a paper's files, figures too
    max_ratio: int = 400  # unpacked to packed; gzip cannot exceed 1032
    max_tex_bytes: int = 32 << 20  # of a paper's TeX files, of their joined text, and of the clean text
    max_files: int = 20_000  # in a paper
    max_growth: int = 32  # characters that expanding macros may handle, a character of the paper
    min_characters: int = 1  # of clean text


class _Refused(Exception):
    """A paper that cannot be unpacked."""


def check_settings(settings: ArxivSettings) -> None:
    """Raises ConfigError."""
    for name, choices in (
        ("start", ("section", "abstract")),
        ("without_heading", ("drop", "keep")),
        ("appendix", ("keep", "cut")),
    ):
        if getattr(settings, name) not in choices:
            raise ConfigError(f"{name}={getattr(settings, name)}: choose one of {', '.join(choices)}")
    for name in ("max_member_bytes", "max_unpacked_bytes", "max_ratio", "max_tex_bytes", "max_files", "max_growth"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be at least 1")


def read(path: Path, name: str, settings: ArxivSettings) -> Iterator[Record | Dropped]:
    """The papers of one file, in its order. Raises ConfigError, and DataError naming a file that cannot be read."""
    check_settings(settings)
    if path.suffix != ".tar":
        yield _read_single(path, name, settings)
        return
    for item in members(path, name, _refused, settings.max_member_bytes):
        if isinstance(item, Dropped):
            yield item
        else:
            member, data = item
            provenance = {"file": name, "member": member}
            yield _paper(data, f"{name}/{member}", posixpath.basename(member), provenance, settings)


def _refused(member: str) -> str | None:
    suffix = posixpath.splitext(member)[1].lower()
    if suffix in PAPER_SUFFIXES:
        return None
    return {".pdf": "pdf_only", ".ps": "postscript_only"}.get(suffix, "unknown_member")


def _read_single(path: Path, name: str, settings: ArxivSettings) -> Record | Dropped:
    size = path.stat().st_size
    if path.suffix.lower() == ".pdf":
        return Dropped("pdf_only", name, size)
    if size > settings.max_member_bytes:
        return Dropped("too_large", name, size)
    paper = _paper(path.read_bytes(), name, path.name, {"file": name}, settings)
    if isinstance(paper, Dropped) and paper.reason in ("broken_gzip", "broken_tar"):
        raise DataError(f"{path}: truncated or damaged; copy it again")
    return paper


def _paper(
    data: bytes, identity: str, file_name: str, provenance: dict[str, str], settings: ArxivSettings
) -> Record | Dropped:
    """One paper, from the bytes of its packed file."""
    counts: Counter[str] = Counter()
    try:
        files = _unpacked(data, settings, counts)
        paper = clean_paper(_decoded(files, counts), _options(settings))
        if len(paper.text) < settings.min_characters:
            raise _Refused("empty")
    except (_Refused, Unfit) as refusal:
        return Dropped(str(refusal), identity, len(data))
    except tarfile.TarError:
        return Dropped("broken_tar", identity, len(data))
    provenance = {**provenance, **_arxiv_id(file_name), "root": paper.root}
    return Record(paper.text, identity, "arxiv", provenance, counts=dict(+(counts + paper.counts)))


def _options(settings: ArxivSettings) -> PaperOptions:
    return PaperOptions(
        start=settings.start,
        without_heading=settings.without_heading,
        appendix=settings.appendix,
        longest=settings.max_tex_bytes,
        growth=settings.max_growth,
    )


def _unpacked(data: bytes, settings: ArxivSettings, counts: Counter[str]) -> dict[str, bytes]:
    """path -> content of the paper's text files."""
    raw: io.RawIOBase | io.BytesIO = _Unzipped(data, settings) if data[:2] == GZIP else io.BytesIO(data)
    with io.BufferedReader(raw, BLOCK_BYTES) as content:
        start = content.peek(TAR_BLOCK)[:TAR_BLOCK]
        if start[:4] == b"%PDF":
            raise _Refused("pdf_only")
        if start[:4] == b"%!PS" or start[:5] == b"\x04%!PS":
            raise _Refused("postscript_only")
        if _is_tar(start):
            files = _tar_files(content, settings, counts)
            while content.read(BLOCK_BYTES):
                pass  # to the end, where gzip's checksum stands
            return files
        text = content.read(settings.max_tex_bytes + 1)
        if len(text) > settings.max_tex_bytes:
            raise _Refused("inputs_too_large")
        counts["bytes_tex"] += len(text)
        return {"paper.tex": text} if b"\x00" not in text else {}


def _is_tar(block: bytes) -> bool:
    try:
        return bool(tarfile.TarInfo.frombuf(block, "latin-1", "replace").name)
    except tarfile.HeaderError:
        return False


def _tar_files(content: IO[bytes], settings: ArxivSettings, counts: Counter[str]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    left = settings.max_tex_bytes
    with tarfile.open(fileobj=content, mode="r|", bufsize=BLOCK_BYTES) as archive:
        for number, member in enumerate(archive):
            if number >= settings.max_files:
                raise _Refused("bomb")
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has seen
            if member.isdir():
                continue
            if is_unsafe(member.name) or not member.isfile():
                counts["files_unsafe"] += 1
                continue
            path = posixpath.normpath(member.name)
            name = posixpath.basename(path)
            if name.startswith("._") or not (name.startswith("00README") or _is_text(name)):
                continue
            if member.size > left:
                counts["files_too_large"] += 1
                continue
            packed = archive.extractfile(member)
            text = packed.read() if packed is not None else b""
            if b"\x00" in text:
                counts["files_binary"] += 1
                continue
            files[path] = text
            left -= len(text)
            counts["bytes_tex"] += len(text)
    return files


def _is_text(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in TEXT_SUFFIXES


def _decoded(files: dict[str, bytes], counts: Counter[str]) -> dict[str, str]:
    declared: str | None = None
    texts: dict[str, str] = {}
    for path, data in files.items():
        try:
            texts[path] = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            declared = declared or _declared_encoding(files)
            texts[path] = data.decode(declared, "replace")
            counts["files_not_utf8"] += 1
    return texts


def _declared_encoding(files: dict[str, bytes]) -> str:
    for data in files.values():
        match = _INPUT_ENCODING.search(data)
        if match is not None and match[1].decode() in ENCODINGS:
            return ENCODINGS[match[1].decode()]
    return "latin-1"


def _arxiv_id(file_name: str) -> dict[str, str]:
    stem = file_name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz").removesuffix(".tex")
    old = _OLD_ID.fullmatch(stem)
    identifier = stem if _NEW_ID.fullmatch(stem) else f"{old[1]}/{old[2]}" if old else ""
    return {"arxiv_id": identifier, "url": f"https://arxiv.org/abs/{identifier}"} if identifier else {}


class _Unzipped(io.RawIOBase):
    """The content of gzip data, refused as soon as it is more than allowed."""

    def __init__(self, data: bytes, settings: ArxivSettings) -> None:
        self._input = memoryview(data)
        self._position = 0
        self._pending = b""
        self._decompressor = zlib.decompressobj(wbits=31)
        self._members = 1
        self._allowed = min(settings.max_unpacked_bytes, max(RATIO_FROM_BYTES, settings.max_ratio * len(data)))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        output = b""
        while not output:
            if self._decompressor.eof and not self._next_member():
                return 0
            if not self._pending:
                self._pending = bytes(self._input[self._position : self._position + BLOCK_BYTES])
                self._position += len(self._pending)
                if not self._pending:
                    raise _Refused("broken_gzip")
            try:
                output = self._decompressor.decompress(self._pending, len(target))
            except zlib.error as error:
                raise _Refused("broken_gzip") from error
            self._pending = self._decompressor.unconsumed_tail
        self._allowed -= len(output)
        if self._allowed < 0:
            raise _Refused("bomb")
        target[: len(output)] = output
        return len(output)

    def _next_member(self) -> bool:
        """Whether another gzip member follows the one that ended; what else follows is padding."""
        rest = self._decompressor.unused_data
        following = rest[:2] or bytes(self._input[self._position : self._position + 2])
        self._members += 1
        if following != GZIP:
            return False
        if self._members > MOST_GZIP_MEMBERS:
            raise _Refused("bomb")
        self._pending = rest
        self._decompressor = zlib.decompressobj(wbits=31)
        return True
