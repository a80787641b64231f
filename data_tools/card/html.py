"""HTML in which nothing that was read can become markup: what is not `Html` already is escaped when it is put in."""

import html
import re
from collections.abc import Iterable

# Characters that would hide, reorder or end text: controls, marks of direction, lone surrogates.
CONTROLS = "\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff"
DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
UNSEEN = re.compile(f"[{CONTROLS}{DIRECTIONS}\ud800-\udfff]")


class Html(str):
    """Markup, as opposed to text."""


def shown(text: str) -> str:
    r"""The text with what would hide or reorder it written out: \x1b, \u202e."""
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def markup(child: object) -> Html:
    """A child of an element: markup as it is, text escaped, the parts of anything else one after the other."""
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int | float):
        return Html(html.escape(shown(str(child))))
    if isinstance(child, Iterable):
        return Html("".join(map(markup, child)))
    raise TypeError(f"{type(child).__name__} is no part of a page")


def element(name: str, *children: object, **attributes: object) -> Html:
    """<name attributes>children</name>; of attributes, `class_` is class, and `text_anchor` text-anchor."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{markup(str(value))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{markup(children)}</{name}>")
