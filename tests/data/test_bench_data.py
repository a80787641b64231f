"""tests/benchmarks/bench_data.py runs on a little text: every stage of ours, and what its table says of peers."""

import random
from pathlib import Path
from typing import ClassVar

import pytest

from tests.benchmarks import bench_data, data_chain, data_peers
from tests.benchmarks.bench_data import Measured, measure, seconds_of_a_pass, stage_rows
from tests.benchmarks.data_models import Models, ModelSizes, trained_models
from tests.benchmarks.data_stages import Contender, Sizes, Stage, Unmeasured, all_stages
from tests.benchmarks.data_texts import Text, Texts
from tests.data.small_language import jumbled, page

TINY = Sizes(text=8_000, beside_slow=4_000, tokens=4_000, seen=8_000, chain=4_000, hashes=3_000, seconds=0.0)


class TinyTexts(Texts):
    """In a made-up language."""

    english = (
        Text("made up", [page(seed) for seed in range(20)]),
        Text("made up", [page(seed, lines=20) for seed in range(100, 220)]),
    )
    books = Text("made up", [page(seed, lines=40) for seed in range(2)])
    web = (english[0], Text("made up", [jumbled(seed) * 3 for seed in range(120)]))
    html: ClassVar = [b"<html><title>A</title><body><p>Some words of a page.</p></body></html>"]
    wikitext = Text("made up", [f"'''A''' is [[b|{page(seed, lines=20)}]]." for seed in range(120)])
    posts = Text("made up", ["<p>Why <code>a</code>?</p>"])
    papers: ClassVar = [{"main.tex": r"\documentclass{article}\begin{document}\section{A}Words.\end{document}"}]
    code = Text("made up", ["# Copyright 2020 A\n\nprint(1)\n"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    sizes = ModelSizes(training_bytes=80_000, tokenizer_pieces=330, model_pieces=60, model_lines=2_000)
    return trained_models(tmp_path_factory.mktemp("models"), TinyTexts(None), sizes, build_binary="not-installed")


def test_every_stage_of_ours_runs(models: Models, tmp_path: Path) -> None:
    stages = list(all_stages(TinyTexts(None), models, tmp_path, TINY))
    assert len({stage.name for stage in stages}) > 18
    for stage in stages:
        assert isinstance(stage, Stage)
        rows = stage_rows(measure(Stage(stage.name, stage.text, stage.size, stage.ours), rounds=1, seconds=1e-9))
        assert rows[0][:2] == [stage.name, stage.text]
        assert float(rows[0][2].split()[0].replace(",", "")) > 0


def test_a_dump_that_is_not_there_is_named(models: Models, tmp_path: Path) -> None:
    class NoDumps(TinyTexts):
        web = html = wikitext = posts = papers = None  # type: ignore[assignment]

    unmeasured = [stage for stage in all_stages(NoDumps(None), models, tmp_path, TINY) if isinstance(stage, Unmeasured)]
    assert len(unmeasured) == 4 and all(stage.why for stage in unmeasured)


def _stage(*peers: Contender, goal: float | None = None) -> Stage:
    return Stage("sums", "numbers", 1.0, Contender("llamatrain", lambda: lambda: sum(range(100))), list(peers), goal)


def test_a_peer_that_is_missing_or_broken_stands_in_the_table() -> None:
    def missing() -> data_peers.Pass:
        import no_such_peer

        return lambda: no_such_peer

    def broken() -> data_peers.Pass:
        raise ImportError("install spacy\nfirst")

    stage = _stage(Contender("one", missing, times_goal=10), Contender("two", broken))
    rows = stage_rows(measure(stage, rounds=1, seconds=1e-9))
    assert rows[1] == ["– one", "", "not installed", "", "10 times", "not measured"]
    assert rows[2] == ["– two", "", "cannot be imported: install spacy", "", "", ""]


@pytest.mark.parametrize(("theirs", "met"), [(1.0, "yes"), (1.01, "no")])
def test_goals_are_of_medians(theirs: float, met: str) -> None:
    stage = _stage(Contender("one", lambda: lambda: None, times_goal=10), goal=10.1)
    rows = stage_rows(Measured(stage, {"llamatrain": [9.0, 10.0, 99.0], "one": [0.9 * theirs, theirs, 9.9 * theirs]}))
    assert rows[0][2:] == ["10.0 (9.0 to 99.0)", "", "10.1", "no"]
    assert rows[1][5] == met


def test_what_starts_afresh_does_so_before_every_pass() -> None:
    started: list[int] = []

    def start() -> data_peers.Pass:
        started.append(0)
        return lambda: sum(range(200_000))

    contender = Contender("one", start, fresh=True)
    assert seconds_of_a_pass(contender, start(), at_least=0.01) > 0
    assert len(started) > 1


def test_the_chain_keeps_all_or_drops_as_the_paper(models: Models, tmp_path: Path) -> None:
    texts = [page(seed) + "\nHome page | About us." for seed in random.Random(0).sample(range(100), 12)]
    kept, dropped = (data_chain.run_chain(tmp_path / "chain", texts, models, drop=drop) for drop in (False, True))
    assert kept.kept == 1.0
    assert kept.bytes_in < dropped.bytes_in  # without the repeated line
    assert dropped.kept < 1.0
    assert all(kept.seconds[stage] > 0 for stage in data_chain.STAGES)
    assert kept.rate(data_chain.STAGES) < kept.rate(data_chain.STAGES[:-1])
    (row,) = bench_data.chain_rows([kept], drop=False, text="made up")
    assert row[1] == "made up, 100 % of the bytes kept"
