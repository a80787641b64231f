"""Licence and copyright headers off source code, without touching the code.

What is looked at is the top of the file: comments, blank lines and the few lines of code that stand before headers
(`<?php`, `<?xml …?>`, `#include`, a Python docstring). The first other line ends it. In it a comment loses its
paragraphs that speak of licence, copyright or SPDX, if at least one sentence in it is of the kind that only such
boilerplate has; of the first of these paragraphs the lines before that sentence stay. What else the comment says
stays too, with its marks; a comment of which no letter is left goes as a whole.

Never touched: code, a shebang, an encoding line, editor and tool directives (`-*-`, `vim:`, `//go:build`, `@flow`,
`eslint-`), a comment with code behind it on its line, one that the next line continues (`\\`), and anything after the
first line of code. So what is left is the same program; for Markdown only `<!-- -->` is a comment.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from data_tools.cleaning.comment_syntax import Syntax, syntax_of

_LICENCE_NAME = (
    r"mit|[23]-clause|bsd|apache|gnu|l?gpl|mozilla|mpl|boost|isc|zlib|eclipse|epl|creative\s+commons|expat|artistic|"
    r"unlicense|cc0|psf|python\s+software\s+foundation|x11|zope|cddl|bsd-style|mit-style|lgplv\d|gplv\d"
)
# Said by boilerplate only: one of these in a comment and it has a licence or copyright notice.
NOTICE = re.compile(
    r"copyright(?:ed)?\s*(?:\(c\)|©|(?:19|20)\d\d|by\b|(?-i:[A-Z]))|^\W*copyright\s*:|\(c\)\s*(?:copyright|(?:19|20)\d\d)"
    r"|©|copyleft|spdx-license|spdx-filecopyright|all\s+rights\s+reserved"
    r"|licen[cs]ed\s+(?:under|to|by|as|in\s+accordance|materials?)|sublicen[cs]e"
    rf"|\b(?:{_LICENCE_NAME})\s+(?:\w+\s+)?(?:public\s+)?(?:software\s+)?licen[cs]e"
    r"|(?:distributed|released|available|provided|published|covered|governed|used)\s+(?:only\s+)?(?:under|by)\s+"
    r"(?:the|a|an|terms)[^.]{0,60}licen[cs]e"
    r"|use\s+of\s+this\s+source\s+code\s+is\s+governed|^\W*licen[cs]e\s*:|@licen[cs]e\b|@copyright\b"
    r"|permission\s+is\s+hereby\s+granted|permission\s+to\s+use,?\s+copy|redistribution\s+and\s+use\s+in\s+source"
    r"|redistributions\s+(?:of\s+source|in\s+binary)"
    r"|this\s+(?:program|library|file|code|software)?\s*is\s+(?:free\s+software|(?:in\s+the\s+)?public\s+domain)"
    r"|(?:released|placed)\s+in(?:to)?\s+the\s+public\s+domain"
    r"|see\s+(?:the\s+)?(?:file\s+)?['\"`]?(?:licen[cs]e|copying)(?:\.\w+)?['\"`]?"
    r"|(?:see|read)\s+the\s+(?:accompanying\s+)?licen[cs]e|without\s+warrant(?:y|ies)",
    re.IGNORECASE | re.MULTILINE,
)
# Said by boilerplate among others: it goes where it stands in a comment that has a notice.
PROSE = re.compile(
    r"licen[cs]e|warrant(?:y|ies)|merchantability|in\s+no\s+event|liab(?:le|ility)|provided\s+[\"'`]?as[- ]is"
    r"|[\"'`]as[- ]is[\"'`]|free\s+software\s+found|neither\s+the\s+names?|without\s+(?:prior|specific)|endorse"
    r"|you\s+(?:may|should)\s+(?:not\s+use|obtain\s+a|have\s+received|redistribute|use\s+th|copy)"
    r"|distributed\s+in\s+the\s+hope|this\s+file\s+is\s+part\s+of|trademark|patent|public\s+domain|above\s+copyright"
    r"|unless\s+required\s+by|^\W*(?:copyright|\(c\))|^\W*portions?\s+(?:of|copyright)|provided\s+that\s+the|this\s+notice",
    re.IGNORECASE | re.MULTILINE,
)
_DIRECTIVE = re.compile(
    r"#!|.*coding[:=]\s*[-\w.]+|.*-\*-.*-\*-|\W*(?:vim?|ex|sw|ts):|\W*(?:go:|\+build|@ts-|@flow|@jsx|eslint|jshint|jslint"
    r"|prettier|istanbul|global\s|globals\s|pylint:|flake8:|mypy:|ruff:|type:\s|cython:|distutils:|noqa|fmt:|isort:"
    r"|frozen_string_literal:|rubocop:|typed:\s|syntax=|escape=|clang-format|NOLINT|nolint|<reference|@jest|@charset"
    r"|sourceMappingURL|\$\w+:.*\$|LANGUAGE\s|OPTIONS_GHC)",
    re.IGNORECASE,
)
_DOCSTRING = re.compile(r"[rRuUbB]{0,2}(\"\"\"|''')")
_WORD = re.compile(r"\w")
_PARAGRAPH_MARK = re.compile(r"[\s*/#\-=~_+;!%.|<>\[\](){}\"'@]*")
_EXTENSIONS_OF_PYTHON = (".py", ".pyi", ".pyx", ".pxd", ".pyw")
LONG_BRACKETS = ("--[=", "#[=")  # Lua's and CMake's comments of another bracket: not followed
SHORTEST_RULE = 7  # characters
MOST_COMMENT_LINES = 2_000  # of a top of file: the GPL has 700


@dataclass(frozen=True)
class Cleaned:
    text: str
    removed: str  # the lines that went, in order, for eyes and to tell the licence by
    lines: int  # how many they are


@dataclass(frozen=True)
class _Comment:
    """Lines [begin, end) that are one comment and nothing else."""

    begin: int
    end: int
    opening: str  # what begins each line, or the block
    closing: str  # what ends the block; empty for line comments


def remove_headers(text: str, path: str) -> Cleaned:
    """The file without its licence and copyright notices; `path` tells its language. Lines end in `\\n`."""
    syntax = syntax_of(path)
    if syntax is None or not text.lstrip().startswith(syntax.begins):
        return Cleaned(text, "", 0)
    lines = text.split("\n", MOST_COMMENT_LINES)
    gone: set[int] = set()
    shortened: dict[int, str] = {}
    for comment in _comments(lines, syntax, path.endswith(_EXTENSIONS_OF_PYTHON)):
        _judge(lines, comment, gone, shortened)
    if not gone and not shortened:
        return Cleaned(text, "", 0)
    removed = [lines[number] for number in sorted({*gone, *shortened})]
    return Cleaned("\n".join(_kept(lines, gone, shortened)), "\n".join(removed), len(removed))


def _comments(lines: list[str], syntax: Syntax, is_python: bool) -> Iterator[_Comment]:
    """The comments at the top of the file, in order."""
    number = 0
    last = min(len(lines), MOST_COMMENT_LINES)
    while number < last:
        line = lines[number].strip()
        if not line or (number == 0 and line.startswith("#!")):
            number += 1
            continue
        block = next((marks for marks in syntax.block if line.startswith(marks[0])), None)
        if block is not None:
            end = _block_end(lines, number, *block)
            if end is None:
                return
            yield _Comment(number, end, *block)
            number = end
        elif line.startswith(LONG_BRACKETS):
            return
        elif (mark := _line_mark(line, syntax)) is not None:
            end = number + 1
            while end < last and _line_mark(lines[end].strip(), syntax) == mark and not _opens(lines[end], syntax):
                end += 1
            yield _Comment(number, end, mark, "")
            number = end
        elif is_python and (docstring := _DOCSTRING.match(line)) is not None:
            end = _docstring_end(lines, number, docstring[1])
            if end is None:
                return
            number, is_python = end, False
        elif _may_pass(line, syntax):
            number += 1
        else:
            return


def _may_pass(line: str, syntax: Syntax) -> bool:
    """Whether it is a line of code that stands before headers, and leaves no comment or line open."""
    if syntax.passed is None or syntax.passed.fullmatch(line) is None or line.endswith("\\"):
        return False
    return not any(opening in line for opening, _ in syntax.block)


def _line_mark(line: str, syntax: Syntax) -> str | None:
    return next((mark for mark in syntax.line if line.startswith(mark) or line == mark.rstrip()), None)


def _opens(line: str, syntax: Syntax) -> bool:
    return line.strip().startswith((*LONG_BRACKETS, *(opening for opening, _ in syntax.block)))


def _block_end(lines: list[str], number: int, opening: str, closing: str) -> int | None:
    """The line after the block that begins at `number`; None if code follows on its last line, or its end is unsure."""
    rest = lines[number].strip()[len(opening) :]
    if opening == "{-" and rest.startswith("#"):  # a pragma of Haskell
        return None
    for end in range(number, min(len(lines), number + MOST_COMMENT_LINES)):
        rest = rest if end == number else lines[end]
        before, found, behind = rest.partition(closing)
        if opening in before:
            return None  # nested, in some languages
        if found:
            return None if behind.strip() else end + 1
    return None


def _docstring_end(lines: list[str], number: int, quotes: str) -> int | None:
    """The line after a Python docstring; None if code follows on its last line, or it has no end."""
    rest = lines[number].strip().partition(quotes)[2]
    for end in range(number, len(lines)):
        rest = rest if end == number else lines[end]
        if quotes in rest:
            return end + 1 if not rest.partition(quotes)[2].strip() else None
    return None


def _judge(lines: list[str], comment: _Comment, gone: set[int], shortened: dict[int, str]) -> None:
    """Add to `gone` the comment's lines of boilerplate, to `shortened` those that keep a mark of the block."""
    if NOTICE.search("\n".join(lines[comment.begin : comment.end])) is None:
        return
    boilerplate: set[int] = set()
    for begin, end in _paragraphs(lines, comment):
        content = "\n".join(_content(lines[number], comment) for number in range(begin, end))
        if NOTICE.search(content) is None and PROSE.search(content) is None:
            continue
        if not boilerplate:  # what a notice stands behind stays, what follows one belongs to it
            begin = next((n for n in range(begin, end) if _speaks_of_licence(lines, n, end, comment)), begin)
        boilerplate.update(range(begin, end))
    if any(lines[number].endswith("\\") for number in boilerplate):
        return
    kept = [number for number in range(comment.begin, comment.end) if number not in boilerplate]
    if not any(_WORD.search(_content(lines[number], comment)) for number in kept):
        gone.update(range(comment.begin, comment.end))
        return
    for number in boilerplate:
        mark = _mark_to_keep(lines[number], number, comment)
        if mark is None:
            gone.add(number)
        else:
            shortened[number] = mark
    _drop_blanks_at_gaps(lines, comment, gone)


def _paragraphs(lines: list[str], comment: _Comment) -> Iterator[tuple[int, int]]:
    """Runs of lines with words in them; directives belong to none."""
    begin = None
    for number in range(comment.begin, comment.end + 1):
        line = lines[number] if number < comment.end else ""
        content = _content(line, comment)
        is_inside = _WORD.search(content) is not None and not _is_directive(line, content)
        if is_inside and begin is None:
            begin = number
        elif not is_inside and begin is not None:
            yield begin, number
            begin = None


def _is_directive(line: str, content: str) -> bool:
    return _DIRECTIVE.match(line.strip()) is not None or _DIRECTIVE.match(content.strip()) is not None


def _content(line: str, comment: _Comment) -> str:
    """What a line says, without the marks of the comment."""
    stripped = line.strip().removeprefix(comment.opening.rstrip())
    if comment.closing:
        stripped = stripped.partition(comment.closing)[0]
    return _PARAGRAPH_MARK.sub("", stripped, count=1) if "(c)" not in stripped[:6].lower() else stripped


def _speaks_of_licence(lines: list[str], number: int, end: int, comment: _Comment) -> bool:
    """Whether a sentence of boilerplate begins on the line; it may run on into the next."""
    content = _content(lines[number], comment)
    following = _content(lines[number + 1], comment) if number + 1 < end else ""
    for pattern in (NOTICE, PROSE):
        found = pattern.search(f"{content} {following}")
        if found is not None and found.start() < len(content):
            return True
    return False


def _mark_to_keep(line: str, number: int, comment: _Comment) -> str | None:
    """What of a removed line must stay for the comment to stay one; None if nothing."""
    if not comment.closing:
        return None
    indent = line[: len(line) - len(line.lstrip())]
    if number == comment.begin:
        mark = re.match(r"[^\w\s\"'(@]*", line.strip())
        assert mark is not None
        return indent + (mark[0] if mark[0].startswith(comment.opening) else comment.opening)
    return indent + comment.closing if number == comment.end - 1 else None


def _drop_blanks_at_gaps(lines: list[str], comment: _Comment, gone: set[int]) -> None:
    """Where lines went out of a comment, one empty line is enough, and none at its beginning and end."""
    kept = []
    after_gap, after_blank = False, True
    for number in range(comment.begin, comment.end):
        if number in gone:
            after_gap = True
            continue
        is_blank = _is_blank(lines[number], comment)
        is_mark = comment.closing != "" and number in (comment.begin, comment.end - 1)
        if is_blank and after_gap and after_blank and not is_mark:
            gone.add(number)
            continue
        after_gap, after_blank = after_gap and is_blank, is_blank
        if not is_mark:
            kept.append(number)
    while kept and _is_blank(lines[kept[-1]], comment) and any(last in gone for last in range(kept[-1], comment.end)):
        gone.add(kept.pop())


def _is_blank(line: str, comment: _Comment) -> bool:
    """Whether a line of a comment is empty, or holds no more than its marks; rules of many marks are not."""
    return _WORD.search(_content(line, comment)) is None and len(line.strip()) < SHORTEST_RULE


def _kept(lines: list[str], gone: set[int], shortened: dict[int, str]) -> list[str]:
    """The lines that stay; where lines went, blank ones do not pile up."""
    kept: list[str] = []
    after_gap, number = False, 0
    last_change = max([*gone, *shortened])
    while number < len(lines) and (number <= last_change or after_gap):
        line = lines[number]
        is_double = not line.strip() and not (kept and kept[-1].strip()) and number + 1 < len(lines)
        if number in gone:
            after_gap = True
        elif not (after_gap and is_double):
            after_gap = False
            kept.append(shortened.get(number, line))
        number += 1
    return kept + lines[number:]
