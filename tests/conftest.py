"""A tokenizer and data sets for all tests, made once a session with the project's own tools."""

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from data_tools.tokenize_shards import TokenizeShardsSettings, tokenize_shards
from data_tools.train_tokenizer import TrainTokenizerSettings, train_tokenizer
from tests.drills.plugin import (  # noqa: F401 - what --drills does
    drills,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)

TINY_VOCAB = 512

# How long an example takes says nothing of the code where others use the machine too.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a tokenizer.model of 512 ids, trained on a few files of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(
        TrainTokenizerSettings(
            input=[str(library / name) for name in ("argparse.py", "textwrap.py", "statistics.py", "json/*.py")],
            output=str(directory),
            vocab_size=TINY_VOCAB,
        )
    )
    return directory / "tokenizer.model"


@pytest.fixture(scope="session")
def tiny_dataset(tiny_tokenizer: Path) -> Callable[..., Path]:
    """make(name, texts, directory, validation_fraction=0.0) writes a data set and returns its directory."""

    def make(name: str, documents: list[str], directory: Path, *, validation_fraction: float = 0.0) -> Path:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        texts = directory / f"{name}.jsonl"
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        tokenize_shards(
            TokenizeShardsSettings(
                source=name,
                input=str(texts),
                tokenizer=str(tiny_tokenizer),
                output=str(directory),
                validation_fraction=validation_fraction,
                workers=1,
            )
        )
        return directory

    return make


@pytest.fixture(scope="session")
def sources(tiny_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two data sets with validation splits, of many short documents, so that masks differ from batch to batch."""
    library = Path(sysconfig.get_path("stdlib"))
    directory = tmp_path_factory.mktemp("data")
    functions = (library / "textwrap.py").read_text().split("\n\n")
    lines = [line for line in (library / "this.py").read_text().splitlines() if line] * 3
    lines += (library / "calendar.py").read_text().split("\n\n")
    return {
        "functions": tiny_dataset("functions", functions, directory / "functions", validation_fraction=0.1),
        "lines": tiny_dataset("lines", lines, directory / "lines", validation_fraction=0.1),
    }
