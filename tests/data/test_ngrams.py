"""The Kneser-Ney model is the one the formulas define, sums to one as KenLM reads it, and agrees with lmplz."""

import dataclasses
import gzip
import json
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.kneser_ney import (
    BEGIN,
    END,
    FALLBACK,
    SPECIAL_WORDS,
    Order,
    count_ngrams,
    estimate,
    estimate_discounts,
    write_arpa,
)
from data_tools.train_ngrams import TrainNgramsSettings, percentiles, train_ngrams
from llamatrain.config.build import build
from llamatrain.errors import ConfigError, DataError
from tests.data.small_language import model_settings, page, sentence, small_models, write_pages

kenlm = pytest.importorskip("kenlm")

ROOT = Path(__file__).resolve().parents[2]
Sentences = list[list[int]]  # of words; 3 is the first that is no special one


def _tokens(sentences: Sentences) -> tuple[np.ndarray, int]:
    flat = [token for sentence in sentences for token in (BEGIN, *sentence, END)]
    return np.array(flat, dtype=np.int32), max(flat) + 1


def _compact(sentences: Sentences) -> Sentences:
    """Words renumbered so that every one occurs."""
    numbers = {word: n for n, word in enumerate(sorted({w for s in sentences for w in s}), start=3)}
    return [[numbers[word] for word in sentence] for sentence in sentences]


def _ngrams_of(model: list[Order] | list[Any]) -> list[list[tuple[int, ...]]]:
    """The n-grams of every order, as words."""
    found: list[list[tuple[int, ...]]] = [[(word,) for word in model[0].word.tolist()]]
    for ngrams in model[1:]:
        pairs = zip(ngrams.prefix.tolist(), ngrams.word.tolist(), strict=True)
        found.append([(*found[-1][prefix], word) for prefix, word in pairs])
    return found


sentences_strategy = st.lists(st.lists(st.integers(3, 6), max_size=7), min_size=1, max_size=12).map(_compact)


@settings(max_examples=60, deadline=None)
@given(sentences=sentences_strategy, order=st.integers(2, 5))
def test_counts_are_occurrences_at_the_top_and_different_words_before_below(sentences: Sentences, order: int) -> None:
    tokens, words = _tokens(sentences)
    counted = count_ngrams(tokens, words=words, order=order)
    padded = [(BEGIN, *sentence, END) for sentence in sentences]
    occurrences: Counter[tuple[int, ...]] = Counter()
    before: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for text in padded:
        for start in range(len(text)):
            for length in range(1, min(order, len(text) - start) + 1):
                ngram = text[start : start + length]
                occurrences[ngram] += 1
                if start:
                    before[ngram].add(text[start - 1])
    for length, (ngrams, found) in enumerate(zip(counted, _ngrams_of(counted), strict=True), start=1):
        wanted = {ngram: n for ngram, n in occurrences.items() if len(ngram) == length}
        if length < order:
            wanted = {ngram: n if ngram[0] == BEGIN else len(before[ngram]) for ngram, n in wanted.items()}
        if length == 1:
            wanted |= {(0,): 0, (BEGIN,): 0}
        assert dict(zip(found, ngrams.count.tolist(), strict=True)) == wanted
        assert len(set(found)) == len(found)


def test_discounts_are_those_of_chen_and_goodman() -> None:
    counts = np.repeat([1, 2, 3, 4, 9], [50, 20, 10, 6, 3])
    ratio = 50 / 90
    wanted = (1 - 2 * ratio * 20 / 50, 2 - 3 * ratio * 10 / 20, 3 - 4 * ratio * 6 / 10)
    assert estimate_discounts(counts) == (wanted, True)
    assert estimate_discounts(np.array([1, 1, 2, 3])) == (FALLBACK, False)
    assert estimate_discounts(np.repeat([1, 2, 3, 4], [10, 1, 1, 900])) == (FALLBACK, False)  # one would be negative


def _save(directory: Path, sentences: Sentences, order: int) -> tuple[Any, list[str]]:
    """The model as KenLM reads it, and its vocabulary."""
    tokens, words = _tokens(sentences)
    vocabulary = [*SPECIAL_WORDS, *(f"w{n}" for n in range(3, words))]
    write_arpa(directory / "model.arpa", estimate(tokens, words=words, order=order), vocabulary)
    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    return kenlm.Model(str(directory / "model.arpa"), config), vocabulary


def _total(model: Any, vocabulary: list[str], context: list[str], *, begins: bool) -> float:
    """The probabilities of all words that may follow a context, added up."""
    state, after = kenlm.State(), kenlm.State()
    (model.BeginSentenceWrite if begins else model.NullContextWrite)(state)
    for word in context:
        model.BaseScore(state, word, after)
        state, after = after, kenlm.State()
    return math.fsum(10 ** model.BaseScore(state, word, after) for word in vocabulary if word != "<s>")


@settings(max_examples=25, deadline=None)
@given(sentences=sentences_strategy, order=st.integers(2, 5), data=st.data())
def test_probabilities_sum_to_one_after_any_context(
    tmp_path_factory: pytest.TempPathFactory, sentences: Sentences, order: int, data: st.DataObject
) -> None:
    if not any(sentences):
        return
    model, vocabulary = _save(tmp_path_factory.getbasetemp(), sentences, order)
    seen = [f"w{word}" for word in data.draw(st.sampled_from(sentences))][: order - 1]
    anything = data.draw(st.lists(st.sampled_from([*vocabulary[3:], "unheard", "<unk>"]), max_size=order + 1))
    for context in (seen, anything, []):
        for begins in (True, False):
            assert _total(model, vocabulary, context, begins=begins) == pytest.approx(1, abs=2e-5)


def _golden_sentences() -> list[list[str]]:
    words = ["the", "a", "small", "old", "red", "fox", "dog", "house", "river", "saw", "met", "left", "found"]
    words += ["and", "then", "quickly", "it", "she", "we", "never"]
    state, sentences = 1, []
    for _ in range(400):
        sentence: list[str] = []
        while not sentence or not ((state >> 23) % 5 == 0 or len(sentence) > 11):
            state = (state * 1103515245 + 12345) % 2**31
            drawn = state >> 12
            sentence.append(words[min(drawn % 23, (drawn >> 6) % 23, 19)])
        sentences.append(sentence)
    return sentences


def test_the_model_is_the_one_lmplz_makes() -> None:
    """The values are those KenLM 0.3.0's `lmplz -o 3 --discount_fallback` gives for these sentences."""
    numbers = {word: n for n, word in enumerate(SPECIAL_WORDS)}
    text = [[numbers.setdefault(word, len(numbers)) for word in sentence] for sentence in _golden_sentences()]
    tokens, words = _tokens(text)
    orders = estimate(tokens, words=words, order=3)
    assert [len(order.probability) for order in orders] == [23, 401, 1468]
    assert orders[0].discounts == (0.5, 1.0, 1.5) and not orders[0].estimated
    assert orders[1].discounts == pytest.approx((0.365854, 0.969981, 1.41663), rel=1e-5)
    assert orders[2].discounts == pytest.approx((0.713411, 1.60671, 2.13727), rel=1e-5)
    wanted = {
        "<unk>": (-2.4472566, 0), "</s>": (-1.3035975, 0), "the": (-1.2823374, -0.5842371),
        "fox": (-1.3035975, -0.5986053), "<s> the": (-1.082727, -0.23801532), "the </s>": (-0.86158776, 0),
        "the a": (-1.1619239, -0.17741388), "small old": (-1.215771, -0.13318308), "<s> the a": (-1.0165422, 0),
        "the a small": (-0.6509642, 0), "a the </s>": (-0.587538, 0),
    }  # fmt: skip
    names = list(numbers)
    found = {}
    for order, ngrams in zip(orders, _ngrams_of([order.ngrams for order in orders]), strict=True):
        for ngram, probability, backoff in zip(ngrams, order.probability, order.backoff, strict=True):
            if (text_of := " ".join(names[word] for word in ngram)) in wanted:
                found[text_of] = (math.log10(probability), math.log10(backoff))
    assert found.keys() == wanted.keys()
    for ngram, values in wanted.items():
        assert found[ngram] == pytest.approx(values, abs=1e-6), ngram


def test_percentiles_are_of_all_values() -> None:
    assert percentiles([float(n) for n in range(201)]) == [2.0 * n for n in range(101)]


# The command


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models(tmp_path_factory.getbasetemp() / "small_language")


def test_the_command_writes_a_model_and_its_percentiles(models: Path) -> None:
    assert sorted(path.name for path in models.iterdir()) == ["en.arpa.gz", "en.ngrams.json", "en.sp.model"]
    record = json.loads((models / "en.ngrams.json").read_text())
    assert record["cutoffs_over"] == 60 and len(record["percentiles"]) == 101
    assert record["percentiles"] == sorted(record["percentiles"])
    assert 1 < record["percentiles"][30] < 20  # this language has little to be surprised by
    assert record["counts"]["lines"] == record["counts"]["lines_sampled"] == 150 * 8
    assert (models / "en.arpa.gz").read_bytes()[4:8] == bytes(4)  # no time: the same model, the same bytes
    head = gzip.decompress((models / "en.arpa.gz").read_bytes())[:200].decode()
    assert head.startswith("\\data\\\nngram 1=") and "ngram 5=" in head


def test_the_same_texts_give_the_same_bytes(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = model_settings(tmp_path)
    train_ngrams(changed)
    for name in ("en.arpa.gz", "en.sp.model", "en.ngrams.json"):
        assert (tmp_path / "models" / name).read_bytes() == (models / name).read_bytes(), name
    capsys.readouterr()
    train_ngrams(changed)
    assert "there already" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"a model made with another order; set overwrite=true"):
        train_ngrams(dataclasses.replace(changed, order=3))
    (tmp_path / "models" / "en.arpa.gz").write_bytes(b"cut")
    with pytest.raises(DataError, match="altered since it was made"):
        train_ngrams(changed)
    (tmp_path / "models" / "en.ngrams.json").unlink()  # as after a kill: it is written last
    train_ngrams(changed)
    assert (tmp_path / "models" / "en.arpa.gz").read_bytes() == (models / "en.arpa.gz").read_bytes()


def test_documents_are_held_out_for_the_percentiles_where_no_pages_are_given(tmp_path: Path) -> None:
    train_ngrams(model_settings(tmp_path, cutoffs_input=None, held_out_fraction=0.2, order=3))
    record = json.loads((tmp_path / "models" / "en.ngrams.json").read_text())
    held_out = record["counts"]["documents_held_out"]
    assert 15 < held_out < 50 and record["cutoffs_over"] == held_out
    assert record["counts"]["lines"] == (150 - held_out) * 8
    with pytest.raises(DataError, match="no document to take percentiles over"):
        train_ngrams(model_settings(tmp_path, output=str(tmp_path / "b"), cutoffs_input=None, held_out_fraction=1e-9))


def test_text_that_spells_a_special_word_in_unknown_characters_is_no_sentence_mark(tmp_path: Path) -> None:
    # "<", "s" and ">" are too rare here to be pieces: together they come out of SentencePiece as "<s>".
    texts = ["рыба нашла старую лодку у реки и поплыла\n" * 300 + "рыба <s> лодка </s> <unk>"]
    training = model_settings(tmp_path, input=str(write_pages(tmp_path / "ru.jsonl", texts)), order=2)
    train_ngrams(dataclasses.replace(training, language="ru", vocab_size=22, character_coverage=0.99))
    text = gzip.decompress((tmp_path / "models" / "ru.arpa.gz").read_bytes()).decode()
    bigrams = text.partition("\\2-grams:\n")[2]
    assert "\t<s> " in bigrams and " <s>" not in bigrams and "</s> " not in bigrams and "<unk>" not in bigrams


FAKE_LMPLZ = """
import sys
import numpy as np
sys.path.insert(0, {root!r})
from pathlib import Path
from data_tools.kneser_ney import BEGIN, END, SPECIAL_WORDS, estimate, write_arpa
arguments = dict(zip(sys.argv[1:], sys.argv[2:]))
if {status}:
    sys.exit({status})
numbers = {{word: n for n, word in enumerate(SPECIAL_WORDS)}}
tokens = []
for line in sys.stdin.buffer.read().decode().splitlines():
    tokens += [BEGIN, *(numbers.setdefault(word, len(numbers)) for word in line.split()), END]
orders = estimate(np.array(tokens, dtype=np.int32), words=len(numbers), order=int(arguments["-o"]))
assert "--discount_fallback" in sys.argv and arguments["-S"] == "10%"
write_arpa(Path("/dev/stdout"), orders, list(numbers))
"""


def test_lmplz_counts_where_it_is_named(models: Path, tmp_path: Path) -> None:
    for status in (0, 3):
        program = tmp_path / "lmplz"
        program.write_text(f"#!{sys.executable}\n{FAKE_LMPLZ.format(root=str(ROOT), status=status)}")
        program.chmod(0o755)
        changes = {
            "trainer": "auto",
            "lmplz": str(program),
            "lmplz_memory": "10%",
            "output": str(tmp_path / f"{status}"),
        }
        if status == 0:
            train_ngrams(model_settings(tmp_path, **changes))
            assert json.loads((tmp_path / "0" / "en.ngrams.json").read_text())["trainer"] == "lmplz"
            made, wanted = (gzip.decompress((d / "en.arpa.gz").read_bytes()) for d in (tmp_path / "0", models))
            assert made == wanted
        else:
            with pytest.raises(DataError, match="failed with status 3"):
                train_ngrams(model_settings(tmp_path, **changes))
            assert [path.name for path in (tmp_path / "3").iterdir()] == ["en.sp.model"]


def test_a_binary_is_written_where_its_program_is_installed(models: Path, tmp_path: Path) -> None:
    program = tmp_path / "build"
    for command, status in (('cp "$1" "$2"', 0), ("echo no memory >&2; exit 4", 4)):
        program.write_text(f"#!/bin/sh\n{command}\n")
        program.chmod(0o755)
        training = model_settings(tmp_path, build_binary=str(program), overwrite=True, seed=status)
        if status:
            with pytest.raises(DataError, match="build: failed with status 4: no memory"):
                train_ngrams(training)
            assert not (tmp_path / "models" / "en.binary").exists()  # the old one is of another model
        else:
            train_ngrams(training)
            assert (tmp_path / "models" / "en.binary").read_bytes() == (models / "en.arpa.gz").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "???"}, "output is not set"),
        ({"language": "../en"}, r"language=\.\./en"),
        ({"order": 7}, "order=7: must be 2 to 6"),
        ({"trainer": "srilm"}, "trainer=srilm: choose one of auto, own, lmplz"),
        ({"trainer": "lmplz", "lmplz": "no-such-lmplz"}, "lmplz=no-such-lmplz: no such program"),
        ({"newlines": "keep"}, "newlines=keep"),
        ({"sample_bytes": 0}, "sample_bytes=0"),
        ({"held_out_fraction": 0.0}, "held_out_fraction=0.0"),
        ({"vocab_size": 65536}, r"vocab_size=65536 is more than this text can fill.* or set vocab_size=\d+ or less"),
        ({"vocab_size": 5}, "vocab_size=5"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        train_ngrams(model_settings(tmp_path, **changes))
    assert not (tmp_path / "models" / "en.ngrams.json").exists()


def test_the_commands_file_lists_every_setting_with_its_default() -> None:
    values = yaml.safe_load((ROOT / "conf" / "data_tools" / "train_ngrams.yaml").read_text())
    assert build(TrainNgramsSettings, values) == TrainNgramsSettings()
    assert set(values) == {field.name for field in dataclasses.fields(TrainNgramsSettings)}


def test_it_runs_from_the_command_line_without_torch(tmp_path: Path) -> None:
    texts = write_pages(tmp_path / "texts.jsonl", [page(seed) for seed in range(60)])
    program = (
        "import sys, data_tools.train_ngrams as command\n"
        "try:\n    command.main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    arguments = [f"input={texts}", f"output={tmp_path / 'm'}", "language=no", "vocab_size=60", "held_out_fraction=0.2"]
    environment = {**os.environ, "PATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m" / "no.arpa.gz").exists() and "counting n-grams with own" in done.stdout


def test_the_small_language_has_what_normalising_is_for() -> None:
    import random

    text = " ".join(sentence(random.Random(seed)) for seed in range(40))
    assert all(mark in text for mark in "—é1…T")
