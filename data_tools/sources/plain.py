"""Documents out of files of no particular source: JSON lines, plain text and Parquet; gzip and zstd are unpacked.

`data_tools.documents` reads the first two for tokenizing and stops at the first fault. Here a document that is broken
is dropped and counted, and a file that is damaged or cut gives what was whole before it fails.

Drop reasons: broken_json (a line that is no JSON object, or no UTF-8), broken_encoding (no UTF-8; JSON and Parquet can
spell lone surrogates), missing_text (the field is not there, or no text), empty (white space alone), too_large.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

from data_tools.progress import advance_share
from data_tools.records import Dropped, Record
from data_tools.sources.packed import json_lines
from data_tools.sources.streams import bounded_parts, file_chunks
from llamatrain.errors import ConfigError, DataError

FORMATS = ("auto", "jsonl", "text", "parquet")
PARQUET_SUFFIX = ".parquet"
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_ROWS = 1024  # read at a time


@dataclass(frozen=True)
class PlainSettings:
    format: str = "auto"  # auto: .parquet; .jsonl, .ndjson or .json before .gz or .zst; any other file is text
    text_field: str = "text"
    language_field: str | None = None  # holds an ISO 639 code; null: the language is not known
    # Fields that go into a document's provenance, where it has them; numbers, truth values and dates as text.
    provenance_fields: list[str] = field(
        default_factory=lambda: ["id", "url", "title", "date", "timestamp", "license", "author", "source"]
    )
    document_separator: str | None = None  # parts a text file into documents; null: a file is a document
    max_document_bytes: int = 1 << 26  # ours; of a line of JSON, a text or a field of Parquet


def check_plain_settings(settings: PlainSettings) -> None:
    """Raises ConfigError."""
    if settings.format not in FORMATS:
        raise ConfigError(f"format={settings.format}: choose one of {', '.join(FORMATS)}")
    if not settings.text_field:
        raise ConfigError("text_field is empty: give the name of a field")
    if settings.document_separator == "":
        raise ConfigError("document_separator is empty: give a text, or null for one document per file")
    if settings.max_document_bytes < 1:
        raise ConfigError(f"max_document_bytes={settings.max_document_bytes}: give at least 1")


def read(path: Path, name: str, settings: PlainSettings) -> Iterator[Record | Dropped]:
    """The documents of a file, in its order.

    Their ids are `NAME:LINE` of JSON lines, `NAME:ROW` of Parquet, and of text `NAME` or, parted, `NAME#NUMBER`.
    Raises DataError naming a file that is damaged or cut.
    """
    check_plain_settings(settings)
    kind = format_of(path) if settings.format == "auto" else settings.format
    if kind == "jsonl":
        return json_documents(path, name, settings, source="plain")
    return _parquet_documents(path, name, settings) if kind == "parquet" else _texts(path, name, settings)


def format_of(path: Path) -> str:
    """What the name of a file says of its format."""
    if path.name.endswith(PARQUET_SUFFIX):
        return "parquet"
    return "jsonl" if path.name.removesuffix(".gz").removesuffix(".zst").endswith(JSON_SUFFIXES) else "text"


def json_documents(path: Path, name: str, settings: PlainSettings, *, source: str) -> Iterator[Record | Dropped]:
    """The documents of a file of JSON lines as records of the source."""
    for item in json_lines(path, name, settings.max_document_bytes):
        if isinstance(item, Dropped):
            yield item
        else:
            number, fields = item
            yield _document(fields, f"{name}:{number}", settings, source)


def _texts(path: Path, name: str, settings: PlainSettings) -> Iterator[Record | Dropped]:
    separator = settings.document_separator
    parts = bounded_parts(
        file_chunks(path), separator.encode() if separator else None, max_bytes=settings.max_document_bytes
    )
    for number, (part, size) in enumerate(parts):
        identifier = f"{name}#{number}" if separator else name
        try:
            text = part.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError:
            text = None
        if size > settings.max_document_bytes or text is None:
            reason = "broken_encoding" if size <= settings.max_document_bytes else "too_large"
            yield Dropped.of_bytes(reason, identifier, part, size=size)
        else:
            yield _checked(Record(text, identifier, "plain"))


def _parquet_documents(path: Path, name: str, settings: PlainSettings) -> Iterator[Record | Dropped]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("reading Parquet needs pyarrow: pip install 'llamatrain[data]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            wanted = {settings.text_field, settings.language_field, *settings.provenance_fields}
            columns = [column for column in file.schema_arrow.names if column in wanted]
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                values = [_column_values(batch.column(column)) for column in columns]
                for row in range(batch.num_rows):
                    fields = {column: value[row] for column, value in zip(columns, values, strict=True)}
                    yield _document(fields, f"{name}:{number}", settings, "plain")
                    number += 1
                advance_share(batch.num_rows / max(1, file.metadata.num_rows))
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not the file's own fault
        raise DataError(f"{path}: truncated or damaged ({error}); copy it again") from None


def _column_values(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # one of them is no UTF-8
        values = [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


def _document(fields: dict[str, Any], identifier: str, settings: PlainSettings, source: str) -> Record | Dropped:
    text = fields.get(settings.text_field)
    if isinstance(text, bytes):  # of Parquet: no UTF-8
        return Dropped.of_bytes("broken_encoding", identifier, text)
    if not isinstance(text, str):
        return Dropped("missing_text", identifier, 0)
    provenance = {name: _label(fields.get(name)) for name in settings.provenance_fields}
    record = Record(text, identifier, source, {name: label for name, label in provenance.items() if label})
    if settings.language_field is not None:
        record.language = _label(fields.get(settings.language_field)) or None
    size = len(text.encode("utf-8", "surrogatepass"))
    return Dropped.of(record, "too_large") if size > settings.max_document_bytes else _checked(record)


def _label(value: Any) -> str:
    """A field as text; "" for what has no short one."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, datetime | date):
        return value.isoformat()
    return str(value) if isinstance(value, bool | int | float) else ""


def _checked(record: Record) -> Record | Dropped:
    if not record.text.isascii() and _has_no_utf8(record.text):
        return Dropped.of(record, "broken_encoding")
    return record if record.text and not record.text.isspace() else Dropped.of(record, "empty")


def _has_no_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
