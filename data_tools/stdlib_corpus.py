"""A corpus that is on every machine: the running Python's standard library, as code and as documentation.

    python -m data_tools.stdlib_corpus output=DIRECTORY

Writes code.jsonl.zst (one document a source file) and docs.jsonl.zst (the topics of `help()`, and the
docstrings of each source file as one document). `group` is the top-level module (a topic, which is of no
module, is a group of its own): tokenize_shards with holdout_by=group holds out a module's code together with its
documentation. Equal libraries give equal bytes.
"""

import ast
import inspect
import io
import json
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from tqdm import tqdm

from llamatrain.cli import run_command
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import write_bytes_atomically

CODE_FILE, DOCS_FILE = "code.jsonl.zst", "docs.jsonl.zst"
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
BUILD_PREFIXES = ("_sysconfigdata", "config-")  # written by the build: they differ from machine to machine
TOPICS_FILE = "pydoc_data/topics.py"  # its text is documentation, so it is no code here
GENERATED_MARK = "with gencodec.py"  # what the character tables of `encodings` say of themselves: no one wrote them
COMPRESSION_LEVEL = 9
LARGEST_SHOWN = 5


@dataclass
class StdlibCorpusSettings:
    output: str = "???"  # directory for code.jsonl.zst and docs.jsonl.zst
    stdlib: str | None = None  # directory of a standard library; null: that of the Python that runs


@dataclass(frozen=True)
class SourceFile:
    name: str  # below the library: asyncio/events.py
    text: str

    @property
    def module(self) -> str:
        """asyncio/events.py is asyncio.events, asyncio/__init__.py is asyncio."""
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def group(self) -> str:
        return self.module.partition(".")[0]


def stdlib_corpus(settings: StdlibCorpusSettings) -> None:
    """Write the two files and print their sizes. Raises ConfigError and DataError."""
    if settings.output in ("", "???"):
        raise ConfigError("output is not set: output=DIRECTORY")
    library = Path(settings.stdlib or sysconfig.get_path("stdlib"))
    counts: Counter[str] = Counter()
    sources = list(_read_sources(library, counts))
    if not sources:
        raise DataError(f"{library}: no .py files there; name a standard library with stdlib=DIRECTORY")
    output = Path(settings.output)
    code = [_record(source.text, source.name, source.group, "python-code") for source in sources]
    docs = [*_topics(library), *_docstrings(sources, counts)]
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, records in ((CODE_FILE, code), (DOCS_FILE, docs)):
            write_bytes_atomically(output / name, _compressed_lines(records))
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror})") from None
    _print_summary(output, {CODE_FILE: code, DOCS_FILE: docs}, counts)


def _read_sources(library: Path, counts: Counter[str]) -> Iterator[SourceFile]:
    names: list[str] = []
    for directory, subdirectories, files in os.walk(library):
        subdirectories[:] = [name for name in subdirectories if name not in SKIPPED_DIRECTORIES]
        parent = Path(directory).relative_to(library)
        names += [(parent / name).as_posix() for name in files if name.endswith(".py")]
    for name in tqdm(sorted(names), desc="reading", unit="file"):
        if name == TOPICS_FILE or name.startswith(BUILD_PREFIXES):
            continue
        try:
            text = (library / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            counts["files not UTF-8, left out"] += 1
            continue
        if not text:
            counts["files empty, left out"] += 1
            continue
        if GENERATED_MARK in text[:300]:
            counts["generated character tables, left out"] += 1
            continue
        yield SourceFile(name, text)


def _topics(library: Path) -> Iterator[dict[str, str]]:
    """The topics of help(), read from the library's own pydoc_data/topics.py without running it."""
    try:
        tree = ast.parse((library / TOPICS_FILE).read_bytes())
    except OSError:
        return  # some distributions leave it out
    for statement in tree.body:
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            for name, text in sorted(ast.literal_eval(value).items()):
                yield _record(text, f"topics/{name}", f"topics/{name}", "python-docs")


def _docstrings(sources: list[SourceFile], counts: Counter[str]) -> Iterator[dict[str, str]]:
    for source in tqdm(sources, desc="docstrings", unit="file"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old code are no concern here
                tree = ast.parse(source.text)
        except (SyntaxError, ValueError):
            counts["files without docstrings: not this Python's syntax"] += 1
            continue
        sections = [f"{name}\n\n{text}" for name, text in _named_docstrings(tree, source.module)]
        if sections:
            text = "\n\n\n".join(sections) + "\n"
            yield _record(text, f"docstrings/{source.name}", source.group, "python-docs")


def _named_docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Qualified names and cleaned docstrings of a module and of all classes and functions in it, in order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        text = inspect.cleandoc(docstring).strip() if docstring else ""
        if text:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _named_docstrings(child, f"{name}.{child.name}")
        else:
            yield from _named_docstrings(child, name)


def _record(text: str, identifier: str, group: str, source: str) -> dict[str, str]:
    return {"text": text, "id": identifier, "group": group, "source": source}


def _compressed_lines(records: Iterable[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).stream_writer(buffer, closefd=False) as writer:
        for record in records:
            writer.write((json.dumps(record, ensure_ascii=True) + "\n").encode())
    return buffer.getvalue()


def _print_summary(output: Path, files: dict[str, list[dict[str, str]]], counts: Counter[str]) -> None:
    group_bytes: Counter[str] = Counter()
    for name, records in files.items():
        sizes = [len(record["text"].encode("utf-8", errors="surrogatepass")) for record in records]
        for record, size in zip(records, sizes, strict=True):
            group_bytes[record["group"]] += size
        print(f"{output / name}: {len(records):,} documents, {sum(sizes):,} bytes of text")
    for reason, count in sorted(counts.items()):
        print(f"{count:,} {reason}")
    total = sum(group_bytes.values())
    largest = ", ".join(f"{name} {size / total:.1%}" for name, size in group_bytes.most_common(LARGEST_SHOWN))
    print(f"{len(group_bytes)} groups; the largest: {largest}")


def main() -> None:
    run_command(StdlibCorpusSettings, "data_tools/stdlib_corpus", stdlib_corpus, help_text=__doc__)


if __name__ == "__main__":
    main()
