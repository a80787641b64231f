"""Validation: every held-out token once, per source and over all, beside the unigram baseline."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatrain.config import RunConfig
from llamatrain.config.parallel import Layout
from llamatrain.data.loader import IGNORE_INDEX
from llamatrain.data.shards import open_tokens, read_manifest
from llamatrain.data.sources import open_sources
from llamatrain.distributed import World
from llamatrain.errors import DataError
from llamatrain.evaluation.validation import Tally, Validation, places, unigram_entropy, windows
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from llamatrain.tokenizer import Tokenizer
from tests.small_run import SEQ_LEN, small_config

TEXTS = [f"The {i}th verse of a song that goes on and on, {i * i} times. " * (1 + i % 4) for i in range(60)]


@pytest.fixture(scope="module")
def sources(tiny_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("data")
    return {
        "verses": tiny_dataset("verses", TEXTS, directory / "verses", validation_fraction=0.4),
        "reverses": tiny_dataset("reverses", [t[::-1] for t in TEXTS], directory / "r", validation_fraction=0.2),
    }


def model_for(config: RunConfig) -> Llama:
    model = Llama(replace(config.model, attention="reference"))
    init_weights(model, config.model, seed=1)
    return model


def validation(config: RunConfig, tokenizer: Path) -> Validation:
    sources = open_sources(config.data, vocab_size=None)
    return Validation(config, sources, Tokenizer(tokenizer), torch.device("cpu"), World(), Layout())


@settings(deadline=None)
@given(seq_len=st.integers(1, 70), max_tokens=st.none() | st.integers(1, 400))
def test_every_token_is_a_target_once(
    sources: dict[str, Path], tiny_tokenizer: Path, seq_len: int, max_tokens: int | None
) -> None:
    manifest = read_manifest(sources["verses"])
    stream = np.concatenate([open_tokens(manifest, shard)[1:] for shard in manifest.shards("validation")])
    found = windows(
        manifest,
        places(manifest, seq_len=seq_len, max_tokens=max_tokens),
        seq_len=seq_len,
        document_mask=False,
        bytes_per_token=Tokenizer(tiny_tokenizer).bytes_per_token,
    )
    targets = np.concatenate([window.targets for window in found])
    assert targets[targets != IGNORE_INDEX].tolist() == stream[:max_tokens].tolist()


@pytest.mark.parametrize("document_mask", [False, True])
def test_losses_are_those_of_one_window_at_a_time(
    document_mask: bool, sources: dict[str, Path], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path, sources, data={"document_mask": document_mask})
    model = model_for(config)
    record = validation(config, tiny_tokenizer).evaluate(model)
    table = Tokenizer(tiny_tokenizer).bytes_per_token
    total, count, size = 0.0, 0, 0
    for name, path in sources.items():
        manifest = read_manifest(path)
        loss, targets, text_bytes = 0.0, 0, 0
        everywhere = places(manifest, seq_len=SEQ_LEN, max_tokens=None)
        for window in windows(
            manifest, everywhere, seq_len=SEQ_LEN, document_mask=document_mask, bytes_per_token=table
        ):
            lengths = window.document_lengths if document_mask else None
            with torch.no_grad():
                logits = model(torch.from_numpy(window.inputs)[None], doc_lengths=lengths)[0].double()
            for row, target in zip(logits, window.targets.tolist(), strict=True):
                if target != IGNORE_INDEX:
                    loss -= torch.log_softmax(row, 0)[target].item()
                    targets += 1
            text_bytes += window.text_bytes
        assert record[f"eval/validation.{name}/loss"] == pytest.approx(loss / targets, rel=1e-5)
        assert record[f"eval/validation.{name}/bits_per_byte"] == pytest.approx(
            loss / math.log(2) / text_bytes, rel=1e-5
        )
        assert record[f"eval/validation.{name}/tokens"] == targets
        total, count, size = total + loss, count + targets, size + text_bytes
    assert record["eval/validation/loss"] == pytest.approx(total / count, rel=1e-5)
    assert record["eval/validation/bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_the_bytes_are_those_of_the_held_out_texts(
    sources: dict[str, Path], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """The first token of a split is BOS, no target; it counts -1, so the bytes of all targets are one more."""
    config = small_config(tmp_path, sources)
    record = validation(config, tiny_tokenizer).evaluate(model_for(config))
    for name, path in sources.items():
        manifest = read_manifest(path)
        expected = sum(shard.text_bytes + 1 for shard in manifest.shards("validation"))
        loss, targets = (record[f"eval/validation.{name}/{metric}"] for metric in ("loss", "tokens"))
        found = loss * targets / math.log(2) / record[f"eval/validation.{name}/bits_per_byte"]
        assert found == pytest.approx(expected, rel=1e-9)


def test_the_micro_batch_plays_no_part(sources: dict[str, Path], tiny_tokenizer: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, sources)
    model = model_for(config)
    records = [
        validation(small_config(tmp_path, sources, evaluation={"micro_batch": n}), tiny_tokenizer).evaluate(model)
        for n in (1, 3, 50)
    ]
    assert records[0].keys() == records[1].keys()
    for name, value in records[0].items():
        assert records[1][name] == pytest.approx(value, rel=1e-6)
        assert records[2][name] == pytest.approx(value, rel=1e-6)


def test_the_unigram_entropy_is_what_a_perfect_counter_reaches() -> None:
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([0, 9])) == 0
    pooled = Tally(1.0, 2, 3, np.array([1, 1])) + Tally(1.0, 2, 3, np.array([0, 0, 2]))
    assert pooled.occurrences.tolist() == [1, 1, 2]
    assert unigram_entropy(pooled.occurrences) == pytest.approx(1.5 * math.log(2))


def test_a_run_that_wants_validation_and_has_none_is_told(
    tiny_dataset: Callable[..., Path], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    source = {"all": tiny_dataset("all", TEXTS, tmp_path / "all")}
    with pytest.raises(DataError, match=r"no source has a validation split.*evaluation\.every_steps=0"):
        validation(small_config(tmp_path, source), tiny_tokenizer)
    validation(small_config(tmp_path, source, evaluation={"every_steps": 0}), tiny_tokenizer)
