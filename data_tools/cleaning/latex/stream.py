"""The text a paper's macros are expanded in, read from left to right as TeX reads it.

What a macro stands for is put in front of the rest and read again, so the text is a stack: the paper below, the texts
of macros above. A text that has been read to its end is taken away before another is put on, and so a macro that calls
itself at its end does not pile up.
"""

import re

from data_tools.cleaning.latex.limits import Account
from data_tools.cleaning.latex.scan import MARK_CLOSE, MARK_OPEN

CONTROL = re.compile(r"\\([A-Za-z@]+|.)", re.S)
_FLAT_GROUP = re.compile(r"\{([^{}\\]*)\}")
_BRACES = re.compile(r"\\.|[{}]", re.S)
_BLANKS = re.compile(r"\s*")
_NUMBER = re.compile(r"\s*(\d+)\s*\Z")

PUSH_COST = 32  # of replacing a macro, in characters read
State = tuple[str, int, tuple[tuple[str, int], ...]]


class Stream:
    def __init__(self, text: str, account: Account) -> None:
        self.text = text
        self.position = 0
        self._below: list[tuple[str, int]] = []
        self._account = account

    @property
    def in_macro(self) -> bool:
        """Whether what is read next was written by a macro."""
        return bool(self._below)

    def settle(self) -> bool:
        """Leaves texts that are read to their end; False at the end of everything."""
        while self.position >= len(self.text):
            if not self._below:
                return False
            self.text, self.position = self._below.pop()
        return True

    def push(self, text: str) -> None:
        """Puts text in front of the rest."""
        self._account.pay(len(text) + PUSH_COST)
        if text:
            if self.position < len(self.text):
                self._below.append((self.text, self.position))
            elif not self._below:
                self._below.append(("", 0))  # still the text of a macro
            self.text, self.position = text, 0

    def state(self) -> State:
        """To return to with `restore`."""
        self._account.pay(len(self._below))
        return self.text, self.position, tuple(self._below)

    def restore(self, state: State) -> None:
        self.text, self.position = state[:2]
        self._below = list(state[2])

    def peek(self) -> str:
        """The next character, nothing at the end."""
        return self.text[self.position] if self.settle() else ""

    def starts_with_token(self, text: str) -> bool:
        """Whether the text comes next; one that ends in a command's name, as that command."""
        if not self.settle() or not self.text.startswith(text, self.position):
            return False
        end = self.position + len(text)
        return not (ends_in_name(text) and self.text[end : end + 1].isalpha())

    def skip_blanks(self) -> None:
        while self.settle() and self.text[self.position].isspace():
            blanks = _BLANKS.match(self.text, self.position)
            assert blanks is not None
            self._account.pay(blanks.end() - self.position)
            self.position = blanks.end()

    def skip(self, char: str) -> bool:
        """Reads the character (and blanks before it) if it comes next."""
        state = self.state()
        self.skip_blanks()
        if self.peek() == char:
            self.position += 1
            return True
        self.restore(state)
        return False

    def control(self) -> str | None:
        """The name of the control sequence that comes next (`\\csname …\\endcsname` too), read; None if none does."""
        if not self.settle():
            return None
        match = CONTROL.match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        if match[1] == "csname":
            end = self.text.find("\\endcsname", self.position)
            self._account.pay((end if end >= 0 else len(self.text)) - self.position)
            if end < 0:
                return None
            name = self.text[self.position : end].strip()
            self.position = end + len("\\endcsname")
            return name if name and "\\" not in name else None
        return match[1]

    def group(self) -> str | None:
        """What is between the braces that come next, read; None where they do not close."""
        if self.peek() != "{":
            return None
        flat = _FLAT_GROUP.match(self.text, self.position)
        if flat:
            self._account.pay(flat.end() - self.position)
            self.position = flat.end()
            return flat[1]
        depth, start = 0, self.position
        for match in _BRACES.finditer(self.text, start):
            if match[0] == "{":
                depth += 1
            elif match[0] == "}":
                depth -= 1
                if depth == 0:
                    self._account.pay(match.end() - start)
                    self.position = match.end()
                    return self.text[start + 1 : match.start()]
        self._account.pay(len(self.text) - start)
        return None

    def argument(self) -> str | None:
        """An argument as TeX takes it: a group without its braces, or one token. None where there is none."""
        self.skip_blanks()
        char = self.peek()
        if char == "{":
            return self.group()
        if char in ("", "}"):
            return None
        start = self.position
        if char == "\\":
            match = CONTROL.match(self.text, start)
            self.position = match.end() if match else start + 1
        elif char == MARK_OPEN:
            self.position = self.text.index(MARK_CLOSE, start) + 1
        else:
            self.position += 1
        self._account.pay(self.position - start)
        return self.text[start : self.position]

    def bracket(self) -> str | None:
        """What is between the square brackets that come next (blanks before them allowed), read; else None."""
        state = self.state()
        self.skip_blanks()
        if self.peek() == "[":
            self.position += 1
            inside = self.until(_CLOSING_BRACKET)
            if inside is not None:
                return inside
        self.restore(state)
        return None

    def until(self, delimiter: re.Pattern[str]) -> str | None:
        """The text up to the delimiter outside of braces; both are read. None where it does not come.

        `delimiter`: made by `delimiter_pattern`.
        """
        if not self.settle():
            return None
        depth, start = 0, self.position
        for match in delimiter.finditer(self.text, start):
            found = match[0]
            if match[1] is not None and depth == 0:
                self._account.pay(match.end() - start)
                self.position = match.end()
                return self.text[start : match.start()]
            if found == "{":
                depth += 1
            elif found == "}":
                depth -= 1
                if depth < 0:
                    break
        self._account.pay(len(self.text) - start)
        return None

    def number(self) -> int | None:
        """A number in brackets, read; 0 where there are no brackets, None where they hold something else."""
        inside = self.bracket()
        if inside is None:
            return 0
        match = _NUMBER.match(inside)
        return int(match[1]) if match and len(match[1]) == 1 else None


def delimiter_pattern(delimiter: str) -> re.Pattern[str]:
    """Finds the delimiter (group 1), and what must be passed over on the way."""
    if delimiter.isspace():
        wanted = r"\s+"
    else:
        wanted = re.escape(delimiter) + ("(?![A-Za-z@])" if ends_in_name(delimiter) else "")
    return re.compile(rf"({wanted})|\\(?:[A-Za-z@]+|.)|[{{}}]", re.S)


def ends_in_name(text: str) -> bool:
    return re.search(r"\\[A-Za-z@]+\Z", text) is not None


_CLOSING_BRACKET = delimiter_pattern("]")
