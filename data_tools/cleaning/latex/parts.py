r"""Which parts of a paper's text are kept: from its first heading on, without the bibliography.

"We removed everything before the first section, as well as the bibliography" (LLaMA, section 2.1, after Lewkowycz et
al. 2022). Headings are `\part` … `\subparagraph`, starred or not, and amsppt's `\head` and plain TeX's `\beginsection`.
All works on the joined document, macros expanded: a heading in an included file or behind an author's `\sect` counts,
and what follows the bibliography (appendices, figures) stays.
"""

import re

from data_tools.cleaning.latex.limits import Unfit
from data_tools.cleaning.latex.scan import MARK_GAP

_HEADING = re.compile(
    r"\\(?:part|chapter|section|subsection|subsubsection|paragraph|subparagraph)\*?\s{0,9}[\[{]"
    r"|\\(?:sub)?head(?:ing)?(?![A-Za-z@])(?=[^\n]{0,500}\\end(?:sub)?head)|\\beginsection(?![A-Za-z@])"
)
_ABSTRACT = re.compile(r"\\begin\s{0,9}\{abstract\}|\\abstract\s{0,9}\{")
_END_ABSTRACT = re.compile(r"\\end\s{0,9}\{abstract\}")
_APPENDIX = re.compile(r"\\appendix(?![A-Za-z@])|\\begin\s{0,9}\{appendi(?:x|ces)\}|\\appendices(?![A-Za-z@])")
_BIBLIOGRAPHY = re.compile(
    r"\\begin\s{0,9}\{(thebibliography|references\*?|REFERENCES|biblist\*?|bibdiv|bibsection)\}|\\(Refs)(?![A-Za-z@])"
)
_BIBLIOGRAPHY_COMMAND = re.compile(
    r"\\(?:bibliography|bibliographystyle|addbibresource|nocite|nobibliography)\*?\s{0,9}(?:\[[^\[\]]{0,300}\])?"
    r"\{[^{}]{0,20000}\}|\\(?:printbibliography|printbibheading|printreferences)(?![A-Za-z@])(?:\[[^\[\]]{0,2000}\])?"
)
_TITLE = re.compile(
    r"\\(?:part|chapter|section|subsection)\*?\s{0,9}\{\s{0,9}(?:\\[A-Za-z]{1,20}\s{0,9}\{?|\{){0,3}"
    r"(?:REFERENCES?|References?|BIBLIOGRAPHY|Bibliography|Literature [Cc]ited|\\refname|\\bibname)[.:]?\s{0,9}\}{1,4}"
)
_TITLE_TRAIL = re.compile(r"(?:\s|\\(?:label|addcontentsline|markboth|phantomsection)(?:\{[^{}]{0,200}\}){0,3}){0,40}")
_TRAILING_BLANKS = re.compile(r"[ \t]+\n")
_EMPTY_LINES = re.compile(r"\n{3,}")


def kept_text(preamble: str, body: str, *, start: str, without_heading: str, appendix: str) -> str:
    """Of the body what is kept.

    start: "section" (the paper's rule), or "abstract": from the abstract on, where it comes before the first heading.
    without_heading: what becomes of a document without headings: "drop", or "keep" it from its abstract on.
    appendix: "keep" or "cut" from `\\appendix` on. Raises Unfit.
    """
    heading = _HEADING.search(body)
    if heading is None and without_heading == "drop":
        raise Unfit("no_section")
    front = preamble + body[: heading.start()] if heading else preamble + body
    abstract = _ABSTRACT.search(front) if start == "abstract" or heading is None else None
    text = body[heading.start() :] if heading else ""
    if abstract is not None and abstract.start() >= len(preamble):
        text = body[abstract.start() - len(preamble) :]
    elif abstract is not None:  # some classes take it in the preamble
        end = _END_ABSTRACT.search(front, abstract.end())
        text = front[abstract.start() : end.end() if end else len(preamble)] + "\n\n" + (text or body)
    elif heading is None:
        text = body
    if appendix == "cut" and (match := _APPENDIX.search(text)) is not None:
        text = text[: match.start()]
    return without_bibliography(text)


def without_bibliography(text: str) -> str:
    """The text without lists of references, the commands that print them, and the headings over them."""
    text = _BIBLIOGRAPHY_COMMAND.sub(MARK_GAP, _without_environments(text))
    if MARK_GAP in text or _TITLE.search(text):
        text = _without_titles(text)
    return text.replace(MARK_GAP, "")


def _without_environments(text: str) -> str:
    out: list[str] = []
    position = 0
    while (match := _BIBLIOGRAPHY.search(text, position)) is not None:
        out += (text[position : match.start()], MARK_GAP)
        end_mark = "\\endRefs" if match[2] else f"\\end{{{match[1]}}}"
        end = text.find(end_mark, match.end())
        position = end + len(end_mark) if end >= 0 else len(text)
    return "".join((*out, text[position:]))


def _without_titles(text: str) -> str:
    """Without headings "References" over a removed list, or with the section if it is the last (a list by hand)."""
    out: list[str] = []
    position = 0
    for title in _TITLE.finditer(text):
        if title.start() < position:
            continue
        trail = _TITLE_TRAIL.match(text, title.end())
        after = trail.end() if trail else title.end()
        end = after if text.startswith(MARK_GAP, after) else None
        if end is None and _HEADING.search(text, title.end()) is None:
            appendix = _APPENDIX.search(text, title.end())
            end = appendix.start() if appendix else len(text)
        if end is not None:
            out.append(text[position : title.start()])
            position = end
    return "".join((*out, text[position:]))


def tidy(text: str) -> str:
    """No blanks at line ends, no more than one empty line, one line end at the end."""
    text = _EMPTY_LINES.sub("\n\n", _TRAILING_BLANKS.sub("\n", text)).strip("\n \t")
    return text + "\n" if text else ""
