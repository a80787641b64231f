"""Names of TeX and LaTeX that bear on expanding macros.

Not every definition an author writes is notation. `\\renewcommand{\\section}` restyles headings, `\\def\\la{\\ifmmode}`
is a program whose text means nothing out of context: the first must not be replaced, the second is left by its name.
"""

_STRUCTURE = """
    part chapter section subsection subsubsection paragraph subparagraph appendix begin end item document title author
    date thanks abstract maketitle tableofcontents label ref pageref cite bibitem bibliography caption footnote
    footnotetext footnotemark input include documentclass documentstyle usepackage newpage clearpage index marginpar
    bibliographystyle printbibliography thebibliography verb par
"""
_DEFINITIONS = """
    def edef gdef xdef let futurelet newcommand renewcommand providecommand newenvironment renewenvironment newtheorem
    DeclareMathOperator DeclareRobustCommand newif csname endcsname expandafter noexpand the string global long outer
    protected protect begingroup endgroup bgroup egroup catcode makeatletter makeatother relax undefined if ifx ifnum
    ifdim ifcat ifmmode iftrue iffalse ifcase else fi or loop repeat number romannumeral advance count dimen skip toks
    box setbox
"""
_LAYOUT = """
    hbox vbox vtop vcenter hskip vskip hfill vfill hss vss kern mskip mkern raise lower hrule vrule halign valign
    noalign omit span cr crcr left right middle over atop above frac sqrt mathchoice displaystyle textstyle scriptstyle
    scriptscriptstyle limits nolimits mathop mathord mathbin mathrel mathopen mathclose mathpunct mathinner nonscript
    accent char mathchar font hyphenation parskip parindent noindent indent vspace hspace baselineskip arraystretch
    baselinestretch tabcolsep textwidth textheight ensuremath xspace text mbox
"""
_PROGRAMMING = """
    else fi or expandafter csname endcsname futurelet catcode lccode uccode mathcode delcode sfcode advance multiply
    divide loop repeat afterassignment aftergroup write immediate read openin openout special halign valign everypar
    everymath output setbox noexpand string meaning detokenize unexpanded number romannumeral jobname the numexpr count
    dimen toks toksdef countdef chardef mathchardef newcount newdimen newtoks newbox newif uppercase lowercase
    pdfliteral directlua whiledo IfNoValueTF IfNoValueT IfNoValueF IfValueTF IfValueT IfValueF IfBooleanTF IfBooleanT
    IfBooleanF pgfkeys pgfmathparse foreach input include
"""
_TAKE_ONE = """
    mathbf mathrm mathit mathsf mathtt mathcal mathbb mathfrak mathscr mathnormal boldsymbol bm pmb hat widehat tilde
    widetilde bar overline underline vec overrightarrow dot ddot check breve acute grave mathring overbrace underbrace
    sqrt operatorname text textbf textit textrm textsf texttt textsc emph phantom hphantom vphantom mathop
"""
_TAKE_TWO = "frac dfrac tfrac cfrac binom stackrel overset underset"
# Redefining these changes the layout, or is meant for TeX's inside: their uses stay as they are.
RESERVED = frozenset((_STRUCTURE + _DEFINITIONS + _LAYOUT).split())
# Of the commands of one character only these are free in LaTeX's text and formulas.
FREE_SYMBOLS = frozenset("<>+*?|:;1234567890")
# A macro whose text holds one of these is a program (so is every \if…): its uses stay, by name.
PROGRAMMING = frozenset(_PROGRAMMING.split())
# Commands whose argument may be given without braces: \frac\x2 means \frac{\x}{2}.
TAKE_TWO = frozenset(_TAKE_TWO.split())
TAKE_ARGUMENTS = TAKE_TWO.union(_TAKE_ONE.split())
GUARDS = frozenset(("@ifnextchar", "@ifstar", "kernel@ifnextchar"))  # carried out; behind one a macro may call itself


def is_reserved(name: str) -> bool:
    return name in RESERVED if name[:1].isalpha() or "@" in name else name not in FREE_SYMBOLS


def is_programming(name: str) -> bool:
    return name in PROGRAMMING or (name.startswith("if") and name != "iff")
