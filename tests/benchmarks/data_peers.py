"""Others' code for the same work on the same text, each as a function without arguments: a pass over all of it.

Every function raises ImportError where its package is missing; importing this module needs none of them. In an
environment of their own beside data_tools (datatrove wants other versions than we do):

    pip install 'datatrove[io,processing]' spacy warcio fastwarc trafilatura lxml_html_clean mwparserfromhell

No torch.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Pass = Callable[[], object]

PACKAGES = ("datatrove", "spacy", "warcio", "FastWARC", "trafilatura", "mwparserfromhell")


def datatrove_c4(texts: Sequence[str], *, min_words: int, min_sentences: int) -> Pass:
    """C4QualityFilter with our numbers of words and sentences; sentences are counted by spaCy."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import C4QualityFilter

    rules = C4QualityFilter(min_words_per_line=min_words, min_num_sentences=min_sentences)
    rules.filter(Document(text="One sentence. Another.\n" * 5, id="0"))  # loads spaCy, or finds it missing
    return lambda: [rules.filter(Document(text=text, id="0")) for text in texts]


def datatrove_lines(texts: Sequence[str]) -> Pass:
    """Signatures of SentenceDedup, a line each."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import SentenceDedupSignature
    from datatrove.pipeline.dedup.sentence_dedup import SentDedupConfig

    config = SentDedupConfig(n_sentences=1, split_sentences=False)
    step = SentenceDedupSignature(_folder(), config=config)
    return lambda: [step.get_hashes(Document(text=text, id="0"), number) for number, text in enumerate(texts)]


def datatrove_minhash(texts: Sequence[str]) -> Pass:
    """Shingles of 5 words and 112 permutations, its defaults; words are parted by spaCy."""
    from datatrove.pipeline.dedup import MinhashDedupSignature

    step = MinhashDedupSignature(_folder())
    step.get_signature(step.get_shingles("some words to load what it needs to part words"))
    return lambda: [step.get_signature(step.get_shingles(text)) for text in texts]


def _folder() -> str:
    return tempfile.gettempdir()  # that its steps want to be told; nothing is written


def warcio_texts(path: Path) -> Pass:
    """Digests are checked, as we do."""
    from warcio.archiveiterator import ArchiveIterator

    def read() -> int:
        with open(path, "rb") as file:
            records = ArchiveIterator(file, check_digests="raise")
            return sum(len(_text(record.content_stream().read())) for record in records)

    return read


def fastwarc_texts(path: Path) -> Pass:
    """Digests are checked, as we do."""
    from fastwarc import ArchiveIterator, WarcRecordType

    def read() -> int:
        records: Any = ArchiveIterator(
            str(path), record_types=WarcRecordType.conversion, verify_digests=True, fsspec_args=False
        )
        return sum(len(_text(record.reader.read())) for record in records)

    return read


def _text(block: bytes) -> str:
    return block.decode("utf-8", "replace")


def trafilatura_texts(pages: Sequence[bytes]) -> Pass:
    from trafilatura import extract

    return lambda: [extract(page) for page in pages]


def mwparserfromhell_texts(articles: Sequence[str]) -> Pass:
    from mwparserfromhell import parse

    return lambda: [parse(article).strip_code() for article in articles]


def sentencepiece_ids(model: Path, texts: Sequence[str]) -> Pass:
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor(model_proto=model.read_bytes())
    return lambda: [processor.encode(text) for text in texts]


def python_set(hashes: Sequence[int]) -> Pass:
    """Keeping the first of equal hashes by a set, all of it in memory."""

    def keep() -> list[bool]:
        seen: set[int] = set()
        add = seen.add
        return [not (value in seen or add(value)) for value in hashes]

    return keep


def trafilatura_is_quiet() -> None:
    """Pages that it cannot read are not worth a line each."""
    import logging

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
