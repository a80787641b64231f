"""Under which licence a file lies: by the LICENSE files above it, or its Python package's metadata.

The nearest directory that has licence files decides for what is below it, so that a vendored library keeps its own
licence. All its licence files count: LICENSE-MIT beside LICENSE-APACHE permits what both permit. One that says no more
than "see LICENSE.APACHE or LICENSE.BSD" is passed over; a long one that is not recognised is not.
"""

import csv
import functools
import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from data_tools.cleaning.licences import UNKNOWN, is_licence_file, licence_of_metadata, licence_of_text
from data_tools.records import Dropped
from data_tools.sources.packed import members
from llamatrain.errors import DataError

MAX_LICENCE_BYTES = 1 << 20  # torch's licence file, of all that it bundles, has 500,000
POINTER_CHARACTERS = 2_000  # a licence file below it may only point to others


def licence_of_tree(directory: Path, root: Path) -> tuple[str, str | None]:
    """(the directory with the nearest licence files, their licence) from `directory` up to `root`."""
    for place in (directory, *directory.parents):
        licence = _stated_in(place)
        if licence is not None:
            return place.name, licence
        if place == root:
            break
    return root.name, None


def licence_of_package(path: Path, root: Path) -> tuple[str, str | None]:
    """(name and version, licence) of the Python package that installed a file below a site-packages directory.

    Licence files among its modules, of what it bundles, count besides.
    """
    site = next((place for place in path.parents if _distributions(place)), root)
    package, licence = _distributions(site).get(path.relative_to(site).as_posix(), ("", None))
    if licence is None:
        return package, None
    _, nearer = licence_of_tree(path.parent, site)
    return package, licence if nearer is None else f"({licence}) AND ({nearer})"


def licence_in_archive(path: Path, name: str) -> dict[str, str]:
    """Directories in an archive -> the licence their licence files state. Of a damaged one, what is whole."""
    texts: dict[str, list[str]] = {}
    try:
        for member in members(path, name, _refuse_all_but_licences, MAX_LICENCE_BYTES, share=0.5):
            if not isinstance(member, Dropped):
                directory = PurePosixPath(member[0]).parent.as_posix()
                texts.setdefault(directory, []).append(member[1].decode("utf-8", "replace"))
    except DataError:
        pass  # whoever reads its files will meet the damage in its place
    joined = {directory: _joined(found) for directory, found in texts.items()}
    return {directory: licence for directory, licence in joined.items() if licence is not None}


def licence_of_files(licences: Mapping[str, str], inside: str) -> str | None:
    """Of a file in an archive, by `licence_in_archive`."""
    above = (parent.as_posix() for parent in PurePosixPath(inside).parents)
    return next((licences[directory] for directory in above if directory in licences), None)


def _refuse_all_but_licences(inside: str) -> str | None:
    return None if is_licence_file(PurePosixPath(inside).name) else "no_licence"


@functools.lru_cache(maxsize=1 << 16)
def _stated_in(directory: Path) -> str | None:
    texts = []
    try:
        for path in sorted(directory.iterdir()):
            if is_licence_file(path.name) and path.is_file() and path.stat().st_size <= MAX_LICENCE_BYTES:
                texts.append(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return _joined(texts)


def _joined(texts: list[str]) -> str | None:
    found = [
        licence_of_text(text) or (UNKNOWN if len(text) > POINTER_CHARACTERS else None) for text in texts if text.strip()
    ]
    stated = [licence for licence in found if licence is not None]
    if not stated:
        return UNKNOWN if found else None
    return " AND ".join(f"({licence})" if " OR " in licence else licence for licence in dict.fromkeys(stated))


@functools.lru_cache(maxsize=1 << 12)
def _distributions(site: Path) -> dict[str, tuple[str, str | None]]:
    """Files below a site-packages directory -> (package, its licence), by the RECORD files."""
    files: dict[str, tuple[str, str | None]] = {}
    try:
        metadata = sorted(site.glob("*.dist-info/METADATA"))
    except OSError:
        return files
    for path in metadata:
        package = path.parent.name.removesuffix(".dist-info")
        licence = licence_of_metadata(path.read_text(encoding="utf-8", errors="replace"))
        if licence is None:
            licence = _stated_in(path.parent) or _stated_in(path.parent / "licenses")
        record = path.parent / "RECORD"
        if record.is_file():
            for row in csv.reader(io.StringIO(record.read_text(encoding="utf-8", errors="replace"))):
                if row:
                    files[row[0]] = (package, licence)
    return files
