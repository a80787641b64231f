"""The HTML of a StackExchange post to plain text (the paper, section 2.1: "removed the HTML tags from text").

    <p>, headings, quotes, rules   paragraphs between blank lines
    <pre>                          its text untouched, a paragraph of its own: indentation is Python's syntax
    <code>                         its text as it stands, inside the sentence
    <li>                           a line beginning "- ", or its number in an ordered list; lists in lists indented
    <br>                           a line end
    <a>                            its text; the address is dropped, as readers do not see it
    <img>                          nothing: its text is almost always "enter image description here"
    <table>                        a line a row, cells parted by " | "
    <sup>2</sup>                   ², as in an article

No mark is set around code: RedPajama sets none either, and a post's author seldom would in prose. `fences=True`
sets Markdown's ``` around blocks, for those who want them told apart.
"""

import html
import re

from selectolax.lexbor import LexborHTMLParser, LexborNode

PARAGRAPHS = frozenset(
    ("p", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "hr", "div", "center", "pre")
)
LINES = frozenset(("li", "tr", "dt", "dd"))
NOTHING = frozenset(("script", "style", "img", "iframe", "template"))
GAPS = ("", " ", "\n", "\n\n")
JOINED, SPACE, LINE, PARAGRAPH = range(4)
DEEPEST_LIST = 8  # that is still indented further
# Of a post; true ones have hundreds. A browser's rules for unclosed tags can make the square of them.
MOST_TAGS = 4000
_TAG = re.compile(r"<[^<>]*>")
_RAISED = re.compile(r"[0-9+\-−]{1,20}")
_TO_RAISED = str.maketrans("0123456789+-−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻")


class _Text:
    """Text being put together: words, and how far they stand from those before."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self._gap = JOINED  # before the next words
        self._mark = ""  # of the list's item they begin

    def words(self, text: str) -> None:
        words = " ".join(text.split())
        if text[:1].isspace():
            self.gap(SPACE)
        if words:
            self.verbatim(words)
        if text[-1:].isspace():
            self.gap(SPACE)

    def verbatim(self, text: str) -> None:
        if self.out:
            self.out.append(GAPS[self._gap])
        self.out += (self._mark, text)
        self._gap, self._mark = JOINED, ""

    def gap(self, gap: int) -> None:
        """At least this much before the next words."""
        self._gap = max(self._gap, gap)

    def item(self, mark: str) -> None:
        self._mark = mark


def post_text(body: str, *, fences: bool = False) -> str:
    """The text of a post's HTML; "" where it has none. Never raises: a browser's parser reads anything."""
    if "<" not in body and "&" not in body:
        return body.strip()
    if body.count("<") > MOST_TAGS:
        return html.unescape(_TAG.sub("", body)).strip()
    root = LexborHTMLParser(body).body
    if root is None:
        return ""
    text = _Text()
    lists: list[list[int]] = []  # of each open list: 1 where it is ordered, and the last number
    node: LexborNode | None = root.child
    while node is not None:
        inside = _open(node, text, lists, fences=fences)
        if inside and node.child is not None:
            node = node.child
            continue
        if inside:
            _close(node, text, lists)
        while node is not None and node.next is None:  # up to where there is a next
            node = node.parent
            if node is None or node.mem_id == root.mem_id:
                return "".join(text.out).strip("\n")
            _close(node, text, lists)
        node = node.next if node is not None else None
    return "".join(text.out).strip("\n")


def _open(node: LexborNode, text: _Text, lists: list[list[int]], *, fences: bool) -> bool:
    """What a node does where it begins. False: its inside has been dealt with, or is not wanted."""
    tag = node.tag
    if tag == "-text":
        text.words(node.text(deep=False) or "")
        return False
    if tag is None or tag in NOTHING or tag.startswith(("-", "_", "!")):
        return False
    if tag == "br":
        text.gap(LINE)
        return False
    if tag == "pre":
        code = node.text(deep=True).strip("\n")
        text.gap(PARAGRAPH)
        if code.strip():
            text.verbatim(f"```\n{code}\n```" if fences else code)
        text.gap(PARAGRAPH)
        return False
    if tag == "sup" and (raised := _only_text(node)) and _RAISED.fullmatch(raised):
        text.verbatim(raised.translate(_TO_RAISED))
        return False
    if tag in PARAGRAPHS:
        text.gap(LINE if lists else PARAGRAPH)
    elif tag in LINES:
        text.gap(LINE)
    if tag in ("ul", "ol"):
        lists.append([int(tag == "ol"), 0])
    elif tag == "li":
        kind = lists[-1] if lists else [0, 0]
        kind[1] += 1
        indent = "  " * min(max(0, len(lists) - 1), DEEPEST_LIST)
        text.item(f"{indent}{kind[1]}. " if kind[0] else f"{indent}- ")
    elif tag in ("td", "th") and node.prev is not None and node.parent is not None:
        text.words(" | ")
    return True


def _only_text(node: LexborNode) -> str:
    """The text of an element that holds nothing else."""
    child = node.child
    if child is None or child.tag != "-text" or child.next is not None:
        return ""
    return (child.text(deep=False) or "").strip()


def _close(node: LexborNode, text: _Text, lists: list[list[int]]) -> None:
    tag = node.tag
    if tag in ("ul", "ol") and lists:
        lists.pop()
    if tag in PARAGRAPHS:
        text.gap(LINE if lists else PARAGRAPH)
    elif tag in LINES:
        text.gap(LINE)
        text.item("")  # an empty item marks nothing
