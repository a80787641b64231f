"""Files of torch.save: nothing in them runs, and none asks for more memory than it is long."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatrain.checkpoint.interchange import pickles
from llamatrain.errors import CheckpointError


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def archive_with(path: Path, program: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


def test_a_pickle_that_runs_a_command_is_refused_by_name(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"tok_embeddings.weight": Evil(ran)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"asks for (posix|os)\.system.*nothing of it was run"):
        pickles.read_header(tmp_path / "evil.pth")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("program", "refusal"),
    [
        (b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.", r"builtins\.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"os\.system"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor\n.", r"torch\._utils\._rebuild_tensor,"),
        (b"\x80\x02ctorch\nload\n.", r"torch\.load"),
        (b"(cos\nsystem\nX\x01\x00\x00\x00xo.", r"os\.system"),
        (b"(S'x'\nios\nsystem\n.", "opcode"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "a call of collections.OrderedDict"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "no dictionary"),
        (b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read|opcode|can be read"),
        (b"\x80\x02" + b")" + b"\x85" * 2_000 + b".", "no dictionary"),
        (b"\x80\x02}", "can be read"),
        (b"0.", "can be read|opcode"),
        (b"", "can be read"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path: Path, program: bytes, refusal: str) -> None:
    with pytest.raises(CheckpointError, match=refusal):
        pickles.read_header(archive_with(tmp_path / "file.pth", program))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A place for files, and the content of one that is sound."""
    path = tmp_path_factory.mktemp("damaged") / "file.pth"
    torch.save({"a": torch.ones(3, 4), "b": torch.ones(2).half()}, path)
    return path, path.read_bytes()


@settings(max_examples=100)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_and_nothing_else(saved: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = saved[0], bytearray(saved[1])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([None, None, -1, -300, 700]))])
    try:
        for region in pickles.read_header(path).values():
            assert region.bytes <= len(content)
            region.read()
    except CheckpointError:
        pass


class Huge:
    """A tensor of `shape` in a storage said to hold `count` numbers."""

    def __init__(self, shape: tuple[int, ...], count: int) -> None:
        self.shape, self.count = shape, count


def test_a_few_bytes_that_ask_for_terabytes_are_refused(tmp_path: Path) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", value.count) if isinstance(value, Huge) else None

        def reducer_override(self, value: Any) -> Any:
            return NotImplemented

    for shape, count, said in (
        ((2**40,), 2**40, "is to hold"),
        ((2**40,), 4, "is to begin at 0"),
        ((2**61, 8), 4, "begin"),
    ):
        strides = tuple(8 if i + 1 < len(shape) else 1 for i in range(len(shape)))

        class Tensorlike:
            def __reduce__(self, shape: Any = shape, count: int = count, strides: Any = strides) -> Any:
                return torch._utils._rebuild_tensor_v2, (Huge(shape, count), 0, shape, strides, False, None)

        with open(tmp_path / "program", "wb") as file:
            Pickler(file, protocol=2).dump({"tok_embeddings.weight": Tensorlike()})
        path = archive_with(tmp_path / "file.pth", (tmp_path / "program").read_bytes(), {"data/0": b"\0" * 16})
        with pytest.raises(CheckpointError, match=said):
            pickles.read_header(path)


def test_strange_tensors_and_archives_are_refused(tmp_path: Path) -> None:
    cases: dict[str, tuple[Any, str]] = {
        "turned": ({"a": torch.ones(3, 4).t()}, "gaps or turned"),
        "double": ({"a": torch.ones(3).double()}, r"torch\.DoubleStorage"),
        "nested": ({"a": {"b": torch.ones(3)}}, "a is no tensor"),
        "list": ([torch.ones(3)], "no dictionary of tensors"),
    }
    for name, (content, refusal) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=refusal):
            pickles.read_header(tmp_path / name)
    torch.save({"a": torch.ones(3)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"not a file of torch\.save as torch 1\.6"):
        pickles.read_header(tmp_path / "old")
    with zipfile.ZipFile(tmp_path / "squeezed", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(CheckpointError, match="compressed"):
        pickles.read_header(tmp_path / "squeezed")


@pytest.mark.parametrize("kept", [0, 700, -1, -100, -600])
def test_a_file_that_was_cut_short_is_said_to_be(tmp_path: Path, kept: int) -> None:
    torch.save({"a": torch.ones(300)}, tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        pickles.read_header(tmp_path / "file")


def test_a_pickle_of_many_marks_is_read_in_time_that_grows_with_it(tmp_path: Path) -> None:
    program = b"\x80\x02" + b"N" * 100_000 + b"(t" * 100_000 + b"."
    with pytest.raises(CheckpointError, match="no dictionary"):
        pickles.read_header(archive_with(tmp_path / "file.pth", program))


def test_a_pickle_larger_than_any_of_weights_is_not_read(tmp_path: Path) -> None:
    path = archive_with(tmp_path / "file.pth", b"\x80\x02" + b"}" * (5 << 20) + b".")
    with pytest.raises(CheckpointError, match="more than weights need"):
        pickles.read_header(path)


def test_views_and_parameters_are_read_from_where_they_lie(tmp_path: Path) -> None:
    whole = torch.arange(20.0)
    torch.save({"a": whole[8:12].view(2, 2), "b": torch.nn.Parameter(whole[12:])}, tmp_path / "file")
    found = pickles.read_header(tmp_path / "file")
    assert found["a"].read().tolist() == [[8, 9], [10, 11]] and found["b"].read().tolist() == whole[12:].tolist()
