"""Evaluation examples found in training text, and only they; documents dropped or cut."""

import gzip
import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_tools.dedup.shingles import word_hashes
from data_tools.engine.components import filter_of
from data_tools.engine.ledger import Tally
from data_tools.engine.outputs import DocumentWriter, whole_file
from data_tools.engine.stages import DocumentSink
from data_tools.evaluation_index import EvaluationSet, build_index, ngram_hashes, read_examples
from data_tools.filters.decontamination import (
    DecontaminationSettings,
    decontamination_filter,
    find_overlaps,
    word_places,
)
from data_tools.records import Dropped, Record
from llamatrain.errors import ConfigError, DataError
from tests.real_text import novels, shared_data

SPEECH = "the of a river house runs under old bright quick stones while nobody ever looks at its green long bank"
WORDS = SPEECH.split()


def prose(seed: int, words: int) -> str:
    """Text that holds no example."""
    choose = random.Random(seed).choice
    return " ".join(choose(WORDS) for _ in range(words)) + "."


QUESTION = "Janet's ducks lay 16 eggs per day; she eats three for breakfast every morning and bakes four."  # 17 words
SHORT = "Which planet has the most moons of all?"  # 8 words
TINY = "Predators eat"


def questions(directory: Path) -> EvaluationSet:
    path = directory / "quiz.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in (QUESTION, SHORT, TINY)))
    return EvaluationSet("quiz", str(path), ["question"])


def filtered(directory: Path, text: str, **settings: object) -> Record | Dropped:
    keep = decontamination_filter(
        DecontaminationSettings(sets=[questions(directory)], **settings)  # type: ignore[arg-type]
    )
    return keep(Record(text, "id", "source"))


def test_a_document_with_a_question_is_dropped_and_the_question_named(tmp_path: Path) -> None:
    text = f"{prose(1, 300)} {QUESTION.upper()} {prose(2, 300)}"
    dropped = filtered(tmp_path, text)
    assert dropped == Dropped("contaminated_quiz", "id", len(text), text[:500])


@pytest.mark.parametrize("action", ["drop", "cut"])
def test_the_ledger_says_which_examples_were_found(tmp_path: Path, action: str) -> None:
    """Through the engine's own tally: it takes the counts of a record, also of one that is dropped."""
    values = {"sets": [asdict(questions(tmp_path))], "action": action}
    tally = Tally()
    path = tmp_path / "documents.jsonl.zst"
    with whole_file(path) as file:
        sink = DocumentSink(
            [("decontamination", filter_of("decontamination", values).make())], tally, DocumentWriter(file)
        )
        for number, text in enumerate((QUESTION, SHORT, QUESTION, "nothing")):
            sink.take(Record(f"{prose(1, 200)} {text} {prose(2, 200)}", str(number), "source"))
        sink.finish()
    counts = tally.as_json()["counts"]
    assert (counts["found_in_quiz#0"], counts["found_in_quiz#1"]) == (2, 1)
    dropped = tally.as_json()["dropped"]
    assert (dropped["contaminated_quiz"]["documents"] if action == "drop" else counts["contaminated_quiz"]) == 3


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (QUESTION, True),
        ("janets ducks? JANET’S\nducks — lay «16» eggs, per day: she eats (three) for breakfast", True),
        (" ".join(QUESTION.split()[3:16]), True),  # 13 words of it
        (" ".join(QUESTION.split()[:11]), False),  # 12 with Janet's two: fewer
        (" ".join([*QUESTION.split()[:7], "blue", *QUESTION.split()[7:12]]), False),
        (f"So: {SHORT}", True),  # of a short one all
        ("which planet has the most moons", False),
        (f"{TINY} {TINY} {TINY} {TINY} {TINY}", False),  # cannot be told from common speech
        (prose(3, 2000), False),
        ("", False),
    ],
)
def test_thirteen_words_in_a_row_or_all_of_a_shorter_one_are_overlap(tmp_path: Path, text: str, found: bool) -> None:
    record = filtered(tmp_path, f"{prose(1, 30)} {text} {prose(2, 30)}")
    assert isinstance(record, Dropped) == found


def test_cutting_takes_the_overlap_and_a_window(tmp_path: Path) -> None:
    before, after = prose(1, 200), prose(2, 200)
    record = filtered(tmp_path, f"{before} {QUESTION} {after}", action="cut", window=50)
    assert isinstance(record, Record)
    first, second = record.text.split("\n\n")
    assert before.startswith(first) and len(before) - len(first) in range(45, 60)
    assert after.endswith(second) and len(after) - len(second) in range(45, 60)
    assert record.counts["contaminated_quiz"] == 1
    assert record.counts["contaminated_characters"] >= len(QUESTION) + 90
    assert record.provenance["contaminated"] == "quiz#0"


def test_nothing_worth_keeping_is_left_or_too_many_cuts_drop_the_document(tmp_path: Path) -> None:
    assert isinstance(filtered(tmp_path, f"{prose(1, 20)} {QUESTION}", action="cut"), Dropped)
    many = " ".join(f"{prose(i, 150)} {QUESTION}" for i in range(4))
    assert isinstance(filtered(tmp_path, many, action="cut", max_cuts=4), Record)
    assert isinstance(filtered(tmp_path, many, action="cut", max_cuts=3), Dropped)


def test_a_minimum_of_hits_counts_by_example(tmp_path: Path) -> None:
    fifteen = " ".join(QUESTION.split()[:14])  # three runs of 13 of its five
    assert isinstance(filtered(tmp_path, fifteen, min_hits=3), Dropped)
    assert isinstance(filtered(tmp_path, fifteen, min_hits=4), Record)
    assert isinstance(filtered(tmp_path, SHORT, min_hits=4), Dropped)  # it has only one


def test_a_clean_document_passes_untouched(tmp_path: Path) -> None:
    record = filtered(tmp_path, prose(1, 100))
    assert record == Record(prose(1, 100), "id", "source")


def test_every_format_is_read(tmp_path: Path) -> None:
    rows = [{"q": {"text": "one"}, "a": ["two", "three"]}, {"q": {"text": "four"}, "a": []}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    frames = [zstandard.compress(line) for line in lines.splitlines(keepends=True)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.json"):
        examples = list(read_examples(EvaluationSet("x", str(tmp_path / name), ["q.text", "a"])))
        assert examples == [["one", "two", "three"], ["four"]]
    (tmp_path / "a.csv").write_text('id,question\n1,"one, two"\n2,three\n')
    assert list(read_examples(EvaluationSet("x", str(tmp_path / "a.csv"), ["question"]))) == [["one, two"], ["three"]]
    (tmp_path / "b.tsv").write_text('say "one\ttwo\nthree\tfour\n')
    assert list(read_examples(EvaluationSet("x", str(tmp_path / "*.tsv"), ["0"]))) == [['say "one'], ["three"]]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert list(read_examples(EvaluationSet("x", str(tmp_path / "a.txt")))) == [["one\n"], ["two\n"]]


def test_a_set_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"q": "one"}\n{"q": "two"}\n')[:-3])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: truncated"):
        list(read_examples(EvaluationSet("x", str(path), ["q"])))


def test_what_is_wrong_with_a_set_is_said(tmp_path: Path) -> None:
    path = str(questions(tmp_path).path)
    for evaluation_set, error, message in (
        (EvaluationSet("x", str(tmp_path / "none.jsonl"), ["q"]), DataError, "no file there"),
        (EvaluationSet("x", path, ["query"]), ConfigError, "name the fields"),
        (EvaluationSet("x", path, []), ConfigError, "fields is empty"),
        (EvaluationSet("x", path, ["question"], "xml"), ConfigError, "format=xml"),
        (EvaluationSet("x", path, ["question"], "json"), DataError, "cannot be read"),
        (EvaluationSet("x", path, ["answer"], "csv"), ConfigError, "no column answer"),
    ):
        with pytest.raises(error, match=message):
            build_index([evaluation_set], ngram=13, shortest=8)
    for settings, message in (
        (DecontaminationSettings(), "sets is empty"),
        (DecontaminationSettings([questions(tmp_path)], action="hide"), "action=hide"),
        (DecontaminationSettings([questions(tmp_path)], ngram=5), "shortest=8"),
        (DecontaminationSettings([questions(tmp_path)] * 2), "name=quiz"),
    ):
        with pytest.raises(ConfigError, match=message):
            decontamination_filter(settings)


def test_the_engine_builds_it_from_plain_settings(tmp_path: Path) -> None:
    quiz = questions(tmp_path)
    values = {"sets": [{"name": "quiz", "path": quiz.path, "fields": ["question"]}], "action": "cut"}
    keep = filter_of("decontamination", values).make()
    assert isinstance(keep(Record(prose(1, 9), "id", "source")), Record)


def test_a_misspelt_key_of_a_set_gets_the_right_one() -> None:
    values = {"sets": [{"name": "quiz", "path": "x", "field": ["question"]}]}
    with pytest.raises(ConfigError, match=r"sets\.field: there is no such setting; did you mean sets\.fields\?"):
        filter_of("decontamination", values)


def test_a_label_of_the_file_is_no_part_of_the_question(tmp_path: Path) -> None:
    """A page has the question without it; indexed with it, a short question (all of it must be there) is missed."""
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps({"q": f"Question: {text}"}) + "\n" for text in (QUESTION, SHORT)))
    index = build_index([EvaluationSet("quiz", str(path), ["q"], strip=["Question:"])], ngram=13, shortest=8)
    assert find_overlaps(f"{prose(1, 30)} {SHORT} {prose(2, 30)}", index)
    with pytest.raises(ConfigError, match=r"strip=\[Question:\]"):
        build_index([EvaluationSet("quiz", str(path), ["q"])], ngram=13, shortest=8)


def test_counts_say_what_is_searched_for(tmp_path: Path) -> None:
    index = build_index([questions(tmp_path)], ngram=13, shortest=8)
    assert index.counts == {"quiz": {"examples": 3, "not_searched": 1, "ngrams": 7}}


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=40), st.integers(1, 5))
def test_equal_runs_of_words_have_equal_hashes_and_others_differ(words: list[str], length: int) -> None:
    found = dict(ngram_hashes(word_hashes(" ".join(words)), length, (length,))).get(length)
    runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    assert (0 if found is None else len(found)) == len(runs)
    if found is not None:
        assert len(set(found.tolist())) == len(set(runs))
        assert len(set(zip(found.tolist(), runs, strict=True))) == len(set(runs))


@given(st.lists(st.sampled_from(["word", "é", "中文", "x1", ", ", "—", " ", "\n", "."]), max_size=60))
def test_the_places_of_words_are_where_they_start(parts: list[str]) -> None:
    text = "".join(parts) * 3
    count = len(word_hashes(text))
    places = word_places(text, list(range(count + 1)))
    assert places == sorted(places) and places[-1] == len(text)
    for number, place in enumerate(places[:-1]):
        assert len(word_hashes(text[:place])) == number
        assert len(word_hashes(text[: place + 1])) == number + 1


# real benchmarks

data = shared_data()
real = pytest.mark.skipif(data is None, reason="no shared data")


def benchmarks() -> list[EvaluationSet]:
    assert data is not None
    folder = data / "eval"
    return [
        EvaluationSet("arc_easy", f"{folder}/arc_easy/*.jsonl", ["query"], strip=["Question:"]),
        EvaluationSet("crows_pairs", f"{folder}/crows_pairs/*.csv", ["sent_more", "sent_less"]),
        EvaluationSet("gsm8k", f"{folder}/gsm8k/test.jsonl", ["question"]),
        EvaluationSet("hellaswag", f"{folder}/hellaswag/*.jsonl", ["ctx"]),
        EvaluationSet("humaneval", f"{folder}/humaneval/*.gz", ["prompt"]),
        EvaluationSet("nq_open", f"{folder}/nq_open/*.jsonl", ["question"]),
        EvaluationSet("openbookqa", f"{folder}/openbookqa/*.jsonl", ["query"]),
        EvaluationSet("piqa", f"{folder}/piqa/valid.jsonl", ["goal"]),
        EvaluationSet("winogender", f"{folder}/winogender/all_sentences.tsv", ["sentence"]),
    ]


@real
def test_every_planted_question_is_found_and_novels_are_clean() -> None:
    assert data is not None
    sets = benchmarks()
    index = build_index(sets, ngram=13, shortest=8)
    texts = novels(data / "corpora" / "english_novels" / "english_novels.tar.zst", 6)
    assert [text[:60] for text in texts if find_overlaps(text, index)] == []  # 5 MB; all 98 novels: none
    example, planted, missed = 0, 0, []
    for evaluation_set in sets:
        for texts_of_example in read_examples(evaluation_set):
            if index.hits_possible[example] and example % 6 == 0:
                start = 1000 + 37 * (planted % 5000)
                page = texts[planted % len(texts)][start : start + 1500].rpartition(" ")[0]
                question = max(texts_of_example, key=len)
                assert not question.startswith("Question:")  # planted as a page would have it
                document = f"{page}\n\n{question}\n\n{page}"
                planted += 1
                overlaps = find_overlaps(document, index)
                mine = {int(overlap.example) for overlap in overlaps}
                same_set = {int(index.set_of[number]) for number in mine}
                if example not in mine and int(index.set_of[example]) not in same_set:
                    missed.append(index.name(example))
            example += 1
    assert planted > 1800 and missed == []
