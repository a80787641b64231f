"""What several tests of data preparation begin with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.tokenize_shards import TokenizeShardsSettings, tokenize_shards


@pytest.fixture
def tokenize(tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., Path]:
    """tokenize(input, output=…, …) with settings for small corpora; returns the data set's directory."""

    def run(corpus: Any, *, output: str = "out", **changes: Any) -> Path:
        values = {
            "source": "test",
            "input": str(corpus) if isinstance(corpus, Path) else corpus,
            "tokenizer": str(tiny_tokenizer),
            "output": str(tmp_path / output),
            "validation_fraction": 0.0,
            "workers": 1,
        }
        tokenize_shards(TokenizeShardsSettings(**{**values, **changes}))
        return tmp_path / output

    return run
