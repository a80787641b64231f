"""Readers and filters by their names.

A reader is a module of data_tools.sources with `read(path, name, settings)`, a filter a module of data_tools.filters
with one function `…_filter(settings)`; what settings they take, the type of that argument says. A name with a dot is
that of a module of one's own.
"""

import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data_tools.records import Dropped, Record
from llamatrain.config.build import build
from llamatrain.errors import ConfigError

Filter = Callable[[Record], Record | Dropped]


@dataclass(frozen=True)
class Reader:
    read: Callable[[Path, str], Iterator[Record | Dropped]]
    settings: Any
    suffixes: tuple[str, ...]  # of the files it reads; none: of all files
    count_rows: Callable[[Path], int] | None = None  # how large a file is, for `largest`


@dataclass(frozen=True)
class FilterMaker:
    make: Callable[[], Filter]  # loads models, so once in a process
    settings: Any


def reader_of(name: str, values: Mapping[str, Any]) -> Reader:
    """Raises ConfigError."""
    module = _module("reader", "sources", name)
    function: Any = getattr(module, "read", None)
    if function is None:
        raise ConfigError(f"reader={name}: the module has no function read(path, name, settings)")
    settings = _settings(function, values, "read")
    suffixes = tuple(getattr(module, "SUFFIXES", ()))
    count_rows = getattr(module, "count_rows", None)
    return Reader(lambda path, name: function(path, name, settings), settings, suffixes, count_rows)


def filter_of(name: str, values: Mapping[str, Any]) -> FilterMaker:
    """Raises ConfigError."""
    module = _module("filters", "filters", name)
    made_here = [
        function
        for function_name, function in vars(module).items()
        if function_name.endswith("_filter") and not function_name.startswith("_") and inspect.isfunction(function)
        if function.__module__ == module.__name__
    ]
    if len(made_here) != 1:
        raise ConfigError(f"{name}: a filter's module needs one function …_filter(settings), and has {len(made_here)}")
    function: Any = made_here[0]
    settings = _settings(function, values, f"filters.{name}")
    return FilterMaker(lambda: function(settings), settings)


def _module(setting: str, package: str, name: str) -> ModuleType:
    path = name if "." in name else f"data_tools.{package}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
            raise ConfigError(f"{setting}: {name} needs {error.name}: pip install 'llamatrain[data]'") from None
    folder = Path(__file__).parent.parent / package
    entry = "\ndef read(" if package == "sources" else "_filter(settings"
    known = ", ".join(sorted(file.stem for file in folder.glob("*.py") if entry in file.read_text(encoding="utf-8")))
    raise ConfigError(f"{setting}: there is no {name}; choose of {known}, or give the dotted name of a module")


def _settings(function: Any, values: Mapping[str, Any], where: str) -> Any:
    kinds = typing.get_type_hints(function)
    if "settings" not in kinds:
        raise ConfigError(f"{where}: {function.__qualname__} has no argument settings with a type")
    try:
        return build(kinds["settings"], values)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None
