"""What TeX would not read: `\\iffalse … \\fi`, and the branches of an author's own switches not taken.

`\\newif\\ifdraft` makes a switch, off until `\\drafttrue`; papers keep a long version or old text that way. A
conditional is decided where its test is `\\iftrue`, `\\iffalse`, two digits (`\\if01`, or `\\if0` and a blank: an old
way to comment out) or such a switch; then only the live branch stays. All others (`\\ifx` …) stay as they are.
"""

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"\\\\|\\(?:newif\s{0,9}\\if([A-Za-z@]{1,60})|(if[A-Za-z@]{0,60})|(else|fi)|([A-Za-z@]{1,60}?)(true|false)"
    r"|let\s{0,9}\\if([A-Za-z@]{1,60})\s{0,9}=?\s{0,9}\\if([A-Za-z@]{1,60}))(?![A-Za-z@])"
)
_SETTING = re.compile(r"\\newif\s*\\if[A-Za-z@]+|\\[A-Za-z@]+(?:true|false)|\s+")
_DIGITS = re.compile(r"\s?([0-9])(?:([0-9])|\s)")
LONGEST_LINE = 500  # characters before a switch is set, looked at
# macros that take their branches in braces, and \iff
_IN_BRACES = """
    iff ifthenelse ifdef ifundef ifcsdef ifcsundef ifdefmacro ifcsmacro ifdefparam ifcsparam ifdefempty ifcsempty
    ifdefvoid ifcsvoid ifdefequal ifcsequal ifdefstring ifcsstring ifdefstrequal ifdefcounter ifcscounter ifdeflength
    ifstrequal ifstrempty ifblank ifnumcomp ifnumequal ifnumgreater ifnumless ifnumodd ifdimcomp ifdimequal
    ifdimgreater ifdimless ifboolexpr ifboolexpe ifbool iftoggle ifinlist ifinlistcs ifpackageloaded ifstar ifnextchar
    ifundefined ifclassloaded ifoptionoff ifoptionon
"""
NOT_TEX = frozenset(_IN_BRACES.split())


@dataclass(slots=True)
class _Open:
    """A conditional that has not ended."""

    start: int
    body: int  # where its first branch starts
    taken: bool | None  # None: not ours to decide
    dead: bool  # the branch we are in is not read
    other: int = -1  # where \else starts
    other_body: int = -1


def live_text(text: str) -> str:
    """The text without what TeX would skip, and without the tests that decided it. One pass."""
    if "\\if" not in text:
        return text
    switches = _switches(text)
    cuts: list[tuple[int, int]] = []
    stack: list[_Open] = []
    for match in _TOKEN.finditer(text):
        dead = bool(stack) and stack[-1].dead
        if match[1] is not None:
            if switches.get(match[1]) is not None:
                cuts.append(match.span())
        elif match[2] is not None:
            if match[2] not in NOT_TEX:
                taken, body = _decided(text, match, switches)
                stack.append(_Open(match.start(), body, taken, dead or taken is False))
        elif match[3] == "else" and stack:
            top = stack[-1]
            if top.other < 0:
                top.other, top.other_body = match.start(), match.end()
                above = len(stack) > 1 and stack[-2].dead
                top.dead = above or top.taken is True
        elif match[3] == "fi" and stack:
            cuts += _cuts(stack.pop(), match.start(), match.end())
        elif match[4] is not None and switches.get(match[4]) is not None:
            cuts.append(match.span())
            if not dead:
                switches[match[4]] = match[5] == "true"
        elif match[6] is not None and match[6] in switches:  # \let\ifdraft\iftrue
            cuts.append(match.span())
            if not dead:
                switches[match[6]] = match[7] == "true"
    return _without(text, cuts)


def _switches(text: str) -> dict[str, bool]:
    """The author's switches, all off; those set inside of a line are left out: a macro may set them, at any time."""
    made: dict[str, bool] = {}
    unclear: set[str] = set()
    for match in _TOKEN.finditer(text):
        if match[1] is not None:
            made[match[1]] = False
        elif match[6] is not None:
            (made.setdefault(match[6], False) if match[7] in ("true", "false") else unclear.add(match[6]))
        elif match[4] is not None:
            line = text.rfind("\n", max(0, match.start() - LONGEST_LINE), match.start()) + 1
            if _SETTING.sub("", text[line : match.start()]):
                unclear.add(match[4])
    return {name: value for name, value in made.items() if name not in unclear}


def _decided(text: str, match: re.Match[str], switches: dict[str, bool]) -> tuple[bool | None, int]:
    """Whether the test holds (None: unknown), and where the branch starts."""
    name = match[2]
    if name in ("iftrue", "iffalse"):
        return name == "iftrue", match.end()
    if name == "if":
        digits = _DIGITS.match(text, match.end())
        return (digits[1] == digits[2], digits.end()) if digits else (None, match.end())
    return switches.get(name[2:]), match.end()


def _cuts(conditional: _Open, end: int, after: int) -> list[tuple[int, int]]:
    if conditional.taken is None:
        return []
    if conditional.other < 0:
        if conditional.taken:
            return [(conditional.start, conditional.body), (end, after)]
        return [(conditional.start, after)]
    if conditional.taken:
        return [(conditional.start, conditional.body), (conditional.other, after)]
    return [(conditional.start, conditional.other_body), (end, after)]


def _without(text: str, cuts: list[tuple[int, int]]) -> str:
    out: list[str] = []
    position = 0
    for start, end in sorted(cuts):
        if end <= position:  # inside another
            continue
        out.append(text[position : max(start, position)])
        if text[end - 1].isalpha() and text[end : end + 1] in (" ", "\t", "\n") and text[end : end + 2] != "\n\n":
            end += 1  # the blank that ends a command
        position = end
    out.append(text[position:])
    return "".join(out)
