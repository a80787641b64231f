"""Whether two final answers of a mathematics problem, written in LaTeX, say the same. No torch.

Answers are brought to one form (no units, no spaces, `\\frac12` and `\\dfrac{1}{2}` alike), as Lewkowycz et al. (2022,
appendix D) do; then equal texts are equal answers. Besides, what can be computed is compared as a number, in which each
variable has a value of its own: expressions that agree there to ten digits are the same (they ask SymPy to simplify the
difference). Tuples, sets and intervals are compared part by part.
"""

import math
import random
import re
import string

LONGEST = 200  # characters that are parsed: no answer is longer, and nesting is bounded by it
DIGITS = 10  # in which equal numbers agree

VALUES = {letter: random.Random(letter).uniform(1, 2) for letter in string.ascii_letters}  # of variables
WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3}")  # three variables in a row are more likely a word
MIXED = r"\d+\\frac\{\d+\}\{\d+\}"  # 2\frac{1}{3}
SPACING = re.compile(r"\\[!,;:> ]|\\(?:quad|qquad|left|right|displaystyle|limits)(?![A-Za-z])|~")
UNITS = re.compile(
    r"(?:square|cubic)?(?:dollars?|cents?|degrees?|units?|inch(?:es)?|feet|foot|ft|yards?|miles?|mph|km|cm|mm|meters?"
    r"|minutes?|hours?|seconds?|days?|weeks?|years?|pounds?|gm|grams?|kg|points?|ways?|students?|people|edges|digits"
    r"|multiples|integers|percent)(?:\^\{?[23]\}?)?$"
)
UNIT_TEXT = re.compile(r"\\(?:text|mbox|mathrm)\{([^{}]*)\}(?:\^\{?[23]\}?)?")
TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|mathrm|mathbf|textnormal|overline)\{([^{}]*)\}")


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{} or \\fbox{} of a text, or None."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[text.index("box", start) + 3 :]
    rest = rest.removeprefix("ed").lstrip(" ")
    if not rest.startswith("{"):
        return rest.split("$")[0].split()[0] if rest.split("$")[0].split() else None
    depth = 0
    for place, char in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return rest[1:place]
    return None


def normalised(answer: str) -> str:
    """One form for answers that differ in how they are written only."""
    answer = answer.replace("\\$", "").strip().rstrip(".")
    if (inside := re.fullmatch(r"[^$]*\$([^$]+)\$[^$]*", answer)) is not None:
        answer = inside[1]
    answer = answer.replace("$", "").replace("\\%", "").replace("%", "").strip().rstrip(".")
    answer = re.sub(r"\^\{?\\circ\}?", "", answer).replace("\\cdot", "*").replace("\\times", "*")
    answer = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", answer)
    answer = SPACING.sub("", answer)
    answer = re.sub(r"\s*,?\s*\\(?:text|mbox)\{\s*(?:and|or)\s*\}\s*", ",", answer)
    without = UNIT_TEXT.sub(_without_unit, answer)
    answer = TEXT.sub(r"\1", without if without.strip() else answer)
    answer = re.sub(r"^(?:the answer is|an?)\s+", "", answer.strip(), flags=re.IGNORECASE)
    answer = answer.replace(" ", "")
    if re.fullmatch(r"[A-Za-z](?:\([a-z]\))?=[^=]+", answer):  # x = 5
        answer = answer.partition("=")[2]
    answer = re.sub(r"^[A-Za-z]\\in(?![A-Za-z])", "", answer)
    if any(char.isdigit() for char in answer) and UNITS.sub("", answer):
        answer = UNITS.sub("", answer)
    answer = re.sub(r"([\^_])\{(\w)\}", r"\1\2", answer)
    answer = re.sub(r"\\sqrt([^\[{\\])", r"\\sqrt{\1}", answer)
    answer = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"\\frac([^{\\])\{", r"\\frac{\1}{", answer)
    answer = re.sub(r"\\frac(\{[^{}]*\})([^{\\])", r"\\frac\1{\2}", answer)
    answer = re.sub(r"(?<=\d)\{?,\}?(?=\d{3}(?:\D|$))", "", answer) if _one_number(answer) else answer
    answer = re.sub(r"(?<![\d.])\.(?=\d)", "0.", answer)
    answer = re.sub(r"(\d+\.\d*?)0+(?!\d)", r"\1", answer)
    answer = re.sub(r"(\d+)\.(?!\d)", r"\1", answer)
    return re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", answer)


def _without_unit(found: re.Match[str]) -> str:
    return "" if UNITS.fullmatch(found[1].replace(" ", "").lower()) else found[0]


def _one_number(answer: str) -> bool:
    """Whether the commas in it are between thousands, not between the parts of a tuple."""
    return re.fullmatch(r"-?\d{1,3}(?:\{?,\}?\d{3})+(?:\.\d+)?", answer) is not None


def canonical(answer: str) -> str:
    """The same text for the same answers, whatever they are: numbers by their value, lists by their parts."""
    return _canonical(normalised(answer)) if len(answer) <= 5 * LONGEST else answer.strip()


def _canonical(answer: str) -> str:
    listed = _parts(answer)
    if listed is not None:
        brackets, parts = listed
        parts = [_canonical(part) for part in parts]
        return brackets + ",".join(sorted(set(parts)) if brackets == "{}" else parts)
    value = None if re.fullmatch(r"-?[1-9]\d*", answer) else number(answer)
    if value is None:
        return answer
    value += 0.0  # -0 becomes 0
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.{DIGITS}g}"


def equal(one: str | None, other: str | None) -> bool:
    """Whether two answers, not yet normalised, are the same; None is equal to nothing."""
    return one is not None and other is not None and canonical(one) == canonical(other) != ""


def _parts(answer: str) -> tuple[str, list[str]] | None:
    """Of a tuple, set or interval, or a bare list: its brackets and what stands between commas."""
    brackets, inner = "", answer
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if answer.startswith(opening) and answer.endswith(closing) and len(answer) > len(opening) + len(closing):
            brackets, inner = opening.strip("\\") + closing.strip("\\"), answer[len(opening) : -len(closing)]
            break
    parts, depth, start = [], 0, 0
    for place, char in enumerate(inner):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(inner[start:place])
            start = place + 1
    parts.append(inner[start:])
    return (brackets, parts) if len(parts) > 1 and len(answer) <= LONGEST else None


def number(answer: str) -> float | None:
    """The value of a normalised answer of numbers, variables, + - * / ^, \\frac, \\sqrt, \\pi, brackets; else None."""
    if len(answer) > LONGEST or WORD.search(answer):
        return None
    tokens = re.findall(r"\d+\.\d+|\d+|\\[A-Za-z]+|\S", answer)
    try:
        value, rest = _sum(tokens)
    except (ValueError, IndexError, ZeroDivisionError, OverflowError, RecursionError):
        return None
    return value if not rest and isinstance(value, float) and math.isfinite(value) else None


def _sum(tokens: list[str]) -> tuple[float, list[str]]:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        sign = 1 if tokens[0] == "+" else -1
        term, tokens = _product(tokens[1:])
        value += sign * term
    return value, tokens


def _product(tokens: list[str]) -> tuple[float, list[str]]:
    if tokens[0] in "+-":
        value, rest = _product(tokens[1:])
        return (value if tokens[0] == "+" else -value), rest
    mixed = re.match(MIXED, "".join(tokens)) is not None
    value, tokens = _power(tokens)
    while tokens and tokens[0] not in ("+", "-", ")", "]", "}", "^", ","):
        if tokens[0] in "*/":
            factor, rest = _power(tokens[1:])
            value = value * factor if tokens[0] == "*" else value / factor
        else:
            factor, rest = _power(tokens)
            value = value + factor if mixed else value * factor
        mixed, tokens = False, rest
    return value, tokens


def _power(tokens: list[str]) -> tuple[float, list[str]]:
    base, tokens = _atom(tokens)
    if tokens and tokens[0] == "^":
        exponent, tokens = _signed_atom(tokens[1:])
        power: float | complex = base**exponent
        if not isinstance(power, float):
            raise ValueError("not real")
        base = power
    return base, tokens


def _signed_atom(tokens: list[str]) -> tuple[float, list[str]]:
    if tokens[0] == "-":
        value, rest = _atom(tokens[1:])
        return -value, rest
    return _atom(tokens)


def _atom(tokens: list[str]) -> tuple[float, list[str]]:
    first, rest = tokens[0], tokens[1:]
    if first[0].isdigit():
        return float(first), rest
    if first == "\\pi":
        return math.pi, rest
    if first in VALUES:
        return VALUES[first], rest
    if first == "\\frac":
        above, rest = _atom(rest)
        below, rest = _atom(rest)
        return above / below, rest
    if first == "\\sqrt":
        degree = 2.0
        if rest[0] == "[":
            degree, rest = _enclosed(rest, "]")
        radicand, rest = _atom(rest)
        if radicand < 0:
            raise ValueError("not real")
        return radicand ** (1 / degree), rest
    if first in ("(", "{"):
        return _enclosed(tokens, ")" if first == "(" else "}")
    raise ValueError(first)


def _enclosed(tokens: list[str], closing: str) -> tuple[float, list[str]]:
    value, rest = _sum(tokens[1:])
    if rest[0] != closing:
        raise ValueError(rest[0])
    return value, rest[1:]
