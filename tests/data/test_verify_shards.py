"""Every damaged file of a data set is found and named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.verify_shards import VerifyShardsSettings, verify_shards
from llamatrain.data.shards import read_manifest
from llamatrain.errors import DataError
from tests.data.corpora import write_jsonl


def test_every_damaged_file_is_named_at_once(
    tokenize: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text number {n}"} for n in range(300)])
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

    directory = tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}]))
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
