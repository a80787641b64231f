"""The models that stages of data_tools need, trained by its own commands on text that is not measured on. No torch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data_tools.cleaning.wikitext import clean_wikitext
from data_tools.language_model import NGRAM_SUFFIXES, PIECES_SUFFIX
from data_tools.train_ngrams import TrainNgramsSettings, train_ngrams
from data_tools.train_quality import TrainQualitySettings, train_quality
from data_tools.train_tokenizer import TrainTokenizerSettings, train_tokenizer
from tests.benchmarks.data_texts import PAGE_CHARACTERS, Texts, quiet


@dataclass(frozen=True)
class ModelSizes:
    training_bytes: int = 12_000_000  # of English text
    tokenizer_pieces: int = 32_000  # the paper's
    model_pieces: int = 8_000  # cc_net has 65,536, which ask for more text than this
    model_lines: int = 20_000  # that those are trained on: the trainer is slow, and its pieces are not judged here


SMOKE = ModelSizes(training_bytes=300_000, tokenizer_pieces=2_000, model_pieces=1_000, model_lines=500)


@dataclass(frozen=True)
class Models:
    tokenizer: Path
    language_models: Path  # a directory, as the perplexity filter wants it
    quality: Path

    @property
    def pieces(self) -> Path:
        return self.language_models / f"en{PIECES_SUFFIX}"

    @property
    def ngrams(self) -> Path:
        return next(path for suffix in NGRAM_SUFFIXES if (path := self.language_models / f"en{suffix}").exists())


def trained_models(folder: Path, texts: Texts, sizes: ModelSizes, *, build_binary: str = "build_binary") -> Models:
    """Train what is not in the folder yet.

    The language model's cut-offs are of the web pages, where there are some, so that its filter drops what it drops of
    a crawl; the classifier tells articles of Wikipedia from them, else English text from Python code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    english = texts.english[1].first(sizes.training_bytes)
    web = texts.web[1].documents if texts.web else None
    code = texts.code.first(1_000_000).documents
    corpus = _write(folder / "english.jsonl", english.documents)
    pages = _write(folder / "pages.jsonl", web or english.documents[:200])
    articles = list(map(clean_wikitext, texts.wikitext.documents)) if texts.wikitext else english.documents[:200]
    positives = _write(folder / "positives.jsonl", _pieces(articles))
    negatives = _write(folder / "negatives.jsonl", _pieces(web or code))
    models = Models(folder / "tokenizer" / "tokenizer.model", folder / "models", folder / "quality.bin")
    with quiet():
        train_tokenizer(
            TrainTokenizerSettings(
                input=corpus, output=str(models.tokenizer.parent), vocab_size=sizes.tokenizer_pieces, overwrite=True
            )
        )
        train_ngrams(
            TrainNgramsSettings(
                input=corpus,
                output=str(models.language_models),
                cutoffs_input=pages,
                vocab_size=sizes.model_pieces,
                pieces_lines=sizes.model_lines,
                trainer="own",
                build_binary=build_binary,
                overwrite=True,
            )
        )
        train_quality(
            TrainQualitySettings(
                positives=positives, negatives=negatives, output=str(models.quality), min_characters=500, overwrite=True
            )
        )
    return models


def _pieces(texts: Iterable[str]) -> list[str]:
    """Of equal length in both classes, so that it tells nothing."""
    return [text[at : at + PAGE_CHARACTERS] for text in texts for at in range(0, len(text), PAGE_CHARACTERS)]


def _write(path: Path, texts: Iterable[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)
