"""Question files as records that know where they stand, so that what is wrong is said with line and field. No torch.

Read by the name's end: .jsonl (one object a line), .json (a list, or an object with a list under "Data" or "data"),
.csv and .tsv (with a header, or `columns` given), .lst (one label a line), .txt (one JSON object, as RACE's), each also
.gz or .zst, and .parquet if pyarrow is installed. A directory is all its files with one of these names, in order of
their names. A .tar (also .gz, .zst) is read like a directory by `read_tables`.
"""

import csv
import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from llamatrain.errors import DataError

READ = (".jsonl", ".json", ".csv", ".tsv", ".lst", ".parquet", ".txt")
LARGEST = 4 << 30  # bytes of a file, unpacked
PIECE = 16 << 20  # of them read at a time
_MISSING = object()


class Question(dict[str, Any]):
    """A record of a file, with `place` for messages: "FILE, line 3"."""

    def __init__(self, fields: Mapping[str, Any], place: str, *, label_place: str = "") -> None:
        super().__init__(fields)
        self.place = place
        self.label_place = label_place or place  # where its field `label` stands

    def field(self, path: str) -> Any:
        """A field, with dots a nested one: `question.stem`; `choices[].text` is that of each. Raises DataError."""
        value = _walk(self, path)
        if value is _MISSING:
            raise DataError(
                f"{self.place}: there is no field {path}; its fields are {', '.join(map(str, self)) or 'none'}"
            )
        return value

    def has(self, *paths: str) -> bool:
        return all(_walk(self, path) is not _MISSING for path in paths)

    def text(self, path: str) -> str:
        """A field that is a text (a number is taken as one)."""
        value = self.field(path)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{self.place}: field {path} is no text but {_short(value)}")
        return str(value)

    def texts(self, path: str) -> list[str]:
        """A field that is a list of texts, at least one."""
        value = self.field(path)
        if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
            raise DataError(f"{self.place}: field {path} is no list of texts but {_short(value)}")
        return value

    def fill(self, template: str) -> str:
        """A template with {field} in it; {field:capitalize} begins with a capital letter, {field:strip} has no margins.

        Whatever else stands in braces stays.
        """

        def put(found: re.Match[str]) -> str:
            text = self.text(found[1])
            return text.capitalize() if found[2] == "capitalize" else text.strip() if found[2] == "strip" else text

        return re.sub(r"\{([A-Za-z_][\w.]*)(?::(capitalize|strip))?\}", put, template)


def _walk(value: Any, path: str) -> Any:
    """What stands at a path, or _MISSING."""
    head, _, rest = path.partition(".")
    for_each = head.endswith("[]")
    name = head.removesuffix("[]")
    if not isinstance(value, Mapping) or name not in value:
        return _MISSING
    inner = value[name]
    if not rest:
        return inner
    if not for_each:
        return _walk(inner, rest)
    if not isinstance(inner, list):
        return _MISSING
    each = [_walk(entry, rest) for entry in inner]
    return _MISSING if any(entry is _MISSING for entry in each) else each


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def read_questions(path: Path, *, columns: Sequence[str] | None = None) -> list[Question]:
    """All records of a file or directory. `columns` names those of a table without header.

    Raises DataError naming file and line.
    """
    if path.is_dir():
        names = sorted(entry for entry in path.iterdir() if _ending(entry.name) in READ and entry.name[0] != ".")
        questions = [question for entry in names for question in read_questions(entry, columns=columns)]
    elif _ending(path.name) == ".parquet":
        questions = _parquet(path)
    else:
        questions = _parse(file_content(path), path.name, str(path), columns)
    if not questions:
        raise DataError(f"{path}: there is no question in it")
    return questions


def read_tables(path: Path, *, columns: Sequence[str] | None = None) -> dict[str, list[Question]]:
    """The files of a directory (with those below), or of a .tar, each by its path there without the ending."""
    found: dict[str, list[Question]] = {}
    if path.is_dir():
        for entry in sorted(path.rglob("*")):
            if entry.is_file() and _ending(entry.name) in READ and entry.name[0] != ".":
                name = entry.relative_to(path).as_posix()
                found[_without_ending(name)] = _parse(file_content(entry), name, str(entry), columns)
    else:
        for name, content in _tar_members(path):
            if _ending(name) in READ and Path(name).name[0] != ".":
                found[_without_ending(name)] = _parse(content, name, f"{path}: {name}", columns)
    if not found:
        raise DataError(f"{path}: there is no table in it")
    return found


def _ending(name: str) -> str:
    return Path(re.sub(r"\.(gz|zst)$", "", name)).suffix.lower()


def _without_ending(name: str) -> str:
    plain = re.sub(r"\.(gz|zst)$", "", name)
    return plain[: -len(Path(plain).suffix)] if Path(plain).suffix else plain


def file_content(path: Path) -> bytes:
    """Of a file, unpacked. Raises DataError."""
    try:
        with open(path, "rb") as file, _unpacked(file, path.suffix) as plain:
            pieces, size = [], 0
            while size <= LARGEST and (piece := plain.read(PIECE)):
                pieces.append(piece)
                size += len(piece)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if size > LARGEST:
        raise DataError(f"{path}: more than {LARGEST >> 30} GiB are no question file")
    return b"".join(pieces)


def _unpacked(file: BinaryIO, ending: str) -> Any:
    if ending == ".gz":
        return gzip.GzipFile(fileobj=file)
    if ending == ".zst":
        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return nullcontext(file)


def _tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(file_content(path)), mode="r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name, file.read()
    except tarfile.TarError as error:
        raise DataError(f"{path}: no directory and no .tar, .tar.gz or .tar.zst ({error})") from None


def _parse(content: bytes, name: str, place: str, columns: Sequence[str] | None) -> list[Question]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{place}, line {line}: no UTF-8") from None
    ending = _ending(name)
    if ending == ".jsonl":
        return _json_lines(text, place)
    if ending in (".json", ".txt"):
        return _whole_json(text, place)
    if ending in (".csv", ".tsv"):
        return _table(text, place, columns, delimiter="," if ending == ".csv" else "\t")
    if ending == ".lst":
        lines = text.split("\n")
        return [
            Question({"label": line.strip()}, f"{place}, line {n}") for n, line in enumerate(lines, 1) if line.strip()
        ]
    raise DataError(f"{place}: no question file by its name; known are {', '.join(READ)}, also .gz and .zst")


def _json_lines(text: str, place: str) -> list[Question]:
    questions = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}, line {number}: no JSON ({error})") from None
        if not isinstance(fields, dict):
            raise DataError(f"{place}, line {number}: no object but {_short(fields)}")
        questions.append(Question(fields, f"{place}, line {number}"))
    return questions


def _whole_json(text: str, place: str) -> list[Question]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: no JSON ({error})") from None
    listed = value
    if isinstance(value, dict):
        listed = next((value[key] for key in ("Data", "data") if isinstance(value.get(key), list)), [value])
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise DataError(f"{place}: neither an object nor a list of objects")
    if len(listed) == 1 and listed[0] is value:
        return [Question(value, place)]
    return [Question(entry, f"{place}, entry {number}") for number, entry in enumerate(listed, start=1)]


def _table(text: str, place: str, columns: Sequence[str] | None, *, delimiter: str) -> list[Question]:
    """Rows of a table. If the first row holds all the `columns` it is a header, which may have more of them."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines) if delimiter == "," else csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    questions: list[Question] = []
    header = list(columns) if columns is not None else None
    first = True
    before = 0  # the line the row before ended on
    try:
        for row in reader:
            line, before = before + 1, reader.line_num
            if not row:
                continue
            if first:
                first = False
                if header is None or set(header) <= set(row):
                    header = row
                    continue
            assert header is not None
            if len(row) != len(header):
                raise DataError(f"{place}, line {line}: {len(row)} fields, where {', '.join(header)} are {len(header)}")
            questions.append(Question(dict(zip(header, row, strict=True)), f"{place}, line {line}"))
    except csv.Error as error:
        raise DataError(f"{place}, line {reader.line_num}: no row of a table ({error})") from None
    return questions


def _parquet(path: Path) -> list[Question]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path}: parquet needs pyarrow; pip install 'llamatrain[data]', or save the set as .jsonl"
        ) from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: no parquet ({error})") from None
    return [Question(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
