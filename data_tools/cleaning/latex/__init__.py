r"""A paper's TeX files as one readable text, after the LLaMA paper's rule (section 2.1, "ArXiv").

    files -> comments out (scan) -> one document (structure) -> untaken branches out (conditionals)
          -> macros expanded (macros) -> front matter and bibliography out (parts) -> verbatim text back

What stays is LaTeX: formulas, `\section`, `\cite`, environments by their names. Time and memory are bounded by the size
of the paper (`limits`). Reasons why a paper is given up (`Unfit`):

    no_tex                its files hold no TeX document
    no_section            no heading in it (withdrawn, a note, plain TeX), unless `without_heading` is "keep"
    inputs_too_large      its files put together are longer than `longest`
    expansion_too_large   its macros write more than `growth` times its own length, or more than `longest`
    empty                 nothing is left
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from data_tools.cleaning.latex.conditionals import live_text
from data_tools.cleaning.latex.limits import Account, Unfit
from data_tools.cleaning.latex.macros import Expander
from data_tools.cleaning.latex.parts import kept_text, tidy
from data_tools.cleaning.latex.scan import Scanner, Vault, plain_lines
from data_tools.cleaning.latex.structure import Joiner, preamble_and_body, roots

__all__ = ["CleanPaper", "PaperOptions", "Unfit", "clean_latex", "clean_paper"]

SMALL_CHANGE = 1_000_000  # characters every paper may handle, however short it is


@dataclass(frozen=True)
class PaperOptions:
    start: str = "section"  # or "abstract"
    without_heading: str = "drop"  # or "keep"
    appendix: str = "keep"  # or "cut"
    longest: int = 32 << 20  # characters of the joined document, and of the clean text
    growth: int = 32  # characters macros may handle, a character of the document


@dataclass
class CleanPaper:
    text: str
    root: str  # the file it starts in
    counts: Counter[str] = field(default_factory=Counter)


def clean_latex(text: str, options: PaperOptions | None = None) -> str:
    """A paper in one file. Raises Unfit."""
    return clean_paper({"paper.tex": text}, options).text


def clean_paper(files: Mapping[str, str], options: PaperOptions | None = None) -> CleanPaper:
    """The paper the files (path -> text) make. Raises Unfit."""
    options = options or PaperOptions()
    plain = {name: plain_lines(text) for name, text in files.items()}
    candidates = roots(plain)
    if not candidates:
        raise Unfit("no_tex")
    vault = Vault()
    joiner = Joiner(plain, Scanner(plain.values(), vault).without_comments, options.longest)
    root, document = _longest(joiner, candidates)
    counts = Counter(joiner.counts)
    counts["other_roots"] = len(candidates) - 1
    preamble, body = preamble_and_body(live_text(document))
    expander = Expander(Account(options.growth * len(document) + SMALL_CHANGE))
    preamble = expander.expand(preamble)
    text = kept_text(
        preamble,
        expander.expand(body),
        start=options.start,
        without_heading=options.without_heading,
        appendix=options.appendix,
    )
    text = tidy(vault.restore(text, options.longest))
    if not text:
        raise Unfit("empty")
    return CleanPaper(text, root, counts + expander.counts)


def _longest(joiner: Joiner, candidates: list[str]) -> tuple[str, str]:
    """The candidate that makes the longest document, and that document."""
    documents = {}
    for root in candidates:
        documents[root] = joiner.joined(root)
    root = max(candidates, key=lambda name: (len(documents[name]), -candidates.index(name)))
    if len(candidates) > 1:
        joiner.joined(root)  # its counts
    return root, documents[root]
