"""tokenizer.json gives SentencePiece's ids and texts, whatever the text."""

import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from llamatrain.checkpoint.interchange import safetensors_files
from llamatrain.errors import DataError
from llamatrain.tokenizer import Tokenizer
from tests.conftest import TINY_VOCAB
from tests.interchange.converting import converted
from tests.real_text import english_documents
from tests.test_tokenizer import AWKWARD, TEXTS

LINES = [
    *AWKWARD,
    "",
    " ",
    "<s>",
    "<unk></s>",
    "\u2581",
    "a" * 10_000,
    *(char * count for char in "a =-e\n" for count in range(1, 40)),
]


@pytest.fixture(scope="module")
def program(exported: Path) -> Any:
    """tokenizer.json in the library that runs it, told what split_special_tokens tells it."""
    from tokenizers import Tokenizer as Program

    program = Program.from_file(str(exported / "tokenizer.json"))
    program.encode_special_tokens = True
    return program


@settings(max_examples=100)
@given(text=TEXTS)
def test_ids_and_texts_are_those_of_sentencepiece(program: Any, tiny_tokenizer: Path, text: str) -> None:
    assert_same_tokenizer(program, Tokenizer(tiny_tokenizer), text)


def test_ids_of_awkward_texts_are_those_of_sentencepiece(program: Any, tiny_tokenizer: Path) -> None:
    ours = Tokenizer(tiny_tokenizer)
    for text in LINES:
        assert_same_tokenizer(program, ours, text)


def assert_same_tokenizer(program: Any, ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text, bos=True)
    assert program.encode(text).ids == ids
    assert program.encode(text, add_special_tokens=False).ids == ids[1:]
    assert program.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def odd_lines(count: int) -> list[str]:
    """Texts of words, control tokens, spaces, marks and characters of all of Unicode, in every order."""
    draw = random.Random(0)
    words = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text().split(" ")
    marks = "<s>|</s>|<unk>|<0x0A>|[INST]|<s|\u2581|\t|\n|\r\n|\xa0|\u200b|\ufeff|\u3000|\x00"
    signs = "e\u0301|ﬁ|½|👩‍👧|한국어|中文|ไทย|עברית"
    pieces = [*marks.split("|"), *signs.split("|"), " ", "  ", "aaaa", "0000", "...", "3.14"]

    def piece() -> str:
        anything = draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])  # no surrogates
        return draw.choice([draw.choice(pieces), draw.choice(words), chr(anything)])

    return [draw.choice(["", " ", "\n"]).join(piece() for _ in range(draw.randrange(25))) for _ in range(count)]


@pytest.mark.slow
def test_ids_of_ten_thousand_odd_lines_are_those_of_sentencepiece(program: Any, tiny_tokenizer: Path) -> None:
    ours = Tokenizer(tiny_tokenizer)
    for text in odd_lines(10_000):
        assert_same_tokenizer(program, ours, text)


@pytest.mark.slow
def test_transformers_gives_those_ids_as_it_is(exported: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(exported), Tokenizer(tiny_tokenizer)
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, 2, TINY_VOCAB)
    texts = [*LINES, *(text[:20_000] for text in english_documents(tmp_path)[:3])]
    for text, ids in zip(texts, theirs(texts)["input_ids"], strict=True):
        assert ids == ours.encode(text, bos=True)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids[1:]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_a_tokenizer_that_normalizes_is_refused_before_weights_are_written(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("the cat sat on the mat\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=280, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    monkeypatch.delattr(safetensors_files, "write")
    with pytest.raises(DataError, match="it normalizes texts"):
        converted(checkpoint(), tmp_path / "out", "huggingface", tokenizer=str(tmp_path / "m.model"))
