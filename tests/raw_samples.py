"""Raw dumps of the paper's seven sources and a few of its evaluation sets, small, each in its own format.

    python -m tests.raw_samples DIRECTORY [--small]

writes DIRECTORY/raw/<source> and DIRECTORY/evaluation/<set>: real samples where shared data is at hand, else documents
and questions made from this machine's Python library.
"""

import argparse
import gzip
import json
import shutil
import sysconfig
import tarfile
import tempfile
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

from tests.data import arxiv_papers, test_github, test_stackexchange, test_wikipedia, wet_writer
from tests.real_text import english_documents, novels, shared_data

SEVEN = ["wikipedia", "c4", "github", "books", "arxiv", "stackexchange", "common_crawl"]
SMALL = {
    "common_crawl": ["commoncrawl/aut-example.warc.gz", "commoncrawl/resiliparse-warcfile.warc.gz"],
    "c4_from_crawl": ["commoncrawl/aut-example.warc.gz"],
    "wikipedia": ["wikipedia/enwiki-pages-articles-shortened.xml.bz2"],
    "books": ["gutenberg/pg-tom_sawyer.txt", "gutenberg/pg-grimm.txt"],
    "arxiv": ["arxiv/1907.10121.gz", "arxiv/1703.09710.gz"],
    "stackexchange": ["stackexchange/coffee.stackexchange.com-Posts.xml"],
}
WHOLE = {
    **SMALL,
    "common_crawl": [*SMALL["common_crawl"], "commoncrawl/dolma-sample-0000.warc.gz"],
    "c4_from_crawl": [*SMALL["c4_from_crawl"], "commoncrawl/dolma-sample-0000.warc.gz"],
    "books": ["gutenberg/*.txt"],
    "arxiv": ["arxiv/*.gz"],
    "stackexchange": ["stackexchange/*"],
}
NOVELS = 15  # of the whole
PACKAGES = {True: ["hydra-core"], False: ["hydra-core", "omegaconf", "networkx"]}  # MIT or BSD, by small
EVALUATION_SETS = ("arc_easy", "boolq", "crows_pairs", "gsm8k", "hellaswag", "humaneval", "mmlu", "nq_open",
                   "openbookqa", "piqa", "winogender")  # fmt: skip


def written_samples(raw: Path) -> None:
    """A few documents of every source."""
    with tempfile.TemporaryDirectory() as directory:
        whole = "\n".join(english_documents(Path(directory)))
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


def written_questions(directory: Path) -> None:
    """PIQA in its official form: which of two endings follows a sentence, the second from elsewhere."""
    with tempfile.TemporaryDirectory() as scratch:
        text = " ".join("\n".join(english_documents(Path(scratch))).split())
    sentences = [sentence.split() for sentence in text.split(". ") if len(sentence.split()) > 12][:200]
    folder = directory / "piqa"
    folder.mkdir(parents=True)
    rows = []
    for n, words in enumerate(sentences):
        endings = [" ".join(words[8:]), " ".join(sentences[(n + 7) % len(sentences)][8:])]
        rows.append({"goal": " ".join(words[:8]), "sol1": endings[n % 2], "sol2": endings[1 - n % 2]})
    (folder / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "valid-labels.lst").write_text("".join(f"{n % 2}\n" for n in range(len(rows))))


def real_samples(raw: Path, *, small: bool = True) -> None:
    """Dumps of the real sources; C4 by its rules out of a crawl, code out of installed packages."""
    data = shared_data()
    assert data is not None
    for source, patterns in (SMALL if small else WHOLE).items():
        (raw / source).mkdir(parents=True)
        for file in sorted(file for pattern in patterns for file in (data / "raw").glob(pattern)):
            (raw / source / file.name).symlink_to(file)
    archive = data / "corpora" / "english_novels" / "english_novels.tar.zst"
    for n, text in enumerate([] if small else novels(archive, NOVELS)):
        (raw / "books" / f"novel-{n:02d}.txt").write_text(text, encoding="utf-8")
    (raw / "github").mkdir()
    for name in PACKAGES[small]:
        _pack(name, raw / "github" / f"{name}.tar.gz")


def _pack(name: str, path: Path) -> None:
    """An installed package and its licence as the archive of a repository."""
    files = distribution(name).files or []
    licence = next(file for file in files if file.name.upper().startswith("LICEN"))
    package = Path(import_module(name.partition("-")[0]).__path__[0])
    with tarfile.open(path, "w:gz") as archive:
        archive.add(package, f"{name}/{package.name}", filter=lambda m: None if m.name.endswith(".pyc") else m)
        archive.add(str(licence.locate()), f"{name}/LICENSE")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--small", action="store_true", help="less of each")
    options = parser.parse_args(arguments)
    if options.directory.exists():
        print(f"{options.directory}: there already")
        return
    made = options.directory.with_name(options.directory.name + ".tmp")
    shutil.rmtree(made, ignore_errors=True)
    data = shared_data()
    if data is not None:
        real_samples(made / "raw", small=options.small)
        (made / "evaluation").mkdir()
        for name in EVALUATION_SETS:
            (made / "evaluation" / name).symlink_to(data / "eval" / name)
    else:
        written_samples(made / "raw")
        written_questions(made / "evaluation")
    made.rename(options.directory)
    print(f"{options.directory}: {'real samples' if data is not None else 'samples written from the Python library'}")


if __name__ == "__main__":
    main()
