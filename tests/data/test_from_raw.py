"""All sources from raw dumps to a trained model, by one command: inputs that the test writes, and real samples."""

import gzip
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.from_raw import FromRawSettings, from_raw, sources_in, stages
from llamatrain.errors import ConfigError
from tests.data import arxiv_papers, test_github, test_stackexchange, test_wikipedia, wet_writer
from tests.real_text import english_documents, shared_data
from tests.small_run import metrics, status

REPOSITORY = Path(__file__).parents[2]
SEVEN = ["wikipedia", "c4", "github", "books", "arxiv", "stackexchange", "common_crawl"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (None, "no such directory"),
        ([], "no source in it; name a folder wikipedia, c4"),
        (["wikipedia", "wiki"], "wiki: not a source; name the folders after wikipedia, c4"),
        (["common_crawl"], "a language model of Wikipedia grades common_crawl: add a folder wikipedia"),
        (["c4", "c4_from_crawl"], "are the same source; leave one"),
    ],
)
def test_what_cannot_be_prepared_is_refused(folders: list[str] | None, message: str, tmp_path: Path) -> None:
    for folder in folders or ():
        (tmp_path / "raw" / folder).mkdir(parents=True)
    if folders == []:
        (tmp_path / "raw").mkdir()
    with pytest.raises(ConfigError, match=message):
        from_raw(FromRawSettings(raw=str(tmp_path / "raw"), output=str(tmp_path / "out")))


def test_every_source_is_audited_before_it_is_used(tmp_path: Path) -> None:
    for source in ("books", "wikipedia"):
        (tmp_path / source).mkdir()
    settings = FromRawSettings(raw=str(tmp_path), output="out")
    commands = [stage[0].partition(".")[2] for stage in stages(settings, sources_in(tmp_path))]
    assert commands == ["prepare", "audit"] * 2 + ["train_tokenizer"] + ["prepare", "audit"] * 2 + ["mix", "train"]


def written_samples(raw: Path, directory: Path) -> None:
    """A few documents of every source, in its own format."""
    whole = "\n".join(english_documents(directory))
    texts = [whole[begin : begin + 4000] for begin in range(0, 600_000, 4000)]
    for source in SEVEN:
        (raw / source).mkdir(parents=True)
    pages = [test_wikipedia.page(f"Page {n}", text, number=n) for n, text in enumerate(texts[:100], start=1)]
    test_wikipedia.written(raw / "wikipedia", test_wikipedia.header() + "".join(pages) + test_wikipedia.FOOTER)
    records = [wet_writer.wet_page(f"Page {n}", text, url=f"http://a.org/{n}") for n, text in enumerate(texts)]
    wet_writer.write_archive(raw / "common_crawl" / "a.warc.wet.gz", wet_writer.warcinfo(), *records)
    lines = [json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://b.org/"}) for text in texts]
    (raw / "c4" / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    library = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))[:40]]
    rows = [test_github.row(text, path=f"{n}.py") for n, text in enumerate(library)]
    (raw / "github" / "rows.jsonl").write_text("\n".join(rows))
    (raw / "books" / "book.txt").write_text("\n\n".join(texts[:40]))
    section = "\\documentclass{article}\n\\begin{document}\n\\section{One}\n"
    sentences = "".join(letter for letter in texts[0] if letter.isalnum() or letter in " .\n")
    paper = f"{section}{sentences}\n\\end{{document}}\n"
    (raw / "arxiv" / "1202.3665.gz").write_bytes(arxiv_papers.packed({"main.tex": paper.encode()}))
    asked = [test_stackexchange.question(2 * n, body=f"<p>{texts[n].split('.')[0]}?</p>") for n in range(1, 40)]
    answered = [test_stackexchange.answer(2 * n + 1, 2 * n, f"<p>{texts[n][:500]}</p>", n) for n in range(1, 40)]
    test_stackexchange.written(raw / "stackexchange", test_stackexchange.posts(*asked, *answered))


def real_samples(raw: Path, directory: Path) -> None:
    """Dumps of the real sources; C4 by its rules out of a crawl, code out of an installed package."""
    data = shared_data()
    if data is None:
        pytest.skip("no shared data here")
    chosen = {
        "common_crawl": ["commoncrawl/aut-example.warc.gz", "commoncrawl/resiliparse-warcfile.warc.gz"],
        "c4_from_crawl": ["commoncrawl/aut-example.warc.gz"],
        "wikipedia": ["wikipedia/enwiki-pages-articles-shortened.xml.bz2"],
        "books": ["gutenberg/pg-tom_sawyer.txt", "gutenberg/pg-grimm.txt"],
        "arxiv": ["arxiv/1907.10121.gz", "arxiv/1703.09710.gz"],
        "stackexchange": ["stackexchange/coffee.stackexchange.com-Posts.xml"],
    }
    for source, names in chosen.items():
        (raw / source).mkdir(parents=True)
        for name in names:
            (raw / source / Path(name).name).symlink_to(data / "raw" / name)
    import hydra

    (licence,) = Path(hydra.__path__[0]).parent.glob("hydra_core-*.dist-info/**/LICENSE")
    (raw / "github").mkdir()
    with tarfile.open(raw / "github" / "hydra.tar.gz", "w:gz") as archive:
        archive.add(hydra.__path__[0], "hydra/hydra")
        archive.add(licence, "hydra/LICENSE")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("samples", [written_samples, real_samples])
def test_one_command_goes_from_raw_samples_of_all_sources_to_200_steps(
    samples: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    samples(tmp_path / "raw", tmp_path / "corpus")
    command = [
        sys.executable, "-m", "launch.from_raw", f"raw={tmp_path / 'raw'}", f"output={tmp_path / 'out'}",
        "vocab_size=1000", "lm_pieces=1000",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for attempt in (1, 2):  # the second finds all done
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert status(tmp_path / "out" / "run")["state"] == "done"
        assert done.stdout.count("whole; every document is accounted for") == 15
        _, _, mixture = done.stdout.partition("Dataset ")
        table = {line.split()[0]: line.split() for line in mixture.splitlines()[1:9]}
        assert {*table} == {*SEVEN, "all"}
        assert table["common_crawl"][1] == "67.00%" and table["stackexchange"][1] == "2.00%"
        records = metrics(tmp_path / "out" / "run")
        assert records[-1]["step"] == 200
        assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.5, attempt
