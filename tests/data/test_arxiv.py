"""arXiv's source dump: tars of .gz members, each a tar of a paper's files or its only file; and real papers."""

import functools
import gzip
import re
import tarfile
from pathlib import Path

import pytest

from data_tools.records import Dropped, Record
from data_tools.sources.arxiv import ArxivSettings, read
from llamatrain.errors import ConfigError, DataError
from tests.data.arxiv_papers import CLEAN_PAPER, PAPER, link, packed, single, tar
from tests.real_text import shared_data


def read_bytes(directory: Path, name: str, data: bytes, **settings: object) -> list[Record | Dropped]:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return list(read(path, name, ArxivSettings(**settings)))  # type: ignore[arg-type]


def reasons(items: list[Record | Dropped]) -> list[str]:
    return [item.reason if isinstance(item, Dropped) else "kept" for item in items]


def test_a_dump_is_read_in_its_order(tmp_path: Path) -> None:
    dump = {
        "0001/hep-th0001001.gz": single(PAPER),
        "0001/2101.00001.gz": packed({"main.tex": PAPER.encode(), "fig.eps": b"%!PS" * 1000}),
        "0001/math0001002.pdf": b"%PDF-1.4",
        "0001/README": b"?",
        "0001/math0001003.gz": single("This paper has been withdrawn."),
    }
    kept, second, *dropped = read_bytes(tmp_path, "arXiv_src_0001_001.tar", tar(dump))
    assert isinstance(kept, Record) and isinstance(second, Record)
    assert kept.text == second.text == CLEAN_PAPER
    assert kept.id == "arXiv_src_0001_001.tar/0001/hep-th0001001.gz" and kept.source == "arxiv"
    assert kept.provenance["url"] == "https://arxiv.org/abs/hep-th/0001001"
    assert second.provenance["arxiv_id"] == "2101.00001" and second.provenance["root"] == "main.tex"
    assert second.counts["macros_expanded"] == 1 and second.counts["bytes_tex"] == len(PAPER)
    assert reasons(dropped) == ["pdf_only", "unknown_member", "no_section"]


@pytest.mark.parametrize("name", ["2101.00001.gz", "2101.00001.tar.gz", "2101.00001.tgz", "2101.00001.tex"])
def test_a_file_of_its_own_is_one_paper(tmp_path: Path, name: str) -> None:
    data = PAPER.encode() if name.endswith("tex") else packed({"./main.tex": PAPER.encode()})
    (paper,) = read_bytes(tmp_path, name, data)
    assert isinstance(paper, Record) and paper.text == CLEAN_PAPER
    assert paper.id == name and paper.provenance["arxiv_id"] == "2101.00001"


def test_latin_1_is_read_where_utf_8_fails(tmp_path: Path) -> None:
    """RedPajama drops the whole paper where one file is not UTF-8."""
    text = PAPER.replace("The mean", "Schrödingers Katze: É. The mean")
    files = {"main.tex": text.encode("latin-1"), "other.tex": "é".encode()}
    (paper,) = read_bytes(tmp_path, "a.gz", packed(files))
    assert isinstance(paper, Record)
    assert "Schrödingers Katze: É." in paper.text and paper.counts["files_not_utf8"] == 1


def test_a_declared_encoding_is_believed(tmp_path: Path) -> None:
    text = PAPER.replace("{article}", "{article}\\usepackage[cp1251]{inputenc}").replace("The mean", "Среднее")
    (paper,) = read_bytes(tmp_path, "a.gz", single(text.encode("cp1251")))
    assert isinstance(paper, Record) and "Среднее" in paper.text


def test_old_line_ends_and_marks_of_byte_order_are_no_text(tmp_path: Path) -> None:
    (paper,) = read_bytes(tmp_path, "a.gz", single(b"\xef\xbb\xbf" + PAPER.replace("\n", "\r").encode()))
    assert isinstance(paper, Record) and paper.text == CLEAN_PAPER


def test_no_path_leads_out_of_a_paper_or_a_dump(tmp_path: Path) -> None:
    main = PAPER.replace("The mean", "\\input{../secret}\\input{/etc/passwd}\\input{linked}The mean").encode()
    files = {"main.tex": main, "../secret.tex": b"no", "/etc/passwd": b"no", "linked.tex": link("linked.tex", "/etc")}
    inner = packed(files)  # type: ignore[arg-type]
    dump = {"a.gz": inner, "../../b.gz": inner, "/c.gz": inner, "d.gz": link("d.gz", "a.gz")}
    kept, *dropped = read_bytes(tmp_path, "x/dump.tar", tar(dump))
    assert isinstance(kept, Record) and kept.text == CLEAN_PAPER
    assert kept.counts["files_unsafe"] == 3 and kept.counts["inputs_missing"] == 3
    assert reasons(dropped) == ["unsafe_path", "unsafe_path", "link"]
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "dump.tar"]


def test_bombs_are_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    zeros = b"\0" * (4 << 20)
    dump = {
        "zeros.gz": gzip.compress(zeros),
        "zeros_in_a_tar.gz": packed({"main.tex": PAPER.encode(), "fig.eps": zeros}),
        "many_members.gz": gzip.compress(b"") * 2000,
        "large.gz": single(PAPER + "%" * 100_000),
        "good.gz": single(PAPER),
    }
    settings = {"max_ratio": 100, "max_tex_bytes": 50_000}
    items = read_bytes(tmp_path, "dump.tar", tar(dump), **settings)
    assert reasons(items) == ["inputs_too_large", "bomb", "bomb", "inputs_too_large", "kept"]
    items = read_bytes(tmp_path, "dump.tar", tar(dump), max_member_bytes=1000)
    assert reasons(items)[0] == "too_large"


def test_broken_papers_are_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    inner = tar({"main.tex": PAPER.encode(), "other.tex": b"x" * 5000})
    whole = gzip.compress(inner + bytes(600_000), mtime=0)  # padded, as tapes were
    dump = {
        "cut.gz": whole[: len(whole) // 8],
        "damaged.gz": whole[:30] + b"\xff" * 20 + whole[50:],
        "wrong_checksum.gz": whole[:-8] + b"\xff" * 4 + whole[-4:],
        "not_gzip.gz": b"<html>",
        "cut_tar.gz": gzip.compress(inner[:3000]),
        "pdf.gz": gzip.compress(b"%PDF-1.4 ..."),
        "ps.gz": gzip.compress(b"%!PS-Adobe"),
        "empty.gz": gzip.compress(b""),
        "binary.gz": gzip.compress(b"\x00\x01" * 500),
        "no_tex.gz": packed({"a.png": b"x"}),
        "good.gz": single(PAPER),
    }
    items = read_bytes(tmp_path, "dump.tar", tar(dump))
    expected = ["broken_gzip", "broken_gzip", "broken_gzip", "no_section", "broken_tar", "pdf_only", "postscript_only"]
    assert reasons(items) == [*expected, "no_section", "no_tex", "no_tex", "kept"]
    assert all(item.bytes > 0 for item in items if isinstance(item, Dropped))


def test_a_dump_cut_short_gives_what_was_whole_and_raises(tmp_path: Path) -> None:
    content = tar({"a.gz": single(PAPER), "b.gz": gzip.compress(PAPER.encode(), 0) * 2})
    path = tmp_path / "dump.tar"
    path.write_bytes(content[:1800])
    papers = read(path, "dump.tar", ArxivSettings())
    first = next(papers)
    assert isinstance(first, Record) and first.text == CLEAN_PAPER
    with pytest.raises(DataError, match=re.escape(str(path))):
        next(papers)


def test_a_single_paper_cut_short_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cut\.gz"):
        read_bytes(tmp_path, "cut.gz", packed({"main.tex": PAPER.encode()})[:-20])


def test_settings_that_cannot_work_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="appendix=maybe"):
        read_bytes(tmp_path, "a.gz", single(PAPER), appendix="maybe")
    with pytest.raises(ConfigError, match="max_files=0"):
        read_bytes(tmp_path, "a.gz", single(PAPER), max_files=0)


def test_tars_of_any_age_are_recognised(tmp_path: Path) -> None:
    """Tars of before 1988 have no magic bytes."""
    old = bytearray(tar({"main.tex": PAPER.encode()}))
    old[257:265] = b"\0" * 8
    checksum = sum(old[:148]) + 8 * 32 + sum(old[156:512])
    old[148:156] = b"%06o\0 " % checksum
    assert tarfile.TarInfo.frombuf(bytes(old[:512]), "ascii", "strict").name == "main.tex"
    (paper,) = read_bytes(tmp_path, "a.gz", gzip.compress(bytes(old)))
    assert isinstance(paper, Record) and paper.text == CLEAN_PAPER


# real papers

data = shared_data()
real = pytest.mark.skipif(data is None, reason="no shared data")
# paper: (root, characters kept, macros defined, uses replaced): looked at, and the text read
GOLDEN = {
    "1202.3665": ("paper.tex", 32_285, 56, 379),
    "1308.0729": ("main.tex", 1_749_476, 417, 23_246),
    "1703.09710": ("ms.tex", 119_901, 81, 1_010),
    "1907.10121": ("paper.tex", 73_815, 6, 63),
}


@functools.cache
def real_paper(number: str) -> Record:
    assert data is not None
    (paper,) = read(data / "raw" / "arxiv" / f"{number}.gz", f"{number}.gz", ArxivSettings())
    assert isinstance(paper, Record)
    return paper


@real
@pytest.mark.parametrize("number", GOLDEN)
def test_a_real_paper_becomes_readable_text(number: str) -> None:
    paper = real_paper(number)
    counts = paper.counts
    found = (paper.provenance["root"], len(paper.text), counts["macros_defined"], counts["macros_expanded"])
    assert found == GOLDEN[number]
    assert re.match(r"\\(section|chapter)\*?\{", paper.text)
    without_code = re.sub(r"\\begin\{(lstlisting|verbatim)\}.*?\\end\{\1\}", "", paper.text, flags=re.S)
    assert re.findall(r"(?<!\\)%", without_code) == []
    assert re.findall(r"\\(?:(?:re)?newcommand|def|let|DeclareMathOperator)\b", without_code) == []
    assert re.findall(r"\\(?:input|include|bibliography|bibitem|begin\{thebibliography\})\b", without_code) == []


@real
def test_the_real_text_reads_as_the_paper_prints() -> None:
    emcee = real_paper("1202.3665").text
    assert "Each step in a M--H chain is proposed using" in emcee
    assert "Section~\\ref{sect:algo}" in emcee  # \sect{algo}: a macro of a macro with an argument
    assert "\\begin{lstlisting}\n% pip install emcee\n\\end{lstlisting}" in emcee  # % is a prompt here
    assert "{\\sffamily emcee}\\ is" in emcee  # \this, of \project and \thisplain
    celerite = real_paper("1703.09710").text
    assert "\\section{celerite as a model of stellar variations}" in celerite  # \section is redefined in the preamble
    assert "Equation~(\\ref{eq:sho-psd})" in celerite
    assert "\\dfmtodo" not in celerite and "\\project" not in celerite


@real
def test_the_homotopy_type_theory_book_is_expanded() -> None:
    """22 files, 417 macros, some with optional arguments and some that look at what follows."""
    text = real_paper("1308.0729").text
    assert text.startswith("\\chapter*{Preface}\n") and "\\chapter{Category theory}" in text
    assert "A \\textbf{precategory}" in text  # \define
    assert "$\\ensuremath{h\\circ (g\\circ f) =_{} (h\\circ g)\\circ f}$" in text  # \id{…}{…}, the type left out
    assert "Zermelo--Fraenkel" in text and "\\ZF" not in text
    for program in ("\\lam{", "\\sectionNotes"):  # kept by their names
        assert program in text
    for name in ("\\jdeq", "\\define", "\\opp", "\\trans{", "\\defeq", "\\refl{", "\\idtype", "\\prd{", "\\sm{"):
        assert re.search(re.escape(name) + r"(?![A-Za-z])", text) is None, name
