"""The page in a recorded HTTP response: status, type, charset and the body without transfer and content encodings.

fastwarc parses and decodes. Two things are common in archives and are no fault of the page: headers that end their
lines with LF alone, and headers that name an encoding which the crawler had undone when it stored the body. So an
encoding is undone only where the body looks like it.
"""

import re
from dataclasses import dataclass
from typing import Literal

from llamatrain.errors import ConfigError

try:
    from fastwarc.warc import WarcRecord
    from resiliparse.parse.encoding import detect_mime
except ImportError:
    raise ConfigError("reading WARC needs fastwarc and resiliparse: pip install 'llamatrain[data]'") from None

_CHUNK_HEADER = re.compile(rb"[0-9a-fA-F]+[ \t]*(;[^\r\n]*)?\r?\n")
_BINARY = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")  # in compressed bytes soon, in text never
_STATUS = re.compile(r"HTTP/\d(?:\.\d)?\s+(\d{3})")
SNIFF_BYTES = 1024
_RECORD = (
    b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class HttpResponse:
    status: int
    media_type: str  # text/html, say; guessed from the body where the headers name none
    charset: str | None
    body: bytes | None  # None: longer than the limit


def read_response(block: bytes, *, max_body_bytes: int) -> HttpResponse | None:
    """The response in the block of a WARC record, or None where it is no HTTP response or cannot be decoded."""
    try:
        record = _parsed(block, "none")
        headers = record.http_headers
        status = _STATUS.match(headers.status_line or "") if headers is not None else None
        if headers is None or status is None:
            return None
        beginning = record.reader.read(SNIFF_BYTES)
        chunked = "chunked" in (headers.get("Transfer-Encoding") or "").lower() and _CHUNK_HEADER.match(beginning)
        if chunked:
            beginning = _parsed(block, "transfer").reader.read(SNIFF_BYTES)
        compressed = headers.get("Content-Encoding") and _BINARY.search(beginning)
        record = _parsed(block, _DECODING[bool(chunked), bool(compressed)])
        body = record.reader.read(max_body_bytes + 1)
    except OSError:
        return None
    return HttpResponse(
        status=int(status[1]),
        media_type=(record.http_content_type or detect_mime(body[:SNIFF_BYTES])).lower(),
        charset=record.http_charset,
        body=body if len(body) <= max_body_bytes else None,
    )


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
