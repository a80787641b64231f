"""Documents out of text and JSON-lines files, plain or packed, in a fixed order and with bounded memory.

Nothing is skipped silently: a damaged file stops the reading with its name (and line), and a document that
has no UTF-8 (JSON can spell lone surrogates) is handed on marked as not valid, for the consumer to count.
"""

import codecs
import glob
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from data_tools.compression import PACKED_SUFFIXES, unpacked
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import sha256_of_json

FORMATS = ("auto", "text", "jsonl")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
HASHED_WHOLE = 16 << 20  # bytes; of larger files, blocks are hashed
SAMPLED_BLOCKS = 64
SAMPLED_BLOCK_BYTES = 64 << 10


@dataclass(frozen=True)
class Document:
    text: str
    id: str  # the JSON field, or FILE:LINE, or the text file's name (FILE#N where a separator splits it)
    group: str | None  # what must stay together when documents are held out
    valid: bool  # False: the text, id or group holds lone surrogates, so it has no UTF-8


@dataclass(frozen=True)
class InputFile:
    path: Path
    name: str  # the path below what was named as input: the same on every machine
    size: int


@dataclass(frozen=True)
class ReadOptions:
    format: str = "auto"  # auto (by suffix) | text | jsonl
    text_field: str = "text"
    id_field: str = "id"
    group_field: str = "group"
    document_separator: str | None = None  # splits text files into documents; None: a file is a document


def check_read_options(options: ReadOptions) -> None:
    """Raises ConfigError."""
    if options.format not in FORMATS:
        raise ConfigError(f"format={options.format}: choose one of {', '.join(FORMATS)}")
    if options.document_separator == "":
        raise ConfigError("document_separator is empty: give a text, or null for one document per file")
    for name in ("text_field", "id_field", "group_field"):
        if not getattr(options, name):
            raise ConfigError(f"{name} is empty: give the name of a JSON field")


def input_list(value: Any) -> list[str]:
    """The setting `input`, one text or several, as a list of paths or patterns. Raises ConfigError."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v for v in values):
        raise ConfigError("input: give a path or a list of paths: input=PATH or 'input=[PATH,PATH]'")
    if "???" in values:
        raise ConfigError("input is not set: input=PATH (a file, a directory or a glob pattern)")
    return list(values)


def find_inputs(inputs: list[str]) -> list[InputFile]:
    """`find_files`, where none may be an archive."""
    files = find_files(inputs)
    archives = [file.name for file in files if ".tar" in file.path.suffixes or file.path.suffix in (".tgz", ".zip")]
    if archives:
        raise DataError(f"{archives[0]}: an archive; unpack it, and name the files in it")
    return files


def find_files(inputs: list[str]) -> list[InputFile]:
    """The files the inputs name: in the order of the inputs, within each by name; hidden ones are left out.

    Raises DataError when an input names no file, or a file is named twice.
    """
    files: list[InputFile] = []
    seen: set[Path] = set()
    for text in inputs:
        found = _find(text)
        if not found:
            raise DataError(f"input={text}: no file there; correct the path or the pattern")
        for file in found:
            if file.path.resolve() in seen:
                raise DataError(f"{file.path}: named twice by input={','.join(inputs)}; name every file once")
            seen.add(file.path.resolve())
        files += found
    return files


def _find(text: str) -> list[InputFile]:
    path = Path(text)
    if path.is_file():
        root, paths = path.parent, [path]
    elif path.is_dir():
        root, paths = path, list(path.rglob("*"))
    else:
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parent.parts)
        root, paths = Path(*fixed), [Path(match) for match in glob.glob(text, recursive=True)]
    named = [(file.relative_to(root).as_posix(), file) for file in paths if file.is_file()]
    shown = [(name, file) for name, file in named if not any(part.startswith(".") for part in name.split("/"))]
    return [InputFile(path=file, name=name, size=file.stat().st_size) for name, file in sorted(shown)]


def inputs_identity(files: list[InputFile]) -> dict[str, Any]:
    """What tells one set of inputs from another: names and sizes, in order, and what `content_sample` saw of each.

    Raises DataError when a file cannot be read.
    """
    return {
        "input_files": len(files),
        "input_bytes": sum(file.size for file in files),
        "input_sha256": sha256_of_json([[file.name, file.size] for file in files]),
        "input_content": sha256_of_json([content_sample(file) for file in files]),
    }


def differing_keys(identity: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The keys of an identity that a recorded one differs in.

    Releases before `input_content` did not record it: what they made is known by the other keys.
    """
    known = [key for key in identity if key in found or key != "input_content"]
    return [key for key in known if found.get(key) != identity[key]]


def read_record(path: Path) -> dict[str, Any]:
    """What is noted beside a model of how it was made; empty where nothing tells."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def content_sample(file: InputFile) -> str:
    """SHA-256 of a file up to HASHED_WHOLE bytes, and of SAMPLED_BLOCKS evenly spread blocks of a larger one.

    The same on every machine, unlike a time of change. A change of a larger file that keeps its size and lies between
    the blocks is not seen; one in compressed text mostly moves or changes what follows it, up to the last block.
    """
    digest = hashlib.sha256()
    last = file.size - SAMPLED_BLOCK_BYTES
    try:
        with open(file.path, "rb") as stream:
            if file.size <= HASHED_WHOLE:
                return hashlib.file_digest(stream, "sha256").hexdigest()
            for number in range(SAMPLED_BLOCKS):
                stream.seek(last * number // (SAMPLED_BLOCKS - 1))
                digest.update(stream.read(SAMPLED_BLOCK_BYTES))
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


class Corpus:
    """The documents of the files, in order; `bytes_read` follows along in the (compressed) files."""

    def __init__(self, files: list[InputFile], options: ReadOptions) -> None:
        self.files = files
        self.options = options
        self.bytes_total = sum(file.size for file in files)
        self._bytes_done = 0
        self._open_file: IO[bytes] | None = None

    @property
    def bytes_read(self) -> int:
        return self._bytes_done + (self._open_file.tell() if self._open_file else 0)

    def documents(self) -> Iterator[Document]:
        """Raises DataError naming the file, and the line where there is one."""
        self._bytes_done = 0
        for file in self.files:
            try:
                with open(file.path, "rb") as self._open_file:
                    yield from self._documents_of(file, self._open_file)
            except OSError as error:
                raise DataError(f"{file.path}: cannot be read ({error.strerror})") from None
            finally:
                self._open_file = None
            self._bytes_done += file.size

    def _documents_of(self, file: InputFile, stream: IO[bytes]) -> Iterator[Document]:
        chunks = unpacked(stream, file.path)
        name = file.path.stem if file.path.suffix in PACKED_SUFFIXES else file.path.name
        is_jsonl = name.endswith(JSONL_SUFFIXES)
        if self.options.format == "jsonl" or (self.options.format == "auto" and is_jsonl):
            return _jsonl_documents(file, chunks, self.options)
        return _text_documents(file, chunks, self.options.document_separator)


def _jsonl_documents(file: InputFile, chunks: Iterator[bytes], options: ReadOptions) -> Iterator[Document]:
    for number, line in enumerate(_lines(chunks), start=1):
        if line and not line.isspace():
            yield _parse(file, number, line, options)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []  # the chunks of a line that is not complete yet
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pending.append(first)
        if others:
            yield b"".join(pending)
            yield from others[:-1]
            pending = [others[-1]]
    yield b"".join(pending)


def _parse(file: InputFile, number: int, line: bytes, options: ReadOptions) -> Document:
    where = f"{file.path}: line {number}"
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON object is needed, found {type(record).__name__}")
    text = record.get(options.text_field)
    if not isinstance(text, str):
        found = f"is {type(text).__name__}, not text" if options.text_field in record else "is missing"
        raise DataError(f"{where}: the field {options.text_field!r} {found}; name another with text_field=NAME")
    identifier = _label(record, options.id_field, where) or f"{file.name}:{number}"
    return _document(text, identifier, _label(record, options.group_field, where))


def _label(record: dict[str, Any], field: str, where: str) -> str | None:
    value = record.get(field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{where}: the field {field!r} must be text or an integer, found {type(value).__name__}")


def _document(text: str, identifier: str, group: str | None) -> Document:
    try:
        for part in (text, identifier, group or ""):
            part.encode("utf-8")
    except UnicodeEncodeError:
        return Document(text=text, id=identifier, group=group, valid=False)
    return Document(text=text, id=identifier, group=group, valid=True)


def _text_documents(file: InputFile, chunks: Iterator[bytes], separator: str | None) -> Iterator[Document]:
    decoded = _decoded(file, chunks)
    if separator is None:
        yield _document("".join(decoded), file.name, None)
        return
    number, pending = 0, ""
    for text in decoded:
        # Only the new text, and as much before it as may begin a separator, is searched: linear in the file.
        searched = max(0, len(pending) - len(separator) + 1)
        pending += text
        while (cut := pending.find(separator, searched)) >= 0:
            yield _document(pending[:cut], f"{file.name}#{number}", None)
            number += 1
            pending, searched = pending[cut + len(separator) :], 0
    if pending and number == 0:
        print(f"{file.path}: document_separator {separator!r} is not in it: taken as one document", file=sys.stderr)
    if pending:
        yield _document(pending, f"{file.name}#{number}", None)


def _decoded(file: InputFile, chunks: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for chunk in chunks:
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{file.path}: not UTF-8 ({error.reason}); convert it, or leave it out of input") from None


def byte_bar(description: str, total: int) -> tqdm:
    """A progress bar over bytes on stderr: live on a terminal, a line now and then in a log."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        mininterval=interval,
        file=sys.stderr,
        leave=True,
    )
