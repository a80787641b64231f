"""Wikitext to plain text: every kind of markup, the languages' own names, and brackets that never close."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.cleaning.wikitext import clean_wikitext
from data_tools.cleaning.wikitext_languages import CATEGORIES, FILES, LANGUAGES, TRAILING, site_of

CASES = {
    "link": ("See [[Paris]] and [[Paris|the city]].", "See Paris and the city."),
    "link with trail": ("two [[bus]]es", "two buses"),
    "link with a bracket inside": ("[[a|b [c] d]] [[a|b [c]]]", "b [c] d b [c]"),
    "link with two bars": ("[[a|b|c]]", "b|c"),
    "link to a section": ("[[Paris#History|its history]]", "its history"),
    "link over two lines": ("[[Paris|the\ncity]]", "the\ncity"),
    "link to another project": ("[[wikt:word]] and [[wikt:word|a word]]", "word and a word"),
    "link to another language": ("Text\n[[de:Text]]\n[[zh-min-nan:Text]]", "Text"),
    "visible link to a category": ("[[:Category:Cats]] of [[:de:Katze|Katzen]]", "Category:Cats of Katzen"),
    "title with a colon": ("[[Alien: Covenant]] and [[Mission: Impossible|a film]]", "Alien: Covenant and a film"),
    "category": ("Cats\n[[Category:Cats|*]]", "Cats"),
    "picture": ("a [[File:x.jpg|thumb|left|A [[cat]] on a [http://x.org mat]]] b", "a b"),
    "picture in a picture": ("[[Image:x.jpg|thumb|[[image:y.png]] and [[a|b]]]]text", "text"),
    "external link": ("[http://x.org/a?b=c a text] here", "a text here"),
    "external link with a bracket": ("[https://x.org a [b] c]", "a [b] c"),
    "external link without text": ("see [http://x.org], [//y.org] now", "see, now"),
    "bare address": ("see http://x.org now", "see http://x.org now"),
    "comment": ("a<!-- b -->c", "ac"),
    "comment over lines": ("a\n<!-- b\n\nc -->\nd", "a\nd"),
    "comment that never ends": ("a <!-- b", "a"),
    "template": ("{{Infobox\n| name = x\n| other = {{nested|{{deep}}}}\n}}\n'''X''' is", "X is"),
    "template in brackets": ("X ({{IPA-en|x}}; born 1 May) and Y ({{lang-zh|}})", "X (born 1 May) and Y"),
    "template in a sentence": ("about {{citation needed}}, or so {{cn}}.", "about, or so."),
    "parameter": ("a{{{1|b}}}c {{{{{x}}}}}d", "ac d"),
    "template that never closes": ("a {{b", "a b"),
    "template that never opened": ("a}} b", "a b"),
    "template's words": ("{{convert|10|km|mi}} of {{lang|fr|[[vin|du vin]]}}", "10 km of du vin"),
    "template's words, nested": ("{{nowrap|{{convert|10|km}} of {{unknown}} road}}", "10 km of road"),
    "template's named words": ("{{quote|text=To be|author=S}} {{nowrap|1=a=b}}", "To be a=b"),
    "template's number": ("{{val|6.2|e=18|u=A}}", "6.2×10¹⁸ A"),
    "template's formula": ("{{chem|H|2|O}}{{spaced ndash}}{{frac|1|2}}", "H2O – 1/2"),
    "transliteration": ("{{transl|ar|ALA|ilāh}}", "ilāh"),
    "template with words before": (
        "{{As of|2011}}, {{USS|Hornet|CV-12}} {{ndash}} x{{emdash}}y",
        "As of 2011, USS Hornet – x—y",
    ),
    "template after a comma": ("from the ship, {{coord|1|N}}. Then", "from the ship. Then"),
    "table": ("a\n{| class=x\n! h\n|-\n| c || {| \n|}\n| b\n|}\nd", "a\n\nd"),
    "nested table": ("a\n{|\n|\n{|\n| in\n|}\n| out\n|}\nd", "a\n\nd"),
    "indented table": ("a\n::{|\n| b\n|}\nd", "a\n\nd"),
    "table that never closes": ("a\n{| class=x\n| b\n|-\n| c\n\nText goes on.", "a\n\nText goes on."),
    "table in HTML": ("a<table border=1><tr><td>b<table></table></td></tr></table>c", "a\nc"),
    "reference": ("a<ref>b</ref>c<ref name=x>d {{e</ref>f<ref name='x' />g<REF>h</Ref>", "acfg"),
    "reference over lines": ("a<ref\nname=x>b\n\nc</ref>d", "ad"),
    "named reference with a slash": ('a<ref name="http://x/">b</ref>c', "ac"),
    "reference that never closes": ("a<ref>b", "ab"),
    "list of references": ("a\n<references>\n<ref name=b>c</ref>\n</references>\nd", "a\n\nd"),
    "formula": ("<math>a^{2}\n < {{b}}</math> is", "$a^{2} < {{b}}$ is"),
    "code": ("<code>x = [[y]]</code>, <tt>z</tt>", "x = y, z"),
    "verbatim": ("<nowiki>''[[a]]'' &lt;</nowiki> ''b''", "''[[a]]'' < b"),
    "verbatim block": ("a\n<pre>\n  b\n\n\n  ''c''\n</pre>\nd", "a\n\n\n  b\n\n\n  ''c''\n\n\nd"),
    "program": (
        'a\n<syntaxhighlight lang="c">\nif (a[[1]]) {{\n    x();\n}}\n</syntaxhighlight>',
        "a\n\nif (a[[1]]) {{\n    x();\n}}",
    ),
    "bold and italic": ("'''a''' ''b'' '''''c'''''", "a b c"),
    "apostrophe before bold": ("L'''arbre'' et l''''eau'''", "L'arbre et l'eau"),
    "apostrophe before italic": ("dell'''Aida''", "dell'Aida"),
    "HTML": ("a<br />b <span style='x'>c</span> <small>d</small>", "a\nb c d"),
    "no HTML": ("a < b and c > d, <foo> stays", "a < b and c > d, <foo> stays"),
    "raised": ("10<sup>−6</sup> m<sup>2</sup>, 19<sup>th</sup>, H<sub>2</sub>O", "10⁻⁶ m², 19th, H2O"),
    "entities": (
        "a&nbsp;b &amp;amp; &#8212; &#x2014; &lt;ref&gt; AT&T &unknown;",
        "a b &amp; — — <ref> AT&T &unknown;",
    ),
    "huge entity": ("&#99999999999999999999; &#xFFFFFFFF;", "&#99999999999999999999; &#xFFFFFFFF;"),
    "magic word": ("__NOTOC__a\n__БЕЗ_ОГЛ__\n__init__ stays", "a\n\n__init__ stays"),
    "lists": ("* a\n** b\n# c\n; term : what\n:: d", "a\nb\nc\nterm : what\nd"),
    "rule": ("a\n----\nb", "a\n\nb"),
    "heading": ("a\n== B ==\nc\n===d===<!-- x -->\ne", "a\n\nB\n\nc\n\nd\n\ne"),
    "heading with nothing below": ("a\n== B ==\n=== C ===\n{{x}}\n== D ==\ne", "a\n\nD\n\ne"),
    "equals signs": ("a\n= \n==\n=x\n====", "a\n=\n==\n=x\n===="),
    "heading with markup": ("== [[a|''B'']] ==\nc", "B\n\nc"),
    "notes": ("a\n== References ==\nb\n=== More ===\nc\n== Life ==\nd\n==See Also==\n* e", "a\n\nLife\n\nd"),
    "old line ends": ("a\r\n== B ==\r\nc", "a\n\nB\n\nc"),
    "the cleaner's own marks": ("a\x01b\x02\x030\x03c\x04d\x05", "ab0cd"),
    "nothing": ("{{x}}\n[[Category:y]]", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_markup_becomes_text(name: str) -> None:
    markup, text = CASES[name]
    assert clean_wikitext(markup) == text


def test_serbian_variant_marks_leave_their_text() -> None:
    assert clean_wikitext("-{Linux}- и -{sr-ec: текст; sr-el: tekst}-", site_of("sr")) == "Linux и текст"


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_language_of_the_paper_has_its_own_names(language: str) -> None:
    site = site_of(language)
    for alias in (*FILES[language].split("|"), "File", "Image"):
        assert clean_wikitext(f"a [[{alias.capitalize() or 'File'}:x.jpg|thumb|b]]", site) == "a"
    for alias in (*CATEGORIES[language].split("|"), "category"):
        assert clean_wikitext(f"a [[{alias or 'Category'} : x]]", site) == "a"
    for title in TRAILING[language].split("|"):
        assert clean_wikitext(f"a\n== {title[0].upper() + title[1:]} ==\n* b\n", site) == "a"
        assert clean_wikitext(f"a\n== {title} ==\n* b\n", site, trailing_sections=True) == f"a\n\n{title}\n\nb"
    assert len(LANGUAGES) == 20


def test_names_of_the_dump_itself_are_known() -> None:
    site = site_of("ltg", {6: "Fails", 14: "Kategoreja"})
    assert clean_wikitext("a [[Fails:x.jpg|b [[c]]]] [[kategoreja:d]] [[Attēls:e]]", site) == "a Attēls:e"


def test_templates_words_are_those_of_the_language() -> None:
    french = site_of("fr")
    assert (
        clean_wikitext("au {{s|XIX|e}}, {{unité|12|km}} et {{nombre|3|ans}}", french)
        == "au XIXe siècle, 12 km et 3 ans"
    )
    assert clean_wikitext("au {{s|XIX|e}}, soit", site_of("de")) == "au, soit"
    assert clean_wikitext("au {{Ier siècle}} en {{date|43|||av. J.-C.}}", french) == "au Ier siècle en 43 av. J.-C."
    assert clean_wikitext("({{јез-рус|Москва}}) у {{segle|X}}", site_of("sr")) == "(Москва) у"


def test_romanian_cedillas_are_commas() -> None:
    assert clean_wikitext("a\n== Referinţe ==\nb", site_of("ro")) == "a"


def test_templates_words_are_left_out_by_setting() -> None:
    assert clean_wikitext("a {{convert|10|km}} road", text_templates=False) == "a road"


UNCLOSED = [
    "{{",
    "[[",
    "{|\n",
    "<ref>",
    "<!--",
    "<math>",
    "[http://a ",
    "[[File:a|",
    "[[a|",
    "{{a|",
    "''",
    "'''",
    "=",
    "(",
    "\n==",
    "__A",
]
UNCLOSED += [
    "{{a}}",
    "({{a}}, ",
    "{{a}} ",
    "<b ",
    "&amp",
    "<table>",
    "-{",
    "}}",
    "]]",
    "|}\n",
    "{{nowrap|",
    "[[a|[b",
    ":",
    " ",
    "{{a}},",
    "(,",
    "<ref ",
]
UNCLOSED += ["\n* ", "'''''a'' ", "{{{", "{{lang|fr|[[a", "<nowiki>", "== a ==\n", "[[a]", "=\n", "\n{|"]


@pytest.mark.parametrize("mark", UNCLOSED)
def test_marks_without_end_take_linear_time(mark: str) -> None:
    """200,000 characters in under 10 s (it takes less than one): what is quadratic takes minutes here."""
    text = mark * (200_000 // len(mark))
    start = time.process_time()
    clean_wikitext(text)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("opening", "closing"), [("{{a|", "}}"), ("[[a|", "]]"), ("{|\n|", "\n|}"), ("{{nowrap|", "}}")]
)
def test_deep_nesting_takes_linear_time_and_no_recursion(opening: str, closing: str) -> None:
    start = time.process_time()
    clean_wikitext("x " + opening * 50_000 + closing * 50_000)
    assert time.process_time() - start < 10


PIECES = [
    "[[",
    "]]",
    "{{",
    "}}",
    "{|",
    "|}",
    "|",
    "\n",
    "''",
    "'''",
    "=",
    "<ref>",
    "</ref>",
    "<!--",
    "-->",
    "<b>",
    "(",
    ")",
]
PIECES += [
    "a",
    " ",
    "File:",
    "http://x",
    "[",
    "]",
    ",",
    "nowrap|",
    "&lt;",
    "<nowiki>",
    "</nowiki>",
    "*",
    ":",
    "lang|",
    "<math>",
]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_mixture_of_marks_is_read_and_leaves_none_of_the_cleaners_own(markup: str) -> None:
    text = clean_wikitext(markup)
    assert not any(mark in text for mark in "\x01\x02\x03\x04\x05")
    assert text == text.strip()


@given(st.text(alphabet=st.characters(categories=["L", "Nd"]), min_size=1).filter(lambda text: text.isprintable()))
def test_words_without_markup_stay(text: str) -> None:
    assert clean_wikitext(text) == text


@given(
    st.recursive(st.just("{{a}}"), lambda inner: st.lists(inner, max_size=3).map(lambda x: "{{b|" + "|".join(x) + "}}"))
)
def test_nested_templates_vanish_whole(template: str) -> None:
    assert clean_wikitext(f"x {template} y") == "x y"


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        # the first sentence of "Arithmetic mean" in the English Wikipedia
        (
            "the '''arithmetic mean''' ({{IPAc-en|x}} {{respell|ARR|ith}}), or just the ''mean''",
            "the arithmetic mean, or just the mean",
        ),
        ("X ([[File:a.ogg]]), y", "X, y"),
        ("X (<small>{{a}}</small>); y", "X; y"),
        ("X ({{a}}) y", "X y"),
        ("X ({{a}}; {{b}}). Y", "X. Y"),
        ("X (({{a}})), y", "X, y"),
        ("Code (ANSI, {{IPAc-en}} {{respell}}) is", "Code (ANSI) is"),
        ("Code (ANSI, {{a}}; {{b}}) is", "Code (ANSI) is"),
        ("Code (ANSI {{a}} {{b}}<ref>c</ref>) is", "Code (ANSI) is"),
        ("Code ({{a}} {{b}} ANSI) is", "Code (ANSI) is"),
        ("a {{x}} {{y}} b", "a b"),
        ("a<ref>x</ref> {{y}}b", "a b"),
    ],
)
def test_what_is_gone_leaves_no_hole(wikitext: str, text: str) -> None:
    assert clean_wikitext(wikitext) == text


def test_a_hundred_thousand_empty_brackets_are_closed_in_time() -> None:
    assert clean_wikitext("(" * 100_000 + "{{a}}" + ")" * 100_000)
    assert clean_wikitext("a " + "({{a}} " * 50_000 + ")" * 50_000 + ", b")
    assert clean_wikitext("a " + "({{a}}), " * 50_000 + "b").startswith("a,")
