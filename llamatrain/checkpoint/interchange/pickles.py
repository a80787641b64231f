"""Files of `torch.save` without running what stands in them, and such files tensor by tensor.

A pickle is a program; unpickling runs it. Here its opcodes are read (`pickletools`), and the few that a dictionary of
tensors needs are carried out on plain values. A global name is never looked up: it is one of those below or is refused
by name. A call makes a `Region` of the file, once its numbers fit the record that it points to.

The file (torch 1.6 and later) is a zip archive without compression: `NAME/data.pkl`, and `NAME/data/KEY` with the
bytes of each storage.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamatrain.checkpoint.interchange.source import Region, memory_of, refuse_what_is_no_file
from llamatrain.errors import CheckpointError

STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
}
ORDERED_DICT, REBUILD, PARAMETER = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)
# What the standard library raises on archives and opcodes that are not sound.
DAMAGED = (EOFError, ValueError, LookupError, TypeError, RuntimeError, struct.error)
ALLOWED = {*STORAGES, ORDERED_DICT, REBUILD, PARAMETER}
LARGEST_PICKLE = 4 << 20  # bytes of data.pkl; 65B has 100 kB. Read, empty dictionaries take 64 times their opcodes
LARGEST_DIRECTORY = 4 << 20  # bytes of a zip archive's directory; 65B has 60 kB
BEGIN_OF_ZIP, END_OF_ZIP, END_OF_ZIP64, LONGEST_COMMENT = b"PK\3\4", b"PK\5\6", b"PK\6\6", 65_535
ALIGNMENT = 64  # of a storage in the file, as torch has it


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    path: Path
    begin: int
    dtype: torch.dtype
    numbers: int


class _Mark:
    """Where a pickle's list of arguments begins, on the stack."""


# Opcodes that put something new on the stack, or what stands beside them in the pickle.
MADE: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _Mark,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
GIVEN = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")


# ---------------------------------------------------------------------- reading


def read_header(path: Path) -> dict[str, Region]:
    """Where each tensor of the dictionary in a file lies. Raises CheckpointError, naming what is refused.

    Only the archive's directory and data.pkl are read.
    """
    refuse_what_is_no_file(path)
    try:
        with open(path, "rb") as file:
            _check_directory(path, file)
            with zipfile.ZipFile(file) as archive:
                records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                info = records.get("data.pkl")
                if info is None:
                    raise CheckpointError(f"{path}: no file of torch.save (its archive has no data.pkl)")
                if info.file_size > LARGEST_PICKLE:
                    raise CheckpointError(f"{path}: data.pkl has {info.file_size} bytes, more than weights need")
                _check_byte_order(path, archive, records)
                if info.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path}: {info.filename} is compressed; torch.save does not do that")
                program = archive.read(info)

            def storage(dtype: torch.dtype, key: str, count: int) -> _Storage:
                begin, size = _place(path, file, records.get(f"data/{key}"), key)
                if not 0 <= count <= size // dtype.itemsize:
                    raise CheckpointError(
                        f"{path}: storage {key} is to hold {count} numbers, and its record has {size} bytes"
                    )
                return _Storage(path, begin, dtype, count)

            content = interpret(program, path, storage)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error})") from None
    except DAMAGED as error:
        raise CheckpointError(f"{path}: no file of torch.save that can be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: it holds no dictionary of tensors")
    for name, value in content.items():
        if not isinstance(value, Region):
            raise CheckpointError(f"{path}: {name} is no tensor; only a dictionary of tensors is read")
    return content


def _check_directory(path: Path, file: Any) -> None:
    """Refuse what is no zip archive, and one whose directory alone would take too much memory."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - LONGEST_COMMENT - 200))
    tail = file.read()
    end = tail.rfind(END_OF_ZIP)
    file.seek(0)
    if end < 0 and file.read(len(BEGIN_OF_ZIP)) in (BEGIN_OF_ZIP, b""):
        raise CheckpointError(f"{path}: truncated or damaged: it has {size} bytes and no end of an archive among them")
    if end < 0:
        raise CheckpointError(
            f"{path}: not a file of torch.save as torch 1.6 and later write it (a zip archive); where you trust it, "
            "load it with torch and save it again"
        )
    directory = int.from_bytes(tail[end + 12 : end + 16], "little")
    zip64 = tail.rfind(END_OF_ZIP64, 0, end)
    if directory == 0xFFFFFFFF or zip64 >= 0:
        directory = int.from_bytes(tail[zip64 + 40 : zip64 + 48], "little")
    if directory > min(LARGEST_DIRECTORY, size):
        raise CheckpointError(f"{path}: its archive's directory has {directory} bytes, more than weights need")


def _check_byte_order(path: Path, archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo]) -> None:
    info = records.get("byteorder")
    if info is not None and (info.file_size > 16 or archive.read(info) != b"little"):
        raise CheckpointError(f"{path}: its numbers are not little-endian")


def _place(path: Path, file: Any, info: zipfile.ZipInfo | None, key: str) -> tuple[int, int]:
    """Where in the file a record begins, and its bytes."""
    if info is None:
        raise CheckpointError(f"{path}: storage {key} is missing")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise CheckpointError(f"{path}: storage {key} is compressed; torch.save does not do that")
    file.seek(info.header_offset)
    local = file.read(30)
    begin = info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if local[:4] != BEGIN_OF_ZIP or begin + info.file_size > file.seek(0, io.SEEK_END):
        raise CheckpointError(f"{path}: storage {key} lies outside the file; it is truncated")
    return begin, info.file_size


def interpret(program: bytes, path: Path, storage: Callable[[torch.dtype, str, int], _Storage]) -> Any:
    """What a pickle of tensors says, tensors as regions. Raises CheckpointError for anything beyond that."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        values = []
        while (value := stack.pop()) is not _Mark:
            values.append(value)
        return values[::-1]

    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case name if name in MADE:
                stack.append(MADE[name]())
            case name if name in GIVEN:
                stack.append(argument)
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "SETITEM" | "SETITEMS":
                items = since_mark() if opcode.name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
                _set_items(stack[-1], items)
            case "APPEND" | "APPENDS":
                values = since_mark() if opcode.name == "APPENDS" else [stack.pop()]
                if not isinstance(stack[-1], list):
                    raise ValueError("something is appended to no list")
                stack[-1].extend(values)
            case "GLOBAL":
                stack.append(_allowed(path, str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_allowed(path, f"{module}.{name}" if {type(name), type(module)} == {str} else "?"))
            case "BINPERSID":
                stack.append(_stored(path, stack.pop(), storage))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_called(path, function, arguments))
            case "BUILD":  # the versions that a state_dict notes for its modules
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise ValueError("a state is given to what is no dictionary")
            case _:
                raise CheckpointError(
                    f"{path}: refused: its pickle has the opcode {opcode.name}, which no dictionary of tensors needs"
                )
    raise ValueError("its pickle does not end")


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
        raise ValueError("a dictionary whose keys are not texts")
    target.update(zip(items[::2], items[1::2], strict=True))


def _allowed(path: Path, name: str) -> _Global:
    if name not in ALLOWED:
        raise CheckpointError(
            f"{path}: refused: its pickle asks for {name}, and only tensors are read, as weights are made of nothing "
            "else; nothing of it was run"
        )
    return _Global(name)


def _stored(path: Path, described: Any, storage: Callable[[torch.dtype, str, int], _Storage]) -> _Storage:
    kind, of_type, key, _, count = described
    if kind != "storage" or not isinstance(of_type, _Global) or not isinstance(key, str) or type(count) is not int:
        raise ValueError("a storage that is not described as torch does")
    if of_type.name not in STORAGES:
        raise CheckpointError(f"{path}: refused: a storage of {of_type.name}; weights are of {', '.join(STORAGES)}")
    return storage(STORAGES[of_type.name], key, count)


def _called(path: Path, function: Any, arguments: Any) -> Any:
    """What a call of one of the allowed functions gives."""
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise ValueError("a call of what is no function")
    if function.name == ORDERED_DICT and not arguments:
        return {}
    if function.name == PARAMETER and isinstance(arguments[0], Region):
        return arguments[0]
    if function.name != REBUILD:
        raise CheckpointError(f"{path}: refused: a call of {function.name} with {len(arguments)} arguments")
    stored, offset, shape, stride = arguments[:4]
    numbers = (offset, *shape, *stride) if isinstance(shape, tuple) and isinstance(stride, tuple) else (None,)
    if (
        not isinstance(stored, _Storage)
        or not all(type(n) is int and 0 <= n < 2**62 for n in numbers)
        or len(shape) > 8
    ):
        raise ValueError("a tensor that is not described as torch does")
    if len(stride) != len(shape) or any(
        n > 1 and step != prod(shape[i + 1 :]) for i, (n, step) in enumerate(zip(shape, stride, strict=True))
    ):
        raise CheckpointError(
            f"{path}: a tensor of shape {list(shape)} has strides {list(stride)}, with gaps or turned"
        )
    if offset + prod(shape) > stored.numbers:
        raise CheckpointError(
            f"{path}: a tensor of shape {list(shape)} is to begin at {offset} of a storage of {stored.numbers} numbers"
        )
    return Region(stored.path, stored.begin + offset * stored.dtype.itemsize, stored.dtype, shape)


# ---------------------------------------------------------------------- writing


class _Placeholder:
    """Stands for a tensor, and for its storage, in the pickle."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.key, self.dtype, self.shape = key, dtype, shape


class _Pickler(pickle.Pickler):
    """Writes placeholders as torch.save writes tensors."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Placeholder):
            return NotImplemented
        stride = tuple(prod(value.shape[i + 1 :]) for i in range(len(value.shape)))
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, ((value,), 0, value.shape, stride, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not (isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], _Placeholder)):
            return None
        (tensor,) = value
        types = {dtype: name.removeprefix("torch.") for name, dtype in STORAGES.items()}
        return "storage", getattr(torch, types[tensor.dtype]), tensor.key, "cpu", prod(tensor.shape)


class Writer:
    """A file that `torch.load` reads as a dictionary of tensors, which come one at a time in the order described."""

    def __init__(self, path: Path, described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._described = {
            name: _Placeholder(str(i), dtype, shape) for i, (name, (dtype, shape)) in enumerate(described.items())
        }
        self._left = list(self._described)
        self._open = ExitStack()
        self._file = self._open.enter_context(path.open("wb"))
        self._archive = self._open.enter_context(zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED))
        program = io.BytesIO()
        _Pickler(program, protocol=2).dump(self._described)
        for name, content in (("data.pkl", program.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            self._write(name, memoryview(content))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def add(self, name: str, tensor: Tensor) -> None:
        """The next tensor."""
        wanted = self._described[name]
        if self._left.pop(0) != name or tensor.dtype != wanted.dtype or tuple(tensor.shape) != wanted.shape:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not the tensor that comes next")
        self._write(f"data/{wanted.key}", memory_of(tensor.contiguous()))

    def _write(self, name: str, content: memoryview) -> None:
        info = zipfile.ZipInfo(f"archive/{name}")
        large = content.nbytes >= 1 << 31
        before = self._file.tell() + 30 + len(info.filename) + (20 if large else 0) + 4
        padding = -before % ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        with self._archive.open(info, "w", force_zip64=large) as record:
            record.write(content)
