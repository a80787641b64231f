"""LaTeX cleaned: comments, verbatim text, branches, macros, headings, bibliographies; time bounded on anything.

Where a public pipeline gets a case wrong (RedPajama v1's arxiv_cleaner, see docs/data.md) the test's name says so.
"""

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.cleaning.latex import PaperOptions, Unfit, clean_latex, clean_paper
from data_tools.cleaning.latex.conditionals import live_text
from data_tools.cleaning.latex.limits import Account
from data_tools.cleaning.latex.macros import Expander
from data_tools.cleaning.latex.parts import without_bibliography
from data_tools.cleaning.latex.scan import Scanner, Vault


def uncommented(text: str) -> str:
    vault = Vault()
    return vault.restore(Scanner([text], vault).without_comments(text), 1 << 20)


def expanded(text: str) -> str:
    return Expander(Account(1 << 20)).expand(text)


def body(text: str, **options: str) -> str:
    """What is kept of a paper with this text after `\\begin{document}`."""
    paper = f"\\documentclass{{article}}\n\\begin{{document}}\n{text}\n\\end{{document}}\n"
    return clean_latex(paper, PaperOptions(**options))  # type: ignore[arg-type]


# comments


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("done.% c\n", "done.\n"),  # RedPajama: "done", the character before % is eaten
        ("exam%\nple", "example"),  # RedPajama keeps a lone % at a line's end, and the word in two
        ("exam% why\n   ple", "example"),
        ("a\n% whole line\nb", "a\nb"),  # leaves no paragraph break
        ("a\n  % c1\n  % c2\n\nb", "a\n  \n\nb"),  # and takes none away
        ("a %c\n\nb", "a \n\nb"),
        ("50\\% of % it\nall", "50\\% of all"),
        ("line \\\\% comment\nnext", "line \\\\next"),  # \\ is a line break, the % is bare
        ("\\\\\\% sure", "\\\\\\% sure"),
        ("\\verb|50% off| % real\nx", "\\verb|50% off| x"),
        ("\\verb*+a%b+ \\verbose % c", "\\verb*+a%b+ \\verbose "),
        ("\\url{http://a.b/%7Ec} \\href{x%20y}{t%}\n}", "\\url{http://a.b/%7Ec} \\href{x%20y}{t}"),
        ("\\lstinline[language=C]!x % y! %c", "\\lstinline[language=C]!x % y! "),
        ("\\begin{verbatim}\n% kept\n\\end{verbatim} % gone", "\\begin{verbatim}\n% kept\n\\end{verbatim} "),
        ('\\begin{lstlisting}[language=C]\nprintf("%d");\n\\end{lstlisting}', None),
        ("% \\begin{verbatim}\na % b\n% \\end{verbatim}\n", "a "),
        ("a\n\\begin{comment}\nnot % this\n\\end{comment}\nb", "a\n\nb"),
        ("\\begin{filecontents*}{a.bib}\n@book{x}\n\\end{filecontents*}b", "b"),
        ("\\lstnewenvironment{code}{}{}\\begin{code}\n%1\n\\end{code}", None),
        ("\\excludecomment{old}\\begin{old}x\\end{old}y", "\\excludecomment{old}y"),
        ("\\begin{verbatim} without end % gone\nx", "\\begin{verbatim} without end x"),
    ],
)
def test_comments_go_as_tex_drops_them(text: str, clean: str | None) -> None:
    assert uncommented(text).rstrip("\n") == (text if clean is None else clean).rstrip("\n")


@given(st.text(alphabet="ab%\\\n {}|v", max_size=60))
def test_no_comment_survives_and_what_is_kept_is_in_order(text: str) -> None:
    clean = uncommented(text)
    position = 0
    for char in clean:
        position = text.index(char, position) + 1
    escaped = clean.replace("\\\\", "").replace("\\%", "")
    assert "%" not in escaped


# branches that are not taken


@pytest.mark.parametrize(
    ("text", "live"),
    [
        ("a \\iffalse old \\fi b", "a b"),
        ("\\iffalse x \\else y \\fi z", "y z"),
        ("\\iftrue x \\else y \\fi z", "x z"),
        ("\\iffalse \\ifx\\a\\b c \\else d \\fi e \\fi f", "f"),
        ("\\if0 old \\fi new", "new"),
        ("\\if01 old \\else new\\fi", "new"),
        ("$a \\iff b$ \\iffalse x\\fi", "$a \\iff b$ "),
        ("\\ifthenelse{a}{b}{c} \\iffalse x\\fi y", "\\ifthenelse{a}{b}{c} y"),
        ("\\newif\\iflong\n\\longtrue\n\\iflong full\\else short\\fi", "full"),
        ("\\newif\\iflong \\iflong full\\else short\\fi", "short"),
        ("\\let\\iflong\\iftrue\n\\iflong full\\else short\\fi", "full"),
        ("\\ifx\\a\\b x\\else y\\fi", "\\ifx\\a\\b x\\else y\\fi"),  # not ours to decide
        ("\\newif\\ifa \\newcommand{\\on}{\\atrue}\n\\ifa x\\fi", None),  # nor is a switch a macro sets
        (
            "\\newif\\ifa\n\\iffalse\n\\ifx\\p\\q\n\\atrue\n\\fi\n\\fi\n\\ifa yes\\else no\\fi",
            "no",
        ),  # set where TeX is not
        ("\\iffalse without an end", "\\iffalse without an end"),
        ("a\\\\iffalse b", "a\\\\iffalse b"),
    ],
)
def test_only_the_live_branch_stays(text: str, live: str | None) -> None:
    assert live_text(text).strip() == (text if live is None else live).strip()


# macros


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("\\newcommand{\\x}{body}\\x", "body"),
        ("\\newcommand\\x{body}\\x", "body"),  # RedPajama: not expanded
        ("\\newcommand{\\x}[2]{#2-#1}\\x{a}{b} \\x ab", "b-a b-a"),  # RedPajama: none with arguments
        ("\\newcommand{\\x}[2][d]{#1#2}\\x{a} \\x[b]{c} \\x[{]}]{c}", "da bc {]}c"),
        ("\\newcommand*{\\x}{body}\\x", "body"),
        ("\\newcommand* \\x [1] {(#1)}\\x{ab}", "(ab)"),
        ("\\renewcommand{\\x}{1}\\x\\renewcommand{\\x}{2}\\x", "12"),  # RedPajama: not read
        ("\\providecommand{\\x}{1}\\providecommand{\\x}{2}\\x", "1"),
        ("\\DeclareRobustCommand{\\x}{r}\\x", "r"),
        ("\\DeclareMathOperator{\\argmax}{arg\\,max}$\\argmax_x$", "$\\operatorname{arg\\,max}_x$"),
        ("\\DeclareMathOperator*\\argmax{arg\\,max}$\\argmax_x$", "$\\operatorname*{arg\\,max}_x$"),
        ("\\def\\x{body}\\x", "body"),
        ("\\def\\x#1#2{#2#1}\\x{a}b", "ba"),
        ("\\def\\x(#1,#2){[#1|#2]}\\x(a,{b,c})", "[a|b,c]"),
        ("\\def\\x#1;{<#1>}\\x a{;}b;c", "<a{;}b>c"),
        ("\\long\\def\\x#1{(#1)}\\global\\let\\y=\\x \\y{a}", "(a)"),
        ("\\gdef\\x{g}\\xdef\\y{x}\\x\\y", "gx"),
        ("\\let\\eps\\varepsilon$\\eps$", "$\\varepsilon$"),
        ("\\let\\old\\vec\\renewcommand{\\vec}[1]{\\old{\\mathbf{#1}}}\\vec v", "\\vec{\\mathbf{v}}"),
        ("\\newcommand{\\a}{1}\\let\\b\\a\\renewcommand{\\a}{2\\b}\\a", "21"),
        ("\\let\\nc\\newcommand\\nc{\\x}{body}\\x", "body"),
        ("\\def\\nc{\\newcommand}\\nc{\\x}[1]{<#1>}\\x{a}", "<a>"),
        ("\\newcommand{\\in}{\\out}\\newcommand{\\out}{deep}\\in", "deep"),  # RedPajama: by order of a dict
        ("\\newcommand{\\b}[1]{\\mathbb{#1}}\\def\\R{\\b R}$\\R$", "$\\mathbb{R}$"),
        ("\\newcommand{\\f}[1]{\\g}\\newcommand{\\g}[1]{[#1]}\\f{x}{y}", "[y]"),  # arguments after a macro's end
        ("\\newcommand{\\mk}[1]{\\newcommand{#1}[1]{<##1>}}\\mk{\\x}\\x{a}", "<a>"),
        ("\\expandafter\\def\\csname x\\endcsname{body}\\x", "body"),
        ("\\NewDocumentCommand{\\x}{O{d} m}{#1#2}\\x{a}\\x[b]{c}", "dabc"),
        ("\\DeclarePairedDelimiter{\\abs}{\\lvert}{\\rvert}$\\abs{x}\\abs*{y}$", None),
        ("\\def\\opt{\\@ifnextchar[{\\with}{\\without}}\\def\\with[#1]{<#1>}\\def\\without{!}\\opt[a]\\opt b", "<a>!b"),
        ("\\newcommand{\\s}{\\@ifstar{star}{plain}}\\s* \\s", "star plain"),
        ("\\newcommand{\\N}{\\mathbb{N}\\xspace}\\N is \\N, $\\N_1$", "\\mathbb{N} is \\mathbb{N}, $\\mathbb{N}_1$"),
        ("\\newcommand{\\ct}{\\mathchoice{D}{T}{S}{SS}}\\ct \\mathchoice{1}{2}{3}{4}", "T\\mathchoice{1}{2}{3}{4}"),
        ("\\newenvironment{e}[1][d]{begin #1}{end}\\begin{e}x\\end{e}", "\\begin{e}x\\end{e}"),
        ("\\newcommand{\\todo}[1]{}a\\todo{never}b", "ab"),
        ("\\newcommand{\\x}{\n  a\n b\n}[\\x]", "[ a\n b ]"),
        ("\\newcommand{\\be}{\\begin{equation}}\n\\be\nx", "\\begin{equation}\nx"),
    ],
)
def test_macros_stand_for_their_text(text: str, result: str | None) -> None:
    if result is None:
        result = "$\\lvert x \\rvert\\left\\lvert y \\right\\rvert$"
        assert expanded(text).replace("  ", " ") == result.replace("  ", " ")
    else:
        assert expanded(text) == result


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("\\def\\v#1{\\bf#1}\\v x", "\\bf x"),  # not \bfx
        ("\\def\\a{\\alpha}$\\a x$", "$\\alpha x$"),
        ("\\def\\n{name}{\\bf\\n}", "{\\bf name}"),
        ("\\def\\s#1{#1n}\\s\\sin", "\\sin n"),
        ("\\def\\x{a+b}$\\frac\\x\\x \\hat\\x \\sqrt[3]\\x \\frac1\\x$", None),  # \frac a+b… is another formula
        ("\\def\\x{\\alpha}$\\hat\\x \\frac{\\x}\\x$", "$\\hat\\alpha\\frac{\\alpha}\\alpha$"),
        ("\\def\\x{a+b}$\\alpha\\x\\left(\\x\\right)x^\\x$", "$\\alpha a+b\\left(a+b\\right)x^a+b$"),
        ("\\def\\b{\\\\}\\b next", "\\\\next"),  # a line break is no open name
        ("\\def\\x{X}\\x{} is, \\x\\ is, \\x\n\nnew", "X is, X\\ is, X\n\nnew"),
        ("\\def\\R{{\\bf R}}$\\R f$", "$R f$".replace("R", "{\\bf R}").replace("} f", "}f")),
    ],
)
def test_pieces_do_not_grow_together_or_apart(text: str, result: str | None) -> None:
    assert expanded(text) == (result or "$\\frac{a+b}{a+b}\\hat{a+b}\\sqrt[3]{a+b}\\frac1{a+b}$")


@pytest.mark.parametrize(
    "text",
    [
        "\\x",
        "\\undefined{a} \\foo",
        "$\\frac{a}{b} \\sqrt[3]{x}$ \\section{A} \\begin{e}\\end{e} \\\\[2mm] \\{ \\} \\% \\# \\'e",
        "a \\newcommand",  # only mentioned
        "}{ } {",
    ],
)
def test_what_is_no_definition_stays(text: str) -> None:
    assert expanded(text) == text


@pytest.mark.parametrize(
    ("definition", "use"),
    [
        ("\\renewcommand{\\section}[1]{\\vspace{1em}\\origsection{#1}}", "\\section{A}"),  # layout, not notation
        ("\\renewcommand{\\frac}[2]{#1/#2}", "\\frac{a}{b}"),
        ("\\def\\par{\\endgraf}", "\\par"),
        ("\\renewcommand{\\,}{x}", "a\\,b"),
        ("\\def\\la{\\mathrel{\\ifmmode a\\else b\\fi}}", "$\\la$"),  # a program
        ("\\newcommand{\\num}{\\the\\value{page}}", "\\num"),
        ("\\newcommand{\\x}{\\@internal{a}}", "\\x"),  # LaTeX's inside
        ("\\newcommand{\\x}{\\my@a}\\def\\my@a{\\expandafter\\y}", "\\x"),  # a program behind the author's inside
        ("\\def\\x{a\\x}", "\\x"),  # calls itself
        ("\\def\\x{\\y}\\def\\y{\\x}", "\\x\\y"),
        ("\\newcommand{\\x}[2]{#1#2}", "{\\x{a}}"),  # an argument is missing
        ("\\def\\x(#1){<#1>}", "\\x[a]"),
        ("\\def~{\\nobreakspace}", "a~b"),
        ("\\newcommandx{\\x}[2][1=a]{#1#2}", "\\x{b}"),
        ("\\def\\x#{\\hbox}", "\\x{b}"),
    ],
)
def test_uses_that_cannot_be_replaced_keep_their_names(definition: str, use: str) -> None:
    assert expanded(definition + use) == use


def test_definitions_hold_from_where_they_stand_and_leave_no_line() -> None:
    text = "\\x\n\\newcommand{\\x}{1}\n\\x\n  \\def\\y{2}\n\\y"
    assert expanded(text) == "\\x\n1\n  \n2"


def test_a_macro_is_judged_by_what_is_defined_when_it_is_used() -> None:
    assert expanded("\\newcommand{\\x}{\\my@y}\\x \\def\\my@y{now}\\x") == "\\x now"


@given(st.text(alphabet="abZ@\\{}[]#$*%(,~ \n1", max_size=80))
def test_text_without_definitions_is_not_changed(text: str) -> None:
    assert expanded(text) == text


def test_verbatim_text_is_never_expanded() -> None:
    clean = body(
        "\\section{A}\\newcommand{\\x}{no}\\verb|\\x| \\begin{verbatim}\n\\newcommand{\\x}\n\\end{verbatim} \\x"
    )
    assert clean == "\\section{A}\\verb|\\x| \\begin{verbatim}\n\\newcommand{\\x}\n\\end{verbatim} no\n"


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "\\def",
                "\\newcommand",
                "\\let",
                "\\x",
                "\\y",
                "{",
                "}",
                "[1]",
                "#1",
                "#",
                " ",
                "a",
                "\\",
                "\n",
                "*",
                "\\@ifstar",
                "\\xspace",
                "\\csname",
                "\\endcsname",
            ]
        ),
        max_size=30,
    ).map("".join)
)
def test_any_text_is_expanded_or_given_up(text: str) -> None:
    with contextlib.suppress(Unfit):
        clean_latex("\\section{s}" + text + "\\documentclass{a}\n\\begin{document}\\section{t}" + text)


# parts


def test_the_text_starts_at_the_first_heading() -> None:
    assert body("\\title{T}\\maketitle front\n\\section{One} text") == "\\section{One} text\n"


@pytest.mark.parametrize("heading", ["part", "chapter", "section*", "subsection", "paragraph", "subparagraph"])
def test_every_kind_of_heading_counts(heading: str) -> None:
    """RedPajama lacks a `|` after \\paragraph: neither it nor \\subparagraph is seen."""
    assert body(f"front \\{heading}{{One}} text").startswith(f"\\{heading}{{One}}")


def test_a_heading_behind_an_authors_macro_counts() -> None:
    assert body("\\newcommand{\\sect}[1]{\\section{#1}} front \\sect{One} text") == "\\section{One} text\n"


def test_without_a_heading_a_paper_is_dropped_or_kept_from_its_abstract() -> None:
    text = "\\maketitle \\begin{abstract}short\\end{abstract} text"
    with pytest.raises(Unfit, match="no_section"):
        body(text)
    assert body(text, without_heading="keep") == "\\begin{abstract}short\\end{abstract} text\n"


def test_the_abstract_can_be_kept() -> None:
    abstract = "\\begin{abstract}short\\end{abstract}"
    text = f"\\maketitle {abstract}\n\\section{{A}} text"
    assert body(text) == "\\section{A} text\n"
    assert body(text, start="abstract") == f"{abstract}\n\\section{{A}} text\n"
    in_preamble = f"\\documentclass{{a}}{abstract}\\begin{{document}}x\\section{{A}} text\\end{{document}}"
    assert clean_latex(in_preamble, PaperOptions(start="abstract")) == f"{abstract}\n\n\\section{{A}} text\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a\\begin{thebibliography}{9}\\bibitem{x} X\\end{thebibliography} b", "a b"),
        ("a\\bibliographystyle{plain}\n\\bibliography{refs,more} b", "a\n b"),
        ("a \\printbibliography[title={Refs}] b \\nocite{*}", "a  b "),
        ("a \\begin{references}\\bibitem x\\end{references} b", "a  b"),
        ("a \\begin{thebibliography}{9} never ends", "a "),
        ("a \\section*{References}\n\\begin{thebibliography}{9}x\\end{thebibliography} b", "a  b"),
        ("a \\section*{References}\n\\bibliography{x}\\section{App} b", "a \\section{App} b"),
        ("a \\section*{REFERENCES} 1. Knuth \\appendix b", "a \\appendix b"),
        ("\\section{References} to cells \\section{Heaps} b", "\\section{References} to cells \\section{Heaps} b"),
        ("a \\cite{x} \\ref{bibliography}", "a \\cite{x} \\ref{bibliography}"),
    ],
)
def test_bibliographies_go_and_what_follows_stays(text: str, kept: str) -> None:
    assert without_bibliography(text) == kept


def test_the_appendix_can_be_cut() -> None:
    text = "\\section{A} text \\appendix \\section{B} more"
    assert "more" in body(text)
    assert body(text, appendix="cut") == "\\section{A} text\n"


# files


def test_files_are_joined_in_the_order_of_the_text() -> None:
    """RedPajama joins in the order of the tar; the cut at a bibliography ends only the file it stands in."""
    files = {
        "a_last.tex": "\\section{Last}\n",
        "macros.tex": "\\newcommand{\\x}{body}\\endinput not read",
        "main.tex": "\\documentclass{article}\\input macros\n\\begin{document} front \\include{sections/one}\n"
        "% \\input{unused}\n\\bibliography{b}\\input{a_last}\\subfile{sub/s.tex}\\input{missing}\\end{document} after",
        "sections/one.tex": "\\section{One}\\input{sections/two.tex}",
        "sections/two.tex": "\\x\\input{main}\\input{sections/two}",
        "sub/s.tex": "\\documentclass[../main]{subfiles}\\begin{document}sub\\import{./}{deep}\\end{document}",
        "sub/deep.tex": " deep",
        "unused.tex": "\\section{Unused}",
    }
    paper = clean_paper(files)
    assert paper.root == "main.tex"
    assert paper.text == "\\section{One}body\n\n\\section{Last}\nsub deep\n"
    assert paper.counts["inputs_in_a_cycle"] == 2 and paper.counts["inputs_missing"] == 1


def test_a_local_list_of_macros_is_read_and_a_style_is_not() -> None:
    files = {
        "p.tex": "\\documentclass{a}\\usepackage{mine,theirs}\\begin{document}\\section{A}\\x\\y\\end{document}",
        "mine.sty": "\\newcommand{\\x}{body}",
        "theirs.sty": "\\ProvidesPackage{theirs}\\newcommand{\\y}{no}",
    }
    assert clean_paper(files).text == "\\section{A}body\\y\n"


def test_the_root_is_the_longest_document_or_the_one_arxiv_was_told() -> None:
    paper = "\\documentclass{a}\\begin{document}\\section{%s}\\end{document}"
    files = {"a_letter.tex": paper % "letter", "main.tex": paper % "a longer paper"}
    assert clean_paper(files).root == "main.tex"
    assert clean_paper({**files, "00README.XXX": "a_letter.tex toplevelfile\n"}).root == "a_letter.tex"


def test_papers_in_old_and_plain_tex_are_found() -> None:
    old = clean_paper(
        {"p": "\\documentstyle[12pt]{article}\\begin{document}\\section{A} x\\end{document}", "f.txt": "x"}
    )
    assert old.root == "p" and old.text == "\\section{A} x\n"
    plain = clean_paper({"p.tex": "\\magnification=1200\\def\\x{body} front \\beginsection 1. One\\par \\x \\bye"})
    assert plain.text == "\\beginsection 1. One\\par body\n"
    with pytest.raises(Unfit, match="no_tex"):
        clean_paper({"a.tex": "nothing", "b.tex": "of TeX"})


# bounds


def timed(text: str) -> float:
    begin = time.process_time()
    with contextlib.suppress(Unfit):
        clean_latex("\\documentclass{a}\\begin{document}\\section{s}" + text)
    return time.process_time() - begin


PATHOLOGICAL = {
    "exponential": lambda n: (
        "".join(f"\\def\\x{chr(97 + i)}{{\\x{chr(98 + i)}\\x{chr(98 + i)}}}" for i in range(24)) + "\\xa" * (n // 3)
    ),
    "doubling arguments": lambda n: "\\def\\d#1{#1#1}" + "\\d{" * (n // 4) + "x" + "}" * (n // 4),
    "nested arguments": lambda n: "\\def\\a#1{#1}" + "\\a{" * (n // 4) + "}" * (n // 4),
    "unclosed arguments": lambda n: "\\def\\a#1{#1}" + "\\a{" * (n // 3),
    "unclosed brackets": lambda n: "\\newcommand\\a[2][x]{#1}" + "\\a[" * (n // 3),
    "delimiters that never come": lambda n: "\\def\\a#1;{#1}" + "\\a " * (n // 3),
    "endless tail": lambda n: "\\def\\a{\\@ifnextchar\\a{}{\\a}}\\a" + "x" * n,
    "chain of macros": lambda n: "".join(f"\\def\\{name(i)}{{\\{name(i + 1)}}}\\{name(0)}" for i in range(n // 30)),
    "backslashes": lambda n: "\\" * n,
    "percents": lambda n: "%" * n,
    "open braces": lambda n: "{" * n,
    "verbs": lambda n: "".join(f"\\verb{chr(0x4E00 + i % 20000)}" for i in range(n // 6)),
    "begins of verbatim": lambda n: "\\begin{verbatim}" * (n // 16),
    "begins of bibliographies": lambda n: "\\begin{references*}" * (n // 19),
    "conditionals": lambda n: "\\iffalse" * (n // 8) + "\\fi" * (n // 8),
    "open conditionals": lambda n: "\\ifx" * (n // 4),
    "reference titles": lambda n: "\\section{References}" * (n // 20),
    "blank lines": lambda n: "\n " * (n // 2),
    "inputs": lambda n: "\\input{" * (n // 7),
    "urls": lambda n: "\\url{a" * (n // 6),
    "csnames": lambda n: "\\expandafter\\def\\csname" * (n // 23),
    "definitions": lambda n: "\\def\\a" * (n // 6),
    "lets": lambda n: "\\let\\a\\b" * (n // 8),
}


def name(number: int) -> str:
    return "q" + "".join(chr(97 + int(digit)) for digit in str(number))


@pytest.mark.parametrize("kind", PATHOLOGICAL)
def test_the_time_of_a_paper_is_bounded_by_its_size(kind: str) -> None:
    assert timed(PATHOLOGICAL[kind](20_000)) < 10


def test_marks_for_verbatim_text_cannot_multiply_it() -> None:
    text = "\\def\\d#1{#1#1#1#1#1#1#1#1}\\d{\\d{\\d{\\d{\\verb|" + "x" * 1900 + "|}}}}" * 3
    paper = "\\documentclass{a}\\begin{document}\\section{s}" + text
    with pytest.raises(Unfit, match="expansion_too_large"):
        clean_latex(paper, PaperOptions(longest=1 << 20))


def test_included_files_cannot_multiply() -> None:
    files = {"r.tex": "\\documentclass{a}\\begin{document}\\section{s}\\input{f0}"}
    files |= {f"f{i}.tex": f"\\input{{f{i + 1}}}" * 10 for i in range(12)} | {"f12.tex": "x" * 1000}
    with pytest.raises(Unfit, match="inputs_too_large"):
        clean_paper(files, PaperOptions(longest=1 << 20))
