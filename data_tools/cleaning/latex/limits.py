"""What bounds the cleaning of one paper, and how a paper that cannot be cleaned is given up.

TeX is a programming language: a hundred bytes can expand to gigabytes, or for ever. Every character that is read as an
argument, written by a macro or visited in a search is paid for out of one account, so the time of a paper is bounded
by its size; a paper that overdraws is given up as a whole, as half of an expanded paper is worth nothing.
"""

from dataclasses import dataclass


class Unfit(Exception):
    """A paper that cannot be cleaned; `reason` is short snake_case."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Account:
    """Characters that may still be handled."""

    left: int

    def pay(self, characters: int) -> None:
        """Raises Unfit."""
        self.left -= characters
        if self.left < 0:
            raise Unfit("expansion_too_large")
