"""What every form is read as, and regions of files that hold a tensor.

What comes from elsewhere is distrusted: a `Region` is made only of numbers that were compared with the file's size, so
a file asks for no more memory than it is long.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamatrain.arithmetic import parameter_shapes
from llamatrain.config.model import ModelConfig, check_model
from llamatrain.errors import CheckpointError, ConfigError

log = logging.getLogger("llamatrain")

LARGEST_JSON = 8 << 20  # bytes; an index of 65B has 60 kB. Parsed, empty lists take thirty times their text
LARGEST_SIZE = 2**40  # of a model's numbers: beyond, products of them would be of no use in messages


@dataclass(frozen=True)
class Region:
    """A tensor in a file, row by row without gaps."""

    path: Path
    begin: int  # bytes from the file's start
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.begin)
            memory, filled = memory_of(tensor), 0
            while filled < len(memory):
                count = file.readinto(memory[filled:])
                if not count:
                    raise CheckpointError(f"{self.path}: it became shorter while it was read")
                filled += count
        return tensor


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def check_regions(regions: Mapping[str, Region]) -> None:
    """Refuse tensors that overlap in a file; the same region under two names is a tied weight. Raises CheckpointError.

    Each lies within its file by how it was made.
    """
    placed = sorted(regions.items(), key=lambda item: (str(item[1].path), item[1].begin, item[1].bytes))
    for (name, one), (other_name, other) in pairwise(placed):
        if one.path == other.path and one.begin + one.bytes > other.begin and one != other:
            raise CheckpointError(f"{one.path}: {name} and {other_name} overlap")


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """The weights of a model, from wherever, and the tokenizer it was trained with."""

    path: Path
    model: ModelConfig
    tokenizer: Path | None  # a SentencePiece model, if one was found
    origin: Mapping[str, Any]  # what identifies the weights, plain JSON values
    tokens: int = 0  # that the weights were trained on, as far as is known

    @abstractmethod
    def dtype_of(self, name: str) -> torch.dtype:
        """Of a parameter, as it is stored."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One parameter, whole, by this program's name and in its layout. Raises CheckpointError."""

    def verify_hashes(self) -> None:
        """Compare the files with the hashes that are known of them; most forms have none. Raises CheckpointError."""
        return None


@dataclass(frozen=True)
class Cast:
    """A source's tensors in the dtype to be written; tells of numbers that no model has."""

    source: Source
    dtype: torch.dtype | None = None  # None: as they are stored

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype or self.source.dtype_of(name)

    def read(self, name: str) -> Tensor:
        """Raises CheckpointError if a number does not fit the dtype."""
        tensor = self.source.read(name)
        if not tensor.numel():
            return tensor.to(self.dtype_of(name))
        low, high = (value.item() for value in tensor.aminmax())
        largest = torch.finfo(self.dtype_of(name)).max
        if not (-float("inf") < low and high < float("inf")):
            log.warning("%s: %s holds numbers that are not finite", self.source.path, name)
            low, high = (value.item() for value in tensor.nan_to_num(0.0, 0.0, 0.0).aminmax())
        if max(-low, high) > largest:
            raise CheckpointError(
                f"{self.source.path}: {name} holds {max(-low, high):.4g}, beyond the {largest:.4g} of "
                f"{str(self.dtype_of(name)).removeprefix('torch.')}; choose dtype=bf16 or dtype=fp32"
            )
        return tensor.to(self.dtype_of(name))


def checked_model(config: ModelConfig, where: Path, *, tensors: int) -> ModelConfig:
    """The shape that a file describes, if such a model can be. Raises CheckpointError naming the file.

    `tensors` is how many there are: more layers than that are not counted out.
    """
    try:
        for name in ("dim", "n_layers", "n_heads", "kv_heads", "ffn_width", "vocab_size", "max_seq_len"):
            if not 0 < getattr(config, name) <= LARGEST_SIZE:
                raise ConfigError(f"{name} is {getattr(config, name)}")
        check_model(config)
        if config.n_layers > tensors:
            raise ConfigError(f"{config.n_layers} layers, and weights of {tensors} tensors")
    except ConfigError as error:
        raise CheckpointError(f"{where}: it describes no model that can be built ({error})") from None
    return config


def check_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Refuse tensors that are not exactly those wanted. Raises CheckpointError naming one."""
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        problem = f"{missing[0]} is missing" if missing else f"{unknown[0]} is no part of such a model"
        raise CheckpointError(f"{where}: the weights are not those of the model described there: {problem}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(f"{where}: {name} is {list(found[name])}, and {list(shape)} in the model described")


def refuse_what_is_no_file(path: Path) -> None:
    """Raises CheckpointError for a path where nothing is, or a pipe say, which would be waited for."""
    try:
        is_file = path.is_file()
    except OSError:  # a name that is too long
        is_file = False
    if not is_file:
        raise CheckpointError(f"{path}: there is no such file")


def shown(value: Any) -> str:
    """A value of a JSON file, for a message."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file of reasonable size. Raises CheckpointError."""
    refuse_what_is_no_file(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path}: it has {path.stat().st_size} bytes, more than such a file needs")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: it is no JSON object")
    return content


def number(content: Mapping[str, Any], key: str, where: Path, default: float | None = None) -> float:
    """A positive finite number of a JSON object. Raises CheckpointError naming the key."""
    value: Any = content.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < 1e15:
        raise CheckpointError(f"{where}: {key} is {shown(value)}, and must be a number above 0")
    return float(value)


def whole(content: Mapping[str, Any], key: str, where: Path, default: int | None = None) -> int:
    """A positive whole number of a JSON object. Raises CheckpointError naming the key."""
    value = number(content, key, where, default)
    if value != int(value) or value > LARGEST_SIZE:
        raise CheckpointError(f"{where}: {key} is {shown(value)}, and must be a whole number up to {LARGEST_SIZE}")
    return int(value)


def in_files(names: Iterable[tuple[str, int]], largest: int) -> Iterator[list[str]]:
    """Names with their bytes, in order, by files of at most `largest` bytes; a tensor alone may be larger."""
    file: list[str] = []
    taken = 0
    for name, size in names:
        if file and taken + size > largest:
            yield file
            file, taken = [], 0
        file.append(name)
        taken += size
    yield file


def parameter_bytes(weights: Cast) -> dict[str, int]:
    """Bytes of each parameter as it is written, in the order of the model."""
    shapes = parameter_shapes(weights.source.model)
    return {name: prod(shape) * weights.dtype_of(name).itemsize for name, shape in shapes.items()}


def counted(tensors: Iterable[Tensor], told: Callable[[int], None]) -> Iterator[Tensor]:
    """The tensors; `told` hears the bytes of each once it was taken care of."""
    for tensor in tensors:
        yield tensor
        told(tensor.nbytes)
