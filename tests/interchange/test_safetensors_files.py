"""Headers of safetensors files are believed only where they fit the file."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from llamatrain.checkpoint.interchange import safetensors_files
from llamatrain.errors import CheckpointError


def safetensors_of(header: Any, body: int = 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * body


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        (b"", "cannot be read"),
        (safetensors_of({}, length=2**63), "a header of 9223372036854775808 bytes"),
        (safetensors_of({}, length=99_999_999), "a header of 99999999 bytes"),
        (safetensors_of(b"[]"), "no JSON object"),
        (safetensors_of(b"{\xff"), "header cannot be read"),
        (safetensors_of(b'{"a": 1, "a": 2}'), "stands there twice"),
        (safetensors_of(b"[" * 100_000), "header cannot be read"),
        (safetensors_of({"a": entry(0, 2**42, [2**40])}), "truncated|describes"),
        (safetensors_of({"a": entry(0, 16, [2**40])}), "has 16 bytes"),
        (safetensors_of({"a": entry(0, 16, [4]), "b": entry(0, 16, [4])}), "b begins at byte"),
        (safetensors_of({"a": entry(0, 8, [2]), "b": entry(4, 16, [3])}), "b begins at byte"),
        (safetensors_of({"a": entry(4, 16, [3])}), "a begins at byte"),
        (safetensors_of({"a": entry(0, 8, [2])}), "truncated or padded"),
        (safetensors_of({"a": entry(0, 16, [-4])}), "does not describe a"),
        (safetensors_of({"a": entry(0, 16, [2, 8], "I8")}), "a is of dtype I8"),
        (safetensors_of({"a": {"dtype": "F32"}}), "does not describe a"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path: Path, content: bytes, refusal: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=refusal):
        safetensors_files.read_header(tmp_path / "model.safetensors")
