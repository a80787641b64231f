"""Documents in, token shards out: nothing lost, nothing held out seen, and the same bytes however it went."""

import dataclasses
import gzip
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
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.documents import (
    HASHED_WHOLE,
    Corpus,
    Document,
    ReadOptions,
    find_inputs,
    input_list,
    inputs_identity,
)
from data_tools.encoding import is_held_out
from data_tools.stdlib_corpus import StdlibCorpusSettings, stdlib_corpus
from data_tools.tokenize_shards import TokenizeShardsSettings, tokenize_shards
from data_tools.verify_shards import VerifyShardsSettings, verify_shards
from llamatrain.data.shards import open_document_starts, open_tokens, read_manifest
from llamatrain.errors import ConfigError, DataError, LlamatrainError
from llamatrain.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def _read(*inputs: Path | str, **options: Any) -> list[Document]:
    return list(Corpus(find_inputs([str(text) for text in inputs]), ReadOptions(**options)).documents())


def _write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _texts_of(directory: Path, split: str) -> list[str]:
    manifest = read_manifest(directory)
    tokenizer = Tokenizer(directory / "tokenizer.model")
    texts = []
    for shard in manifest.shards(split):
        tokens, starts = open_tokens(manifest, shard), open_document_starts(manifest, shard).astype(int)
        ends = [*starts[1:], shard.tokens]
        texts += [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
    return texts


def _files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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


# Reading


def test_plain_gzip_and_zstd_files_give_the_same_documents(tmp_path: Path) -> None:
    content = _write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {n}\r\n"} for n in range(500)]).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content[:999]) + gzip.compress(content[999:]))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(compress(content[:777]) + compress(content[777:]))
    wanted = [document.text for document in _read(tmp_path / "a.jsonl")]
    assert len(wanted) == 500
    for name in ("b.jsonl.gz", "c.jsonl.zst"):
        assert [document.text for document in _read(tmp_path / name)] == wanted


def test_a_directory_is_read_in_sorted_order_and_hidden_files_are_not(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".hidden", ".git/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.id for document in _read(tmp_path)] == ["a/b/c.txt", "a/z.txt", "b.txt"]
    assert [document.id for document in _read(f"{tmp_path}/a/**/*.txt")] == ["b/c.txt", "z.txt"]
    assert [document.id for document in _read(tmp_path / "b.txt", tmp_path / "a")] == ["b.txt", "b/c.txt", "z.txt"]


def test_inputs_that_name_nothing_or_the_same_file_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for missing in ("gone.txt", "*.jsonl", "gone/*"):
        with pytest.raises(DataError, match="no file there"):
            _read(tmp_path / missing)
    with pytest.raises(DataError, match=r"a\.txt: named twice"):
        _read(tmp_path / "a.txt", tmp_path)
    assert input_list("a") == ["a"]
    for wrong in ("???", "", [], [1], None):
        with pytest.raises(ConfigError, match="input"):
            input_list(wrong)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from("ab-é\n"), min_size=1, max_size=9), min_size=1, max_size=6))
def test_a_separator_splits_text_files(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "split.txt"
    texts = [text.replace("--", "-é").strip("-") + "." for text in texts]
    path.write_bytes("--".join(texts).encode())
    documents = _read(path, document_separator="--")
    assert [document.text for document in documents] == texts
    assert [document.id for document in documents] == [f"split.txt#{n}" for n in range(len(texts))]


def test_a_separator_on_the_edge_of_two_chunks_is_found(tmp_path: Path) -> None:
    from data_tools.documents import CHUNK_BYTES

    first = "x" * (CHUNK_BYTES - 2)
    (tmp_path / "a.txt").write_text(f"{first}<|end|>second<|end|>")
    assert [d.text for d in _read(tmp_path, document_separator="<|end|>")] == [first, "second"]
    assert len(_read(tmp_path)) == 1


def test_fields_have_configurable_names_and_defaults(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", [{"body": "one", "key": 7, "part": "p"}, {"body": "two", "extra": None}])
    documents = _read(path, text_field="body", id_field="key", group_field="part")
    assert documents == [Document("one", "7", "p", True), Document("two", "a.jsonl:2", None, True)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "line 3: not JSON"),
        (b'["text"]', "line 3: a JSON object is needed"),
        (b'{"body": "x"}', "line 3: the field 'text' is missing"),
        (b'{"text": 5}', "line 3: the field 'text' is int"),
        (b'{"text": "x", "id": [1]}', "line 3: the field 'id'"),
        (b'{"text": "\xff"}', "line 3: not UTF-8 at byte 10"),
        (b"[" * 100_000, "line 3: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl: {message}"):
        _read(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    content = b"".join(b'{"text": "%d"}\n' % n for n in random.Random(0).sample(range(10**9), 20_000))
    whole = gzip.compress(content) if suffix == ".gz" else zstandard.ZstdCompressor().compress(content)
    damaged = {"truncated": whole[: len(whole) * 2 // 3], "empty": b"", "garbage": b"no archive" * 9}[damage]
    (tmp_path / f"bad.jsonl{suffix}").write_bytes(damaged)
    with pytest.raises(DataError, match=rf"bad\.jsonl{suffix}: truncated or damaged"):
        _read(tmp_path)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    for content in (b"caf\xe9 au lait", b"cut in a character \xc3"):
        (tmp_path / "latin.txt").write_bytes(content)
        with pytest.raises(DataError, match=r"latin\.txt: not UTF-8"):
            _read(tmp_path)


# Tokenizing


def test_every_document_comes_back(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    texts = ["plain", " spaces  ", "<s>\0</s>", "😀\r\n", "\n", *(f"number {n} " * n for n in range(1, 40))]
    corpus = _write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    directory = tokenize(corpus, validation_fraction=0.3, shard_tokens=1500)
    manifest = read_manifest(directory)
    assert sorted(_texts_of(directory, "train") + _texts_of(directory, "validation")) == sorted(texts)
    assert len(manifest.shards("train")) > 2
    stored = sum(shard.text_bytes for split in manifest.splits.values() for shard in split)
    assert stored == sum(len(text.encode()) for text in texts)
    verify_shards(VerifyShardsSettings(path=str(directory)))


def test_what_is_dropped_is_counted(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    texts = ["kept", "", "bad \udcff", "with \u2581 mark", "kept too"]
    corpus = _write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    kept = read_manifest(tokenize(corpus, output="keep")).documents
    dropped = read_manifest(tokenize(corpus, output="drop", on_space_mark="drop")).documents
    same = {"read": 5, "validation": 0, "dropped_empty": 1, "dropped_invalid": 1, "with_space_mark": 1}
    same |= {"byte_tokens": 0, "newline_tokens": 0}
    assert kept == same | {"kept": 3, "train": 3, "dropped_space_mark": 0}
    assert dropped == same | {"kept": 2, "train": 2, "dropped_space_mark": 1}
    assert _texts_of(tmp_path / "keep", "train") == ["kept", "with   mark", "kept too"]


def test_documents_carry_bos_and_eos_only_as_set(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    corpus = _write_jsonl(tmp_path / "a.jsonl", [{"text": "word"}])
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
    corpus = _write_jsonl(tmp_path / "a.jsonl", records)
    options = {"validation_fraction": 0.1, "shard_tokens": 300_000}
    one = tokenize(corpus, output="one", workers=1, **options)
    two = tokenize(corpus, output="two", workers=2, **options)
    assert len(read_manifest(one).shards("train")) > 2
    assert _files_of(one) == _files_of(two)


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
    directory = tokenize(_write_jsonl(tmp_path / "a.jsonl", records), validation_fraction=0.3)
    train, validation = set(_texts_of(directory, "train")), set(_texts_of(directory, "validation"))
    assert train and validation and not train & validation and len(train | validation) == 50


def test_a_held_out_group_is_held_out_of_every_corpus(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    sides = {}
    for source in ("code", "docs"):
        records = [{"text": f"{source} {g} {n}", "group": f"g{g}"} for n in range(3) for g in range(60)]
        corpus = _write_jsonl(tmp_path / f"{source}.jsonl", records)
        directory = tokenize(corpus, output=source, validation_fraction=0.2, holdout_by="group")
        for split in ("train", "validation"):
            sides[source, split] = {text.split()[1] for text in _texts_of(directory, split)}
    assert sides["code", "validation"] == sides["docs", "validation"] != set()
    assert not sides["code", "train"] & sides["docs", "validation"]
    with pytest.raises(DataError, match=r"no group to hold it out by; set group_field=NAME"):
        tokenize(_write_jsonl(tmp_path / "no.jsonl", [{"text": "x"}]), output="no", holdout_by="group")


def test_a_finished_data_set_is_left_alone_and_another_refused(
    tokenize: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = _write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(50)])
    directory = tokenize(corpus)
    before = _files_of(directory)
    tokenize(corpus, workers=2)
    assert "complete; nothing to do" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"made with another add_bos; set overwrite=true"):
        tokenize(corpus, add_bos=False)
    with pytest.raises(DataError, match=r"made with another source, shard_tokens; set overwrite=true"):
        tokenize(corpus, source="other", shard_tokens=10)
    assert _files_of(directory) == before
    (directory / "train-00000.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"damaged: .*train-00000\.bin.*overwrite=true"):
        tokenize(corpus)
    tokenize(corpus, overwrite=True)
    assert _files_of(directory) == before
    tokenize(corpus, overwrite=True, shard_tokens=100)
    verify_shards(VerifyShardsSettings(path=str(directory)))


def test_shards_of_unknown_origin_are_not_overwritten(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    corpus = _write_jsonl(tmp_path / "a.jsonl", [{"text": "text"}])
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
        tokenize(_write_jsonl(tmp_path / "a.jsonl", [{"text": "text"}]), **changes)
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_a_document_is_refused(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document was kept of 2"):
        tokenize(_write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": ""}]))


# Interruption


@pytest.fixture
def stopped(tokenize: Callable[..., Path], tmp_path: Path) -> Path:
    """The corpus of an unfinished data set in out, of shard_tokens=2000: a hundred texts, of which 70 were read."""
    corpus = _write_jsonl(tmp_path / "a.jsonl", [{"text": f"text number {n} " * 20} for n in range(100)])

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
    unbroken = _files_of(tokenize(corpus, output="whole", shard_tokens=2000))
    with pytest.raises(DataError, match=r"unfinished data set made with another add_eos; set overwrite=true"):
        tokenize(corpus, shard_tokens=2000, add_eos=False)
    capsys.readouterr()
    assert _files_of(tokenize(corpus, shard_tokens=2000)) == unbroken
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
    made = _files_of(tokenize(copy, shard_tokens=2000))
    with pytest.raises(DataError, match=r"a data set made with another input_content; set overwrite=true"):
        tokenize(corpus, shard_tokens=2000)
    corpus.write_bytes(whole)
    assert _files_of(tokenize(corpus, output="anew", shard_tokens=2000)) == made


def test_a_change_anywhere_in_a_small_file_and_at_the_ends_of_a_large_one_is_seen(tmp_path: Path) -> None:
    for size, places in ((100_000, (0, 50_000, 99_999)), (HASHED_WHOLE + 1, (0, HASHED_WHOLE))):
        content = bytearray(random.Random(0).randbytes(size))
        seen = set()
        for place in (None, *places):
            if place is not None:
                content[place] ^= 1
            (tmp_path / "a.bin").write_bytes(content)
            seen.add(inputs_identity(find_inputs([str(tmp_path)]))["input_content"])
        assert len(seen) == 1 + len(places)


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
    corpus = _write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
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
    corpus = _write_jsonl(tmp_path / "a.jsonl", records)
    options = {"validation_fraction": 0.05, "shard_tokens": 60_000}
    unbroken = _files_of(tokenize(corpus, output="whole", **options))
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
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    wanted = f"train-{generator.randrange(1, 12):05d}.bin"
    while not (output / wanted).exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(generator.random() * 0.03)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (output / "progress.json").exists() and not (output / "dataset.json").exists()
    assert _files_of(tokenize(corpus, **options)) == unbroken


def test_two_runs_do_not_write_to_one_place(tokenize: Callable[..., Path], tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is at work there; wait for it or stop it"):
        tokenize(_write_jsonl(tmp_path / "a.jsonl", [{"text": "text"}]))
    os.close(descriptor)


# Verifying


def test_every_damaged_file_is_named_at_once(
    tokenize: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = _write_jsonl(tmp_path / "a.jsonl", [{"text": f"text number {n}"} for n in range(300)])
    directory = tokenize(corpus, validation_fraction=0.2, shard_tokens=600)
    assert len(read_manifest(directory).shards("train")) > 3
    content = bytearray((directory / "train-00000.bin").read_bytes())
    content[8] ^= 64
    (directory / "train-00000.bin").write_bytes(content)
    (directory / "train-00001.idx").write_bytes((directory / "train-00001.idx").read_bytes()[:-8])
    (directory / "train-00002.bin").unlink()
    (directory / "validation-00000.bin").write_bytes(b"")
    (directory / "train-99999.bin").write_bytes(b"stray")
    (directory / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(DataError, match="6 not whole") as caught:
        verify_shards(VerifyShardsSettings(path=str(directory)))
    named = ("train-00000.bin", "train-00001.idx", "train-00002.bin", "validation-00000.bin", "train-99999.bin")
    for name in (*named, "tokenizer.model"):
        assert f"{name} (" in str(caught.value)
    assert "train-00003.bin (" not in str(caught.value)
    assert "train-00003.bin" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tokens", "starts", "documents", "message"),
    [
        ([1, 5, 2, 1, 6, 2], [0, 3], {}, None),
        ([1, 600, 2, 1, 6, 2], [0, 3], {}, "holds the id 600, the vocabulary has 512"),
        ([1, 5, 2, 1, 6, 2], [1, 3], {}, "first document starts at 1"),
        ([1, 5, 2, 1, 6, 2], [0, 0], {}, "document 0 is empty"),
        ([1, 5, 2, 1, 6, 2], [0, 6], {}, "document 1 is empty or ends outside"),
        ([1, 5, 2, 9, 6, 2], [0, 3], {}, "document 1 does not begin with BOS"),
        ([1, 5, 9, 1, 6, 2], [0, 3], {}, "document 0 does not end with EOS"),
        ([1, 5, 2, 1, 6, 2], [0, 3], {"train": 3}, "documents.train is 3, the shards hold 2"),
        ([1, 5, 2, 1, 6, 2], [0, 3], {"kept": 1}, "documents.kept is 1"),
        ([1, 5, 2, 1, 6, 2], [0, 3], {"read": 9}, "documents.read is 9"),
    ],
)
def test_contents_that_contradict_the_manifest_are_found(
    tokenize: Callable[..., Path],
    tmp_path: Path,
    tokens: list[int],
    starts: list[int],
    documents: dict[str, int],
    message: str | None,
) -> None:
    import hashlib

    directory = tokenize(_write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}]))
    manifest = json.loads((directory / "dataset.json").read_text())
    content, index = (
        b"".join(n.to_bytes(2, "little") for n in tokens),
        b"".join(n.to_bytes(8, "little") for n in starts),
    )
    (directory / "train-00000.bin").write_bytes(content)
    (directory / "train-00000.idx").write_bytes(index)
    hashes = {"sha256": hashlib.sha256(content).hexdigest(), "index_sha256": hashlib.sha256(index).hexdigest()}
    manifest["splits"]["train"][0].update(tokens=len(tokens), **hashes)
    manifest["documents"].update(documents)
    (directory / "dataset.json").write_text(json.dumps(manifest))
    if message is None:
        verify_shards(VerifyShardsSettings(path=str(directory)))
        return
    with pytest.raises(DataError, match=message):
        verify_shards(VerifyShardsSettings(path=str(directory)))


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


def test_an_archive_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "corpus.tar.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"corpus\.tar\.zst: an archive; unpack it"):
        find_inputs([str(tmp_path)])


def test_a_separator_that_does_not_occur_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("one\n\ntwo")
    corpus = Corpus(find_inputs([str(tmp_path / "in.txt")]), ReadOptions(document_separator="<|end|>"))
    assert len(list(corpus.documents())) == 1
    assert "document_separator '<|end|>' is not in it" in capsys.readouterr().err


# The standard library as a corpus, and the command line


@pytest.fixture
def small_library(tmp_path: Path) -> Path:
    files = {
        "alpha/__init__.py": '"""About alpha."""\ndef f():\n    """Do f.\n\n        Indented.\n    Not.\n    """\n',
        "alpha/inner.py": 'class A:\n    async def g(self):\n        """Do g."""\n',
        "beta.py": "x = 1\n",
        "latin.py": None,
        "broken.py": "def (:\n",
        "empty.py": "",
        "encodings/cp1.py": '""" Codec cp1 generated from \'CP1.TXT\' with gencodec.py. """\nx = "left out"\n',
        "test/test_beta.py": "left out",
        "alpha/tests/t.py": "left out",
        "site-packages/other.py": "left out",
        "_sysconfigdata_x.py": "left out",
        "pydoc_data/topics.py": "topics = {'while': 'The while statement', 'for': 'The for statement'}\n",
    }
    for name, text in files.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"# caf\xe9\n" if text is None else text.encode())
    return tmp_path / "library"


def test_the_library_corpus_holds_code_and_documentation_by_module(
    small_library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in ("a", "b"):
        stdlib_corpus(StdlibCorpusSettings(output=str(tmp_path / output), stdlib=str(small_library)))
    assert _files_of(tmp_path / "a") == _files_of(tmp_path / "b")
    code, docs = _read(tmp_path / "a" / "code.jsonl.zst"), _read(tmp_path / "a" / "docs.jsonl.zst")
    groups = [("alpha/__init__.py", "alpha"), ("alpha/inner.py", "alpha"), ("beta.py", "beta"), ("broken.py", "broken")]
    assert [(document.id, document.group) for document in code] == groups
    assert [(document.id, document.group, document.text) for document in docs] == [
        ("topics/for", "topics/for", "The for statement"),
        ("topics/while", "topics/while", "The while statement"),
        (
            "docstrings/alpha/__init__.py",
            "alpha",
            "alpha\n\nAbout alpha.\n\n\nalpha.f\n\nDo f.\n\n    Indented.\nNot.\n",
        ),
        ("docstrings/alpha/inner.py", "alpha", "alpha.inner.A.g\n\nDo g.\n"),
    ]
    printed = capsys.readouterr().out
    assert "1 files not UTF-8" in printed and "1 files empty" in printed and "1 files without docstrings" in printed


def _command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"data_tools.{name}", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_commands_work_from_the_command_line(small_library: Path, tmp_path: Path, tiny_tokenizer: Path) -> None:
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    made = _command("stdlib_corpus", f"output={corpus}", f"stdlib={small_library}")
    assert made.returncode == 0, made.stderr
    inputs = f"input=[{corpus}/code.jsonl.zst,{corpus}/docs.jsonl.zst]"
    written = _command(
        "tokenize_shards", "source=x", inputs, f"tokenizer={tiny_tokenizer}", f"output={output}", "workers=1"
    )
    assert written.returncode == 0, written.stderr
    assert "tokenizing x" in written.stderr
    verified = _command("verify_shards", f"path={output}")
    assert verified.returncode == 0 and "whole" in verified.stdout
    (output / "train-00000.idx").unlink()
    refused = _command("verify_shards", f"path={output}")
    assert refused.returncode == 2
    assert "train-00000.idx" in refused.stderr.splitlines()[-1] and "Traceback" not in refused.stderr
    misspelt = _command("train_tokenizer", f"input={corpus}", f"output={tmp_path / 't'}", "vocab_siz=300")
    assert misspelt.returncode == 2 and "vocab_size" in misspelt.stderr


def test_the_tools_do_not_import_torch() -> None:
    names = ("train_tokenizer", "tokenize_shards", "verify_shards", "stdlib_corpus", "show_samples", "prepare", "audit")
    program = f"import sys, {', '.join(f'data_tools.{name}' for name in names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
