"""Web archives as Common Crawl writes them, for tests: whole or with faults on purpose, and what is read of them."""

import base64
import gzip
import hashlib
from dataclasses import replace
from pathlib import Path

import zstandard

from data_tools.records import Dropped, Record
from data_tools.sources import common_crawl
from data_tools.sources.common_crawl import CommonCrawlSettings

ANY_LENGTH = CommonCrawlSettings(min_characters=1)
DATE = "2024-05-18T01:58:10Z"


def record(
    kind: str,
    block: bytes,
    *,
    url: str | None = "http://example.com/",
    headers: tuple[tuple[str, str], ...] = (),
    line_end: bytes = b"\r\n",
    length: int | str | None = None,
    digest: str | None = None,
    version: bytes = b"WARC/1.0",
) -> bytes:
    """One record. A length or digest that is given is written whether it is right or not."""
    named = [("WARC-Type", kind), ("WARC-Date", DATE)]
    if url is not None:
        named.append(("WARC-Target-URI", url))
    named.append(("WARC-Block-Digest", sha1_digest(block) if digest is None else digest))
    named += headers
    named.append(("Content-Length", str(len(block) if length is None else length)))
    lines = [version, *(f"{name}: {value}".encode() for name, value in named), b"", b""]
    return line_end.join(lines) + block + line_end * 2


def sha1_digest(block: bytes) -> str:
    return "sha1:" + base64.b32encode(hashlib.sha1(block).digest()).decode()


def warcinfo(line_end: bytes = b"\r\n") -> bytes:
    block = line_end.join([b"Software-Info: a test", b"isPartOf: CC-MAIN-2024-22", b""])
    return record(
        "warcinfo", block, url=None, line_end=line_end, headers=(("Content-Type", "application/warc-fields"),)
    )


def wet_page(
    title: str, text: str, *, url: str = "http://example.com/", language: str | None = "eng", **changes
) -> bytes:  # type: ignore[no-untyped-def]
    """A page in the form of dumps since 2020, with the header for its language, or (None) as before."""
    headers = () if language is None else (("WARC-Identified-Content-Language", language),)
    block = f"{title}\n{text}\n".encode()
    return record("conversion", block, url=url, headers=(*headers, ("Content-Type", "text/plain")), **changes)


def http_response(
    body: bytes,
    *headers: str,
    status: str = "HTTP/1.1 200 OK",
    line_end: bytes = b"\r\n",
    content_type: str = "text/html",
) -> bytes:
    """The block of a response record."""
    lines = [status, *([f"Content-Type: {content_type}"] if content_type else []), *headers, "", ""]
    return line_end.join(line.encode() for line in lines) + body


def warc_page(body: bytes, *headers: str, url: str = "http://example.com/", **http) -> bytes:  # type: ignore[no-untyped-def]
    block = http_response(body, *headers, **http)
    return record("response", block, url=url, headers=(("Content-Type", "application/http; msgtype=response"),))


def chunked(body: bytes, size: int = 100) -> bytes:
    """The body in HTTP's chunks."""
    chunks = [body[begin : begin + size] for begin in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])


def write_archive(path: Path, *records: bytes) -> Path:
    """The records as the suffix says: .gz a member each (as Common Crawl does), .zst one frame, else plain."""
    if path.suffix == ".gz":
        data = b"".join(gzip.compress(part, mtime=0) for part in records)
    else:
        data = b"".join(records)
        if path.suffix == ".zst":
            data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


def read_pages(path: Path, **changes: object) -> list[Record | Dropped]:
    """What is read of an archive, pages of any length unless told otherwise."""
    return list(common_crawl.read(path, "dump/file", replace(ANY_LENGTH, **changes)))  # type: ignore[arg-type]


def outcomes(items: list[Record | Dropped]) -> list[str]:
    """The text of what is kept, and why the others were dropped."""
    return [item.text if isinstance(item, Record) else item.reason for item in items]


def read_records(folder: Path, *records: bytes, name: str = "a.warc", **changes: object) -> list[str]:
    """The outcomes of an archive of these records."""
    return outcomes(read_pages(write_archive(folder / name, *records), **changes))
