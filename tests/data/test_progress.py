"""Bars move while a unit is made, not only when it is done, and end at what there was to read."""

import bz2
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from data_tools.engine import executors
from data_tools.engine.components import reader_of
from data_tools.progress import advance, advance_share, metered, watched
from tests.data.preparing import files_of, prepared, settings_for, write_corpus


class Bar:
    """What a bar was told."""

    def __init__(self, label: str, total: int) -> None:
        self.labels, self.total, self.steps = [label], total, []  # type: tuple[list[str], int, list[float]]

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, step: float) -> None:
        self.steps.append(step)

    def set_description(self, label: str, *, refresh: bool) -> None:
        self.labels.append(label)

    @property
    def inside(self) -> list[float]:
        """Steps that went forward."""
        return [step for step in self.steps if step > 0]


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> dict[str, Bar]:
    shown: dict[str, Bar] = {}

    def bar(label: str, total: int) -> Bar:
        return shown.setdefault(label.partition(",")[0], Bar(label, total))

    monkeypatch.setattr(executors, "byte_bar", bar)
    monkeypatch.setattr(executors, "LOOK_EVERY_S", 0.001)
    return shown


def test_the_bar_of_every_stage_ends_at_what_its_units_read(tmp_path: Path, bars: dict[str, Bar]) -> None:
    corpus = write_corpus(tmp_path / "in", files=4)
    output = prepared(corpus, tmp_path / "out", reader="plain", before=[])
    assert set(bars) == {"clean", "hash", "mark", "filter"}
    for bar in bars.values():
        assert sum(bar.steps) == pytest.approx(bar.total, abs=0.01)
    units = len(list((output / "ledger" / "clean").glob("*.json")))
    assert bars["clean"].labels == [f"clean, {done} of {units} units done" for done in range(units + 1)]
    assert bars["clean"].total == sum(path.stat().st_size for path in corpus.iterdir())
    assert bars["hash"].total == sum(path.stat().st_size for path in (output / "clean").iterdir())
    assert bars["mark"].total == pytest.approx(sum(path.stat().st_size for path in (output / "hash").iterdir()), abs=3)


def test_the_bar_moves_inside_a_unit(tmp_path: Path, bars: dict[str, Bar]) -> None:
    corpus = write_corpus(tmp_path / "in", files=1, documents=3000)
    prepared(corpus, tmp_path / "out", reader="plain", before=[], workers=1)
    assert len(bars["clean"].inside) >= corpus.joinpath("0.jsonl").stat().st_size // (1 << 16)
    assert len(bars["clean"].labels) == 2  # one unit


def test_processes_tell_how_far_they_are_before_a_unit_is_done(
    tmp_path: Path, bars: dict[str, Bar], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "in", files=2, documents=8000)
    before_first_unit = []
    told = Bar.set_description

    def note(bar: Bar, label: str, *, refresh: bool) -> None:
        before_first_unit.append(len(bar.inside))
        told(bar, label, refresh=refresh)

    monkeypatch.setattr(Bar, "set_description", note)
    size = max(path.stat().st_size for path in corpus.iterdir())
    prepared(corpus, tmp_path / "out", reader="plain", before=[], workers=2, unit_bytes=size)
    assert before_first_unit[0] > 2  # of `clean`
    for bar in bars.values():
        assert sum(bar.steps) == pytest.approx(bar.total, abs=0.01)


def test_a_unit_that_was_done_before_is_counted_as_done(tmp_path: Path, bars: dict[str, Bar]) -> None:
    corpus = write_corpus(tmp_path / "in", files=4)
    output = prepared(corpus, tmp_path / "out", reader="plain", before=[])
    entries = sorted((output / "ledger" / "clean").glob("*.json"))
    before = files_of(output)
    entries[0].unlink()
    bars.clear()
    prepared(corpus, output, reader="plain", before=[])
    assert bars["clean"].labels == [
        f"clean, {done} of {len(entries)} units done" for done in (len(entries) - 1, len(entries))
    ]
    assert files_of(output) == before


def test_an_array_task_tells_of_its_own_units(tmp_path: Path, bars: dict[str, Bar]) -> None:
    corpus = write_corpus(tmp_path / "in", files=4)
    settings = settings_for(corpus, tmp_path / "out", reader="plain", before=[], stage="clean", part="1/2")
    executors_units = len(prepared_units(settings))
    assert bars["clean"].labels[-1] == f"clean, {executors_units} of {executors_units} units done"


def prepared_units(settings: Any) -> list[Path]:
    from data_tools.prepare import prepare

    prepare(settings)
    return list((Path(settings.output) / "ledger" / "clean").glob("*.json"))


# ---------------------------------------------------------------------- readers

TEXT = "A line of a text that is some words long.\n" * 20
PAGES = "".join(
    f"<page><title>T{n}</title><ns>0</ns><revision><text>{TEXT}{n}</text></revision></page>" for n in range(3000)
)
WIKI = f"<mediawiki xml:lang='en'>{PAGES}</mediawiki>".encode()
POSTS = (
    "<posts>"
    + "".join(f'<row Id="{n}" PostTypeId="1" Score="1" Title="t" Body="{TEXT}{n}" />\n' for n in range(3000))
    + "</posts>"
)
ROWS = "".join(json.dumps({"text": f"{TEXT}{n}"}) + "\n" for n in range(3000)).encode()


def archive_of(suffix: str) -> bytes:
    """Books in an archive, hard to compress."""
    import random

    generator = random.Random(0)
    buffer = io.BytesIO()
    books = {f"b/{n}.txt": generator.randbytes(20_000).hex().encode() for n in range(40)}
    if suffix == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in books.items():
                packed.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
            for name, content in books.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                packed.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("reader", "name", "content"),
    [
        ("plain", "a.jsonl", ROWS),
        ("plain", "a.txt.gz", gzip.compress(ROWS, 1)),
        ("books", "a.zip", archive_of("zip")),
        ("books", "a.tar.gz", archive_of("tar.gz")),
        ("wikipedia", "a.xml", WIKI),
        ("wikipedia", "a.xml.bz2", bz2.compress(WIKI, 1)),
        ("stackexchange", "Posts.xml", POSTS.encode()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_reader_tells_of_the_bytes_it_reads(tmp_path: Path, reader: str, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    steps: list[float] = []
    with watched(10 * len(content), steps.append):
        items = list(reader_of(reader, {}).read(path, name))
        told = sum(steps)
    assert items
    if reader == "stackexchange":  # half is joining, told as a share
        assert told == pytest.approx(0.5 * len(content) + 5 * len(content), rel=0.01)
    else:
        assert 0.9 * len(content) < told <= len(content)


def test_parquet_tells_of_its_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a text"] * 5000}), tmp_path / "a.parquet")
    steps: list[float] = []
    with watched(1000, steps.append):
        list(reader_of("plain", {}).read(tmp_path / "a.parquet", "a.parquet"))
        assert len(steps) > 2 and sum(steps) == pytest.approx(1000)


# ---------------------------------------------------------------------- meters


def test_a_meter_gives_what_it_holds_and_no_more() -> None:
    steps: list[float] = []
    with watched(100, steps.append):
        with metered(60):
            advance(50)
            advance(50)
            assert sum(steps) == 60
        with metered(30):
            advance_share(0.5)
            assert sum(steps) == 75
        assert sum(steps) == 90  # a reader that tells nothing counts when it is done
    assert sum(steps) == 100


def test_nobody_needs_to_listen() -> None:
    with metered(5):
        advance(3)
        advance_share(0.1)
