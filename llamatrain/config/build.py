"""Plain values (from YAML, JSON or the command line) into the configuration's dataclasses, strictly.

Unknown keys are refused with the nearest valid one and ill-typed values by name, whoever wrote them: a YAML
file, an override, or the configuration inside a checkpoint.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from llamatrain.errors import ConfigError

T = TypeVar("T")


def build(schema: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the dataclass `schema` from nested plain values. Raises ConfigError naming the key."""
    built: T = _build_dataclass(schema, values, "", known_keys(schema))
    return built


def plain(instance: Any) -> dict[str, Any]:
    """The inverse of `build`: nested plain values."""

    def named(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {_key(name): value for name, value in fields}

    return dataclasses.asdict(instance, dict_factory=named)


def _key(name: str) -> str:
    """A field's key: `from_`, since `from` is a word of Python's own, is typed and written `from`."""
    return name.removesuffix("_")


def known_keys(schema: Any, prefix: str = "") -> list[str]:
    """Every key of a dataclass, nested ones with dots; the entries of a mapping stand under `NAME`."""
    keys = []
    for name, kind in ((_key(name), kind) for name, kind in typing.get_type_hints(schema).items()):
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += known_keys(kind, f"{prefix}{name}.")
        elif typing.get_origin(kind) is list and dataclasses.is_dataclass(typing.get_args(kind)[0]):
            keys += known_keys(typing.get_args(kind)[0], f"{prefix}{name}.")
        elif typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
            keys += known_keys(typing.get_args(kind)[1], f"{prefix}{name}.NAME.")
    return keys


def text_keys(schema: Any) -> set[str]:
    """The keys of a dataclass, not nested ones, whose values are texts."""
    hints = typing.get_type_hints(schema).items()
    return {name for name, kind in hints if kind is str or str in typing.get_args(kind)}


def _build_dataclass(schema: Any, values: Any, path: str, known: list[str]) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path[:-1]}={values!r}: this is a group of settings, give one of its keys a value")
    fields = {_key(name): (name, kind) for name, kind in typing.get_type_hints(schema).items()}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{path}{key}: there is no such setting{_nearest(f'{path}{key}', known)}")
    named = ((*fields[key], key, value) for key, value in values.items())
    return schema(**{name: _convert(kind, value, f"{path}{key}", known) for name, kind, key, value in named})


def _nearest(key: str, known: list[str]) -> str:
    same_leaf = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    others = [k for k in known if not key.startswith(f"{k}.")]
    matches = same_leaf or _beside(key, others) or difflib.get_close_matches(key, others, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _beside(key: str, known: list[str]) -> list[str]:
    """The key of the same group nearest to the one typed, or of which a word is: `prize` to `price_per_gpu_hour`."""
    group, _, leaf = key.rpartition(".")
    leaves = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group}
    words = {word: k for name, k in reversed(leaves.items()) for word in name.split("_")}
    for candidates in (leaves, words):
        if near := difflib.get_close_matches(leaf, candidates, n=1, cutoff=0.7):
            return [candidates[near[0]]]
    return []


def _convert(kind: Any, value: Any, path: str, known: list[str]) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, f"{path}.", known)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        lists = [argument for argument in arguments if typing.get_origin(argument) is list]
        return _convert(lists[0] if lists and isinstance(value, list) else arguments[0], value, path, known)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r}: must be a mapping from names to settings")
        template_path = f"{path}.NAME"
        if dataclasses.is_dataclass(arguments[1]):
            _refuse_scalar_entries(value, path, template_path)
        return {str(name): _convert(arguments[1], v, f"{path}.{name}", known) for name, v in value.items()}
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={value!r}: must be a list, like {path}=[a,b]")
        return [_convert(arguments[0], v, path, known) for v in value]
    return _convert_scalar(kind, value, path)


def _refuse_scalar_entries(value: Mapping[str, Any], path: str, template_path: str) -> None:
    for name, entry in value.items():
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{path}.{name}={entry!r}: settings stand one level deeper, as in {template_path}.…=…")


def _convert_scalar(kind: type, value: Any, path: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}={value}: must be finite")
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
        return int(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{path}: a whole number of so many digits is no number to compute with") from None
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise ConfigError(f"{path}={value!r}: must be {names[kind]}")
