"""The cached encoder gives SentencePiece's own ids for every text, or says why it leaves the work to it."""

import io
import statistics
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_tools import cached_encoding
from data_tools.cached_encoding import CachedEncoder
from data_tools.sentencepiece_spec import read_spec
from data_tools.train_tokenizer import LLAMA_SETTINGS, TrainTokenizerSettings, train_tokenizer
from llamatrain.errors import DataError
from llamatrain.tokenizer import SPACE_MARK, Tokenizer
from tests.real_text import needed_data, novels

SPACES = [" ", "  ", "   ", "    ", "\n", "\n\n", "\r\n", "\t", "\v", "\f", "\x85", "\u00a0", "\u2028", "\u3000"]
MARKS = [SPACE_MARK, SPACE_MARK * 2, f" {SPACE_MARK}", f"{SPACE_MARK} ", f"\n{SPACE_MARK}", "\u2585"]
ODD = ["\0", "\x1b", "\x7f", "\ufeff", "\ufffd", "e\u0301", "\u0301", "\u202e", "\U0010ffff"]
ODD += ["👩\u200d👩\u200d👧", "世界", "١٢٣", "ß"]
WORDS = ["def", "return", "self.x", "the", "a", "1", "42", "2023", "=", "(", "),", "x_"]
WORDS += ["<s>", "</s>", "<unk>", "<0x0A>"]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from(f" \n{SPACE_MARK}a.")),
    st.lists(st.sampled_from([*SPACES, *SPACES, *WORDS, *ODD])).map("".join),
    st.lists(st.sampled_from([*SPACES, *MARKS, *WORDS, *ODD])).map("".join),
)
MANY = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def whole(tokenizer: Tokenizer, text: str, dtype: str = "<u2") -> bytes:
    return np.asarray(tokenizer.encode(text), dtype).tobytes()


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> CachedEncoder:
    encoder = CachedEncoder(tokenizer, "uint16")
    assert encoder.obstacle is None
    return encoder


@MANY
@given(text=TEXTS)
@example("")
@example(" ")
@example("a ")
@example(" a")
@example(" \n ")
@example("\n  \n")
@example("a \n")
def test_ids_are_those_of_the_whole_text(tokenizer: Tokenizer, encoder: CachedEncoder, text: str) -> None:
    assert encoder.encode(text) == whole(tokenizer, text)


@settings(MANY, max_examples=150)
@given(text=TEXTS, slice_characters=st.integers(1, 12), cache_chunks=st.integers(1, 4))
def test_neither_the_slices_nor_the_size_of_the_cache_change_an_id(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: str, slice_characters: int, cache_chunks: int
) -> None:
    monkeypatch.setattr(cached_encoding, "SLICE_CHARACTERS", slice_characters)
    encoder = CachedEncoder(tokenizer, "uint32", cache_chunks=cache_chunks)
    assert encoder.encode(text) == whole(tokenizer, text, "<u4")
    assert encoder.obstacle is None


def test_every_character_is_encoded_as_alone_between_words_and_after_spaces(
    tokenizer: Tokenizer, encoder: CachedEncoder
) -> None:
    points = [chr(point) for point in (*range(0x3000), *range(0x3000, 0x110000, 97)) if not 0xD800 <= point < 0xE000]
    for form in ("{0}", "a{0} b", "  {0}  {0}\n{0}", "a \n{0}\n "):
        for start in range(0, len(points), 512):
            text = "".join(form.format(point) for point in points[start : start + 512] if point != SPACE_MARK)
            assert encoder.encode(text) == whole(tokenizer, text)


def test_most_of_a_text_is_not_encoded_twice(tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(tiny_tokenizer)
    encoder = CachedEncoder(tokenizer, "uint16")
    text = (Path(sysconfig.get_path("stdlib")) / "calendar.py").read_text()
    encode, encoded = tokenizer.encode, []
    monkeypatch.setattr(tokenizer, "encode", lambda chunk: encoded.append(chunk) or encode(chunk))
    first = encoder.encode(text)
    assert 100 < len(encoded) < len(text.split())
    encoded.clear()
    assert encoder.encode(text) == first
    assert all(len(chunk) > cached_encoding.LONGEST_CHUNK for chunk in encoded)


def test_the_cache_keeps_to_its_bound(tokenizer: Tokenizer) -> None:
    encoder = CachedEncoder(tokenizer, "uint16", cache_chunks=50)
    for n in range(300):
        text = f"word{n} {n}"
        assert encoder.encode(text) == whole(tokenizer, text)
        assert encoder._cache is not None and 0 < len(encoder._cache) <= 50
    encoder.encode("x" * (cached_encoding.LONGEST_CHUNK + 1))
    assert "x" * (cached_encoding.LONGEST_CHUNK + 1) not in encoder._cache


def test_bos_eos_and_byte_tokens(tokenizer: Tokenizer, encoder: CachedEncoder) -> None:
    text = "a ☃\nb\n"
    ids = encoder.encode(text, bos=True, eos=True)
    assert np.frombuffer(ids, "<u2").tolist() == tokenizer.encode(text, bos=True, eos=True)
    assert encoder.count_bytes(ids) == (5, 2)
    assert encoder.count_bytes(encoder.encode("")) == (0, 0)


@pytest.mark.parametrize("text", ["\ud800", "a \udfff b", "\n\ud800\n"])
def test_a_lone_surrogate_is_refused_as_by_the_tokenizer(encoder: CachedEncoder, text: str) -> None:
    with pytest.raises(DataError, match="not valid Unicode text"):
        encoder.encode(text)


# Tokenizers whose texts do not fall apart at spaces


def train(directory: Path, lines: list[str] | None = None, **changes: Any) -> Tokenizer:
    """A tokenizer of LLaMA's settings but for the changes."""
    text = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text().splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines or text), model_writer=model, minloglevel=2,
        **{**LLAMA_SETTINGS, "vocab_size": 400, "num_threads": 1, **changes},
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer(directory / "tokenizer.model")


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({}, None),
        ({"allow_whitespace_only_pieces": False, "split_digits": False, "split_by_unicode_script": False}, None),
        ({"model_type": "unigram", "hard_vocab_limit": False}, "not of type BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises characters"),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"add_dummy_prefix": False}, "puts no space in front"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
        ({"byte_fallback": False}, "no byte tokens"),
        ({"user_defined_symbols": ["in the"]}, "user-defined symbols"),
        ({"user_defined_symbols": ["\n"]}, "user-defined symbols"),
    ],
)
def test_what_cannot_be_split_is_encoded_whole(tmp_path: Path, changes: dict[str, Any], obstacle: str | None) -> None:
    tokenizer = train(tmp_path, **changes)
    encoder = CachedEncoder(tokenizer, "uint16")
    assert (encoder.obstacle is None) == (obstacle is None) and (obstacle or "") in (encoder.obstacle or "")
    texts = [(Path(sysconfig.get_path("stdlib")) / "string.py").read_text(), f"a{SPACE_MARK} b", "  a", " ", ""]
    for text in (*texts, "ﬁ ½ in the  in the\n in the ", "it is in the middle of the"):
        assert encoder.encode(text) == whole(tokenizer, text)


def test_a_piece_across_words_would_make_another_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its check the encoder would be wrong here: it is what keeps the ids exact."""
    tokenizer = train(tmp_path, lines=["in the house"] * 50 + list("abcdefghijklmnopqrstuvwxyz"), vocab_size=310,
                      split_by_whitespace=False)  # fmt: skip
    encoder = CachedEncoder(tokenizer, "uint16")
    assert "reaches across words or lines" in str(encoder.obstacle)
    assert encoder.encode("in the house") == whole(tokenizer, "in the house")
    monkeypatch.setattr(cached_encoding, "_obstacle", lambda spec: None)
    monkeypatch.setattr(cached_encoding, "PROBE", "a")
    assert CachedEncoder(tokenizer, "uint16").encode("in the house") != whole(tokenizer, "in the house")


def test_an_encoding_that_the_probe_finds_wrong_is_not_used(tokenizer: Tokenizer, monkeypatch: Any) -> None:
    monkeypatch.setattr(cached_encoding, "_chunks", lambda text: iter([text.split()]))
    encoder = CachedEncoder(tokenizer, "uint16")
    assert "release of SentencePiece" in str(encoder.obstacle)
    assert encoder.encode("a  b") == whole(tokenizer, "a  b")


@pytest.mark.parametrize("changes", [{}, {"normalization_rule_name": "nfkc", "byte_fallback": False}])
def test_the_spec_is_what_protocol_buffers_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    from sentencepiece import sentencepiece_model_pb2 as messages

    content = train(tmp_path, **changes).path.read_bytes()
    model, spec = messages.ModelProto.FromString(content), read_spec(content)
    assert spec.pieces == tuple((piece.piece, piece.type) for piece in model.pieces)
    assert spec.charsmap == model.normalizer_spec.precompiled_charsmap
    for part in (model.trainer_spec, model.normalizer_spec):
        for name in set(spec.__dataclass_fields__) & set(part.DESCRIPTOR.fields_by_name):
            assert getattr(spec, name) == getattr(part, name), name
    for damaged in (content[:-1], b"\xff" * 12, b"\x0a\x05ab"):
        with pytest.raises(DataError, match="not a SentencePiece model"):
            read_spec(damaged)


# Real text


def texts_below(directory: Path) -> Iterator[str]:
    """Every file of text, also those in archives; what is no UTF-8 with U+FFFD."""
    for path in sorted(directory.rglob("*")):
        if not path.is_file() or path.suffix in (".gz", ".bz2", ".warc"):
            continue
        content = path.read_bytes()
        if path.suffix == ".zst":
            content = zstandard.ZstdDecompressor().decompressobj().decompress(content)
        if path.name.endswith(".tar.zst"):
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                members = [archive.extractfile(member) for member in archive if member.isfile()]
                yield from (member.read().decode("utf-8", "replace") for member in members if member)
        elif path.suffix == ".zip":
            with zipfile.ZipFile(io.BytesIO(content)) as zipped:
                yield from (zipped.read(name).decode("utf-8", "replace") for name in zipped.namelist())
        else:
            yield content.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def large_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """LLaMA's settings and size, trained on the novels."""
    archive = needed_data() / "corpora" / "english_novels" / "english_novels.tar.zst"
    directory = tmp_path_factory.mktemp("large")
    for number, text in enumerate(novels(archive, 98)):
        (directory / f"{number}.txt").write_text(text)
    values = {"input": str(directory / "*.txt"), "output": str(directory / "out"), "vocab_size": 32000}
    train_tokenizer(TrainTokenizerSettings(**values))
    return Tokenizer(directory / "out" / "tokenizer.model")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_text_of_the_shared_data(tokenizer: Tokenizer, large_tokenizer: Tokenizer) -> None:
    data = needed_data()
    for used, directory, least in ((large_tokenizer, data, 400), (tokenizer, data / "raw", 20)):
        encoder, texts = CachedEncoder(used, "uint16"), 0
        for text in texts_below(directory):
            texts += 1
            assert encoder.encode(text) == whole(used, text)
        assert encoder.obstacle is None and texts > least


@pytest.mark.slow
def test_it_is_faster(large_tokenizer: Tokenizer) -> None:
    data = needed_data()
    whole_texts = novels(data / "corpora" / "english_novels" / "english_novels.tar.zst", 25)
    texts = [text[start : start + 5000] for text in whole_texts for start in range(0, len(text), 5000)]

    def seconds(encode: Callable[[str], bytes]) -> float:
        started = time.process_time()
        for text in texts:
            encode(text)
        return time.process_time() - started

    cold, warm = [], []
    for _ in range(3):
        encoder = CachedEncoder(large_tokenizer, "uint16")
        plain = seconds(lambda text: whole(large_tokenizer, text))
        cold.append(plain / seconds(encoder.encode))
        warm.append(plain / seconds(encoder.encode))
    print(f"times as fast: cold {cold}, warm {warm}")
    assert statistics.median(cold) > 1 and statistics.median(warm) > 1  # on any machine; docs/benchmarks has how much
