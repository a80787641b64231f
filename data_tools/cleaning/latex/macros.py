"""An author's macros, replaced by what they stand for ("inline-expanded", LLaMA paper section 2.1).

Definitions are carried out in the order of the text, as TeX does, and taken out of it; from there to the next
definition of the same name every use is replaced. Arguments, also optional and delimited ones, are taken by TeX's
rules, and what a macro wrote is read again, so a macro may end in another whose arguments follow in the text, or
define new ones. Where two pieces would grow together into another command (`\\bf#1` with `x`) a blank keeps them apart;
where a macro is the bare argument of a command (`\\frac\\x\\y`, `\\hat\\x`) its text gets the braces it then needs.

Kept by name are uses of macros that are programs (`names.PROGRAMMING`, or LaTeX internals with `@` that are not the
author's), that call themselves, or whose arguments are not there. Redefinitions of TeX's own structure are not applied
(`names.RESERVED`). Of programs two kinds are carried out, for papers live on them: `\\@ifnextchar` and `\\@ifstar`; of
`\\mathchoice` in a macro the text style is taken, and `\\xspace` is the blank it prints.

Simplified: a definition inside of a group holds also after it.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from data_tools.cleaning.latex import definitions
from data_tools.cleaning.latex.definitions import Alias, Macro
from data_tools.cleaning.latex.limits import Account
from data_tools.cleaning.latex.names import GUARDS, TAKE_ARGUMENTS, TAKE_TWO, is_programming, is_reserved
from data_tools.cleaning.latex.stream import CONTROL, Stream

_OPEN_WORD = re.compile(r"(?<!\\)(?:\\\\)*\\[A-Za-z@]+\Z")
_ONE_TOKEN = re.compile(r"\s*(?:\\(?:[A-Za-z@]+|.)|[^\\{}]|\{(?:[^{}\\]|\\.)*\})?\s*", re.S)
_ARGUMENT = r"\s*(?:[^\\{}\s]|\\[A-Za-z]+|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})"
_LAST_COMMAND = re.compile(r"\\([A-Za-z]+)(?:\[[^\[\]]*\])?\s*\Z")
_WANTS_SECOND = re.compile(rf"\\(?:{'|'.join(sorted(TAKE_TWO))}){_ARGUMENT}\s*\Z")
_REST_OF_LINE = re.compile(r"[ \t]*\n")
LONGEST_NAME = 80
LOOK_BACK = 160  # characters written before a macro, that may be a command which takes it as its argument
WORD_COST = 4  # of looking at a word of a macro's text, in characters read
READERS = {
    **dict.fromkeys(
        ("newcommand", "renewcommand", "providecommand", "DeclareRobustCommand"), definitions.read_newcommand
    ),
    **dict.fromkeys(("newcommandx", "renewcommandx", "providecommandx"), definitions.read_foreign),
    **dict.fromkeys(("def", "gdef", "edef", "xdef"), definitions.read_def),
    **dict.fromkeys(
        ("NewDocumentCommand", "RenewDocumentCommand", "ProvideDocumentCommand", "DeclareDocumentCommand"),
        definitions.read_document_command,
    ),
    "DeclareMathOperator": definitions.read_operator,
}
ENVIRONMENTS = ("newenvironment", "renewenvironment", "provideenvironment")
PREFIXES = ("long", "global", "outer", "protected", "expandafter")


class Expander:
    """The macros of one paper; `expand` may be called on its parts in order."""

    def __init__(self, account: Account) -> None:
        self.counts: Counter[str] = Counter()
        self._account = account
        self._macros: dict[str, Macro | Alias] = {}
        self._refused: dict[str, bool] = {}  # of the macros as they are now
        self._commands: dict[str, Callable[[str], None]] = self._known_commands()
        self._stream = Stream("", account)
        self._out: list[str] = []

    def _known_commands(self) -> dict[str, Callable[[str], None]]:
        commands: dict[str, Callable[[str], None]] = {}
        for names, command in (
            (READERS, self._definition),
            (("let",), self._let),
            (("DeclarePairedDelimiter",), self._paired_delimiter),
            (ENVIRONMENTS, self._environment),
            (PREFIXES, self._prefix),
            (("makeatletter", "makeatother"), self._nothing),
            (("@ifnextchar", "kernel@ifnextchar"), self._if_next_char),
            (("@ifstar",), self._if_star),
            (("mathchoice",), self._mathchoice),
            (("xspace",), self._xspace),
        ):
            commands.update(dict.fromkeys(names, command))
        return commands

    def expand(self, text: str) -> str:
        """The text with its definitions carried out. Raises Unfit when it grows beyond the account."""
        stream = self._stream = Stream(text, self._account)
        self._out = []
        while stream.settle():
            match = self._next_known()
            if match is None:
                self._emit(stream.text[stream.position :])
                stream.position = len(stream.text)
                continue
            self._emit(stream.text[stream.position : match.start()])
            stream.position = match.end()
            self._act(match[1])
        return "".join(self._out)

    def _next_known(self) -> re.Match[str] | None:
        macros, commands = self._macros, self._commands
        for match in CONTROL.finditer(self._stream.text, self._stream.position):
            if match[1] in macros or match[1] in commands:
                return match
        return None

    def _act(self, name: str) -> None:
        macro = self._macros.get(name)
        if macro is None:
            self._commands[name](name)
        elif isinstance(macro, Alias):
            self.counts["macros_expanded"] += 1
            self._emit(macro.text)
            self._skip_blanks()
        elif self._is_refused(macro) or not self._call(macro):
            self.counts["macros_kept"] += 1
            self._emit("\\" + name)

    def _emit(self, text: str) -> None:
        if text:
            if self._out and text[0].isalpha() and _ends_in_word(self._out[-1]):
                self._out.append(" ")
            self._out.append(text)

    def _is_argument(self) -> bool:
        """Whether what has been written ends in a command that takes what comes next as its argument."""
        tail = ""
        for piece in self._out[:-LONGEST_NAME:-1]:
            tail = piece[-LOOK_BACK:] + tail
            if len(tail) >= LOOK_BACK:
                break
        last = _LAST_COMMAND.match(tail, max(0, tail.rfind("\\")))
        if last is not None and last[1] in TAKE_ARGUMENTS:
            return True
        return any(name in tail for name in TAKE_TWO) and _WANTS_SECOND.search(tail) is not None

    # uses

    def _call(self, macro: Macro) -> bool:
        """Replaces a use; False, and nothing read, where its arguments are not there."""
        stream = self._stream
        arguments: list[str] = []
        if macro.parameters or macro.before:
            state = stream.state()
            taken = self._arguments(macro)
            if taken is None:
                stream.restore(state)
                return False
            arguments = taken
        text = _replaced(macro, arguments)
        if not macro.parameters and not macro.before:
            self._skip_blanks()
            if not _ONE_TOKEN.fullmatch(text) and self._is_argument():
                text = f"{{{text}}}"
        self.counts["macros_expanded"] += 1
        stream.push(text)
        return True

    def _arguments(self, macro: Macro) -> list[str] | None:
        stream = self._stream
        if macro.before:
            stream.skip_blanks()
            if not stream.starts_with_token(macro.before):
                return None
            stream.position += len(macro.before)
        arguments: list[str] = []
        for place, delimiter in enumerate(macro.delimiters):
            if place == 0 and macro.optional is not None:
                given = stream.bracket()
                arguments.append(macro.optional if given is None else given)
                continue
            argument = stream.argument() if delimiter is None else stream.until(delimiter)
            if argument is None:
                return None
            arguments.append(argument if delimiter is None else _unbraced(argument, self._account))
        return arguments

    def _skip_blanks(self) -> None:
        """TeX skips blanks after a command's name; of these the end of a line stays, that lines may be read."""
        stream = self._stream
        if stream.text.startswith("{}", stream.position):
            stream.position += 2
            return
        while stream.text[stream.position : stream.position + 1] in (" ", "\t"):
            stream.position += 1

    def _is_refused(self, macro: Macro) -> bool:
        if macro.name not in self._refused:
            self._refused[macro.name] = self._is_program(macro) or self._calls_itself(macro)
        return self._refused[macro.name]

    def _is_program(self, macro: Macro) -> bool:
        """Whether its text, or that of an internal macro of the author's in it, programs TeX."""
        seen, waiting = {macro.name}, [macro]
        while waiting:
            for word in waiting.pop().words:
                self._account.pay(WORD_COST)
                if is_programming(word):
                    return True
                if "@" in word and len(word) > 1 and word not in GUARDS and word not in seen:
                    inner = self._macros.get(word)
                    if not isinstance(inner, Macro):
                        return True
                    seen.add(word)
                    waiting.append(inner)
        return False

    def _calls_itself(self, macro: Macro) -> bool:
        """Whether it leads back to itself with nothing that could end it."""
        seen: set[str] = set()
        waiting = [macro]
        while waiting:
            words = waiting.pop().words
            if words & GUARDS:
                continue
            for word in words:
                self._account.pay(WORD_COST)
                inner = self._macros.get(word)
                if not isinstance(inner, Macro) or inner.name in seen:
                    continue
                if inner.name == macro.name:
                    return True
                seen.add(inner.name)
                waiting.append(inner)
        return False

    # definitions

    def _define(self, name: str | None, macro: Macro | Alias | None) -> None:
        self._leave_line()
        if name is None:
            return
        if macro is None or is_reserved(name) or name in self._commands:
            self.counts["definitions_not_used"] += 1
            if macro is None:
                self._macros.pop(name, None)
        else:
            self.counts["macros_defined"] += 1
            self._macros[name] = macro
        self._refused.clear()

    def _leave_line(self) -> None:
        """A definition that had a line of its own leaves none behind."""
        stream = self._stream
        if (not self._out or self._out[-1].endswith("\n")) and not stream.in_macro:
            rest = _REST_OF_LINE.match(stream.text, stream.position)
            stream.position = rest.end() if rest else stream.position

    def _definition(self, name: str) -> None:
        """`\\newcommand` and all the others; what is none (a command that is only mentioned) stays."""
        state = self._stream.state()
        defined, macro = READERS[name](self._stream)
        if defined is None:
            self._stream.restore(state)
            self._emit("\\" + name)
        elif name.startswith("provide") and defined in self._macros:
            self._leave_line()
        else:
            self._define(defined, macro)

    def _paired_delimiter(self, name: str) -> None:
        for macro in definitions.read_paired_delimiter(self._stream):
            self._define(macro.name, macro)

    def _environment(self, name: str) -> None:
        definitions.read_environment(self._stream)
        self.counts["definitions_not_used"] += 1
        self._leave_line()

    def _let(self, name: str) -> None:
        state = self._stream.state()
        new, old = definitions.read_let(self._stream)
        self._skip_blanks()
        if new is None:
            self._stream.restore(state)
            self._emit("\\let")
            return
        if old is None:
            self._define(new, None)
            return
        meaning = self._macros.get(old[1:]) if old.startswith("\\") else None
        if old.startswith("\\") and old[1:] in self._commands and meaning is None and not is_reserved(new):
            self._commands[new] = partial(_as_named, self._commands[old[1:]], old[1:])  # \let\nc\newcommand
            self._leave_line()
        elif old in ("\\undefined", "\\relax") or (meaning is None and "@" in old):  # nothing, or somebody's inside
            self._define(new, None)
        else:
            self._define(new, replace(meaning, name=new) if isinstance(meaning, Macro) else meaning or Alias(old))

    def _prefix(self, name: str) -> None:
        """`\\long` and the like go with the definition they stand before."""
        state = self._stream.state()
        self._stream.skip_blanks()
        following = self._stream.control()
        self._stream.restore(state)
        if following not in self._commands or following in self._macros:
            self._emit("\\" + name)

    def _nothing(self, name: str) -> None:
        self._leave_line()

    # the little programming that is carried out

    def _if_next_char(self, name: str) -> None:
        stream = self._stream
        state = stream.state()
        wanted, yes, no = stream.argument(), stream.argument(), stream.argument()
        if wanted is None or yes is None or no is None:
            stream.restore(state)
            self._emit("\\" + name)
            return
        state = stream.state()
        stream.skip_blanks()
        if stream.starts_with_token("{" if wanted == "\\bgroup" else wanted):
            stream.push(yes)
        else:
            stream.restore(state)
            stream.push(no)

    def _if_star(self, name: str) -> None:
        stream = self._stream
        state = stream.state()
        yes, no = stream.argument(), stream.argument()
        if yes is None or no is None:
            stream.restore(state)
            self._emit("\\" + name)
            return
        stream.push(yes if stream.skip("*") else no)

    def _mathchoice(self, name: str) -> None:
        stream = self._stream
        state = stream.state()
        choices = [stream.argument() for _ in range(4)] if stream.in_macro else []
        if not choices or None in choices:
            stream.restore(state)
            self._emit("\\" + name)
        else:
            stream.push(choices[1] or "")

    def _xspace(self, name: str) -> None:
        self._skip_blanks()
        following = self._stream.peek()
        if following and (following.isalnum() or following in '(`"'):
            self._emit(" ")


def _as_named(command: Callable[[str], None], name: str, alias: str) -> None:
    command(name)


def _ends_in_word(text: str) -> bool:
    return text[-1].isalpha() and _OPEN_WORD.search(text[-LONGEST_NAME:]) is not None


def _unbraced(argument: str, account: Account) -> str:
    """A delimited argument that is one whole group loses its braces."""
    argument = argument.strip()
    if not argument.startswith("{") or not argument.endswith("}"):
        return argument
    stream = Stream(argument, account)
    inside = stream.group()
    return inside if inside is not None and stream.position == len(argument) else argument


def _replaced(macro: Macro, arguments: list[str]) -> str:
    """The macro's text with the arguments in place."""
    out: list[str] = []
    for piece in macro.text:
        text = piece if isinstance(piece, str) else arguments[piece]
        if text:
            if out and text[0].isalpha() and _ends_in_word(out[-1]):
                out.append(" ")
            out.append(text)
    return "".join(out)
