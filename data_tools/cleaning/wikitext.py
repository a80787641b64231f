"""Wikitext to plain text: "removing hyperlinks, comments and other formatting boilerplate" (the paper, section 2.1).

What becomes of what:

    [[target|text]], [[text]]s     text, texts; of a link to another project ([[wikt:word]]) the word
    [[File:…]], [[Category:…]]     nothing, captions included, in every spelling of the language; nor links to the same
                                   article in other languages
    [http://… text], [http://…]    text; nothing. A bare URL stays
    <!-- -->, <ref>, <gallery> …   nothing (DROPPED_TAGS)
    {{template}}                   nothing, except those that carry words of their sentence (TEXT_TEMPLATES); commas
                                   and brackets that stood around what is gone go with it
    {| table |}, <table>           nothing
    <math>, <chem>                 $TeX$ as it stands; the formula as it stands
    <nowiki>, <pre>, <syntaxhighlight>   their text untouched, spaces and line ends included
    <code> and other HTML          the text inside; <br> and block tags are line ends; <sup>2</sup> is ²
    == Heading ==                  its text, a line between blank lines; left out where nothing is left below it
    == References == …             left out with all below it, where `trailing_sections` is set (the site's table)
    * item, # item, : indented     a line without its mark
    ''italic'', '''bold'''         the text; apostrophes as MediaWiki counts them, so L'''arbre'' keeps its L'
    &nbsp; &amp; &#8212;           the character; a no-break space is a space
    __NOTOC__, ----                nothing
    -{text}- (Serbian)             text

Every pass is linear in the text's length, also over brackets that never close: what opens and does not close is
looked for once, and only its mark is removed.
"""

import html
import re

from data_tools.cleaning.wikitext_blocks import (
    EXTENSION_TAGS,
    GONE,
    KEPT,
    KEPT_END,
    MARKS,
    TO_RAISED,
    without_extensions,
    without_tables,
    without_templates,
)
from data_tools.cleaning.wikitext_languages import Site, site_of

ENGLISH = site_of("en")

NESTED_GAPS = 3  # brackets around brackets around nothing that are closed up
HEADING = "\x04"  # at the start of a heading's line, followed by its level

BLOCK_TAGS = "br|p|div|li|ul|ol|dl|dt|dd|tr|td|th|table|caption|hr|center|blockquote|poem|h[1-6]"
INLINE_TAGS = (
    "abbr|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|ins|kbd|link|mark|meta|noinclude|onlyinclude|q|rb|rp|rt|rtc"
    "|ruby|s|samp|small|span|strike|strong|sub|sup|time|tt|u|var|wbr|langconvert"
)
_PROJECT = re.compile(
    "wikt|wiktionary|s|wikisource|q|wikiquote|b|wikibooks|n|wikinews|v|wikiversity|commons|m|meta|species"
    "|wikispecies|w|wikipedia|voy|wikivoyage|d|wikidata"
)
_LANGUAGE_CODE = re.compile(r"(?!(?:doi|rfc|pmid|irc|iso|map)$)[a-z]{2,3}(?:-[a-z]+)*|simple")
_LABEL = r"(?:[^\[\]]++|\[[^\[\]]*+\]|\[(?!\[)|\](?!\]))"
_PLAIN_LINK = re.compile(rf"\[\[(?:[^\[\]|:\n]++\|({_LABEL}++)|([^\[\]|:\n]++)\|?)\]\]")
_COLON_LINK = re.compile(rf"\[\[([^\[\]|]*+)(?:\|({_LABEL}*+))?\]\]")
_EXTERNAL_LINK = re.compile(
    r"\[(?:(?:https?:|ftps?:|ircs?:|news:|gopher:)?//|mailto:)[^\s\[\]<>\"]*+"
    r"[ \t]*+((?:[^\[\]\n]++|\[[^\[\]\n]*+\])*+)\]"
)
_HEADING_LINE = re.compile(r"\n=[^\n]*")
_QUOTES = re.compile(r"('{2,})")
_RAISED = re.compile(r"<sup>\s*([0-9+\-−–]{1,20})\s*</sup>", re.IGNORECASE)
_BLOCK = re.compile(rf"</?(?:{BLOCK_TAGS})\b[^<>]*>", re.IGNORECASE)
_INLINE = re.compile(rf"</?(?:{INLINE_TAGS}|{EXTENSION_TAGS})\b[^<>]*>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_MAGIC_WORD = re.compile(r"__((?:[^\W\d_]|_(?!_))++)__")
_VARIANT = re.compile(r"-\{(?:[^{}|:;]*+\|)?([^{}|]*+)\}-")
_KEPT = re.compile(f"{KEPT}([0-9]+){KEPT_END}")
_SPACES = re.compile("  +")
_NO_WORDS = " -–—.,;:·•|"  # a line of only these is a rule, or what is left of something removed
_INVISIBLE = ("\u200b", "\u200e", "\u200f", "\ufeff", "\xad")


def clean_wikitext(
    text: str, site: Site = ENGLISH, *, trailing_sections: bool = False, text_templates: bool = True
) -> str:
    """The text of an article, paragraphs between blank lines; "" where none is left.

    trailing_sections: keep "References", "See also" and their like. text_templates: keep the words of
    TEXT_TEMPLATES.
    """
    for mark in (*MARKS, HEADING):
        text = text.replace(mark, "")
    aside: list[str] = []
    text = without_extensions(text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " "), aside)
    text = without_templates(text, site.text_templates if text_templates else {})
    text = _without_sections(text, frozenset() if trailing_sections else site.trailing_sections)
    text = without_tables(text)
    text = _without_links(text, site)
    text = _without_html(_without_quotes(text))
    text = _without_entities(text)
    text = _lines(_without_gaps(text))
    return _KEPT.sub(lambda match: aside[int(match[1])], text).strip() if aside else text


def _without_sections(text: str, unwanted: frozenset[str]) -> str:
    """Headings as marked lines; sections whose title is unwanted are left out up to the next of their level."""
    text = "\n" + text
    out: list[str] = []
    position = 0
    skipping = 0  # the level of the section being left out
    for match in _HEADING_LINE.finditer(text):
        heading = _heading(match[0][1:])
        if heading is None:
            continue
        level, title = heading
        if not skipping:
            out.append(text[position : match.start()])
        if not skipping or level <= skipping:
            skipping = level if _title_key(title) in unwanted else 0
            if not skipping:
                out.append(f"\n{HEADING}{level}{title}")
        position = match.end()
    if not skipping:
        out.append(text[position:])
    return "".join(out)


def _heading(line: str) -> tuple[int, str] | None:
    line = line.rstrip(f" \t{GONE}")
    left, right = len(line) - len(line.lstrip("=")), len(line) - len(line.rstrip("="))
    level = min(left, right, 6)
    title = line[level:-level].strip() if level else ""
    return (level, title) if title.strip("=") else None


def _title_key(title: str) -> str:
    plain = title.replace("''", "").translate({ord(mark): None for mark in f"[]{GONE}"}).strip("' :").lower()
    return plain.replace("’", "'").replace("ş", "ș").replace("ţ", "ț")


def _without_links(text: str, site: Site) -> str:
    """Links as their text. Two or three rounds: a picture's caption may hold links."""

    def with_colon(match: re.Match[str]) -> str:
        return _text_of_link(match[1].strip(), match[2], site)

    for _ in range(5):
        if "[[" not in text:
            break
        before = len(text)
        text = _COLON_LINK.sub(with_colon, _PLAIN_LINK.sub(r"\1\2", text))
        if len(text) == before:
            break
    text = text.replace("[[", "").replace("]]", "") if "[[" in text else text
    return _EXTERNAL_LINK.sub(lambda match: match[1] or GONE, text) if "//" in text or "mailto:" in text else text


def _text_of_link(target: str, label: str | None, site: Site) -> str:
    prefix, colon, rest = target.partition(":")
    prefix = prefix.strip().replace("_", " ")
    lower = prefix.lower()
    if colon and prefix:
        if lower in site.file_names or lower in site.category_names:
            return GONE
        if _PROJECT.fullmatch(lower):
            return label or rest.strip().lstrip(":")
        if prefix == lower and _LANGUAGE_CODE.fullmatch(lower):
            return GONE
    return (label or "").strip() or target.lstrip(":#/ ")


def _without_html(text: str) -> str:
    if "<" not in text:
        return text
    text = _RAISED.sub(lambda match: match[1].translate(TO_RAISED), text)
    return _INLINE.sub("", _BLOCK.sub("\n", text))


def _without_quotes(text: str) -> str:
    """Without the apostrophes of italic and bold."""
    if "''" not in text:
        return text
    return "\n".join(_line_without_quotes(line) if "''" in line else line for line in text.split("\n"))


def _line_without_quotes(line: str) -> str:
    """MediaWiki's doQuotes: four are one and bold, more than five leave the first ones; where both bold and italic
    are odd in number, one ''' is an apostrophe and italic, best after a word of one letter."""
    if "'''" not in line:
        return line.replace("''", "")
    parts = _QUOTES.split(line)
    marks = parts[1::2]
    extra = [1 if len(mark) == 4 else max(0, len(mark) - 5) for mark in marks]
    bold = [index for index, mark in enumerate(marks) if len(mark) - extra[index] == 3]
    italics = sum(len(mark) - extra[index] in (2, 5) for index, mark in enumerate(marks))
    both = sum(len(mark) - extra[index] == 5 for index, mark in enumerate(marks))
    if (len(bold) + both) % 2 and italics % 2 and bold:
        extra[min(bold, key=lambda index: _apostrophe_rank(parts[2 * index]))] += 1
    parts[1::2] = ["'" * count for count in extra]
    return "".join(parts)


def _apostrophe_rank(before: str) -> int:
    """How badly an apostrophe fits after this text: after a word of one letter, a longer word, a space."""
    if before.endswith(" ") or not before:
        return 2
    return 0 if before[-2:-1] in (" ", "") else 1


def _first_variant(match: re.Match[str]) -> str:
    """-{text}-, or the first of -{sr-ec: текст; sr-el: tekst}-."""
    code, colon, rest = match[1].partition(":")
    return rest.partition(";")[0].strip() if colon and code.strip().startswith("sr") else match[1]


def _without_entities(text: str) -> str:
    """Without entities, magic words, Serbian variant marks and invisible characters."""
    if "__" in text:
        text = _MAGIC_WORD.sub(lambda match: "" if match[1].isupper() else match[0], text)
    if "-{" in text:
        text = _VARIANT.sub(_first_variant, text)
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    for character in _INVISIBLE:
        text = text.replace(character, "")
    return text.replace("\xa0", " ")


def _without_gaps(text: str) -> str:
    """Without the marks of what is gone, and the empty brackets, lone commas and double spaces it leaves behind."""
    first, *parts = text.split(GONE)
    out = [first]
    for part in parts:
        left, right = _closed_gap(out.pop(), part)
        while not left and out:  # nothing stood between two that are gone
            left, right = _closed_gap(out.pop(), right)
        out += (left, right) if right else (left,)
    return _SPACES.sub(" ", "".join(out))


def _closed_gap(left: str, right: str) -> tuple[str, str]:
    """What stands before and after something gone, fitted to each other."""
    for _ in range(NESTED_GAPS):
        if left[-1:] not in ("(", " ", ",", ";", ":") or not (opened := left.rstrip(" ,;:")).endswith("("):
            break
        right = right.lstrip(" ,;:")
        if not right.startswith(")"):
            return opened, right
        left, right = opened[:-1], right[1:]  # the brackets are gone too
    if not right:
        return left, right
    rest = right.lstrip(" ,;")
    if rest.startswith(")"):
        return left.rstrip(" ,;"), rest
    if right[0] in ",.;\n":
        left = left.rstrip(" ")
        left = left[:-1] if right[0] in ",." and left.endswith(",") else left
    return left, right


def _lines(text: str) -> str:
    """Lines without list marks, one blank line between paragraphs, headings with nothing below them left out."""
    out: list[str] = []
    headings: list[tuple[int, str]] = []
    blank = False
    for line in text.split("\n"):
        line = line.strip()
        if line[:1] in ("*", "#", ":", ";"):
            line = line.lstrip("*#:; ")
        if line.startswith(HEADING):
            level = int(line[1])
            while headings and headings[-1][0] >= level:
                headings.pop()
            headings.append((level, line[2:].strip()))
            continue
        if not line or line[0] == "|" or not line.strip(_NO_WORDS):
            blank = True
            continue
        for _, heading in headings:
            out += ("", heading) if heading else ()
        if blank or headings:
            out.append("")
        headings.clear()
        blank = False
        out.append(line)
    return "\n".join(out).strip("\n")
