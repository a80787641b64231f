"""Project Gutenberg's wrappers off a book: what stands before the text, after it, and who typed it in.

Three generations are known. Since about 2003 the text lies between `*** START OF THE PROJECT GUTENBERG EBOOK TITLE
***` and `*** END OF …`, spelled in many ways (THIS, EBOOK or ETEXT, a title over several lines, no blank after the
stars), often after a line "End of Project Gutenberg's TITLE". Before, a "small print" stood in front of the text and
ended in `*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*`; for some years it stood behind it. What is
between the END of one text and the START of the next, in a file of several, goes too. Outside these marks not a
character is touched, but for the credits ("Produced by …") that open the text. The marks are those of the texts
themselves; a mark counts only at the beginning of a line.
"""

import re
from dataclasses import dataclass

END_ZONE = 40_000  # characters: the full licence has 18,500; small print and lists of donors up to 30,000
HEADER_ZONE = 60_000  # characters: headers with small print have 10,000 to 20,000
SHORT = 300  # characters: no book
CREDIT_PARAGRAPHS = 4  # looked at after the START mark

_NAME = r"(?:THE\s+|THIS\s+|A\s+)?(?:COPYRIGHTED\s+)?PROJECT\s+GUTENBERG(?:['’]S|[-\s]?TM)?"
# The title may run over lines up to the closing stars; where there are none, the mark is one line.
_TITLE = r"(?:(?:(?:(?!\*\*\*)[^\n])+\n){0,4}?(?:(?!\*\*\*)[^\n])*\*\*\*[ \t]*|[^\n]*)"
_START = re.compile(rf"^[ \t]*\**[ \t]*START\s+OF\s+{_NAME}{_TITLE}$", re.IGNORECASE | re.MULTILINE)
_END = re.compile(rf"^[ \t]*\*{{2,3}}[ \t]*END\s+OF\s+{_NAME}[^\n]*$", re.IGNORECASE | re.MULTILINE)
_END_IN_WORDS = re.compile(
    r"^[ \t]*\**[ \t]*(?:THIS\s+IS\s+)?(?:(?:THE\s+)?END\s+OF|FIN\s+D[EU]|ENDE|FINE\s+D[EI]L?)\s+"
    r"(?:THE\s+|THIS\s+|CE\s+|CET\s+|DIESES\s+|DES\s+|QUESTO\s+)?(?:COPYRIGHTED\s+)?PROJE[CK]T\s+GUTENBERG\b[^\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
_SMALL_START = re.compile(
    r"^[ \t]*\*+[ \t]*START[ \t]*\**[ \t]*THE\s+SMALL\s+PRINT\b[^\n]*$", re.IGNORECASE | re.MULTILINE
)
_SMALL_END = re.compile(
    r"^[ \t]*\*+[ \t]*END[ \t]*\**[ \t]*(?:OF\s+)?THE\s+SMALL\s+PRINT\b[^\n]*$", re.IGNORECASE | re.MULTILINE
)
_FULL_LICENCE = re.compile(
    r"^[ \t]*\*{2,3}[ \t]*START[ \t]*:\s*FULL\s+LICEN[CS]E|^[ \t]*THE\s+FULL\s+PROJECT\s+GUTENBERG\s+LICEN[CS]E",
    re.IGNORECASE | re.MULTILINE,
)
_CREDIT = re.compile(
    r"(?:\[?(?:this\s+)?(?:e-?\s?text|e-?\s?book|file|html\s+version)?\s*(?:was\s+)?"
    r"(?:first\s+)?(?:produced|prepared|scanned|transcribed|typed|digitized|proofed|proofread|created)"
    r"(?:\s+(?:and\s+\w+))?\s+(?:by|from|for)\b|html\s+version\s+by\b|credits?:|updated\s+editions\s+will\b)",
    re.IGNORECASE,
)
_PRODUCTION_WORD = re.compile(
    r"gutenberg|proofread|scann|html|e-?mail|@|volunteer|e-?text|e-?book|digital|internet|\bby\b", re.IGNORECASE
)
LONGEST_CREDIT = 700  # characters: a paragraph that goes on is not one


@dataclass(frozen=True)
class Unwrapped:
    text: str
    header: bool  # a header was found and taken off
    footer: bool
    left_over: bool  # the text opens like a file of Project Gutenberg, but no mark says where the book begins


def unwrap(text: str) -> Unwrapped:
    """The book inside a Project Gutenberg file; any other text comes back unchanged. Lines end in `\\n`."""
    if "gutenberg" not in text[:HEADER_ZONE].lower() and "gutenberg" not in text[-END_ZONE:].lower():
        return Unwrapped(text, header=False, footer=False, left_over=False)
    pieces, header, footer = _between_marks(text)
    if pieces is None:
        begin = _header_end(text)
        end = _footer_begin(text, begin)
        pieces, header, footer = [(begin, end)], begin > 0, end < len(text)
    books = [_without_credits(text[begin:end]) if header else text[begin:end] for begin, end in pieces]
    book = "\n\n\n".join(part.strip("\n") for part in books) if header or footer else text
    opens_like_one = re.search(r"project gutenberg", text[:1_000], re.IGNORECASE) is not None
    return Unwrapped(book, header=header, footer=footer, left_over=opens_like_one and not header)


def _between_marks(text: str) -> tuple[list[tuple[int, int]] | None, bool, bool]:
    """Several texts in a file, each between its START and its END; None where there are not several."""
    starts = [mark.end() for mark in _START.finditer(text)]
    if len(starts) < 2:
        return None, False, False
    ends = [mark.start() for mark in _END.finditer(text)]
    pieces = []
    for place, begin in enumerate(starts):
        limit = starts[place + 1] if place + 1 < len(starts) else len(text)
        inside = [end for end in ends if begin <= end < limit]
        if not inside:
            return None, False, False  # no alternation, so no several texts
        pieces.append((begin, _said_in_words_before(text, begin, inside[0])))
    return pieces, True, True


def _header_end(text: str) -> int:
    """Where the book begins: after the last mark of a header."""
    start = _START.search(text, 0, HEADER_ZONE)
    begin = start.end() if start is not None else 0
    small_end = _SMALL_END.search(text, begin, HEADER_ZONE)
    if small_end is None:
        return begin
    small_start = _SMALL_START.search(text, begin, small_end.start())
    between = text[begin : small_start.start() if small_start is not None else small_end.start()].strip()
    behind = text[small_end.end() :].strip()
    # After a START, or with nothing behind it, small print is the footer of a short book.
    is_header = len(between) < SHORT if start is not None else len(behind) > SHORT
    return small_end.end() if is_header else begin


def _footer_begin(text: str, begin: int) -> int:
    """Where the book ends: before the first mark of a footer."""
    zone = max(begin, len(text) - END_ZONE)
    end = _END.search(text, begin)
    if end is not None and not _START.search(text, end.end()):
        return _said_in_words_before(text, begin, end.start())
    marks = (pattern.search(text, zone) for pattern in (_END, _END_IN_WORDS, _SMALL_START, _FULL_LICENCE))
    return min((mark.start() for mark in marks if mark is not None), default=len(text))


def _said_in_words_before(text: str, begin: int, end: int) -> int:
    """`end`, or the line "End of Project Gutenberg's …" that stands just before it."""
    words = _END_IN_WORDS.search(text, max(begin, end - 1_000), end)
    return words.start() if words is not None else end


def _without_credits(book: str) -> str:
    """Without the paragraphs at its beginning that say who produced the file."""
    kept: list[str] = []
    paragraphs = re.split(r"(\n[ \t]*\n\s*)", book.lstrip("\n"), maxsplit=CREDIT_PARAGRAPHS)
    for paragraph, gap in zip(paragraphs[:-1:2], paragraphs[1::2], strict=True):
        flat = paragraph.strip()
        is_credit = len(flat) < LONGEST_CREDIT and _CREDIT.match(flat) and _PRODUCTION_WORD.search(flat)
        if not is_credit:
            kept += [paragraph, gap]
    return "".join([*kept, paragraphs[-1]])
