"""Documents out of files: nothing lost, and what is damaged named."""

import bz2
import gzip
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import compression
from data_tools.documents import HASHED_WHOLE, Corpus, Document, ReadOptions, find_inputs, input_list, inputs_identity
from llamatrain.errors import ConfigError, DataError
from tests.data.corpora import documents_in, write_jsonl


def test_plain_and_packed_files_give_the_same_documents(tmp_path: Path) -> None:
    content = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {n}\r\n"} for n in range(500)]).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content[:999]) + gzip.compress(content[999:]))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(compress(content[:777]) + compress(content[777:]))
    wanted = [document.text for document in documents_in(tmp_path / "a.jsonl")]
    assert len(wanted) == 500
    (tmp_path / "d.jsonl.bz2").write_bytes(bz2.compress(content))
    for name in ("b.jsonl.gz", "c.jsonl.zst", "d.jsonl.bz2"):
        assert [document.text for document in documents_in(tmp_path / name)] == wanted


def test_a_directory_is_read_in_sorted_order_and_hidden_files_are_not(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".hidden", ".git/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.id for document in documents_in(tmp_path)] == ["a/b/c.txt", "a/z.txt", "b.txt"]
    assert [document.id for document in documents_in(f"{tmp_path}/a/**/*.txt")] == ["b/c.txt", "z.txt"]
    assert [document.id for document in documents_in(tmp_path / "b.txt", tmp_path / "a")] == [
        "b.txt",
        "b/c.txt",
        "z.txt",
    ]


def test_inputs_that_name_nothing_or_the_same_file_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for missing in ("gone.txt", "*.jsonl", "gone/*"):
        with pytest.raises(DataError, match="no file there"):
            documents_in(tmp_path / missing)
    with pytest.raises(DataError, match=r"a\.txt: named twice"):
        documents_in(tmp_path / "a.txt", tmp_path)
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
    documents = documents_in(path, document_separator="--")
    assert [document.text for document in documents] == texts
    assert [document.id for document in documents] == [f"split.txt#{n}" for n in range(len(texts))]


def test_a_separator_on_the_edge_of_two_chunks_is_found(tmp_path: Path) -> None:
    first = "x" * (compression.READ_BYTES - 2)
    (tmp_path / "a.txt").write_text(f"{first}<|end|>second<|end|>")
    assert [d.text for d in documents_in(tmp_path, document_separator="<|end|>")] == [first, "second"]
    assert len(documents_in(tmp_path)) == 1


def test_fields_have_configurable_names_and_defaults(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "one", "key": 7, "part": "p"}, {"body": "two", "extra": None}])
    documents = documents_in(path, text_field="body", id_field="key", group_field="part")
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
        documents_in(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    content = b"".join(b'{"text": "%d"}\n' % n for n in random.Random(0).sample(range(10**9), 20_000))
    whole = gzip.compress(content) if suffix == ".gz" else zstandard.ZstdCompressor().compress(content)
    damaged = {"truncated": whole[: len(whole) * 2 // 3], "empty": b"", "garbage": b"no archive" * 9}[damage]
    (tmp_path / f"bad.jsonl{suffix}").write_bytes(damaged)
    told = "truncated or damaged" if damage == "truncated" else "its name says compressed, and it is not"
    with pytest.raises(DataError, match=rf"bad\.jsonl{suffix}: {told}"):
        documents_in(tmp_path)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    for content in (b"caf\xe9 au lait", b"cut in a character \xc3"):
        (tmp_path / "latin.txt").write_bytes(content)
        with pytest.raises(DataError, match=r"latin\.txt: not UTF-8"):
            documents_in(tmp_path)


def test_an_archive_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "corpus.tar.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"corpus\.tar\.zst: an archive; unpack it"):
        find_inputs([str(tmp_path)])


def test_a_separator_that_does_not_occur_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("one\n\ntwo")
    corpus = Corpus(find_inputs([str(tmp_path / "in.txt")]), ReadOptions(document_separator="<|end|>"))
    assert len(list(corpus.documents())) == 1
    assert "document_separator '<|end|>' is not in it" in capsys.readouterr().err


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
