"""The definitions in a paper, read into macros: what stands behind `\\newcommand`, `\\def`, `\\let` and their kin."""

import re
from dataclasses import dataclass, field

from data_tools.cleaning.latex.stream import CONTROL, Stream, delimiter_pattern

MOST_ARGUMENTS = 9
_PARAMETER = re.compile(r"#([1-9#])")
_EDGE = re.compile(r"\A[ \t]*\n[ \t]*(?!\s)|(?<!\s)[ \t]*\n[ \t]*\Z")  # a line end at either end of a text is a blank
_PARAMETER_TEXT = re.compile(r"[^{}]{0,300}")
_XPARSE = re.compile(r"\s*(?:(O)\s*\{([^{}]*)\}|\+?(m))")


@dataclass(frozen=True)
class Macro:
    """`\\name` followed by its parameters stands for its text."""

    name: str
    text: tuple[str | int, ...]  # literal pieces, and the numbers of parameters (from 0) between them
    before: str = ""  # what must follow the name
    delimiters: tuple[re.Pattern[str] | None, ...] = ()  # one a parameter; None: a group or one token
    optional: str | None = None  # the first parameter may be given in brackets; otherwise it is this
    words: frozenset[str] = field(default=frozenset(), compare=False)  # the commands in its text

    @property
    def parameters(self) -> int:
        return len(self.delimiters)


@dataclass(frozen=True)
class Alias:
    """`\\name` is another name of what is not the author's: `\\let\\epsilon\\varepsilon`."""

    text: str


def make_macro(name: str, body: str, parameters: int, *, optional: str | None = None) -> Macro | None:
    """A macro of plain parameters; None where the body asks for one it does not have."""
    return _macro(name, body, "", (None,) * parameters, optional)


def _macro(
    name: str, body: str, before: str, delimiters: tuple[re.Pattern[str] | None, ...], optional: str | None
) -> Macro | None:
    pieces: list[str | int] = []
    literal, position = "", 0
    body = _EDGE.sub(" ", body)
    for match in _PARAMETER.finditer(body):
        literal += body[position : match.start()]
        position = match.end()
        if match[1] == "#":
            literal += "#"
        elif int(match[1]) > len(delimiters):
            return None
        else:
            pieces += (literal, int(match[1]) - 1)
            literal = ""
    pieces.append(literal + body[position:])
    words = frozenset(CONTROL.findall(body))
    text = tuple(piece for piece in pieces if piece != "")
    return Macro(name, text, before, delimiters, optional, words)


def read_name(stream: Stream) -> str | None:
    """The name to be defined, braced or not; None where none follows."""
    stream.skip("*")
    stream.skip_blanks()
    if stream.peek() == "{":
        inside = stream.group()
        name = CONTROL.fullmatch(inside.strip()) if inside is not None else None
        return name[1] if name else None
    return stream.control()


def read_newcommand(stream: Stream) -> tuple[str | None, Macro | None]:
    """`{\\name}[2][default]{body}`: the name, and the macro if it can be one."""
    name = read_name(stream)
    parameters = stream.number()
    optional = stream.bracket() if parameters != 0 else None
    body = stream.argument()
    if name is None or body is None:
        return None, None
    return name, None if parameters is None else make_macro(name, body, parameters, optional=optional)


def read_foreign(stream: Stream) -> tuple[str | None, Macro | None]:
    """xargs' `\\newcommandx{\\name}[2][1=a]{body}`: read, and not used."""
    return read_newcommand(stream)[0], None


def read_def(stream: Stream) -> tuple[str | None, Macro | None]:
    """`\\name#1:#2;{body}`."""
    stream.skip_blanks()
    name = stream.control()
    if name is None and stream.peek() not in ("", "{", "}"):
        name = stream.peek()  # an active character: \\def~{…}
        stream.position += 1
    pattern = _PARAMETER_TEXT.match(stream.text, stream.position) if stream.settle() else None
    if pattern is None or not stream.text.startswith("{", pattern.end()):
        return None, None
    stream.position = pattern.end()
    body = stream.group()
    if name is None or body is None:
        return None, None
    before, *rest = _PARAMETER.split(pattern[0].lstrip())
    numbers, literals = rest[::2], rest[1::2]
    if numbers != [str(place + 1) for place in range(len(numbers))] or pattern[0].endswith("#"):
        return name, None
    return name, _macro(name, body, before.rstrip("\n"), tuple(_delimiter(text) for text in literals), None)


def _delimiter(literal: str) -> re.Pattern[str] | None:
    literal = literal if literal.isspace() else literal.strip()
    return delimiter_pattern(literal) if literal else None


def read_operator(stream: Stream) -> tuple[str | None, Macro | None]:
    """`\\DeclareMathOperator*{\\name}{text}`: stands for `\\operatorname*{text}`."""
    star = "*" if stream.skip("*") else ""
    name, body = read_name(stream), stream.argument()
    if name is None or body is None:
        return None, None
    return name, make_macro(name, f"\\operatorname{star}{{{body.replace('#', '##')}}}", 0)


def read_document_command(stream: Stream) -> tuple[str | None, Macro | None]:
    """`\\NewDocumentCommand{\\name}{O{default} m}{body}`; of xparse's parameters these two kinds."""
    name, specification, body = read_name(stream), stream.argument(), stream.argument()
    if name is None or specification is None or body is None:
        return None, None
    optional, parameters, position = None, 0, 0
    while (match := _XPARSE.match(specification, position)) is not None:
        if match[1]:
            if parameters:
                return name, None
            optional = match[2]
        parameters += 1
        position = match.end()
    if specification[position:].strip() or parameters > MOST_ARGUMENTS:
        return name, None
    return name, make_macro(name, body, parameters, optional=optional)


def read_paired_delimiter(stream: Stream) -> list[Macro]:
    """mathtools' `\\DeclarePairedDelimiter{\\abs}{\\lvert}{\\rvert}`, for \\abs{x}, \\abs*{x}, \\abs[\\big]{x}."""
    name, left, right = read_name(stream), stream.argument(), stream.argument()
    if name is None or left is None or right is None or "#" in left + right:
        return []
    macros = (
        make_macro(name, f"\\@ifstar{{\\{name}@star}}{{\\{name}@plain}}", 0),
        make_macro(f"{name}@star", f"\\left{left} #1 \\right{right}", 1),
        make_macro(f"{name}@plain", f"#1{left} #2 #1{right}", 2, optional=""),
    )
    return [macro for macro in macros if macro is not None]


def read_environment(stream: Stream) -> None:
    """`{name}[1][default]{begin}{end}`: read, and left alone."""
    stream.skip("*")
    stream.argument()
    if stream.number():
        stream.bracket()
    stream.argument()
    stream.argument()


def read_let(stream: Stream) -> tuple[str | None, str | None]:
    """`\\name=\\other`: both names, the second with its backslash (or the character it is)."""
    stream.skip_blanks()
    name = stream.control()
    stream.skip("=")
    stream.skip_blanks()
    if not stream.settle() or stream.peek() in "{}":
        stream.position += 1
        return name, None
    return name, stream.argument()
