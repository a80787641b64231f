"""A run of the tiny model for every shape that a test asks for, and its export, each made once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.interchange.converting import built, converted, run_with


@pytest.fixture(scope="session")
def checkpoint(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(**changes) is a run's folder with a checkpoint of the tiny model; nobody may change it."""
    made: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        if str(changes) not in made:
            made[str(changes)] = run_with(built(**changes), tmp_path_factory.mktemp("run"), tiny_tokenizer)
        return made[str(changes)]

    return make


@pytest.fixture(scope="session")
def exported(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in Hugging Face's form; nobody may change it."""
    return converted(checkpoint(), tmp_path_factory.mktemp("exported") / "there", "huggingface")


@pytest.fixture
def there(exported: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    return shutil.copytree(exported, tmp_path / "there")
