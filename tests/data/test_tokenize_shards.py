"""Documents in, token shards out: nothing lost, nothing held out seen, and the same bytes however it went."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.documents import Corpus, Document
from data_tools.encoding import is_held_out
from data_tools.tokenize_shards import TokenizeShardsSettings, tokenize_shards
from data_tools.verify_shards import VerifyShardsSettings, verify_shards
from llamatrain.data.shards import open_tokens, read_manifest
from llamatrain.errors import DataError, LlamatrainError
from tests.data.corpora import files_of, texts_of, write_jsonl
from tests.real_text import REPOSITORY


def test_every_document_comes_back(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    texts = ["plain", " spaces  ", "<s>\0</s>", "😀\r\n", "\n", *(f"number {n} " * n for n in range(1, 40))]
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    directory = tokenize(corpus, validation_fraction=0.3, shard_tokens=1500)
    manifest = read_manifest(directory)
    assert sorted(texts_of(directory, "train") + texts_of(directory, "validation")) == sorted(texts)
    assert len(manifest.shards("train")) > 2
    stored = sum(shard.text_bytes for split in manifest.splits.values() for shard in split)
    assert stored == sum(len(text.encode()) for text in texts)
    verify_shards(VerifyShardsSettings(path=str(directory)))


def test_what_is_dropped_is_counted(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    texts = ["kept", "", "bad \udcff", "with \u2581 mark", "kept too"]
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    kept = read_manifest(tokenize(corpus, output="keep")).documents
    dropped = read_manifest(tokenize(corpus, output="drop", on_space_mark="drop")).documents
    same = {"read": 5, "validation": 0, "dropped_empty": 1, "dropped_invalid": 1, "with_space_mark": 1}
    same |= {"byte_tokens": 0, "newline_tokens": 0}
    assert kept == same | {"kept": 3, "train": 3, "dropped_space_mark": 0}
    assert dropped == same | {"kept": 2, "train": 2, "dropped_space_mark": 1}
    assert texts_of(tmp_path / "keep", "train") == ["kept", "with   mark", "kept too"]


def test_documents_carry_bos_and_eos_only_as_set(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": "word"}])
    for bos in (True, False):
        for eos in (True, False):
            directory = tokenize(corpus, output=f"out-{bos}-{eos}", add_bos=bos, add_eos=eos)
            manifest = read_manifest(directory)
            ids = open_tokens(manifest, manifest.shards("train")[0]).tolist()
            assert (ids[0] == 1, ids[-1] == 2) == (bos, eos)
            assert (manifest.add_bos, manifest.add_eos) == (bos, eos)
            verify_shards(VerifyShardsSettings(path=str(directory)))


def test_the_number_of_workers_does_not_change_a_byte(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    generator = random.Random(3)
    records = [{"text": f"word {generator.randrange(10**6)} " * generator.randrange(1, 1500)} for _ in range(400)]
    corpus = write_jsonl(tmp_path / "a.jsonl", records)
    options = {"validation_fraction": 0.1, "shard_tokens": 300_000}
    one = tokenize(corpus, output="one", workers=1, **options)
    two = tokenize(corpus, output="two", workers=2, **options)
    assert len(read_manifest(one).shards("train")) > 2
    assert files_of(one) == files_of(two)


@settings(max_examples=100, deadline=None)
@given(key=st.text(st.characters(exclude_categories=["Cs"])), low=st.floats(0, 1), high=st.floats(0, 1))
def test_what_a_small_fraction_holds_out_a_larger_one_does_too(key: str, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert is_held_out(key, salt="s", fraction=low) <= is_held_out(key, salt="s", fraction=high)
    assert not is_held_out(key, salt="s", fraction=0.0)


def test_the_held_out_share_is_the_fraction_and_depends_on_the_salt() -> None:
    for salt in ("a", "b"):
        share = sum(is_held_out(str(n), salt=salt, fraction=0.1) for n in range(20_000)) / 20_000
        assert abs(share - 0.1) < 0.01
    assert [is_held_out(str(n), salt="a", fraction=0.5) for n in range(40)] != [
        is_held_out(str(n), salt="b", fraction=0.5) for n in range(40)
    ]


def test_the_hold_out_rule_is_the_documented_one() -> None:
    held_out = [n for n in range(100) if is_held_out(str(n), salt="llamatrain", fraction=0.05)]
    assert held_out == [10, 17, 74, 92, 99]  # another rule would mix training and validation of old data sets


def test_equal_texts_fall_on_one_side(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    records = [{"text": f"text {n % 50}", "id": n} for n in range(500)]
    directory = tokenize(write_jsonl(tmp_path / "a.jsonl", records), validation_fraction=0.3)
    train, validation = set(texts_of(directory, "train")), set(texts_of(directory, "validation"))
    assert train and validation and not train & validation and len(train | validation) == 50


def test_a_held_out_group_is_held_out_of_every_corpus(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    sides = {}
    for source in ("code", "docs"):
        records = [{"text": f"{source} {g} {n}", "group": f"g{g}"} for n in range(3) for g in range(60)]
        corpus = write_jsonl(tmp_path / f"{source}.jsonl", records)
        directory = tokenize(corpus, output=source, validation_fraction=0.2, holdout_by="group")
        for split in ("train", "validation"):
            sides[source, split] = {text.split()[1] for text in texts_of(directory, split)}
    assert sides["code", "validation"] == sides["docs", "validation"] != set()
    assert not sides["code", "train"] & sides["docs", "validation"]
    with pytest.raises(DataError, match=r"no group to hold it out by; set group_field=NAME"):
        tokenize(write_jsonl(tmp_path / "no.jsonl", [{"text": "x"}]), output="no", holdout_by="group")


def test_a_finished_data_set_is_left_alone_and_another_refused(
    tokenize: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(50)])
    directory = tokenize(corpus)
    before = files_of(directory)
    tokenize(corpus, workers=2)
    assert "complete; nothing to do" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"made with another add_bos; set overwrite=true"):
        tokenize(corpus, add_bos=False)
    with pytest.raises(DataError, match=r"made with another source, shard_tokens; set overwrite=true"):
        tokenize(corpus, source="other", shard_tokens=10)
    assert files_of(directory) == before
    (directory / "train-00000.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"damaged: .*train-00000\.bin.*overwrite=true"):
        tokenize(corpus)
    tokenize(corpus, overwrite=True)
    assert files_of(directory) == before
    tokenize(corpus, overwrite=True, shard_tokens=100)
    verify_shards(VerifyShardsSettings(path=str(directory)))


def test_shards_of_unknown_origin_are_not_overwritten(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": "text"}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-00000.bin").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"holds train-00000\.bin but no dataset\.json; set overwrite=true"):
        tokenize(corpus)
    assert (tmp_path / "out" / "train-00000.bin").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "???"}, "source="),
        ({"tokenizer": "???"}, "tokenizer="),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"validation_fraction": float("nan")}, "validation_fraction=nan"),
        ({"holdout_by": "url"}, "holdout_by=url"),
        ({"on_space_mark": "fix"}, "on_space_mark=fix"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
        ({"workers": 0}, "workers=0"),
        ({"format": "csv"}, "format=csv"),
        ({"tokenizer": "gone.model"}, r"gone\.model"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tokenize: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LlamatrainError, match=message):
        tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": "text"}]), **changes)
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_a_document_is_refused(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document was kept of 2"):
        tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": ""}]))


# Interruption


@pytest.fixture
def stopped(tokenize: Callable[..., Path], tmp_path: Path) -> Path:
    """The corpus of an unfinished data set in out, of shard_tokens=2000: a hundred texts, of which 70 were read."""
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text number {n} " * 20} for n in range(100)])

    def read(self: Corpus) -> Iterator[Document]:
        yield from itertools.islice(Corpus(self.files, self.options).documents(), 70)
        raise DataError("the disk is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_tools.tokenize_shards.Corpus", type("Failing", (Corpus,), {"documents": read}))
        with pytest.raises(DataError, match="the disk is gone"):
            tokenize(corpus, shard_tokens=2000)
    assert (tmp_path / "out" / "progress.json").exists() and not list((tmp_path / "out").glob(".*"))
    return corpus


def test_a_stopped_run_goes_on_with_the_same_settings_only(
    tokenize: Callable[..., Path], stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = stopped
    unbroken = files_of(tokenize(corpus, output="whole", shard_tokens=2000))
    with pytest.raises(DataError, match=r"unfinished data set made with another add_eos; set overwrite=true"):
        tokenize(corpus, shard_tokens=2000, add_eos=False)
    capsys.readouterr()
    assert files_of(tokenize(corpus, shard_tokens=2000)) == unbroken
    assert "going on after" in capsys.readouterr().out


def test_an_input_changed_in_place_is_noticed_and_a_copied_one_is_the_same(
    tokenize: Callable[..., Path], stopped: Path, tmp_path: Path
) -> None:
    corpus, copy = stopped, tmp_path / "copy" / "a.jsonl"
    whole = corpus.read_bytes()
    corpus.write_bytes(whole.replace(b"number 3 ", b"NUMBER 3 "))
    assert corpus.stat().st_size == len(whole)
    with pytest.raises(DataError, match=r"unfinished data set made with another input_content; set overwrite=true"):
        tokenize(corpus, shard_tokens=2000)
    copy.parent.mkdir()
    copy.write_bytes(whole)
    os.utime(copy, (0, 0))
    made = files_of(tokenize(copy, shard_tokens=2000))
    with pytest.raises(DataError, match=r"a data set made with another input_content; set overwrite=true"):
        tokenize(corpus, shard_tokens=2000)
    corpus.write_bytes(whole)
    assert files_of(tokenize(corpus, output="anew", shard_tokens=2000)) == made


def test_what_a_release_made_that_did_not_hash_its_input_is_still_its_own(
    tokenize: Callable[..., Path], stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = tmp_path / "out" / "progress.json"
    content = json.loads(progress.read_text())
    del content["identity"]["input_content"], content["counts"]["byte_tokens"], content["counts"]["newline_tokens"]
    progress.write_text(json.dumps(content))
    directory = tokenize(stopped, shard_tokens=2000)
    assert "going on after" in capsys.readouterr().out
    assert "byte_tokens" not in read_manifest(directory).documents  # of some shards only, it would be wrong
    tokenize(stopped, shard_tokens=2000)
    assert "nothing to do" in capsys.readouterr().out
    verify_shards(VerifyShardsSettings(path=str(directory)))


def test_bytes_per_token_and_byte_tokens_are_told(
    tokenize: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a line\nanother\n", "\N{SNOWMAN}", "plain"]
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    manifest = read_manifest(tokenize(corpus))
    ids = open_tokens(manifest, manifest.shards("train")[0])
    assert np.isin(ids, range(3, 259)).sum() == manifest.documents["byte_tokens"] == 5
    assert (ids == 13).sum() == manifest.documents["newline_tokens"] == 2
    share = f"{23 / len(ids):.2f} bytes of text per token; byte tokens: {3 / len(ids):.3%} of the tokens"
    assert f"{share}, and {2 / len(ids):.3%} line feeds" in capsys.readouterr().out


def test_an_unfinished_data_set_with_a_damaged_shard_is_not_gone_on_with(
    tokenize: Callable[..., Path], stopped: Path, tmp_path: Path
) -> None:
    corpus = stopped
    (tmp_path / "out" / "train-00000.bin").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"unfinished data set, damaged: .*train-00000\.bin.*overwrite=true"):
        tokenize(corpus, shard_tokens=2000)
    directory = tokenize(corpus, shard_tokens=2000, overwrite=True)
    verify_shards(VerifyShardsSettings(path=str(directory)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_killed_and_resumed_run_is_byte_for_byte_the_unbroken_one(
    tokenize: Callable[..., Path], tmp_path: Path, tiny_tokenizer: Path, seed: int
) -> None:
    generator = random.Random(seed)
    records = [{"text": f"piece {n} of text\n" * generator.randrange(1, 300)} for n in range(1500)]
    corpus = write_jsonl(tmp_path / "a.jsonl", records)
    options = {"validation_fraction": 0.05, "shard_tokens": 60_000}
    unbroken = files_of(tokenize(corpus, output="whole", **options))
    output = tmp_path / "out"
    values = {"source": "test", "input": str(corpus), "tokenizer": str(tiny_tokenizer), "output": str(output)}
    program = (
        "from data_tools.tokenize_shards import *\n"
        "if __name__ == '__main__':\n"
        f"    tokenize_shards(TokenizeShardsSettings(**{values | options | {'workers': 2}!r}))"
    )
    (tmp_path / "run.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
    )
    wanted = f"train-{generator.randrange(1, 12):05d}.bin"
    while not (output / wanted).exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(generator.random() * 0.03)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (output / "progress.json").exists() and not (output / "dataset.json").exists()
    assert files_of(tokenize(corpus, **options)) == unbroken


def test_two_runs_do_not_write_to_one_place(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is at work there; wait for it or stop it"):
        tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": "text"}]))
    os.close(descriptor)


def test_a_tokenization_that_committed_nothing_may_be_corrected(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a text"}\n')
    wrong = TokenizeShardsSettings(
        source="web",
        input=str(tmp_path / "in.jsonl"),
        tokenizer=str(tiny_tokenizer),
        output=str(tmp_path / "out"),
        text_field="content",
        workers=1,
    )
    with pytest.raises(DataError, match="the field 'content' is missing"):
        tokenize_shards(wrong)
    tokenize_shards(dataclasses.replace(wrong, text_field="text"))
    assert read_manifest(tmp_path / "out").documents["train"] == 1
