"""The text of a web page out of its bytes: which encoding it has, and what of it is content.

The encoding. A page's headers say one thing, its `<meta>` tag another, and both are often wrong; but bytes outside
ASCII that are valid UTF-8 are UTF-8, as no other text makes them by chance. So valid UTF-8 wins, then the HTTP
header, then the tag, then detection. A page cut in the middle of a character, or with a few wrong bytes, is still
UTF-8. What the chosen encoding cannot read becomes U+FFFD, for the caller to count.

The content. Resiliparse (Bevendorff et al. 2018) parses as browsers do and leaves out what is no main content by its
rules: navigation, headers, footers, forms, advertisements, hidden elements. Its rules take time quadratic in the
depth of nested `<div>` and `<article>`: the caller refuses pages that nest them deeper than any page for people does.
"""

import codecs
import re
from dataclasses import dataclass

from llamatrain.errors import ConfigError

try:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
    from resiliparse.parse.html import HTMLTree
except ImportError:
    raise ConfigError("reading HTML needs resiliparse: pip install 'llamatrain[data]'") from None

WHOLE_PER_DAMAGED = 4  # characters outside ASCII for each wrong byte: then a page is UTF-8 with faults
DEEPEST_NESTING = 500  # Chromium flattens what is deeper than 512
_NESTED = re.compile(r"<(/?)(?:div|article)\b", re.IGNORECASE)
_BLANK_LINES = re.compile(r"\n{3,}")
_WHITE_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class HtmlPage:
    title: str  # on one line; "" without one
    language: str  # as its <html lang> says; "" if it does not
    text: str


def decode_page(data: bytes, declared: str | None) -> str:
    """The bytes of a page as text; `declared` is the charset of its HTTP header."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    # UTF-16 of Latin letters and the ISO 2022 of Japanese are valid UTF-8 too; zero bytes and escapes give them away.
    if not any(code in data[:1024] for code in (b"\0", b"\x1b$", b"\x1b(")):
        text = _as_utf8(data)
        if text is not None:
            return text
    chosen = map_encoding_to_html5(declared, fallback_utf8=False) if declared else None
    if chosen in (None, "utf-8"):  # it is not UTF-8, whatever was declared
        chosen = detect_encoding(data, from_html_meta=True)
    if chosen == "utf-8":
        chosen = detect_encoding(data)
    try:
        return data.decode(chosen or "utf-8", "replace")
    except LookupError:
        return data.decode("utf-8", "replace")


def _as_utf8(data: bytes) -> str | None:
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data)  # an unfinished character at the end is left out
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    others = len(text) - len(text.encode("ascii", "ignore")) - damaged
    return text if others > WHOLE_PER_DAMAGED * damaged else None


def is_too_nested(html: str) -> bool:
    """Whether `<div>` and `<article>` are nested deeper than DEEPEST_NESTING."""
    if html.count("<") <= DEEPEST_NESTING:
        return False
    depth = 0
    for match in _NESTED.finditer(html):
        depth = max(0, depth + (-1 if match[1] else 1))
        if depth > DEEPEST_NESTING:
            return True
    return False


def read_html(html: str, *, main_content: bool = True) -> HtmlPage:
    """Title, declared language and text of a page: its main content, or everything it shows. Check its nesting first.

    The lines of the text have no white space at their ends, and between them stands one blank line at most.
    """
    tree = HTMLTree.parse(html)
    root = tree.document.query_selector("html") if tree.document is not None else None
    language = (root.getattr("lang") or root.getattr("xml:lang") or "") if root is not None else ""
    text = extract_plain_text(
        tree, main_content=main_content, preserve_formatting=True, list_bullets=False, alt_texts=False
    )
    return HtmlPage(
        title=_WHITE_SPACE.sub(" ", tree.title or "").strip(),
        language=language.strip(),
        text=tidy_lines(text),
    )


def tidy_lines(text: str) -> str:
    """The text with no white space around its lines, one blank line between them at most and none at its ends."""
    stripped = "\n".join(map(str.strip, text.split("\n")))
    return _BLANK_LINES.sub("\n\n", stripped).strip("\n")
