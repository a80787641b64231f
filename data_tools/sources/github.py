"""Source code under free licences: BigQuery's GitHub set, repositories, this machine's Python packages (paper, 2.1).

A document is a file. It comes as
    JSON-lines       of BigQuery's `github_repos`: {"content", "path", "repo_name", "license"}, a file a line
    archive          .tar, packed or not, or .zip of a repository
    tree             any other file: one of a repository that lies below the input; a directory: all its files
    python_packages  as tree, below a site-packages directory, with the licences of the packages' metadata
Its licence is BigQuery's word, that of the LICENSE files in the nearest directory above it that has some, or that of
its package; several must all be permitted. What a file's own header says counts besides, so that a vendored LGPL file
in an MIT package is dropped.

Then, as RedPajama does in other order and bigcode in part: licence and copyright headers are removed (without touching
code: data_tools.cleaning.code_headers), and files dropped that people did not write. Exact copies are looked for in
what is left, so that files that differ in their header alone are one.

Dropped as: extension, licence_file, licence (not permitted), licence_unknown, licence_of_file (its header's),
no_content (null in BigQuery: binary or too large), too_large, binary (zero bytes), broken_encoding (no UTF-8), empty,
line_too_long, lines_long_on_average, few_alphanumerics, few_letters_per_token, xml, little_visible_text, few_comments,
mostly_comments, too_short, too_long; link, package_metadata (of Python); and as data_tools.sources.packed says.
"""

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.cleaning import code_statistics as statistics
from data_tools.cleaning.code_headers import remove_headers
from data_tools.cleaning.comment_syntax import extension_of
from data_tools.cleaning.licences import FAMILIES, is_licence_file, is_permitted, licence_of_name, licence_of_text
from data_tools.records import SAMPLE_CHARACTERS, Dropped, Record
from data_tools.sources.code_licences import licence_in_archive, licence_of_files, licence_of_package, licence_of_tree
from data_tools.sources.packed import JSONL_SUFFIXES, TAR_SUFFIXES, ZIP_SUFFIX, json_lines, members
from llamatrain.errors import ConfigError, DataError

SOURCE = "github"
LAYOUTS = ("auto", "bigquery", "archive", "tree", "python_packages")
SNIFF_BYTES = 1 << 16  # of the first row, to know it
_ROW = re.compile(rb'\s*\{\s*"')
BIGQUERY_SUFFIXES = (*JSONL_SUFFIXES, ".json.gz", ".json.zst")
SKIPPED_DIRECTORIES = ("__pycache__", "node_modules", "site-packages", "dist-packages")  # below a directory to read
# The languages of RedPajama's and bigcode's (The Stack's) selections; data formats (json, csv, svg) are left out.
EXTENSIONS = (
    ".asm .s .bat .cmd .c .h .cs .cpp .hpp .c++ .h++ .cc .hh .cxx .hxx .cmake .css .scss .dockerfile Dockerfile .f90 "
    ".f .f03 .f08 .f77 .f95 .for .fpp .go .hs .html .java .js .jsx .jl .kt .lua .md .markdown Makefile .mk .php .pl "
    ".pm .proto .ps1 .psd1 .psm1 .py .pyi .pyx .pxd .rb .rs .sql .scala .sh .bash .command .zsh .swift .ts .tsx .tex "
    ".vb .cu .cuh .clj .erl .ex .exs .ml .mli .r .rst .tf .toml .yaml .yml CMakeLists.txt"
)


@dataclass
class GithubSettings:
    layout: str = "auto"  # auto (by suffix) | bigquery | archive | tree | python_packages
    licences: list[str] = field(default_factory=lambda: ["mit", "bsd", "apache"])  # families; the paper's three
    unstated_licence: str | None = None  # of a tree without LICENSE file: its SPDX identifier; null: it is dropped
    heed_file_headers: bool = True  # drop a file whose own header names another licence
    remove_headers: bool = True  # the paper: "boilerplate, such as headers"
    extensions: list[str] = field(default_factory=lambda: EXTENSIONS.split())  # or whole names; empty: every file
    max_file_bytes: int = 1 << 20  # BigQuery holds no larger ones
    max_line: int = 1000  # characters; RedPajama and bigcode (after Codex)
    max_mean_line: float = 100.0  # characters; RedPajama and bigcode (after Codex)
    min_alphanumeric: float = 0.25  # of all characters; RedPajama and bigcode (after Codex)
    min_letters_per_token: float = 1.5  # RedPajama, with Pythia's tokenizer; measured only where `tokenizer` is given
    tokenizer: str | None = None  # tokenizer.model
    drop_xml: bool = False  # bigcode: `<?xml` in the first 100 characters
    min_visible_html: float = 0.0  # bigcode: 0.2 of an HTML file, and 100 characters
    min_comments: float = 0.0  # bigcode: 0.01 of the characters in comments
    max_comments: float = 1.0  # bigcode: 0.8
    min_characters: int = 1  # bigcode: 100, as an option
    max_characters: int | None = None  # bigcode: 5000, as an option


def check_github_settings(settings: GithubSettings) -> None:
    """Raises ConfigError."""
    if settings.layout not in LAYOUTS:
        raise ConfigError(f"layout={settings.layout}: choose one of {', '.join(LAYOUTS)}")
    unknown = sorted(set(settings.licences) - set(FAMILIES))
    if unknown or not settings.licences:
        found = unknown[0] if unknown else "[]"
        raise ConfigError(f"licences={found}: choose of {', '.join(FAMILIES)}")
    if settings.max_file_bytes < 1 or settings.max_line < 1 or settings.min_characters < 1:
        raise ConfigError("max_file_bytes, max_line and min_characters must be at least 1")


def read(path: Path, name: str, settings: GithubSettings) -> Iterator[Record | Dropped]:
    """The files in or at `path`, in order. Raises DataError when it cannot be read to its end."""
    check_github_settings(settings)
    layout = _layout_of(path, settings)
    if layout == "bigquery":
        yield from _rows(path, name, settings)
    elif layout == "archive":
        yield from _archive(path, name, settings)
    elif path.is_dir():
        for inside, link in _files_below(path):
            identifier = f"{name}/{inside}" if name not in ("", ".") else inside
            below = path / inside
            yield Dropped("link", identifier, 0) if link else _tree_file(below, identifier, path, layout, settings)
    else:
        depth = len(PurePosixPath(name).parts)
        yield _tree_file(path, name, path.parents[min(depth, len(path.parents)) - 1], layout, settings)


def _layout_of(path: Path, settings: GithubSettings) -> str:
    if settings.layout != "auto":
        return settings.layout
    if path.is_dir():
        return "python_packages" if any(path.glob("*.dist-info")) else "tree"
    if path.name.endswith(BIGQUERY_SUFFIXES) or (path.suffix == ".json" and _holds_rows(path)):
        return "bigquery"
    return "archive" if path.name.endswith((*TAR_SUFFIXES, ZIP_SUFFIX)) else "tree"


def _holds_rows(path: Path) -> bool:
    """Whether a .json is one of BigQuery's exports, which are JSON-lines, and no file of a repository."""
    with open(path, "rb") as file:
        line = file.readline(SNIFF_BYTES)
    return bool(_ROW.match(line)) and (b'"content"' in line or b'"repo_name"' in line)


def _rows(path: Path, name: str, settings: GithubSettings) -> Iterator[Record | Dropped]:
    # A file of a megabyte may be six in JSON, where every character is escaped.
    for line in json_lines(path, name, 6 * settings.max_file_bytes + (1 << 16)):
        if isinstance(line, Dropped):
            yield line
            continue
        number, row = line
        repositories = row.get("repo_name")
        repository = repositories[0] if isinstance(repositories, list) and repositories else repositories
        inside, content, said = row.get("path"), row.get("content"), row.get("license")
        identifier = f"{name}:{number}"
        if not isinstance(inside, str):
            yield Dropped("broken_json", identifier, 0)
            continue
        licence = (licence_of_name(said) if isinstance(said, str) else None) or settings.unstated_licence
        provenance = {"repository": str(repository or ""), "path": inside, "file": name}
        size = len(content.encode("utf-8", "surrogatepass")) if isinstance(content, str) else 0
        reason = _refused(inside, settings) or _licence_reason(licence, settings)
        if size > settings.max_file_bytes:
            reason = reason or "too_large"
        if reason is None and isinstance(content, str):
            yield _document(content, identifier, licence, provenance, settings)
        else:
            beginning = content[:SAMPLE_CHARACTERS] if isinstance(content, str) else ""
            yield Dropped(reason or "no_content", identifier, size, beginning.encode("utf-8", "replace").decode())


def _archive(path: Path, name: str, settings: GithubSettings) -> Iterator[Record | Dropped]:
    licences = licence_in_archive(path, name)
    for member in members(path, name, lambda inside: _refused(inside, settings), settings.max_file_bytes, share=0.5):
        if isinstance(member, Dropped):
            yield member
            continue
        inside, content = member
        licence = licence_of_files(licences, inside) or settings.unstated_licence
        provenance = {"repository": inside.partition("/")[0], "path": inside, "file": name}
        yield _from_bytes(content, f"{name}/{inside}", licence, provenance, settings)


def _tree_file(path: Path, identifier: str, root: Path, layout: str, settings: GithubSettings) -> Record | Dropped:
    """One file; licences are looked for from its directory up to `root`."""
    try:
        size = path.stat().st_size
        reason = _refused(path.name, settings) or ("too_large" if size > settings.max_file_bytes else None)
        if any(part.endswith((".dist-info", ".egg-info")) for part in path.parts[-4:]):
            reason = "package_metadata"
        if reason is not None:
            return Dropped(reason, identifier, size)
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    inside = path.relative_to(root).as_posix()
    if layout == "python_packages":
        repository, licence = licence_of_package(path, root)
    else:
        repository, licence = licence_of_tree(path.parent, root)
    provenance = {"repository": repository, "path": inside}
    return _from_bytes(content, identifier, licence or settings.unstated_licence, provenance, settings)


def _files_below(root: Path) -> Iterator[tuple[str, bool]]:
    """(path below the root, whether it is a link), in order; hidden files and directories are left out."""
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(
            name for name in subdirectories if not name.startswith(".") and name not in SKIPPED_DIRECTORIES
        )
        for name in sorted(files):
            path = Path(directory, name)
            if not name.startswith("."):
                yield path.relative_to(root).as_posix(), path.is_symlink()


def _refused(inside: str, settings: GithubSettings) -> str | None:
    """Why a file of this path is not even read."""
    name = PurePosixPath(inside).name
    if is_licence_file(name):
        return "licence_file"
    wanted = _wanted(tuple(settings.extensions))
    return None if not wanted or extension_of(name).lower() in wanted or name.lower() in wanted else "extension"


@functools.lru_cache(maxsize=8)
def _wanted(extensions: tuple[str, ...]) -> frozenset[str]:
    return frozenset(extension.lower() for extension in extensions)


def _licence_reason(licence: str | None, settings: GithubSettings) -> str | None:
    if licence is None:
        return "licence_unknown"
    return None if is_permitted(licence, settings.licences) else "licence"


def _from_bytes(
    content: bytes, identifier: str, licence: str | None, provenance: dict[str, str], settings: GithubSettings
) -> Record | Dropped:
    reason = _licence_reason(licence, settings) or ("binary" if b"\0" in content else None)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        reason = reason or "broken_encoding"
    if reason is not None:
        return Dropped.of_bytes(reason, identifier, content)
    return _document(text, identifier, licence, provenance, settings)


def _document(
    text: str, identifier: str, licence: str | None, provenance: dict[str, str], settings: GithubSettings
) -> Record | Dropped:
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    cleaned = remove_headers(text, provenance["path"])
    counts: dict[str, int] = {}
    if settings.remove_headers:
        text = cleaned.text
        counts = {"lines_header": cleaned.lines} if cleaned.lines else {}
    record = Record(text, identifier, SOURCE, {**provenance, "licence": licence or ""}, counts=counts)
    if settings.heed_file_headers and cleaned.removed:
        own = licence_of_text(cleaned.removed)
        if own is not None and not is_permitted(own, settings.licences):
            return Dropped.of(record, "licence_of_file")
    reason = _reason(text, provenance["path"], settings)
    return record if reason is None else Dropped.of(record, reason)


def _reason(text: str, path: str, settings: GithubSettings) -> str | None:
    """Why a text is no code to learn from, if it is not."""
    if not text or text.isspace():
        return "empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "broken_encoding"
    if len(text) < settings.min_characters:
        return "too_short"
    if settings.max_characters is not None and len(text) > settings.max_characters:
        return "too_long"
    lengths = statistics.line_lengths(text)
    if lengths.longest > settings.max_line:
        return "line_too_long"
    if lengths.mean > settings.max_mean_line:
        return "lines_long_on_average"
    if statistics.alphanumeric_share(text) < settings.min_alphanumeric:
        return "few_alphanumerics"
    return _optional_reason(text, path, settings)


def _optional_reason(text: str, path: str, settings: GithubSettings) -> str | None:
    """bigcode's rules, and RedPajama's that needs a tokenizer: off unless set."""
    if settings.drop_xml and "<?xml" in text[:100]:
        return "xml"
    if settings.min_visible_html > 0 and extension_of(path) in (".html", ".htm", ".xhtml"):
        visible = statistics.visible_characters(text)
        if visible < 100 or visible < settings.min_visible_html * len(text):
            return "little_visible_text"
    if settings.min_comments > 0 or settings.max_comments < 1:
        comments = statistics.comment_share(text, path)
        if comments is not None and comments < settings.min_comments:
            return "few_comments"
        if comments is not None and comments > settings.max_comments:
            return "mostly_comments"
    if settings.tokenizer is not None:
        tokens = len(_tokenizer(settings.tokenizer).encode(text))
        if statistics.letter_count(text) < settings.min_letters_per_token * tokens:
            return "few_letters_per_token"
    return None


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Any:
    from llamatrain.tokenizer import Tokenizer

    return Tokenizer(path)
