r"""The files of a paper as one document: which file is the root, and `\input` and its kin put in their places.

The root is the file with `\documentclass` (or LaTeX 2.09's `\documentstyle`) and `\begin{document}`; where several
qualify (a cover letter, a supplement) the one that makes the longest document. Papers in plain TeX have neither: there
the file that ends in `\bye` or `\end` is taken, or a paper's only file.

`\input`, `\include`, `\subfile`, `\import` and `\usepackage` of a file beside the paper are replaced by what is in the
file, in order, without its own preamble; a file that includes itself is put in once, one that is missing is counted. A
local package is put in where it is a mere list of macros: one with `\ProvidesPackage` is somebody's style.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Mapping

from data_tools.cleaning.latex.limits import Unfit

DEEPEST = 30  # files within files
CANDIDATES = 8  # roots that are tried
TEX_SUFFIXES = (".tex", ".ltx", ".latex", ".txt")

_CLASS = re.compile(r"^[^%\n]{0,200}?\\document(?:class|style)(?![A-Za-z@])", re.M)
_BEGIN = re.compile(r"^[^%\n]{0,200}?\\begin\s{0,9}\{document\}", re.M)
_PLAIN = re.compile(r"^[^%\n]{0,200}?\\(?:bye|end|magnification|documentstyle|beginsection)(?![A-Za-z@])", re.M)
_TOP_LEVEL = re.compile(r"^\s*(\S{1,200})\s+toplevelfile\s*$", re.M)  # in 00README.XXX
_NAME = r"\{\s*([^{}]{0,300}?)\s*\}"
_INPUT = re.compile(
    rf"\\(input|include|subfile|subfileinclude|InputIfFileExists)(?![A-Za-z@])\s{{0,9}}(?:{_NAME}|([^\s{{}}\\]{{1,300}}))"
    rf"|\\(?:sub)?(?:import|includefrom|inputfrom)\*?(?![A-Za-z@])\s{{0,9}}{_NAME}\s{{0,9}}{_NAME}"
    rf"|\\(usepackage|RequirePackage)\s{{0,9}}(?:\[[^\[\]]{{0,300}}\]\s{{0,9}})?{_NAME}"
)
_END_INPUT = re.compile(r"\\endinput(?![A-Za-z@])")
_BEGIN_DOCUMENT = re.compile(r"\\begin\s{0,9}\{document\}")
_END_DOCUMENT = re.compile(r"\\end\s{0,9}\{document\}|\\bye(?![A-Za-z@])")


def roots(files: Mapping[str, str]) -> list[str]:
    """The files that may be the root, best kind first; none where the paper has no TeX document."""
    named = {name for text in _readmes(files) for name in _TOP_LEVEL.findall(text)} & set(files)
    if named:
        return sorted(named)[:CANDIDATES]
    texts = {name: text for name, text in files.items() if not name.lower().endswith((".sty", ".cls", ".def"))}
    tests: tuple[Callable[[str], object], ...] = (
        lambda text: _CLASS.search(text) and _BEGIN.search(text),
        _BEGIN.search,
        _CLASS.search,
        _PLAIN.search,
    )
    for test in tests:
        found = [name for name, text in sorted(texts.items()) if test(text)]
        if found:
            return sorted(found, key=lambda name: (-len(files[name]), name))[:CANDIDATES]
    documents = [name for name in texts if name.lower().endswith(TEX_SUFFIXES) or "." not in posixpath.basename(name)]
    return documents if len(documents) == 1 else []


def _readmes(files: Mapping[str, str]) -> list[str]:
    return [text for name, text in files.items() if name.upper().startswith("00README")]


class Joiner:
    """Puts the files of one paper together; `strip` takes the comments out of a file's text."""

    def __init__(self, files: Mapping[str, str], strip: Callable[[str], str], longest: int) -> None:
        self._files = files
        self._strip = strip
        self._stripped: dict[str, str] = {}
        self._longest = longest
        self.length = 0
        self.counts: Counter[str] = Counter()

    def joined(self, root: str) -> str:
        """The document that starts in `root`. Raises Unfit where it is longer than allowed."""
        self.length = 0
        self.counts.clear()
        return self._document(root, posixpath.dirname(root), ())

    def _text(self, name: str) -> str:
        if name not in self._stripped:
            text = self._strip(self._files[name])
            end = _END_INPUT.search(text)
            self._stripped[name] = text[: end.start()] if end else text
        return self._stripped[name]

    def _document(self, name: str, base: str, above: tuple[str, ...]) -> str:
        """`base`: the directory of the root, against which TeX resolves names."""
        text = self._text(name)
        if above:
            text = _inside(text)
        self.counts["files_joined"] += 1
        out: list[str] = []
        position = 0
        for match in _INPUT.finditer(text):
            out.append(text[position : match.start()])
            self._grow(match.start() - position)
            out.append(self._replacement(match, name, base, (*above, name)))
            position = match.end()
        self._grow(len(text) - position)
        out.append(text[position:])
        return "".join(out)

    def _grow(self, length: int) -> None:
        self.length += length + 1
        if self.length > self._longest:
            raise Unfit("inputs_too_large")

    def _replacement(self, match: re.Match[str], current: str, base: str, above: tuple[str, ...]) -> str:
        if match[6] is not None:
            return self._packages(match, base, above)
        folder, asked = (match[4], match[5]) if match[4] is not None else ("", match[2] or match[3])
        found = self._find(posixpath.join(folder, asked.strip('"')), base, current)
        if found is None:
            self.counts["inputs_missing"] += 1
            return ""
        if found in above or len(above) >= DEEPEST:
            self.counts["inputs_in_a_cycle"] += 1
            return ""
        text = self._document(found, base, above)
        return f"\n{text}\n" if match[1] == "include" else text

    def _packages(self, match: re.Match[str], base: str, above: tuple[str, ...]) -> str:
        texts = []
        for package in match[7].split(","):
            found = self._find(package.strip() + ".sty", base, "")
            if found is None or found in above or len(above) >= DEEPEST:
                continue
            if "\\ProvidesPackage" not in self._files[found]:
                texts.append(self._document(found, base, above) + "\n")
                self.counts["packages_joined"] += 1
        self._grow(len(match[0]))
        return "".join((match[0], "\n", *texts)) if texts else match[0]

    def _find(self, asked: str, base: str, current: str) -> str | None:
        """The file TeX would open: beside the root, else (as `subfiles` and `import` do) beside the current file."""
        for folder in dict.fromkeys((base, posixpath.dirname(current), "")):
            path = posixpath.normpath(posixpath.join(folder, asked))
            for candidate in (path + ".tex", path):
                if candidate in self._files:
                    return candidate
        return None


def _inside(text: str) -> str:
    """What a file with a preamble of its own (`subfiles`) adds to the document."""
    begin = _BEGIN_DOCUMENT.search(text)
    if begin is None:
        return text
    end = _END_DOCUMENT.search(text, begin.end())
    return text[begin.end() : end.start() if end else len(text)]


def preamble_and_body(text: str) -> tuple[str, str]:
    """The joined document before and after `\\begin{document}`; a plain TeX document is all body."""
    begin = _BEGIN_DOCUMENT.search(text)
    preamble, body = (text[: begin.start()], text[begin.end() :]) if begin else ("", text)
    end = _END_DOCUMENT.search(body)
    return preamble, body[: end.start()] if end else body
