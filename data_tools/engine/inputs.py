"""Which input files are read, in which groups copies are looked for, and how the files are cut into units."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from data_tools.dedup.levels import DedupSettings
from data_tools.documents import InputFile, find_files, input_list
from data_tools.engine.components import Reader
from data_tools.engine.settings import PrepareSettings
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import write_json_atomically

ROWS_FILE = "rows.json"
# What a preparation writes to, by its stages
DIRECTORIES = frozenset({"clean", "hash", "mark", "filter", "sketch", "near", "select", "documents", "shards"})


def input_files(settings: PrepareSettings, reader: Reader) -> list[InputFile]:
    """Those that the reader reads. Raises ConfigError and DataError."""
    inputs, suffixes = input_list(settings.input), reader.suffixes
    check_output(settings.output, inputs)
    found = find_files(inputs)
    _check_places(settings.output, found)
    files = [file for file in found if not suffixes or file.name.endswith(suffixes)]
    if not files:
        raise DataError(
            f"input={','.join(inputs)}: reader={settings.reader} reads {', '.join(suffixes)}; none is there"
        )
    if len(files) < len(found):
        left_out = sorted({Path(file.name).suffix or file.name for file in found if file not in set(files)})
        print(f"{len(found) - len(files)} files left out, not {', '.join(suffixes)}: {', '.join(left_out)[:200]}")
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"input: two files are named {twice}, and documents' ids would be equal; name a common folder")
    return files if settings.largest is None else _largest(files, reader, settings)


def check_output(output: str, inputs: Sequence[str]) -> None:
    """That nothing written to the output would be read as input. Raises ConfigError."""
    place = Path(output).resolve()
    for text in inputs:
        pattern, parts = Path(text), Path(text).parts
        fixed = Path(*parts[: parts.index("**")]) if "**" in parts else pattern  # all below it is looked at
        if fixed.is_dir() and fixed.resolve() in (place, *place.parents):
            where = "is" if fixed.resolve() == place else "lies in"
            raise ConfigError(
                f"output={output}: {where} input={text}, and what is written there would be read as input by the next "
                "start; give a directory outside of it"
            )


def _check_places(output: str, files: Sequence[InputFile]) -> None:
    """That no output would be put among the input files, or takes the place of one. Raises ConfigError."""
    place = Path(output).resolve()
    for folder in {file.path.parent for file in files}:
        there = folder.resolve()
        if there == place:
            raise ConfigError(f"output={output}: is the directory of input files; give one of its own")
        if place in there.parents and there.relative_to(place).parts[0] in DIRECTORIES:
            raise ConfigError(f"output={output}: the input is what a preparation wrote there; give another output")


def _largest(files: list[InputFile], reader: Reader, settings: PrepareSettings) -> list[InputFile]:
    """Those with the most rows, in the order of their names. They are counted once, and noted in the output."""
    if reader.count_rows is None:
        raise ConfigError(f"largest={settings.largest}: reader={settings.reader} cannot count rows; largest=null")
    if len(files) <= (settings.largest or 0):
        return files
    path = Path(settings.output) / ROWS_FILE
    known: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    counted = {}
    for file in files:
        size, rows = known.get(file.name, (None, 0))
        counted[file.name] = [file.size, rows if size == file.size else reader.count_rows(file.path)]
    if counted != known:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(path, counted)
    ranked = sorted(files, key=lambda file: (-counted[file.name][1], file.name))[: settings.largest]
    print(f"largest={settings.largest}: {len(files) - len(ranked)} files with fewer rows are left out, see {path}")
    return [file for file in files if file in ranked]


def groups_of(files: Sequence[InputFile], settings: DedupSettings) -> list[list[int]]:
    """The input files of each group, as numbers."""
    numbers = list(range(len(files)))
    if settings.level == "none" or settings.scope == "all":
        return [numbers]
    if settings.scope == "files":
        return [numbers[start : start + settings.scope_files] for start in range(0, len(files), settings.scope_files)]
    groups: dict[str, list[int]] = {}
    for number, file in enumerate(files):
        found = re.search(settings.dump_pattern, file.name) or re.search(settings.dump_pattern, str(file.path))
        if found is None:
            raise ConfigError(
                f"dedup.scope=dump: {file.name} does not tell its dump; set dedup.dump_pattern, or dedup.scope=all"
            )
        groups.setdefault(found.group(), []).append(number)
    return list(groups.values())


def by_bytes(files: Sequence[InputFile], group: Sequence[int], unit_bytes: int) -> list[list[int]]:
    """The files of a group in units of so many bytes, in their order."""
    units: list[list[int]] = []
    size = 0
    for number in group:
        if not units or size + files[number].size > unit_bytes:
            units.append([])
            size = 0
        units[-1].append(number)
        size += files[number].size
    return units
