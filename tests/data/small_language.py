"""Pages in a small made-up language with a grammar, and the model of it that several tests use."""

import json
import random
from functools import lru_cache
from pathlib import Path

from data_tools.train_ngrams import TrainNgramsSettings, train_ngrams

NOUNS = ["river", "fox", "house", "teacher", "garden", "letter", "window", "stone", "village", "morning"]
VERBS = ["follows", "remembers", "paints", "carries", "forgets", "watches", "opens", "answers"]
ADJECTIVES = ["old", "quiet", "small", "bright", "distant", "green"]


def sentence(generator: random.Random) -> str:
    """A sentence with capitals, accents, digits and typographic marks, so that normalising has work to do."""
    subject, thing = (f"the {generator.choice(ADJECTIVES)} {generator.choice(NOUNS)}" for _ in range(2))
    text = f"{subject} {generator.choice(VERBS)} {thing}".capitalize()
    end = generator.choice([".", "…", " — at the café.", f", in {generator.randrange(1500, 2000)}.", "!"])
    return text + end


def page(seed: int, *, lines: int = 8) -> str:
    generator = random.Random(seed)
    return "\n".join(sentence(generator) for _ in range(lines))


def jumbled(seed: int) -> str:
    """A page's words in no order: the same language, and a bad text."""
    words = page(seed).split()
    random.Random(seed).shuffle(words)
    return "\n".join(" ".join(words[start : start + 7]) for start in range(0, len(words), 7))


def write_pages(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def model_settings(directory: Path, **changes: object) -> TrainNgramsSettings:
    values = {
        "input": str(write_pages(directory / "texts.jsonl", [page(seed) for seed in range(150)])),
        "output": str(directory / "models"),
        "cutoffs_input": str(write_pages(directory / "pages.jsonl", [page(1000 + seed) for seed in range(60)])),
        "vocab_size": 60,
        "trainer": "own",
        "build_binary": "not-installed",
    }
    return TrainNgramsSettings(**{**values, **changes})


@lru_cache
def small_models(directory: Path) -> Path:
    """A directory with a trained model of the language, named en."""
    directory.mkdir(exist_ok=True)
    train_ngrams(model_settings(directory))
    return directory / "models"
