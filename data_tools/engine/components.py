"""Readers and filters by their names.

A reader is a module of data_tools.sources with `read(path, name, settings)`, a filter a module of data_tools.filters
with one function `…_filter(settings)`; what settings they take, the type of that argument says. Any other name is that
of a module of one's own on the Python path. A filter that needs what others find out names them in `COMES_AFTER`.
"""

import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    checks: tuple[Callable[[Any], None], ...] = ()  # of the settings; raise ConfigError


@dataclass(frozen=True)
class FilterMaker:
    make: Callable[[], Filter]  # loads models, so once in a process
    settings: Any
    comes_after: tuple[str, ...] = ()  # filters that must not stand behind it


def reader_of(name: str, values: Mapping[str, Any]) -> Reader:
    """Raises ConfigError."""
    module = _module("reader", "sources", name)
    function: Any = getattr(module, "read", None)
    if function is None:
        raise ConfigError(f"reader={name}: the module has no function read(path, name, settings)")
    try:
        settings = _settings(function, values, "read")
    except ConfigError as error:
        if module.__name__.startswith("data_tools."):
            raise
        hint = "; if it is one of the preset's, for its own reader: source=own brings no settings of another reader"
        raise ConfigError(f"{error}{hint}") from None
    suffixes = tuple(getattr(module, "SUFFIXES", ()))
    count_rows = getattr(module, "count_rows", None)
    checks = tuple(
        found
        for called, found in vars(module).items()
        if called.startswith("check_") and called.endswith("settings") and found.__module__ == module.__name__
    )
    return Reader(lambda path, name: function(path, name, settings), settings, suffixes, count_rows, checks)


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
    return FilterMaker(lambda: function(settings), settings, tuple(getattr(module, "COMES_AFTER", ())))


def values_by_name(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Settings of filters with those of dotted names under the whole name: the command line nests them at each dot."""
    found = dict(values)
    for name in (name for name in names if "." in name and name not in values):
        inner: Any = values
        for part in name.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if inner is not None:
            found.pop(name.partition(".")[0], None)
            found[name] = inner
    return found


def _module(setting: str, package: str, name: str) -> ModuleType:
    for path in [name] if "." in name else [f"data_tools.{package}.{name}", name]:
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
                raise ConfigError(f"{setting}: {name} needs {error.name}: pip install 'llamatrain[data]'") from None
    folder = Path(__file__).parent.parent / package
    entry = "\ndef read(" if package == "sources" else "_filter(settings"
    known = ", ".join(sorted(file.stem for file in folder.glob("*.py") if entry in file.read_text(encoding="utf-8")))
    raise ConfigError(f"{setting}: there is no {name}; choose of {known}, or name a module on the Python path")


def _settings(function: Any, values: Mapping[str, Any], where: str) -> Any:
    kinds = typing.get_type_hints(function)
    if "settings" not in kinds:
        raise ConfigError(f"{where}: {function.__qualname__} has no argument settings with a type")
    try:
        return build(kinds["settings"], values)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None
