"""The page in a recorded HTTP response: status, type, charset and the body without transfer and content encodings.

fastwarc parses and decodes. Two things are common in archives and are no fault of the page: headers that end their
lines with LF alone, and headers that name an encoding which the crawler had undone when it stored the body. So an
encoding is undone only where the body looks like it. gzip and deflate are undone here: fastwarc takes a stream that
stops in the middle for a whole one.
"""

import re
import zlib
from dataclasses import dataclass
from typing import Literal

from data_tools.compression import GZIP_MAGIC
from llamatrain.errors import ConfigError

try:
    from fastwarc.warc import WarcRecord
    from resiliparse.parse.encoding import detect_mime
except ImportError:
    raise ConfigError("reading WARC needs fastwarc and resiliparse: pip install 'llamatrain[data]'") from None

_CHUNK_HEADER = re.compile(rb"[0-9a-fA-F]+[ \t]*(;[^\r\n]*)?\r?\n")
_BINARY = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")  # in compressed bytes soon, in text never
_STATUS = re.compile(r"HTTP/\d(?:\.\d)?\s+(\d{3})")
# A first line that is short, no size and no markup, before the end of a chunked body: its first size is damaged.
_BROKEN_FIRST_CHUNK = re.compile(rb"[^\r\n<]{0,20}\r?\n")
_LAST_CHUNK = re.compile(rb"\n0+[ \t]*\r?\n\r?\n\Z")
LAST_CHUNK_BYTES = 32
SNIFF_BYTES = 1024
ZLIB_ENCODINGS = ("gzip", "x-gzip", "deflate")
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_RECORD = (
    b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class HttpResponse:
    status: int
    media_type: str  # text/html, say; guessed from the body where the headers name none
    charset: str | None
    body: bytes | None  # None: longer than the limit
    cut: bool = False  # whether its compressed stream stops in the middle


def read_response(block: bytes, *, max_body_bytes: int) -> HttpResponse | None:
    """The response in the block of a WARC record, or None where it is no HTTP response or cannot be decoded."""
    try:
        record = _parsed(block, "none")
        headers = record.http_headers
        status = _STATUS.match(headers.status_line or "") if headers is not None else None
        if headers is None or status is None:
            return None
        beginning = record.reader.read(SNIFF_BYTES)
        says_chunked = "chunked" in (headers.get("Transfer-Encoding") or "").lower()
        chunked = says_chunked and _CHUNK_HEADER.match(beginning)
        if chunked:
            beginning = _parsed(block, "transfer").reader.read(SNIFF_BYTES)
        elif says_chunked and _BROKEN_FIRST_CHUNK.match(beginning) and _LAST_CHUNK.search(block[-LAST_CHUNK_BYTES:]):
            return None
        encoding = (headers.get("Content-Encoding") or "").strip().lower() if _BINARY.search(beginning) else ""
        own = encoding in ZLIB_ENCODINGS
        record = _parsed(block, _DECODING[bool(chunked), bool(encoding) and not own])
        if own:
            body, cut = _decompressed(record.reader.read(), max_body_bytes + 1)
        else:
            body, cut = record.reader.read(max_body_bytes + 1), False
    except (OSError, zlib.error):
        return None
    return HttpResponse(
        status=int(status[1]),
        media_type=(record.http_content_type or detect_mime(body[:SNIFF_BYTES])).lower(),
        charset=record.http_charset,
        body=body if len(body) <= max_body_bytes else None,
        cut=cut,
    )


def _decompressed(data: bytes, max_bytes: int) -> tuple[bytes, bool]:
    """(at most so many bytes of the body, whether a stream stops in the middle). Raises zlib.error."""
    parts: list[bytes] = []
    left = max_bytes
    while left > 0:
        stream, piece = _begun(data, left)
        parts.append(piece)
        left -= len(piece)
        if not stream.eof:
            return b"".join(parts), left > 0
        data = stream.unused_data
        if not data.startswith(GZIP_MAGIC):  # the next member of a gzip file; other bytes behind are nobody's
            break
    return b"".join(parts), False


def _begun(data: bytes, max_bytes: int) -> "tuple[zlib._Decompress, bytes]":
    stream = zlib.decompressobj(wbits=GZIP_OR_ZLIB)
    try:
        return stream, stream.decompress(data, max_bytes)
    except zlib.error:
        if data.startswith(GZIP_MAGIC) or int.from_bytes(data[:2], "big") % 31 == 0:  # the check of zlib's header
            raise
        stream = zlib.decompressobj(wbits=-zlib.MAX_WBITS)  # "deflate" without zlib's header, as some servers send it
        return stream, stream.decompress(data, max_bytes)


_Decoding = Literal["none", "content", "transfer", "all"]
_DECODING: dict[tuple[bool, bool], _Decoding] = {  # by whether the body is chunked and compressed
    (False, False): "none",
    (False, True): "content",
    (True, False): "transfer",
    (True, True): "all",
}


def _parsed(block: bytes, decoding: _Decoding) -> WarcRecord:
    record = WarcRecord.from_bytes(_RECORD % len(block) + block)
    record.parse_http(auto_decode=decoding, quirks_mode=True)
    return record
