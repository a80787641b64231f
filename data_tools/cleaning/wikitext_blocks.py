"""What nests or hides text in wikitext: comments, tags whose inside is not wikitext, templates, tables.

Each is found by one scan over its marks with a stack, so brackets that never close cost no more than others.
`GONE` is left where something inside a sentence was taken out, for the cleaner to close the gap.
"""

import html
import re
from collections.abc import Callable, Mapping

from data_tools.cleaning.wikitext_languages import CHARACTER_TEMPLATES, TONGUES, Kept

# Control characters, which XML cannot hold, mark places between the passes.
GONE = "\x01"  # something was removed here
KEPT, KEPT_END = "\x02", "\x03"  # around the number of a text put aside
PIPE = "\x05"  # a | inside a link inside a template's parameter
TO_RAISED = str.maketrans("0123456789+-−–", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻")
MARKS = (GONE, KEPT, KEPT_END, PIPE)

VERBATIM_TAGS = "nowiki|pre|syntaxhighlight|source|math|chem|ce"
DROPPED_TAGS = (
    "ref|references|gallery|timeline|score|hiero|graph|mapframe|maplink|imagemap|templatestyles|templatedata"
    "|indicator|inputbox|categorytree|charinsert|includeonly|section|rss|phonos"
)
EXTENSION_TAGS = f"{VERBATIM_TAGS}|{DROPPED_TAGS}"
LONGEST_EXPANDED = 20_000  # characters of a template whose words are kept
FIRST = Kept((1,))
DEEPEST_EXPANDED = 4  # of such templates inside each other

_EXTENSIONS = re.compile(rf"<!--|<(/?)({EXTENSION_TAGS})(?=[\s/>])([^<>]*)>", re.IGNORECASE)
_CLOSINGS = {tag: re.compile(rf"</{tag}\s*>", re.IGNORECASE) for tag in EXTENSION_TAGS.split("|")}
_BRACES = re.compile(r"\{\{+|\}\}+")
_TABLE = "[tT][aA][bB][lL][eE]"  # not by IGNORECASE, which would slow the search for the other marks
_TABLES = re.compile(rf"(?P<wiki>\{{\|)|(?P<wikiend>\|\}})|(?P<html><{_TABLE}\b[^<>]*>)|(?P<htmlend></{_TABLE}\s*>)")
INDENT_CHARACTERS = 64  # that may stand before a table's mark on its line
_OPEN_TABLE = re.compile(r"\{\|[^\n]*(?:\n[ \t]*[|!][^\n]*)*")
_SINGLE_LINK = re.compile(r"\[\[[^\[\]]*+\]\]")


def without_extensions(text: str, aside: list[str]) -> str:
    """Without comments and the tags whose inside is not wikitext; what is kept of these is put `aside`."""
    if "<" not in text:
        return text
    out: list[str] = []
    position = 0
    unclosed: set[str] = set()
    while match := _EXTENSIONS.search(text, position):
        out.append(text[position : match.start()])
        position = match.end()
        if match[2] is None:
            position = _after_comment(text, match.start(), position)
            continue
        tag = match[2].lower()
        if match[1] or tag in unclosed or match[3].rstrip().endswith("/"):
            continue
        closing = _CLOSINGS[tag].search(text, position)
        if closing is None:
            unclosed.add(tag)
            continue
        if tag in VERBATIM_TAGS.split("|"):
            out.append(_put_aside(tag, match[3], text[position : closing.start()], aside))
        position = closing.end()
    out.append(text[position:])
    return "".join(out)


def _after_comment(text: str, start: int, inside: int) -> int:
    """Where text goes on after a comment, which takes the line end with it where it has the line for itself."""
    end = text.find("-->", inside)
    if end < 0:
        return len(text)  # as MediaWiki does
    end += 3
    alone = (start == 0 or text[start - 1] == "\n") and text[end : end + 1] == "\n"
    return end + 1 if alone else end


def _put_aside(tag: str, attributes: str, inside: str, aside: list[str]) -> str:
    if tag == "math":
        inside = f"${' '.join(html.unescape(inside).split())}$"
    elif tag in ("syntaxhighlight", "source"):
        inside = inside.strip("\n")
    else:
        inside = html.unescape(inside)
    if not inside.strip() or inside == "$$":
        return ""
    aside.append(inside)
    mark = f"{KEPT}{len(aside) - 1}{KEPT_END}"
    block = tag == "pre" or (tag in ("syntaxhighlight", "source") and "inline" not in attributes)
    return f"\n{mark}\n" if block else mark


def _cut(text: str, regions: list[tuple[int, int]], replacement: Callable[[str], str]) -> str:
    """The text with each region replaced; regions are in order and do not overlap."""
    if not regions:
        return text
    out: list[str] = []
    position = 0
    for start, end in regions:
        out += (text[position:start], replacement(text[start:end]))
        position = end
    out.append(text[position:])
    return "".join(out)


def _add_region(regions: list[tuple[int, int]], start: int, end: int) -> None:
    """Adds a region that closed; those inside it closed before."""
    while regions and regions[-1][0] >= start:
        regions.pop()
    regions.append((start, end))


def without_templates(text: str, kept: Mapping[str, Kept], *, depth: int = DEEPEST_EXPANDED) -> str:
    """Without {{…}} and {{{…}}}, nested however deep; those in `kept` leave their words, `depth` levels of them."""
    if "{{" not in text:
        return _BRACES.sub("", text) if "}}" in text else text
    regions: list[tuple[int, int]] = []
    open_runs: list[list[int]] = []  # [end of the run of braces, how many of it are open]
    for match in _BRACES.finditer(text):
        count = match.end() - match.start()
        if text[match.start()] == "{":
            open_runs.append([match.end(), count])
            continue
        end = match.start()
        while count >= 2 and open_runs:
            run = open_runs[-1]
            taken = 3 if count >= 3 and run[1] >= 3 else 2
            end, count, run[1] = end + taken, count - taken, run[1] - taken
            _add_region(regions, run[0] - taken, end)
            run[0] -= taken
            if run[1] < 2:
                open_runs.pop()
    text = _cut(text, regions, lambda template: _words_of(template, kept, depth) if kept and depth else GONE)
    return _BRACES.sub("", text) if "{{" in text or "}}" in text else text


def _words_of(template: str, kept: Mapping[str, Kept], depth: int) -> str:
    """The words a template of the table carries, or GONE."""
    if len(template) > LONGEST_EXPANDED or template.startswith("{{{"):
        return GONE
    name, bar, rest = template[2:-2].partition("|")
    name = name.strip().replace("_", " ").lower()
    if not bar:
        name, _, rest = name.partition(":") if name.startswith("formatnum:") else (name, "", "")
        if not rest:
            return CHARACTER_TEMPLATES.get(name, GONE)
    wanted = FIRST if name.startswith(TONGUES) else kept.get(name)
    if wanted is None:
        return CHARACTER_TEMPLATES.get(name, GONE)
    rest = _SINGLE_LINK.sub(lambda link: link[0].replace("|", PIPE), rest)
    return _parameters(without_templates(rest, kept, depth=depth - 1), wanted).replace(PIPE, "|") or GONE


def _parameters(text: str, kept: Kept) -> str:
    """The wanted parameters of a template; a number's power of ten (e=) and unit (u=) belong to it."""
    values: list[str] = []
    named: dict[str, str] = {}
    for value in text.split("|"):
        key, equals, rest = value.partition("=")
        if equals and key.strip().isalnum():
            named[key.strip()] = rest.strip()
        else:
            values.append(value.strip())
    for number in range(len(values) + 1, 4):
        values += [named[str(number)]] if str(number) in named else []
    chosen = [values[p - (p > 0)] for p in kept.positions if abs(p) <= len(values)] if kept.positions else values
    words = kept.between.join(word for word in chosen if word) or named.get("text", "")
    power = f"×10{named['e'].translate(TO_RAISED)}" if "e" in named else ""
    unit = named.get("u") or named.get("ul")
    return f"{kept.before}{words}{power}{f' {unit}' if unit else ''}{kept.after}" if words else ""


def without_tables(text: str) -> str:
    """Without {|…|} and <table>…</table>, nested; of one that never closes, the lines that look like a table's."""
    if "{|" not in text and "<table" not in text.lower():
        return text
    regions: list[tuple[int, int]] = []
    stack: list[tuple[int, str]] = []
    for match in _TABLES.finditer(text):
        kind = match.lastgroup or ""
        if kind.startswith("wiki") and not _begins_line(text, match.start()):
            continue
        if not kind.endswith("end"):
            stack.append((match.start(kind), kind))
        elif any(kind.startswith(opened) for _, opened in stack[-1:]):
            _add_region(regions, stack.pop()[0], match.end())
    text = _cut(text, regions, lambda _: "\n") if regions else text
    return _OPEN_TABLE.sub("\n", text) if stack else text


def _begins_line(text: str, position: int) -> bool:
    """Whether only indentation stands before this on its line."""
    start = max(0, position - INDENT_CHARACTERS)
    line_end = text.rfind("\n", start, position)
    return (line_end >= 0 or start == 0) and not text[line_end + 1 if line_end >= 0 else 0 : position].strip(" :*#;")
