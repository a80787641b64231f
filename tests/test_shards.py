"""The shard format: what is written is read back, and what is not whole is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatrain.data.shards import (
    MANIFEST_FILE,
    Manifest,
    ShardWriter,
    check_hashes,
    check_sizes,
    open_document_starts,
    open_tokens,
    read_manifest,
    token_dtype,
    write_manifest,
)
from llamatrain.errors import DataError


def _write(directory: Path, documents: list[list[int]], *, vocab_size: int = 1000) -> Manifest:
    writer = ShardWriter(directory, "train-00000", token_dtype(vocab_size))
    for tokens in documents:
        writer.add(tokens, text_bytes=3 * len(tokens))
    manifest = Manifest(
        directory=directory,
        source="test",
        dtype=token_dtype(vocab_size),
        tokenizer_sha256="0" * 64,
        vocab_size=vocab_size,
        bos_id=1,
        eos_id=2,
        add_bos=True,
        add_eos=True,
        splits={"train": (writer.commit(),), "validation": ()},
        documents={"kept": len(documents)},
        settings={"fraction": 0.1},
    )
    write_manifest(manifest)
    return manifest


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    _write(tmp_path, [[1, 5, 6, 2], [1, 7, 2]])
    return tmp_path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 69_999), min_size=1, max_size=20), max_size=8),
    wide=st.booleans(),
)
def test_what_is_written_is_read_back(scratch: Path, documents: list[list[int]], wide: bool) -> None:
    documents = documents if wide else [[token % 65_536 for token in tokens] for tokens in documents]
    written = _write(scratch, documents, vocab_size=70_000 if wide else 65_536)
    manifest = read_manifest(scratch)
    assert manifest == written and manifest.hash == written.hash
    assert manifest.dtype == ("uint32" if wide else "uint16")
    (shard,) = manifest.shards("train")
    tokens, starts = open_tokens(manifest, shard), open_document_starts(manifest, shard)
    assert [list(part) for part in np.split(tokens, starts[1:].astype(int))] == (documents or [[]])
    assert manifest.tokens("train") == sum(map(len, documents)) and manifest.tokens("validation") == 0
    check_sizes(manifest)
    check_hashes(manifest)


def test_the_bytes_on_disk_are_as_documented(data_set: Path) -> None:
    assert (data_set / "train-00000.bin").read_bytes() == bytes.fromhex("0100 0500 0600 0200 0100 0700 0200")
    assert (data_set / "train-00000.idx").read_bytes() == bytes(8) + b"\x04" + bytes(7)
    assert sorted(path.name for path in data_set.iterdir()) == [
        MANIFEST_FILE,
        "train-00000.bin",
        "train-00000.idx",
    ]


def test_the_identity_does_not_depend_on_where_the_data_set_lies(data_set: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(data_set, elsewhere)
    assert read_manifest(elsewhere).hash == read_manifest(data_set).hash


def test_a_directory_without_manifest_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset.json.*tokenize_shards"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"format": "llamatr', "cannot be read"),
        (b"[]", "not a llamatrain-shards manifest"),
        (b'{"format": "other"}', "not a llamatrain-shards manifest"),
        (b'{"format": "llamatrain-shards", "version": 1}', "field is missing"),
        (
            b'{"format": "llamatrain-shards", "version": 1, "splits": []}',
            "field is missing or of the wrong kind",
        ),
    ],
)
def test_a_garbage_manifest_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(DataError, match=rf"dataset.json: .*{message}"):
        read_manifest(tmp_path)


def _edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((directory / MANIFEST_FILE).read_text())
    change(content)
    (directory / MANIFEST_FILE).write_text(json.dumps(content))


def test_a_newer_version_is_refused_by_number(data_set: Path) -> None:
    _edit(data_set, lambda content: content.update(version=2))
    with pytest.raises(DataError, match="format version 2; this program reads version 1"):
        read_manifest(data_set)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("vocab_size"),
        lambda content: content.update(unknown=1),
        lambda content: content.update(dtype="float16"),
        lambda content: content["splits"]["train"][0].pop("sha256"),
        lambda content: content["splits"]["train"][0].update(file="../train-00000.bin"),
        lambda content: content["splits"]["train"][0].update(file=7),
        lambda content: content["splits"]["train"][0].update(tokens=-1),
        lambda content: content["splits"]["train"][0].update(tokens="7"),
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused(data_set: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    _edit(data_set, change)
    with pytest.raises(DataError, match=r"dataset\.json"):
        read_manifest(data_set)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx"])
def test_a_truncated_or_missing_file_is_named(data_set: Path, name: str) -> None:
    manifest = read_manifest(data_set)
    content = (data_set / name).read_bytes()
    (data_set / name).write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{name}: {len(content) - 1} bytes .* {len(content)}"):
        check_sizes(manifest)
    (data_set / name).unlink()
    with pytest.raises(DataError, match=f"{name}: named in the manifest but cannot be read"):
        check_sizes(manifest)


def test_mapping_a_truncated_file_is_refused(data_set: Path) -> None:
    manifest = read_manifest(data_set)
    (shard,) = manifest.shards("train")
    (data_set / shard.file).write_bytes(b"\1\0")
    with pytest.raises(DataError, match=r"train-00000.bin: cannot be mapped"):
        open_tokens(manifest, shard)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx"])
def test_an_altered_byte_is_found(data_set: Path, name: str) -> None:
    manifest = read_manifest(data_set)
    content = bytearray((data_set / name).read_bytes())
    content[3] ^= 1
    (data_set / name).write_bytes(content)
    check_sizes(manifest)
    with pytest.raises(DataError, match=f"{name}: its SHA-256"):
        check_hashes(manifest)


def test_an_unfinished_shard_leaves_no_file_under_its_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train-00000", "uint16")
    writer.add([1, 2], text_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == [".train-00000.bin.tmp"]
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_ids_that_do_not_fit_the_type_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train-00000", "uint16")
    with pytest.raises(OverflowError):
        writer.add([70_000], text_bytes=1)
    writer.discard()
