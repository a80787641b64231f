"""The rules that made C4 out of Common Crawl's pages (Raffel et al. 2020, section 2.2).

A line goes on if it ends in a terminal mark and has enough words, and is no notice about JavaScript, cookies or terms
of use; a page goes on if it holds no lorem ipsum, no curly bracket, no word of a given list, and enough sentences.
The order of the tests, the details the paper leaves out (words of more than 1000 characters, citation marks, "..." is
no end, page rules look only at lines that are still there) and the numbers are those of the code that made the data
set (`clean_page` and `get_badwords_filter_fn` of TensorFlow Datasets). Deviations:

* Sentences are counted by `sentences` below, not by NLTK's punkt model, which would have to be downloaded. Every kept
  line has at least one, so the two can only disagree about pages of one or two kept lines.
* No list of bad words comes with the program: `bad_words` names a file, one word or phrase a line. C4 took the English
  list of LDNOOBW (CC BY 4.0).
* C4 then removes repeated text between pages: three-sentence spans in the paper, lines in the code. That is the
  work of deduplication; `data_tools.dedup.levels` does it.

Drop reasons of pages: c4_too_long, c4_lorem_ipsum, c4_curly_bracket, c4_bad_word, c4_too_few_sentences. Lines taken
out are counted in `Record.counts` as lines_in and lines_long_word, lines_no_end_mark, lines_short, lines_javascript,
lines_policy.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError

END_MARKS = (".", "?", "!", '"')
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")

PAGE_SCOPES = ("kept_lines", "page")


@dataclass(frozen=True)
class C4Settings:
    # The final paper and the code; the paper's first version, and datatrove by default, say 3 words, 5 sentences.
    min_words_per_line: int = 5
    min_sentences: int = 3
    max_word_characters: int = 1000  # the code; a line with a longer word goes
    max_characters: int | None = 190_000  # the code: a longer page goes before anything else; null: any length
    drop_javascript_lines: bool = True
    drop_policy_lines: bool = True
    drop_lorem_ipsum: bool = True
    drop_curly_brackets: bool = True
    # Where lorem ipsum and curly brackets count: "kept_lines", in lines that no rule took out before (the code), or
    # "page", anywhere on the page (the paper's words).
    page_scope: str = "kept_lines"
    bad_words: str | None = None  # a file, one word or phrase a line; null: no such rule
    # C4 looks for whole words, except in Japanese, Thai and Chinese, which do not separate them: false for those.
    bad_words_whole: bool = True


def check_c4_settings(settings: C4Settings) -> None:
    """Raises ConfigError."""
    for name in ("min_words_per_line", "min_sentences", "max_word_characters"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: give at least 1")
    if settings.max_characters is not None and settings.max_characters < 1:
        raise ConfigError(f"max_characters={settings.max_characters}: give at least 1, or null for any length")
    if settings.page_scope not in PAGE_SCOPES:
        raise ConfigError(f"page_scope={settings.page_scope}: choose one of {', '.join(PAGE_SCOPES)}")


def c4_filter(settings: C4Settings) -> Callable[[Record], Record | Dropped]:
    """The rules as a filter. Raises ConfigError when the settings or the file of bad words cannot be used."""
    check_c4_settings(settings)
    has_bad_word = _bad_word_test(settings) if settings.bad_words is not None else None

    def apply(record: Record) -> Record | Dropped:
        if settings.max_characters is not None and len(record.text) > settings.max_characters:
            return Dropped.of(record, "c4_too_long")
        kept, counts, reason = clean_page(record.text, settings)
        if reason is None and has_bad_word is not None and has_bad_word("\n".join(kept).lower()):
            reason = "c4_bad_word"
        if reason is not None:
            return Dropped.of(record, reason)
        record.text = "\n".join(kept).strip()
        for name, count in counts.items():
            record.counts[name] = record.counts.get(name, 0) + count
        return record

    return apply


def clean_page(text: str, settings: C4Settings) -> tuple[list[str], dict[str, int], str | None]:
    """The lines kept, how many were there and went for which reason, and why the page goes (None: it does not)."""
    lines = text.splitlines()
    has_citation = CITATION.search(text) is not None
    # What does not occur on the page need not be looked for in its lines.
    lower = (CITATION.sub("", text) if has_citation else text).lower()
    tests = [test for test in _phrase_tests(settings) if any(phrase in lower for phrase in test[0])]
    if settings.page_scope == "page":
        for _, reason, whole_page in tests:
            if whole_page:
                return [], {}, reason

    kept: list[str] = []
    gone: list[str] = []
    for raw in lines:
        line = raw.strip()
        if len(line) > settings.max_word_characters and max(map(len, line.split())) > settings.max_word_characters:
            gone.append("lines_long_word")
            continue
        if has_citation:
            line = CITATION.sub("", line)  # what is white space at the end now stays, and is no end mark
        if not line.endswith(END_MARKS) or line.endswith("..."):
            gone.append("lines_no_end_mark")
        elif len(line.split(None, settings.min_words_per_line - 1)) < settings.min_words_per_line:
            gone.append("lines_short")
        elif tests and (found := _first_found(line.lower(), tests)):
            reason, whole_page = found
            if whole_page:
                return [], {}, reason
            gone.append(reason)
        else:
            kept.append(line)
    counts = {"lines_in": len(lines), **Counter(gone)}
    return kept, counts, None if _has_sentences(kept, settings.min_sentences) else "c4_too_few_sentences"


_PhraseTest = tuple[tuple[str, ...], str, bool]  # phrases, reason, whether the whole page goes


def _phrase_tests(settings: C4Settings) -> list[_PhraseTest]:
    # In the order of the code: a JavaScript notice with a curly bracket costs the line, not the page.
    tests: list[tuple[bool, _PhraseTest]] = [
        (settings.drop_lorem_ipsum, (("lorem ipsum",), "c4_lorem_ipsum", True)),
        (settings.drop_javascript_lines, (("javascript",), "lines_javascript", False)),
        (settings.drop_curly_brackets, (("{",), "c4_curly_bracket", True)),
        (settings.drop_policy_lines, (POLICIES, "lines_policy", False)),
    ]
    return [test for wanted, test in tests if wanted]


def _first_found(line: str, tests: list[_PhraseTest]) -> tuple[str, bool] | None:
    for phrases, reason, whole_page in tests:
        if any(phrase in line for phrase in phrases):
            return reason, whole_page
    return None


def _has_sentences(lines: list[str], least: int) -> bool:
    # Every line is a sentence at least: they are counted only where that does not settle it.
    return len(lines) >= least or sum(len(sentences(line)) for line in lines) >= least


def _bad_word_test(settings: C4Settings) -> Callable[[str], bool]:
    """Whether a text in lower case holds a bad word. Raises ConfigError.

    Searching for some hundred words everywhere is slow. A whole word that is there shows among the text's words of
    ASCII, by its own first such part: only words whose part is met are searched for exactly.
    """
    words = _read_bad_words(settings.bad_words or "")
    if not settings.bad_words_whole:
        return lambda text: any(word in text for word in words)
    patterns: dict[bytes | None, list[tuple[str, re.Pattern[str]]]] = {None: []}  # None: emoji, other scripts
    for word in words:
        first_part = next(iter(_ascii_words(word)), None)
        patterns.setdefault(first_part, []).append((word, re.compile(rf"(?:\W|^){re.escape(word)}(?:\W|$)")))
    first_parts = frozenset(patterns.keys() - {None})

    def has_bad_word(text: str) -> bool:
        met = first_parts.intersection(_ascii_words(text)) | {None}
        return any(word in text and pattern.search(text) for part in met for word, pattern in patterns[part])

    return has_bad_word


_WORD_BYTES = bytes(code if chr(code).isascii() and (chr(code).isalnum() or code == 95) else 32 for code in range(256))


def _ascii_words(text: str) -> list[bytes]:
    # What is not ASCII becomes "?", and so parts words: of a word with such letters the first ASCII part is looked up.
    return text.encode("ascii", "replace").translate(_WORD_BYTES).split()


def _read_bad_words(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"bad_words={path}: cannot be read ({error}); name a text file, one word a line") from None
    words = sorted({line.strip().lower() for line in text.splitlines()} - {""})
    if not words:
        raise ConfigError(f"bad_words={path}: no word in it; write one a line, or set bad_words=null")
    return words


# A mark, what closes after it, then white space; or a mark of Chinese and Japanese, which need none.
_BOUNDARY = re.compile(r"""[.?!…]+["'”’»)\]]*\s+|[。！？]+["”’」』）]*\s*""")
_OPENING = "\"'“‘«([{"
# Not the end of a sentence before a capital: titles, and what stands before names, numbers and months.
_ABBREVIATIONS = re.compile(
    r"(?:mrs?|ms|dr|prof|rev|gen|col|capt|lt|sgt|sen|rep|gov|hon|st|jr|sr|vs|etc|nos?|figs?|vol|pp?|ch|sec|art|eq|al|ca"
    r"|approx|dept|est|inc|ltd|co|corp|bros|ave|blvd|rd|mt|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tue|wed"
    r"|thu|fri|sat|sun|e\.g|i\.e|u\.s|u\.k|a\.m|p\.m)",
    re.IGNORECASE,
)


def sentences(line: str) -> list[tuple[int, int]]:
    """Where the sentences of a line begin and end. Any line that is not blank has at least one.

    A sentence ends at . ? ! or … and closing quotes or brackets, white space, and a beginning that is no lower-case
    letter; not after an initial or a common abbreviation of English. Chinese and Japanese ends need no white space.
    """
    begin, spans = 0, []
    for match in _BOUNDARY.finditer(line):
        end, following = match.end(), line[match.end() : match.end() + 8].lstrip(_OPENING)
        if following and not following[0].islower() and not _is_abbreviated(line, begin, match.start()):
            spans.append((begin, begin + len(line[begin:end].rstrip())))
            begin = end
    rest = line[begin:].rstrip()
    if rest:
        spans.append((begin, begin + len(rest)))
    return spans


def _is_abbreviated(line: str, begin: int, mark: int) -> bool:
    if line[mark] != "." or line[mark + 1 : mark + 2] in (".", "?", "!"):
        return False
    word = line[max(begin, mark - 12) : mark].rsplit(None, 1)[-1:] or [""]
    last = word[0].lstrip(_OPENING)
    return _ABBREVIATIONS.fullmatch(last) is not None or (len(last) == 1 and last.isupper())
