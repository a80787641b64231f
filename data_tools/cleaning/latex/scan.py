"""Comments out of a TeX file as TeX itself drops them, and verbatim text out of harm's way.

A `%` starts a comment unless a backslash escapes it (`\\%`; in `\\\\%` the backslash is itself escaped). TeX then skips
the rest of the line, its end, and the blanks that begin the next line: `exam%` + `ple` is one word, and a line that is
all comment leaves no trace. Where the next line is empty the paragraph ends there, so the line end stays. In `\\verb`,
verbatim environments and web addresses `%` is a character like others.

What is verbatim goes into a `Vault` and a mark stands for it until the end, so that no later step takes
`\\begin{lstlisting} \\newcommand` for a definition.
"""

import re
from collections.abc import Iterable

from data_tools.cleaning.latex.limits import Unfit

MARK_OPEN, MARK_CLOSE, MARK_GAP = "\ufdd0", "\ufdd1", "\ufdd2"  # not characters (Unicode, section 23.7)
_VERBATIM = """
    verbatim verbatim* Verbatim Verbatim* BVerbatim LVerbatim SaveVerbatim verbatimtab lstlisting minted alltt Listing
    spverbatim tcblisting pyverbatim rawhtml
"""
VERBATIM = frozenset(_VERBATIM.split())
UNREAD = ("comment", "filecontents", "filecontents*")  # environments that do not print
LONGEST_VERB = 2000  # characters

_NAMED_VERBATIM = re.compile(
    r"\\(?:lstnewenvironment|DefineVerbatimEnvironment|CustomVerbatimEnvironment)\s{0,9}\{([A-Za-z]{1,40}\*?)\}"
    r"|\\newminted\[([A-Za-z]{1,40})\]"
)
_NAMED_COMMENT = re.compile(r"\\excludecomment\s{0,9}\{([A-Za-z]{1,40}\*?)\}")
_COMMENT = re.compile(r"%[^\n]*(?:\n[ \t]*(?=[^\s]))?")
_VERB = re.compile(rf"\\verb\*?([^\sA-Za-z*])[^\n]{{0,{LONGEST_VERB}}}?\1")
_INLINE_CODE = re.compile(
    r"\\(?:lstinline(?:\[[^\]\n]{0,300}\])?|mintinline(?:\[[^\]\n]{0,300}\])?\{[^{}\n]{0,60}\})"
    rf"(?:\{{[^{{}}\n]{{0,{LONGEST_VERB}}}\}}|([^\sA-Za-z{{*])[^\n]{{0,{LONGEST_VERB}}}?\1)"
)
_ADDRESS = re.compile(rf"\\(?:url|path|nolinkurl|href)\*?\s{{0,9}}\{{[^{{}}\n]{{0,{LONGEST_VERB}}}\}}")
_MARK = re.compile(f"{MARK_OPEN}([0-9]+){MARK_CLOSE}")
_COMMAND = {"verb": _VERB, "lstinline": _INLINE_CODE, "mintinline": _INLINE_CODE}


class Vault:
    """Texts that no step may touch."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def put(self, text: str) -> str:
        """The mark to stand for it."""
        self._texts.append(text)
        return f"{MARK_OPEN}{len(self._texts) - 1}{MARK_CLOSE}"

    def restore(self, text: str, longest: int) -> str:
        """The text with all marks replaced. Raises Unfit where that makes more than `longest` characters."""
        marks = [int(mark) for mark in _MARK.findall(text)]
        if len(text) + sum(len(self._texts[mark]) for mark in marks) > longest:
            raise Unfit("expansion_too_large")
        return _MARK.sub(lambda mark: self._texts[int(mark[1])], text)


def plain_lines(text: str) -> str:
    """Line ends as \\n, and nothing that could be taken for a mark or cannot stand in a document."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.translate(_STRANGE) if _STRANGE_PATTERN.search(text) else text


_STRANGE_PATTERN = re.compile(f"[\x00\x0c{MARK_OPEN}{MARK_CLOSE}{MARK_GAP}]")
_STRANGE = {0: None, 0x0C: "\n", ord(MARK_OPEN): None, ord(MARK_CLOSE): None, ord(MARK_GAP): None}


class Scanner:
    """Takes the comments out of the files of one paper."""

    def __init__(self, files: Iterable[str], vault: Vault) -> None:
        self.vault = vault
        self.verbatim, self.unread = set(VERBATIM), set(UNREAD)
        for text in files:
            for match in _NAMED_VERBATIM.finditer(text):
                self.verbatim.add(match[1] or match[2] + "code")
            self.unread.update(_NAMED_COMMENT.findall(text))
        self.verbatim -= self.unread
        names = "|".join(re.escape(name) for name in sorted(self.verbatim | self.unread))
        self._special = re.compile(
            r"\\[\\%]|%|\\(verb|lstinline|mintinline|url|path|nolinkurl|href)(?![A-Za-z@])"
            rf"|\\begin\s{{0,9}}\{{({names})\}}"
        )

    def without_comments(self, text: str) -> str:
        """The text of one file without comments and `comment` environments, verbatim text replaced by marks."""
        out: list[str] = []
        position, searched = 0, 0
        endless: set[str] = set()  # environments of which no end follows
        while (match := self._special.search(text, searched)) is not None:
            start, searched = match.span()
            if match[0] == "%":
                out.append(text[position:start])
                comment = _COMMENT.match(text, start)
                assert comment is not None
                position = searched = comment.end()
            elif (command := match[1]) is not None:
                literal = _COMMAND.get(command, _ADDRESS).match(text, start)
                if literal is None:
                    continue
                searched = literal.end()
                if command in _COMMAND:
                    out += (text[position:start], self.vault.put(literal[0]))
                    position = searched
            elif (environment := match[2]) is not None and environment not in endless:
                end_mark = f"\\end{{{environment}}}"
                end = text.find(end_mark, searched)
                if end < 0:
                    endless.add(environment)
                    continue
                out.append(text[position:start])
                position = searched = end + len(end_mark)
                if environment in self.verbatim:
                    out.append(self.vault.put(text[start:position]))
        out.append(text[position:])
        return "".join(out)
