"""The standard library as a corpus, and the commands that take it on."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.stdlib_corpus import StdlibCorpusSettings, stdlib_corpus
from tests.data.corpora import documents_in, files_of
from tests.real_text import REPOSITORY


@pytest.fixture
def small_library(tmp_path: Path) -> Path:
    files = {
        "alpha/__init__.py": '"""About alpha."""\ndef f():\n    """Do f.\n\n        Indented.\n    Not.\n    """\n',
        "alpha/inner.py": 'class A:\n    async def g(self):\n        """Do g."""\n',
        "beta.py": "x = 1\n",
        "latin.py": None,
        "broken.py": "def (:\n",
        "empty.py": "",
        "encodings/cp1.py": '""" Codec cp1 generated from \'CP1.TXT\' with gencodec.py. """\nx = "left out"\n',
        "test/test_beta.py": "left out",
        "alpha/tests/t.py": "left out",
        "site-packages/other.py": "left out",
        "_sysconfigdata_x.py": "left out",
        "pydoc_data/topics.py": "topics = {'while': 'The while statement', 'for': 'The for statement'}\n",
    }
    for name, text in files.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"# caf\xe9\n" if text is None else text.encode())
    return tmp_path / "library"


def test_the_library_corpus_holds_code_and_documentation_by_module(
    small_library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in ("a", "b"):
        stdlib_corpus(StdlibCorpusSettings(output=str(tmp_path / output), stdlib=str(small_library)))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    code, docs = documents_in(tmp_path / "a" / "code.jsonl.zst"), documents_in(tmp_path / "a" / "docs.jsonl.zst")
    groups = [("alpha/__init__.py", "alpha"), ("alpha/inner.py", "alpha"), ("beta.py", "beta"), ("broken.py", "broken")]
    assert [(document.id, document.group) for document in code] == groups
    assert [(document.id, document.group, document.text) for document in docs] == [
        ("topics/for", "topics/for", "The for statement"),
        ("topics/while", "topics/while", "The while statement"),
        (
            "docstrings/alpha/__init__.py",
            "alpha",
            "alpha\n\nAbout alpha.\n\n\nalpha.f\n\nDo f.\n\n    Indented.\nNot.\n",
        ),
        ("docstrings/alpha/inner.py", "alpha", "alpha.inner.A.g\n\nDo g.\n"),
    ]
    printed = capsys.readouterr().out
    assert "1 files not UTF-8" in printed and "1 files empty" in printed and "1 files without docstrings" in printed


def _command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"data_tools.{name}", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_commands_work_from_the_command_line(small_library: Path, tmp_path: Path, tiny_tokenizer: Path) -> None:
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    made = _command("stdlib_corpus", f"output={corpus}", f"stdlib={small_library}")
    assert made.returncode == 0, made.stderr
    inputs = f"input=[{corpus}/code.jsonl.zst,{corpus}/docs.jsonl.zst]"
    written = _command(
        "tokenize_shards", "source=x", inputs, f"tokenizer={tiny_tokenizer}", f"output={output}", "workers=1"
    )
    assert written.returncode == 0, written.stderr
    assert "tokenizing x" in written.stderr
    verified = _command("verify_shards", f"path={output}")
    assert verified.returncode == 0 and "whole" in verified.stdout
    (output / "train-00000.idx").unlink()
    refused = _command("verify_shards", f"path={output}")
    assert refused.returncode == 2
    assert "train-00000.idx" in refused.stderr.splitlines()[-1] and "Traceback" not in refused.stderr
    misspelt = _command("train_tokenizer", f"input={corpus}", f"output={tmp_path / 't'}", "vocab_siz=300")
    assert misspelt.returncode == 2 and "vocab_size" in misspelt.stderr
