"""The tokenizer and how it is trained."""

import json
import tracemalloc
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.train_tokenizer import (
    LLAMA_SETTINGS,
    MAX_LINE_BYTES,
    LineSample,
    TrainTokenizerSettings,
    train_tokenizer,
    usable_pieces,
)
from llamatrain.errors import ConfigError, DataError
from llamatrain.tokenizer import SPACE_MARK, Tokenizer

AWKWARD = [
    "<s>",
    "</s><unk>",
    "\0",
    "a\0b",
    "😀👩‍👩‍👧",
    "  two  spaces ",
    " ",
    "\r\n\r",
    "\t",
    "▅",
    "<0x0A>",
    "é\u0301",
]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE_MARK)),
    st.lists(st.sampled_from([*AWKWARD, "def ", "word", "\n", "12"])).map("".join),
)
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer)


@QUICK
@given(text=TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_decoding_gives_awkward_texts_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@QUICK
@given(text=TEXTS.filter(bool))
def test_bytes_per_token_add_up_to_the_bytes_of_a_document(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())


def test_text_never_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<s> a </s> <unk>")
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_digits_are_split_and_newline_is_llamas_id(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("2023")) in (4, 5)  # with or without a piece for the space in front
    assert tokenizer.encode("\n")[-1] == 13
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_a_missing_or_garbage_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.model"):
        Tokenizer(tmp_path / "gone.model")
    (tmp_path / "bad.model").write_bytes(b"no model" * 10)
    with pytest.raises(DataError, match=r"bad.model.*train_tokenizer"):
        Tokenizer(tmp_path / "bad.model")


def _settings(directory: Path, **changes: object) -> TrainTokenizerSettings:
    corpus = directory / "corpus.txt"
    if not corpus.exists():
        corpus.write_text("".join(f"the cat number {n * 7919} sat on mat {n}\n" for n in range(300)))
    values = {"input": str(corpus), "output": str(directory / "out"), "vocab_size": 300}
    return TrainTokenizerSettings(**{**values, **changes})  # type: ignore[arg-type]


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    train_tokenizer(_settings(tmp_path))
    train_tokenizer(_settings(tmp_path, output=str(tmp_path / "again")))
    names = ("tokenizer.model", "tokenizer.json")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_model_holds_llamas_trainer_settings(tiny_tokenizer: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2 as messages

    model = messages.ModelProto.FromString(tiny_tokenizer.read_bytes())
    spec = model.trainer_spec
    for name, wanted in LLAMA_SETTINGS.items():
        if name == "model_type":
            assert spec.model_type == spec.BPE
        elif hasattr(spec, name):
            assert getattr(spec, name) == pytest.approx(wanted), name
    assert model.normalizer_spec.name == "identity"
    assert model.normalizer_spec.add_dummy_prefix and not model.normalizer_spec.remove_extra_whitespaces


def test_an_existing_tokenizer_is_kept_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(_settings(tmp_path))
    before = (tmp_path / "out" / "tokenizer.model").stat().st_mtime_ns
    train_tokenizer(_settings(tmp_path))
    assert "there already" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.model").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"another vocab_size; set overwrite=true"):
        train_tokenizer(_settings(tmp_path, vocab_size=310))
    train_tokenizer(_settings(tmp_path, vocab_size=310, overwrite=True))
    assert Tokenizer(tmp_path / "out" / "tokenizer.model").vocab_size == 310
    with open(tmp_path / "out" / "tokenizer.model", "ab") as file:
        file.write(b" ")
    with pytest.raises(DataError, match="altered since it was made"):
        train_tokenizer(_settings(tmp_path, vocab_size=310))


def test_a_vocabulary_that_does_not_fit_the_corpus_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab_size=9000 .* set vocab_size=\d+ or less"):
        train_tokenizer(_settings(tmp_path, vocab_size=9000))
    with pytest.raises(DataError, match=r"vocab_size=100 .* set vocab_size=\d+ or more"):
        train_tokenizer(_settings(tmp_path, vocab_size=100))
    assert list((tmp_path / "out").iterdir()) == []


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no text to train on"):
        train_tokenizer(_settings(tmp_path, input=str(tmp_path / "empty.txt")))
    for changes, message in (
        ({"output": "???"}, "output="),
        ({"input": "???"}, "input="),
        ({"sample_lines": 0}, "sample_lines=0"),
        ({"format": "csv"}, "format=csv"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_tokenizer(_settings(tmp_path, **changes))


def test_lines_and_what_became_of_them_are_counted(tmp_path: Path) -> None:
    records = ["a b\n\nc", "x" * 5000, "before\0after", "bad \ud800"]
    corpus = tmp_path / "c.jsonl"
    more = [f"words to fill {n} the corpus" for n in range(100)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in records + more))
    train_tokenizer(_settings(tmp_path, input=[str(corpus)]))
    counts = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["counts"]
    assert counts["documents"] == 104 and counts["documents_invalid"] == 1
    assert counts["lines"] == 105 and counts["lines_empty"] == 1
    assert counts["lines_split"] == 2 and counts["pieces_from_split"] == 4
    assert counts["pieces"] == counts["sampled"] == 106
    assert (
        counts["bytes"]
        == counts["sampled_bytes"]
        == 4 - 1 + 5000 + 11 - 0 - 0 + sum(map(len, more)) + 0 + 1 - 0 - 0 - 0
    )


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from(["é" * 700, "x" * 3000, "😀" * 500, "a b c ", "\0", "\u2585", " "]), max_size=12))
def test_long_lines_are_split_and_nothing_is_lost(parts: list[str]) -> None:
    line = "".join(parts)
    pieces = usable_pieces(line)
    assert b"".join(pieces).decode() == line.replace("\0", "").replace("\u2585", "")
    for piece in pieces:
        assert 0 < len(piece) <= MAX_LINE_BYTES
        assert "\0" not in piece.decode() and "\u2585" not in piece.decode()


def test_sentencepiece_uses_every_piece_of_a_long_line(tmp_path: Path) -> None:
    corpus = tmp_path / "long.txt"
    corpus.write_text("filler text here " * 2000 + "needleword " * 2000)  # one line far beyond the limit
    train_tokenizer(_settings(tmp_path, input=str(corpus), vocab_size=300))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert "▁needleword" in model.encode("needleword", out_type=str)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=200), lines=st.integers(1, 40), size=st.integers(50, 400))
def test_the_sample_keeps_both_bounds_and_the_order(lengths: list[int], lines: int, size: int) -> None:
    stream = [b"%d:" % number + b"x" * length for number, length in enumerate(lengths)]
    sample = LineSample(max_lines=lines, max_bytes=size, seed=1)
    for line in stream:
        sample.add(line)
    chosen = sample.lines()
    assert len(chosen) <= lines and sum(map(len, chosen)) <= size
    numbers = [int(line.partition(b":")[0]) for line in chosen]
    assert numbers == sorted(set(numbers))
    if len(stream) <= lines and sum(map(len, stream)) <= size:
        assert chosen == stream


def test_the_sample_is_uniform() -> None:
    hits = [0] * 10
    for seed in range(600):
        sample = LineSample(max_lines=3, max_bytes=10**6, seed=seed)
        for number in range(10):
            sample.add(b"%d" % number)
        for line in sample.lines():
            hits[int(line)] += 1
    assert all(130 < count < 230 for count in hits), hits  # 180 expected


def test_sampling_needs_memory_for_the_sample_only() -> None:
    sample = LineSample(max_lines=10**9, max_bytes=100_000, seed=0)
    tracemalloc.start()
    for number in range(50_000):
        sample.add(b"%07d" % number + b"x" * 200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000  # of 10 MB offered
