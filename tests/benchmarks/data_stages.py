"""The stages of data_tools to be timed: each with the text it is given, our function, and its peers'.

A stage's contenders do the same work on the same text. What is loaded or built once in a process (models, tables)
is not timed, unless it is what the stage is about (`fresh`). No torch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_tools.cached_encoding import CachedEncoder
from data_tools.cleaning.code_headers import remove_headers
from data_tools.cleaning.code_statistics import alphanumeric_share, line_lengths
from data_tools.cleaning.html import decode_page, read_html
from data_tools.cleaning.latex import clean_paper
from data_tools.cleaning.posts_html import post_text
from data_tools.cleaning.wikitext import clean_wikitext
from data_tools.dedup.exact import HashFile, HashWriter, KeepMask, mark_partition
from data_tools.dedup.lines import KINDS, line_hashes
from data_tools.dedup.near import NearSettings
from data_tools.dedup.shingles import sample, shingles, signature
from data_tools.filters.c4_rules import C4Settings, c4_filter
from data_tools.filters.language import LanguageSettings, language_identifier
from data_tools.filters.quality import QualitySettings, quality_score
from data_tools.language_model import load_ngrams, load_pieces, normalised_lines, page_scorer
from data_tools.records import Record
from data_tools.sources import common_crawl
from llamatrain.tokenizer import Tokenizer
from tests.benchmarks import data_peers as peers
from tests.benchmarks.data_chain import write_wet
from tests.benchmarks.data_models import Models
from tests.benchmarks.data_peers import Pass
from tests.benchmarks.data_texts import Text, Texts

XXH3, SHA1 = KINDS


@dataclass(frozen=True)
class Sizes:
    """Bytes of text for a turn, and hashes; what a turn takes at least, in CPU-seconds."""

    text: int = 2_000_000
    beside_slow: int = 400_000  # where a peer does 0.3 MB a second
    tokens: int = 2_500_000
    seen: int = 40_000_000  # by an encoder before those, of other text
    chain: int = 5_000_000
    hashes: int = 2_000_000
    seconds: float = 0.3


SMOKE = Sizes(
    text=100_000, beside_slow=30_000, tokens=100_000, seen=400_000, chain=100_000, hashes=100_000, seconds=0.02
)


@dataclass(frozen=True)
class Contender:
    name: str
    start: Callable[[], Pass]  # builds and loads what a pass needs; ImportError: not installed
    fresh: bool = False  # started anew, untimed, before every pass
    times_goal: float | None = None  # of a peer: how many times as fast we mean to be


@dataclass(frozen=True)
class Stage:
    name: str
    text: str  # what it is timed on, in words
    size: float  # MB of text, or millions of hashes, in a pass
    ours: Contender
    peers: list[Contender] = field(default_factory=list)
    goal: float | None = None  # of `size` a second
    unit: str = "MB/s"


@dataclass(frozen=True)
class Unmeasured:
    name: str
    why: str


Stages = Iterator[Stage | Unmeasured]


def all_stages(texts: Texts, models: Models, folder: Path, sizes: Sizes) -> Stages:
    """In the order of the chain, then the other sources."""
    english = texts.english[0]
    pages = [english] if texts.web is None else [english, texts.web[0]]
    for text in pages:
        yield reading(text.first(sizes.text), folder)
    yield html(texts.html, sizes)
    for text in pages:
        yield from page_rules(text, sizes)
        yield from language(text.first(sizes.text))
    yield exact_dedup(folder, sizes)
    yield from language_model(english.first(sizes.text), models)
    for text in pages:
        yield quality(text.first(sizes.text), models)
    yield wikipedia(texts.wikitext, sizes)
    yield latex(texts.papers)
    yield posts(texts.posts, sizes)
    yield from code(texts.code.first(sizes.text))
    yield minhash(texts.books, sizes)
    yield from tokens(english, texts.english[1], models, sizes)


def _each(function: Callable[[str], object], texts: Sequence[str]) -> Pass:
    return lambda: [function(text) for text in texts]


def _megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def reading(text: Text, folder: Path) -> Stage:
    """A gzipped WET file: records, their digests checked, decoded. Ours also strips the lines."""
    path = folder / f"{text.kind.replace(' ', '_')}.warc.wet.gz"
    size = write_wet(path, text.documents) / 1e6
    settings = common_crawl.CommonCrawlSettings(min_characters=1)
    return Stage(
        "WET file to pages",
        text.kind,
        size,
        Contender("llamatrain", lambda: lambda: [*common_crawl.read(path, path.name, settings)]),
        [
            Contender("FastWARC", lambda: peers.fastwarc_texts(path)),
            Contender("warcio", lambda: peers.warcio_texts(path)),
        ],
    )


def html(pages: list[bytes] | None, sizes: Sizes) -> Stage | Unmeasured:
    name = "HTML to main text"
    if pages is None:
        return Unmeasured(name, "no web archive at hand")
    taken: list[bytes] = []
    for page in pages:
        if sum(map(len, taken)) < sizes.text:
            taken.append(page)
    return Stage(
        name,
        "HTML of web pages",
        sum(map(len, taken)) / 1e6,
        Contender("llamatrain", lambda: lambda: [read_html(decode_page(page, None)).text for page in taken]),
        [Contender("trafilatura", lambda: peers.trafilatura_texts(taken))],
    )


def page_rules(text: Text, sizes: Sizes) -> Stages:
    """Lines and pages by rules: what datatrove does too, but slowly, so on less text."""
    part = text.first(sizes.beside_slow)
    pages, size = part.documents, part.bytes / 1e6
    described = f"{text.kind}, {part.line_bytes:.0f} bytes a line"

    def hashed(kind: str) -> Callable[[], Pass]:
        return lambda: _each(lambda page: line_hashes(page, kind=kind), pages)

    yield Stage(
        "lines, normalised and hashed",
        described,
        size,
        Contender("llamatrain", hashed(XXH3)),
        [
            Contender("the same with CCNet's hash (SHA-1)", hashed(SHA1)),
            Contender("datatrove, signatures of lines", lambda: peers.datatrove_lines(pages), times_goal=10),
        ],
        goal=50,
    )
    settings = C4Settings()
    words, sentences = settings.min_words_per_line, settings.min_sentences

    def datatrove(least_sentences: int) -> Callable[[], Pass]:
        return lambda: peers.datatrove_c4(pages, min_words=words, min_sentences=least_sentences)

    yield Stage(
        "C4 rules",
        described,
        size,
        Contender("llamatrain", lambda: _each(_on_records(c4_filter(settings)), pages)),
        [
            Contender("datatrove", datatrove(sentences), times_goal=10),
            Contender("datatrove, sentences not counted", datatrove(-1)),
        ],
        goal=25,
    )


def _on_records(keep: Callable[[Record], object]) -> Callable[[str], object]:
    return lambda text: keep(Record(text, "0", "bench"))


def language(text: Text) -> Stages:
    def identify(prefix: int) -> Callable[[], Pass]:
        return lambda: _each(language_identifier(LanguageSettings(prefix_characters=prefix)), text.documents)

    size, prefix = text.bytes / 1e6, LanguageSettings().prefix_characters
    yield Stage("language, prefix rule", text.kind, size, Contender("llamatrain", identify(prefix)), goal=10)
    yield Stage("language, whole page", text.kind, size, Contender("llamatrain", identify(0)), goal=3)


def exact_dedup(folder: Path, sizes: Sizes) -> Stage:
    """Hashes of which half occur twice: written in sorted runs, marked, and read back as a mask."""
    distinct = np.random.default_rng(0).integers(0, 1 << 64, sizes.hashes * 2 // 3, dtype=np.uint64)
    hashes = np.concatenate([distinct, distinct[: sizes.hashes - len(distinct)]])
    memory = 1 << 30

    def keep() -> np.ndarray:
        with open(folder / "hashes", "wb") as file:
            writer = HashWriter(file, memory_bytes=memory)
            writer.add(hashes)
            writer.finish()
        source = HashFile(folder / "hashes")
        with open(folder / "marks", "wb") as file:
            mark_partition([source], file, partition=0, partitions=1, policy="keep_first", memory_bytes=memory)
        return KeepMask(source, marks=[folder / "marks"], number=0, policy="keep_first").take(len(hashes))

    return Stage(
        "exact deduplication by files",
        "random hashes, a half again",
        len(hashes) / 1e6,
        Contender("llamatrain", lambda: keep),
        [Contender("a Python set in memory", lambda: peers.python_set(hashes.tolist()))],
        unit="million hashes/s",
    )


def language_model(text: Text, models: Models) -> Stages:
    """The parts of the perplexity filter, then all of it."""
    pages, size = text.documents, text.bytes / 1e6

    def lines() -> list[str]:
        return [line for page in pages for line in normalised_lines(page, "line")]

    def pieces() -> Pass:
        encode, normalised = load_pieces(models.pieces).encode_as_pieces, lines()
        return lambda: [encode(line) for line in normalised]

    def score() -> Pass:
        encode, model = load_pieces(models.pieces).encode_as_pieces, load_ngrams(models.ngrams)
        sentences = [" ".join(encode(line)) for line in lines()]
        return lambda: [model.score(sentence) for sentence in sentences]

    def whole() -> Pass:
        return _each(page_scorer(models.pieces, models.ngrams, newlines="line"), pages)

    kind = text.kind
    yield Stage("perplexity: normalising", kind, size, Contender("llamatrain", lambda: lines))
    yield Stage("perplexity: pieces", kind, size, Contender("llamatrain", pieces))
    yield Stage("perplexity: KenLM alone", kind, size, Contender("llamatrain", score), goal=10)
    yield Stage("perplexity: all", kind, size, Contender("llamatrain", whole), goal=4)


def quality(text: Text, models: Models) -> Stage:
    settings = QualitySettings(model=str(models.quality))
    return Stage(
        "quality classifier",
        text.kind,
        text.bytes / 1e6,
        Contender("llamatrain", lambda: _each(quality_score(settings), text.documents)),
    )


def wikipedia(text: Text | None, sizes: Sizes) -> Stage | Unmeasured:
    name = "Wikipedia markup to text"
    if text is None:
        return Unmeasured(name, "no dump at hand")
    articles = text.first(sizes.text // 2).documents
    return Stage(
        name,
        text.kind,
        _megabytes(articles),
        Contender("llamatrain", lambda: _each(clean_wikitext, articles)),
        [Contender("mwparserfromhell", lambda: peers.mwparserfromhell_texts(articles))],
    )


def latex(papers: list[dict[str, str]] | None) -> Stage | Unmeasured:
    name = "LaTeX to text, macros expanded"
    if papers is None:
        return Unmeasured(name, "no papers at hand")
    size = sum(_megabytes(list(files.values())) for files in papers)
    cleaned = Contender("llamatrain", lambda: lambda: [clean_paper(files).text for files in papers])
    return Stage(name, f"{len(papers)} papers, one of them a book", size, cleaned)


def posts(text: Text | None, sizes: Sizes) -> Stage | Unmeasured:
    name = "StackExchange HTML to text"
    if text is None:
        return Unmeasured(name, "no dump at hand")
    bodies = text.first(sizes.text).documents
    return Stage(name, text.kind, _megabytes(bodies), Contender("llamatrain", lambda: _each(post_text, bodies)))


def code(text: Text) -> Stages:
    files, size = text.documents, text.bytes / 1e6

    def numbers(file: str) -> tuple[object, float]:
        return line_lengths(file), alphanumeric_share(file)

    yield Stage("GitHub heuristics", text.kind, size, Contender("llamatrain", lambda: _each(numbers, files)))
    headers = Contender("llamatrain", lambda: _each(lambda file: remove_headers(file, "module.py"), files))
    yield Stage("GitHub licence headers", text.kind, size, headers)


def minhash(text: Text, sizes: Sizes) -> Stage:
    """Everything that a book's sketch holds."""
    books = [book[: sizes.beside_slow // 2] for book in text.documents[:2]]
    settings = NearSettings()

    def sketch(book: str) -> object:
        hashes = shingles(book, settings.shingle_words)
        return signature(hashes, settings.permutations), sample(hashes, settings.sample_one_in)

    return Stage(
        "book sketch: shingles and MinHash",
        text.kind,
        _megabytes(books),
        Contender("llamatrain", lambda: _each(sketch, books)),
        [Contender("datatrove", lambda: peers.datatrove_minhash(books), times_goal=10)],
    )


def tokens(text: Text, more: Text, models: Models, sizes: Sizes) -> Stages:
    """By an encoder that knows no word yet, one that has encoded other text, and one that knows all words of this."""
    pages = text.first(sizes.tokens).documents
    other = Text(text.kind, text.documents[len(pages) :] + more.documents).first(sizes.seen).documents

    def encoder(*seen: Sequence[str]) -> Pass:
        cached = CachedEncoder(Tokenizer(models.tokenizer), "uint16")
        for known in seen:
            _each(cached.encode, known)()
        return _each(cached.encode, pages)

    kinds = [
        ("tokens, cold", lambda: encoder(), True, None, 1.8),
        (f"tokens, after {_megabytes(other):.3g} MB of other text", lambda: encoder(other), True, 8, 3),
        ("tokens, warm: all words met", lambda: encoder(pages), False, 8, 3),
    ]
    for name, start, fresh, goal, times in kinds:
        plain = Contender("SentencePiece", lambda: peers.sentencepiece_ids(models.tokenizer, pages), times_goal=times)
        yield Stage(name, text.kind, _megabytes(pages), Contender("llamatrain", start, fresh), [plain], goal=goal)
