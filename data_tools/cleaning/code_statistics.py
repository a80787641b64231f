"""Numbers of a source file that tell code people wrote from data, minified bundles and generated tables."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from data_tools.cleaning.comment_syntax import syntax_of

_NOT_ALPHANUMERIC = bytes(code for code in range(256) if not chr(code).isalnum() or code > 127)
_NOT_A_LETTER = bytes(code for code in range(256) if not chr(code).isalpha() or code > 127)
_ASCII = re.compile(r"[\x00-\x7f]+")
_INVISIBLE = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class LineLengths:
    """In characters. The mean counts newlines, as RedPajama's and bigcode's do."""

    longest: int
    mean: float


def line_lengths(text: str) -> LineLengths:
    lines = text.split("\n")
    if lines[-1] == "" and len(lines) > 1:
        lines.pop()
    return LineLengths(max(map(len, lines)), len(text) / len(lines))


def alphanumeric_share(text: str) -> float:
    """Letters and digits of all characters, blanks included."""
    return _share(text, _NOT_ALPHANUMERIC, str.isalnum)


def letter_count(text: str) -> int:
    return round(_share(text, _NOT_A_LETTER, str.isalpha) * len(text))


def visible_characters(html: str) -> int:
    """Of an HTML file, roughly: what is no tag, script, style or comment, blanks apart."""
    return len("".join(_INVISIBLE.sub(" ", html).split()))


def comment_share(text: str, path: str) -> float | None:
    """Characters in whole lines of comment, of all; None for languages without known comments."""
    syntax = syntax_of(path)
    if syntax is None:
        return None
    count, closing = 0, ""
    for line in text.split("\n"):
        stripped = line.strip()
        if closing:
            count += len(line) + 1
            closing = "" if closing in stripped else closing
        elif stripped.startswith(syntax.line):
            count += len(line) + 1
        else:
            marks = next((marks for marks in syntax.block if stripped.startswith(marks[0])), None)
            if marks is not None:
                count += len(line) + 1
                closing = "" if marks[1] in stripped[len(marks[0]) :] else marks[1]
    return min(1.0, count / max(1, len(text)))


def _share(text: str, others: bytes, is_one: Callable[[str], bool]) -> float:
    """Of all characters. In UTF-8 the bytes of ASCII are counted at once, the characters beyond one by one."""
    if not text:
        return 0.0
    count = len(text.encode("utf-8", "surrogatepass").translate(None, others))
    if not text.isascii():
        count += sum(map(is_one, _ASCII.sub("", text)))
    return count / len(text)
