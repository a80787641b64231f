"""Prepared sources become a mixture: the paper's shares and epochs, and a configuration that training reads."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data_tools.mix import (
    PAPER_PERCENT,
    PAPER_TOKENS,
    MixSettings,
    decimal,
    describe,
    epochs_of,
    find_data_sets,
    group_of,
    mix,
    table_of,
    weights_of,
)
from llamatrain.errors import ConfigError, DataError, LlamatrainError

ROOT = Path(__file__).parents[2]
# What Table 1 implies: tokens = share * 1.4e12 / epochs, and the epochs it reports.
PAPER_SOURCES = {
    "common_crawl": (853e9, 1.10),
    "c4": (198e9, 1.06),
    "github": (98e9, 0.64),
    "wikipedia": (25.7e9, 2.45),
    "books": (28.2e9, 2.23),
    "arxiv": (33.0e9, 1.06),
    "stackexchange": (27.2e9, 1.03),
}


@pytest.fixture(scope="module")
def prepared(tiny_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets: two of CommonCrawl, one of GitHub below a folder of its own, and one of its own kind."""
    root = tmp_path_factory.mktemp("prepared")
    texts = [f"text number {n} of some words\n" * 3 for n in range(40)]
    tiny_dataset("common_crawl", texts, root / "cc-2019", validation_fraction=0.1)
    tiny_dataset("common_crawl", texts * 2, root / "cc-2020")
    tiny_dataset("GitHub", texts[:20], root / "github" / "shards")
    tiny_dataset("laws", texts[:10], root / "laws")
    return root


def test_the_papers_tokens_and_shares_give_the_papers_epochs() -> None:
    tokens = {name: int(count) for name, (count, _) in PAPER_SOURCES.items()}
    weights = weights_of(tokens, {})
    assert weights == PAPER_PERCENT
    epochs = epochs_of(tokens, weights, PAPER_TOKENS)
    assert epochs == pytest.approx({name: seen for name, (_, seen) in PAPER_SOURCES.items()}, abs=0.01)


def test_the_shares_are_those_of_the_papers_preset() -> None:
    preset = yaml.safe_load((ROOT / "conf" / "data" / "paper.yaml").read_text())["sources"]
    assert {name: entry["weight"] for name, entry in preset.items()} == PAPER_PERCENT


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("common_crawl", "common_crawl"),
        ("CommonCrawl-2019-30", "common_crawl"),
        ("Stack Exchange", "stackexchange"),
        ("stack_exchange", "stackexchange"),
        ("wikipedia.de", "wikipedia"),
        ("c4_en", "c4"),
        ("c4x", "c4x"),
        ("webbooks", "webbooks"),
        ("laws", "laws"),
        ("laws-2", "laws"),
    ],
)
def test_names_of_the_papers_sources_are_known(name: str, group: str) -> None:
    assert group_of(name) == group


def test_data_sets_of_one_source_divide_its_share_by_their_tokens() -> None:
    tokens = {"wikipedia-de": 30, "wikipedia-en": 60, "books": 10, "wikipedia-fr": 5}
    weights = weights_of(tokens, {"wikipedia-fr": 2.0, "wikipedia": 9.0})
    assert weights == pytest.approx({"wikipedia-de": 3.0, "wikipedia-en": 6.0, "books": 4.5, "wikipedia-fr": 2.0})
    assert weights_of({"books": 1, "books-2": 2}, {"books": 3.0}) == {"books": 1.0, "books-2": 2.0}
    epochs = epochs_of(tokens, weights, 1000)
    assert epochs["wikipedia-de"] == pytest.approx(epochs["wikipedia-en"], rel=1e-3)


def test_a_source_of_weight_0_is_never_seen() -> None:
    tokens = {"c4": 100, "books": 100}
    assert epochs_of(tokens, weights_of(tokens, {"books": 0.0}), 300) == {"c4": 3.0, "books": 0.0}


@pytest.mark.parametrize(
    ("tokens", "percent", "message"),
    [
        ({"laws": 5}, {}, r"laws: none of the paper's sources .* weight\.laws=PERCENT"),
        ({"c4": 5}, {"books": 1.0}, r"weight\.books: there is no such source; there are c4"),
        ({"c4": 5}, {"c4": 0.0}, "every weight is 0"),
    ],
)
def test_shares_that_cannot_be_are_refused(tokens: dict[str, int], percent: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weights_of(tokens, percent)


def test_the_table_says_what_the_data_sets_hold(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = find_data_sets([str(prepared)])
    assert list(manifests) == ["common_crawl-1", "common_crawl-2", "GitHub", "laws"]  # the paper's first
    rows = table_of(manifests, {"laws": 28.5}, 100_000)
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert sum(row.epochs * row.tokens for row in rows) == pytest.approx(100_000)
    by_name = {row.name: row for row in rows}
    assert by_name["common_crawl-1"].epochs == pytest.approx(by_name["common_crawl-2"].epochs, rel=1e-3)
    assert by_name["laws"].share == pytest.approx(0.285)
    text = sum(len(f"text number {n} of some words\n") * 3 for n in range(10))
    assert by_name["laws"].text_bytes == text and by_name["laws"].bytes_per_token == text / by_name["laws"].tokens
    assert by_name["laws"].byte_share == 0  # but for its line feeds
    on_disk = sum(
        file.stat().st_size for suffix in ("bin", "idx") for file in (prepared / "cc-2019").glob(f"*.{suffix}")
    )
    assert by_name["common_crawl-1"].shard_bytes == on_disk
    mix(MixSettings(input=str(prepared), weight={"laws": 28.5}))
    head, *lines = capsys.readouterr().out.splitlines()
    titles = ["Dataset", "Sampling prop.", "Epochs", "Disk size", "Tokens", "Bytes/token", "Byte tokens", "Shards"]
    assert head.split() == " ".join(titles).split()
    assert [line.split()[0] for line in lines] == [*manifests, "all", "Epochs"]
    assert lines[3].split()[1] == "28.50%"


def test_the_mixture_is_a_data_configuration(prepared: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)

    done = command(
        "data_tools.mix", f"input=[{prepared}/cc-2020,{prepared}/github,{prepared}/laws]", f"output={tmp_path}/conf",
        "name=ours", "weight.laws=3", "train_tokens=1e6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = command("llamatrain.train", "--config-dir", f"{tmp_path}/conf", "data=ours", "data.seq_len=64",
                   "train.steps=5", "optim.warmup_steps=1", "--cfg", "job")  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load(done.stdout)["data"]
    assert data["seq_len"] == 64 and data["prefetch_steps"] == 2  # of conf/data/default.yaml
    assert data["sources"] == {
        "common_crawl": {"path": f"{prepared}/cc-2020", "weight": 67.0},
        "GitHub": {"path": f"{prepared}/github/shards", "weight": 4.5},
        "laws": {"path": f"{prepared}/laws", "weight": 3.0},
    }


def test_the_table_says_how_weights_become_shares(prepared: Path) -> None:
    manifests = find_data_sets([f"{prepared}/github", f"{prepared}/laws"])
    rows = table_of(manifests, {"laws": 3.0}, 100_000)
    missing = "common_crawl, c4, wikipedia, books, arxiv, stackexchange"
    told = f"Weights: not there: {missing}; they add up to 7.5 %, so each share is its weight divided by 0.075."
    assert told in describe(rows, 100_000)
    assert rows[1].share == pytest.approx(0.4)
    assert not any("Weights" in line for line in describe(table_of(manifests, {"laws": 95.5}, 100_000), 100_000))


def test_many_epochs_stay_in_their_column(prepared: Path) -> None:
    rows = table_of(find_data_sets([f"{prepared}/github"]), {}, PAPER_TOKENS)
    assert rows[0].epochs > 1e6
    head, row, *_ = describe(rows, PAPER_TOKENS)
    assert len(row) == len(head) and re.search(r" \d+(\.\d+)? [MG] ", row)


def test_another_mixture_is_replaced_only_when_told_to(prepared: Path, tmp_path: Path) -> None:
    settings = {"input": str(prepared), "output": str(tmp_path)}
    mix(MixSettings(**settings, weight={"laws": 1.0}))
    mix(MixSettings(**settings, weight={"laws": 1.0}))
    with pytest.raises(DataError, match=r"there is another mixture; set overwrite=true"):
        mix(MixSettings(**settings, weight={"laws": 2.0}))
    mix(MixSettings(**settings, weight={"laws": 2.0}, overwrite=True))
    assert yaml.safe_load((tmp_path / "data" / "mixture.yaml").read_text())["sources"]["laws"]["weight"] == 2.0


def test_data_sets_that_do_not_go_together_are_refused(
    prepared: Path, tiny_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_dataset("books", ["a book"], tmp_path / "books")
    manifest = json.loads((other / "dataset.json").read_text())
    manifest["tokenizer_sha256"] = "0" * 64
    (other / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="were tokenized with different tokenizers"):
        find_data_sets([str(prepared), str(other)])
    (tmp_path / "empty").mkdir()
    for changes, message in (
        ({"input": str(tmp_path / "empty")}, r"no dataset\.json there"),
        ({"input": str(prepared), "name": "../x"}, r"name=\.\./x"),
        ({"input": str(prepared), "train_tokens": 0}, "train_tokens=0"),
        ({"input": str(prepared), "weight": {"laws": -1.0}}, r"weight\.laws=-1"),
        ({"input": "???"}, "input is not set"),
    ):
        with pytest.raises(LlamatrainError, match=message):
            mix(MixSettings(**changes))  # type: ignore[arg-type]


def test_sizes_are_shown_as_the_paper_shows_them() -> None:
    sizes = (783e9, 3.3e12, 85.04e9, 999.6e6, 12_345, 999, 0, -5e6)
    assert [decimal(size, "B") for size in sizes] == [
        "783 GB", "3.30 TB", "85.0 GB", "1.00 GB", "12.3 kB", "999 B", "0 B", "-5.00 MB",
    ]  # fmt: skip
    assert decimal(853e9) == "853 G" and decimal(7) == "7"
