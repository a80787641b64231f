"""Source code: licences, layouts, the rules for files, exact keys."""

import gzip
import io
import json
import sysconfig
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.cleaning.code_statistics import alphanumeric_share, comment_share, letter_count, line_lengths
from data_tools.cleaning.licences import (
    is_licence_file,
    is_permitted,
    licence_of_metadata,
    licence_of_name,
    licence_of_text,
)
from data_tools.records import Dropped, Record
from data_tools.sources import github
from data_tools.sources.github import GithubSettings, check_github_settings, read
from llamatrain.errors import ConfigError, DataError
from tests.data.test_code_headers import APACHE, BSD, MIT, lines_of

SETTINGS = GithubSettings()
PAPER = ("mit", "bsd", "apache")
CODE = "def add(a, b):\n    return a + b\n"


def found(path: Path, settings: GithubSettings = SETTINGS, name: str | None = None) -> dict[str, str]:
    """Ids with the text of what is kept, or the reason in brackets."""
    items = list(read(path, name or path.name, settings))
    assert len({item.id for item in items}) == len(items)
    return {item.id: f"[{item.reason}]" if isinstance(item, Dropped) else item.text for item in items}


def row(content: str | None = CODE, path: str = "a.py", licence: str | None = "mit", **more: object) -> str:
    return json.dumps({"content": content, "path": path, "repo_name": "person/project", "license": licence, **more})


def rows(tmp_path: Path, *lines: str, settings: GithubSettings = SETTINGS) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    return list(found(path, settings).values())


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


# Licences


@pytest.mark.parametrize(
    ("name", "expression", "permitted"),
    [
        ("mit", "MIT", True),
        ("bsd-3-clause", "BSD-3-Clause", True),
        ("apache-2.0", "Apache-2.0", True),
        ("gpl-3.0", "GPL", False),
        ("lgpl-2.1", "LGPL", False),
        ("MIT License", "MIT", True),
        ("MIT-0", "MIT-0", True),
        ("MIT-CMU", "MIT-CMU", False),  # other terms, those of HPND
        ("BSD", "BSD", True),
        ("3-Clause BSD License", "BSD-3-Clause", True),
        ("Apache License, Version 2.0", "Apache-2.0", True),
        ("Apache Software License", "Apache", True),
        ("MIT OR GPL-3.0-only", "MIT OR GPL", True),
        ("MIT AND GPL-3.0-or-later", "MIT AND GPL", False),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", "MPL-2.0 AND ( Apache-2.0 OR MIT )", False),
        ("Apache-2.0 WITH LLVM-exception", "Apache-2.0 WITH LLVM-exception", True),
        ("Dual BSD/GPL", None, False),
        ("Proprietary", None, False),
        ("see LICENSE", None, False),
        ("", None, False),
    ],
)
def test_licences_by_name(name: str, expression: str | None, permitted: bool) -> None:
    assert licence_of_name(name) == expression
    assert is_permitted(expression, PAPER) == permitted


@settings(deadline=None)
@given(st.text(alphabet="MITGPL-2.0 ()ANDORWTH", max_size=40))
def test_no_expression_breaks_the_judgement(text: str) -> None:
    assert is_permitted(text, PAPER) in (True, False)
    assert licence_of_name(text) is None or licence_of_name(text)


def test_licences_by_text() -> None:
    assert licence_of_text(MIT) == "MIT"
    assert licence_of_text(BSD) == "BSD-3-Clause"
    assert licence_of_text(BSD.replace("Neither", "Each of")) == "BSD-2-Clause"
    assert licence_of_text(BSD + "All advertising materials mentioning features must display …") == "BSD-4-Clause"
    assert licence_of_text(APACHE) == "Apache-2.0"
    assert licence_of_text("The MIT License\n\nCopyright 2020") == "MIT"
    assert licence_of_text("SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note") is not None
    assert licence_of_text("All is well.") is None
    for other in (
        "The Software shall be used for Good, not Evil.",
        "Not for non-commercial use.",
        "GNU General Public License",
    ):
        assert not is_permitted(licence_of_text(MIT + other), PAPER)


def test_licences_by_metadata() -> None:
    assert licence_of_metadata("Name: a\nLicense-Expression: MIT\nLicense: GPL\n\nLicense: body") == "MIT"
    assert licence_of_metadata(
        "Name: a\nLicense: BSD-3-Clause\nClassifier: License :: OSI Approved :: BSD License\n"
    ) == ("BSD-3-Clause")
    both = "Classifier: License :: OSI Approved :: {}\nClassifier: License :: OSI Approved :: MIT License\n"
    assert licence_of_metadata(both.format("Apache Software License")) == "Apache AND MIT"
    assert not is_permitted(licence_of_metadata(both.format("GNU General Public License v3 (GPLv3)")), PAPER)
    assert licence_of_metadata("License: " + MIT.replace("\n", "\n        ")) == "MIT"
    assert licence_of_metadata("Name: a\n") is None
    assert not is_permitted(licence_of_metadata("License: All mine\n"), PAPER)


def test_licence_files_are_told_from_code() -> None:
    for name in (
        "LICENSE",
        "licence.txt",
        "LICENSE-MIT",
        "LICENSE.APACHE",
        "COPYING",
        "COPYING.LESSER",
        "mit-license.txt",
    ):
        assert is_licence_file(name)
    for name in ("license.py", "licenses.go", "license_checker.c", "README", "copyright.js", "unlicensed.md.py"):
        assert not is_licence_file(name)


# BigQuery


def test_rows_of_bigquery(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(row(repo_name=["person/project", "other/fork"]) + "\n")
    (record,) = read(tmp_path / "rows.jsonl", "dump/rows.jsonl", SETTINGS)
    assert isinstance(record, Record)
    assert record.text == CODE and record.id == "dump/rows.jsonl:1" and record.source == "github"
    assert record.provenance == {
        "repository": "person/project",
        "path": "a.py",
        "file": "dump/rows.jsonl",
        "licence": "MIT",
    }


def test_rows_are_dropped_with_their_reason(tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_file_bytes=5_000)
    assert rows(
        tmp_path,
        row(licence="gpl-2.0"),
        row(licence=None),
        row(content=None),
        row(path="a.json"),
        row(path="vendor/LICENSE"),
        row(path="server.crt"),
        row(content=""),
        row(content="x = 1\n" * 1_000),
        row(content="x" * 40_000 + "y" * 60_000),
        row(content="lone \ud800 surrogate\n"),
        "{broken",
        json.dumps({"content": CODE}),
        row(),
        settings=settings,
    ) == [
        "[licence]",
        "[licence_unknown]",
        "[no_content]",
        "[extension]",
        "[licence_file]",
        "[extension]",
        "[empty]",
        "[too_large]",
        "[too_large]",
        "[broken_encoding]",
        "[broken_json]",
        "[broken_json]",
        CODE,
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz"])
def test_packed_rows(tmp_path: Path, suffix: str) -> None:
    content = "\n".join([row(path=f"{number}.py") for number in range(600)]).encode()
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(suffix.rsplit(".", 1)[-1], bytes)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(pack(content))
    assert len(found(path)) == 600
    if suffix != ".jsonl":
        path.write_bytes(pack(content)[:-20])
        with pytest.raises(DataError, match="copy it again"):
            list(read(path, path.name, SETTINGS))


# Rules


def test_rules_of_the_paper(tmp_path: Path) -> None:
    long, short = "x" * 1_001 + "\n" + CODE * 20, "x" * 1_000 + "\n" + CODE * 20
    assert rows(tmp_path, row(long), row(short)) == ["[line_too_long]", short]
    long, short = ("x" * 100 + "\n") * 9, ("x" * 99 + "\n") * 9
    assert rows(tmp_path, row(long), row(short)) == ["[lines_long_on_average]", short]
    few, enough = "(+)=\n" * 19 + "abcd" * 7 + "\n", "(+)=\n" * 19 + "abcd" * 8 + "\n"
    assert rows(tmp_path, row(few), row(enough)) == ["[few_alphanumerics]", enough]
    unicode = "变量 = 一\n" * 20
    assert rows(tmp_path, row(unicode)) == [unicode]


def test_rules_that_are_off_unless_set(tmp_path: Path) -> None:
    xml, html = '<?xml version="1.0"?>\n<a>text</a>\n', "<div><p>\n" * 100 + "few words here</p>\n"
    assert rows(tmp_path, row(xml, "a.html"), row(html, "b.html"), row(CODE)) == [xml, html, CODE]
    settings = replace(SETTINGS, drop_xml=True, min_visible_html=0.2, min_comments=0.01)
    assert rows(tmp_path, row(xml, "a.html"), row(html, "b.html"), row(CODE), settings=settings) == [
        "[xml]",
        "[little_visible_text]",
        "[few_comments]",
    ]
    comments = "# one\n# two\n# three\nx = 1\n"
    assert rows(tmp_path, row(comments), settings=replace(SETTINGS, max_comments=0.7)) == ["[mostly_comments]"]
    assert rows(tmp_path, row(CODE), settings=replace(SETTINGS, min_characters=100)) == ["[too_short]"]
    assert rows(tmp_path, row(CODE), settings=replace(SETTINGS, max_characters=10)) == ["[too_long]"]


def test_letters_per_token_where_a_tokenizer_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoCharacters:
        def encode(self, text: str) -> list[int]:
            return [0] * (len(text) // 2)

    monkeypatch.setattr(github, "_tokenizer", lambda path: TwoCharacters())
    words, numbers = "alphabet soup here\n" * 5, "0x1234, 0xabcd,\n" * 5
    settings = replace(SETTINGS, tokenizer="tokenizer.model")
    assert rows(tmp_path, row(words), row(numbers), settings=settings) == [words, "[few_letters_per_token]"]


def test_numbers_of_a_file() -> None:
    assert line_lengths("ab\n\nabcd\n").longest == 4 and line_lengths("ab\n\nabcd\n").mean == 3.0
    assert line_lengths("").mean == 0 and line_lengths("ab").mean == 2
    assert alphanumeric_share("a1 \n") == 0.5 and alphanumeric_share("é1 \n") == 0.5 and alphanumeric_share("") == 0
    assert letter_count("a1é ") == 2
    assert comment_share("/* a\nb */\nint x;\n", "a.c") == pytest.approx(10 / 17)
    assert comment_share("x", "a.unknown") is None


@settings(deadline=None)
@given(st.text())
def test_alphanumerics_are_pythons(text: str) -> None:
    assert round(alphanumeric_share(text) * len(text)) == sum(map(str.isalnum, text))


def test_headers_go_and_their_licence_is_heeded(tmp_path: Path) -> None:
    gpl = "# This program is free software under the terms of the GNU General Public License.\n# Copyright 2020 A\n"
    spdx = "# SPDX-License-Identifier: LGPL-2.1-or-later\n"
    texts = [row(lines_of(MIT, "#") + CODE), row(gpl + CODE), row(spdx + CODE)]
    assert rows(tmp_path, *texts) == [CODE, "[licence_of_file]", "[licence_of_file]"]
    assert rows(tmp_path, *texts, settings=replace(SETTINGS, heed_file_headers=False)) == [CODE, CODE, CODE]
    kept = rows(tmp_path, texts[0], settings=replace(SETTINGS, remove_headers=False))
    assert kept == [lines_of(MIT, "#") + CODE]


def test_line_ends_and_byte_order_marks(tmp_path: Path) -> None:
    assert rows(tmp_path, row("\ufeffa = 1\r\nb = 2\rc = 3\n")) == ["a = 1\nb = 2\nc = 3\n"]


def test_files_that_differ_in_their_header_alone_are_copies(tmp_path: Path) -> None:
    """RedPajama hashes before it cleans, so such files stay apart."""
    path = tmp_path / "rows.jsonl"
    variants = [CODE, lines_of(MIT, "#") + CODE, lines_of(APACHE, "#") + "\n" + CODE, CODE.replace("\n", "\r\n")]
    path.write_text("\n".join([row(text) for text in variants] + [row(CODE + "x = 1\n")]))
    texts = [record.text for record in read(path, "rows.jsonl", SETTINGS) if isinstance(record, Record)]
    assert len(texts) == 5 and len(set(texts[:4])) == 1 and len(set(texts)) == 2


# Trees and archives

FILES: dict[str, str | bytes] = {
    "LICENSE": MIT,
    "Makefile": "all:\n\techo all the things\n",
    "README.md": "# Title\n\nSome words about it.\n",
    "big.py": "x = 1\n" * 400_000,
    "data.json": "{}",
    "logo.py": b"\x89PNG\0\0",
    "old.c": "int café;\n".encode("latin-1"),
    "src/a.py": CODE,
    "third_party/gpl/COPYING": "GNU GENERAL PUBLIC LICENSE\nVersion 2",
    "third_party/gpl/b.c": "int b;\n",
    "third_party/bsd/LICENSE.txt": BSD,
    "third_party/bsd/c.c": "int c;\n",
}
EXPECTED = {
    "LICENSE": "[licence_file]",
    "Makefile": FILES["Makefile"],
    "README.md": FILES["README.md"],
    "big.py": "[too_large]",
    "data.json": "[extension]",
    "logo.py": "[binary]",
    "old.c": "[broken_encoding]",
    "src/a.py": CODE,
    "third_party/bsd/LICENSE.txt": "[licence_file]",
    "third_party/bsd/c.c": "int c;\n",
    "third_party/gpl/COPYING": "[licence_file]",
    "third_party/gpl/b.c": "[licence]",
}


def test_a_repository_as_a_directory_and_file_by_file(tmp_path: Path) -> None:
    root = tree(tmp_path / "project", FILES)
    (root / ".git").mkdir()
    (root / ".git" / "hook.py").write_text(CODE)
    assert found(root) == {f"project/{name}": text for name, text in EXPECTED.items()}
    for name, text in EXPECTED.items():  # as the engine reads it: each file by itself, the input being the directory
        assert found(root / name, name=name) == {name: text}
    (root / "link.py").symlink_to("src/a.py")
    assert found(root)["project/link.py"] == "[link]"


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst", ".zip"])
def test_a_repository_as_an_archive(tmp_path: Path, suffix: str) -> None:
    """The licence may come behind the code in it."""
    path = tmp_path / f"project{suffix}"
    buffer = io.BytesIO()
    ordered = sorted(FILES.items(), key=lambda item: item[0], reverse=True)
    if suffix == ".zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in ordered:
                zipped.writestr(f"project-1.0/{name}", content)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, content in ordered:
                data = content.encode() if isinstance(content, str) else content
                member = tarfile.TarInfo(f"project-1.0/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    pack = {".tar.gz": gzip.compress, ".tar.zst": zstandard.ZstdCompressor().compress}.get(suffix, bytes)
    path.write_bytes(pack(buffer.getvalue()))
    assert found(path) == {f"project{suffix}/project-1.0/{name}": text for name, text in EXPECTED.items()}


def test_a_tree_that_states_no_licence(tmp_path: Path) -> None:
    root = tree(tmp_path / "project", {"a.py": CODE})
    assert found(root) == {"project/a.py": "[licence_unknown]"}
    assert found(root, replace(SETTINGS, unstated_licence="MIT")) == {"project/a.py": CODE}
    assert found(root, replace(SETTINGS, unstated_licence="GPL-3.0")) == {"project/a.py": "[licence]"}


def test_all_licence_files_of_a_directory_count(tmp_path: Path) -> None:
    pointer = "This software is under either of the licences in LICENSE.APACHE or LICENSE.BSD."
    dual = tree(tmp_path / "dual", {"LICENSE": pointer, "LICENSE.APACHE": APACHE, "LICENSE.BSD": BSD, "a.py": CODE})
    assert found(dual)["dual/a.py"] == CODE
    odd = tree(tmp_path / "odd", {"LICENSE": "We allow some things. " * 200, "LICENSE-MIT": MIT, "a.py": CODE})
    assert found(odd)["odd/a.py"] == "[licence]"


# Python packages


def package(site: Path, name: str, metadata: str, files: dict[str, str | bytes]) -> None:
    tree(site, files)
    record = "".join(f"{file},sha256=x,1\n" for file in files)
    tree(site / f"{name}-1.0.dist-info", {"METADATA": f"Name: {name}\n{metadata}", "RECORD": record, "LICENSE": MIT})


def test_python_packages_by_their_metadata(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    package(site, "one", "License-Expression: MIT\n", {"one/__init__.py": CODE, "one/_vendor/LICENSE": "Mozilla Public "
            "License Version 2.0", "one/_vendor/a.py": CODE})  # fmt: skip
    package(site, "two", "License: GPL-3.0\n", {"two.py": CODE})
    package(site, "three", "", {"three.py": CODE + "# three\n"})
    tree(site, {"stray.py": CODE, "three-1.0.dist-info/AUTHORS.md": "Some people.\n"})
    expected = {
        "one/__init__.py": CODE,
        "one/_vendor/a.py": "[licence]",
        "two.py": "[licence]",
        "three.py": CODE + "# three\n",
        "stray.py": "[licence_unknown]",
        "three-1.0.dist-info/AUTHORS.md": "[package_metadata]",
    }
    whole = found(site)
    settings = replace(SETTINGS, layout="python_packages")
    for name, text in expected.items():
        assert whole[f"site-packages/{name}"] == text
        assert found(site / name, settings, name=name) == {name: text}
    (record,) = read(site / "three.py", "three.py", settings)
    assert isinstance(record, Record)
    assert record.provenance == {"repository": "three-1.0", "path": "three.py", "licence": "MIT"}


def test_installed_packages_of_this_python() -> None:
    """Real packages under the paper's licences give code, and one under another does not."""
    site = Path(sysconfig.get_path("purelib"))
    settings = replace(SETTINGS, layout="python_packages")
    reasons: Counter[str] = Counter()
    kept: list[Record] = []
    for name in ("pytest", "_pytest", "iniconfig", "pluggy", "packaging", "hypothesis"):
        if not (site / name).is_dir():
            continue
        for path in sorted((site / name).glob("*.py")):
            for item in read(path, path.relative_to(site).as_posix(), settings):
                reasons[item.reason if isinstance(item, Dropped) else "kept"] += 1
                if isinstance(item, Record):
                    kept.append(item)
    assert reasons["kept"] > 50 and reasons["licence"] > 10  # hypothesis is under the MPL
    assert {record.provenance["repository"].split("-")[0] for record in kept} >= {"pytest", "pluggy", "packaging"}
    assert not any(record.provenance["path"].startswith("hypothesis/") for record in kept)
    for record in kept:
        compile(record.text, record.id, "exec", dont_inherit=True)


def test_the_standard_library_of_this_python() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    settings = replace(SETTINGS, licences=["psf", "mit", "bsd", "apache", "isc"], unstated_licence="PSF-2.0")
    paths = [library / "json" / "decoder.py", library / "logging" / "config.py", library / "textwrap.py"]
    for path in paths:
        (record,) = read(path, path.relative_to(library).as_posix(), settings)
        assert isinstance(record, Record) and "PSF-2.0" in record.provenance["licence"]
        compile(record.text, record.id, "exec", dont_inherit=True)
        assert not record.text.startswith("# Copyright")
        (strict,) = read(path, path.relative_to(library).as_posix(), replace(SETTINGS, unstated_licence="PSF-2.0"))
        assert isinstance(strict, Dropped) and strict.reason == "licence"


def test_settings_that_cannot_work_are_refused() -> None:
    for change in ({"layout": "cvs"}, {"licences": ["wtf"]}, {"licences": []}, {"max_line": 0}):
        with pytest.raises(ConfigError):
            check_github_settings(replace(SETTINGS, **change))


def test_rows_of_bigquery_in_a_file_named_json_are_read(tmp_path: Path) -> None:
    row = {"content": "print('a program of one line')\n", "path": "a.py", "repo_name": "a/b", "license": "mit"}
    (tmp_path / "contents-000000000000.json").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"path": "b.py"}) + "\n"
    )
    (tmp_path / "package.json").write_text('{\n  "content": "no row"\n}\n')
    found = list(github.read(tmp_path / "contents-000000000000.json", "contents-000000000000.json", GithubSettings()))
    assert [record.provenance["path"] for record in found if isinstance(record, Record)] == ["a.py", "b.py"]
    (tree_file,) = github.read(tmp_path / "package.json", "package.json", GithubSettings())
    assert isinstance(tree_file, Dropped) and tree_file.reason == "extension"
