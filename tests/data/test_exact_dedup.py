"""Exact deduplication against the plain way with a set and a dictionary, and its memory, measured."""

import io
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.dedup.exact import BYTES_PER_ITEM, HashFile, HashWriter, KeepMask, mark_partition
from llamatrain.errors import DataError

MIB = 1 << 20


def deduplicated(
    units: list[list[int]], directory: Path, *, policy: str, partitions: int, memory_bytes: int
) -> list[list[bool]]:
    """The keep-masks of the units, by way of the files."""
    sources = []
    for number, hashes in enumerate(units):
        with open(directory / f"{number}.hashes", "wb") as file:
            writer = HashWriter(file, memory_bytes=memory_bytes)
            for start in range(0, len(hashes), 7):  # as many small documents would
                writer.add(np.array(hashes[start : start + 7], np.uint64))
            writer.finish()
        sources.append(HashFile(directory / f"{number}.hashes"))
    marks = [directory / f"{number}.marks" for number in range(partitions)]
    for number, path in enumerate(marks):
        with open(path, "wb") as file:
            mark_partition(
                sources, file, partition=number, partitions=partitions, policy=policy, memory_bytes=memory_bytes
            )
    masks = []
    for number, (source, hashes) in enumerate(zip(sources, units, strict=True)):
        mask = KeepMask(source, marks=marks, number=number, policy=policy)
        bits = [bool(bit) for start in range(0, len(hashes), 5) for bit in mask.take(len(hashes[start : start + 5]))]
        mask.finish()
        masks.append(bits)
    return masks


def by_hand(units: list[list[int]], *, policy: str) -> list[list[bool]]:
    counts = Counter(item for unit in units for item in unit)
    if policy == "drop_all":
        return [[counts[item] == 1 for item in unit] for unit in units]
    seen: set[int] = set()
    return [[not (item in seen or seen.add(item)) for item in unit] for unit in units]  # type: ignore[func-returns-value]


EDGES = [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]


@pytest.mark.parametrize("policy", ["drop_all", "keep_first"])
@settings(max_examples=40, deadline=None)
@given(
    units=st.lists(st.lists(st.sampled_from(EDGES) | st.integers(0, 2**64 - 1), max_size=40), max_size=5),
    partitions=st.integers(1, 5),
    items=st.integers(1, 30),
)
def test_masks_are_those_of_a_dictionary_whatever_the_partitions_and_the_memory(
    tmp_path_factory: pytest.TempPathFactory, policy: str, units: list[list[int]], partitions: int, items: int
) -> None:
    found = deduplicated(
        units,
        tmp_path_factory.mktemp("dedup"),
        policy=policy,
        partitions=partitions,
        memory_bytes=items * BYTES_PER_ITEM,
    )
    assert found == by_hand(units, policy=policy)


def test_one_line_on_every_page_is_one_hash_a_run_and_fills_no_partition(tmp_path: Path) -> None:
    file = io.BytesIO()
    writer = HashWriter(file, memory_bytes=1000 * BYTES_PER_ITEM)
    writer.add(np.full(10_000, 5, np.uint64))
    assert writer.finish() == {"items": 10_000, "distinct_in_runs": 10, "runs": 10}


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    units = [[number, number + 1] for number in range(100)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        found = deduplicated(units, tmp_path, policy="keep_first", partitions=60, memory_bytes=MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == by_hand(units, policy="keep_first")


@pytest.mark.parametrize("cut", [1, 8, 16, 100])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "hashes"
    with open(path, "wb") as file:
        writer = HashWriter(file, memory_bytes=MIB)
        writer.add(np.arange(1000, dtype=np.uint64))
        writer.finish()
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match="cut short or damaged"):
        HashFile(path)


def test_documents_that_changed_since_the_hashes_were_made_are_noticed(tmp_path: Path) -> None:
    path, marks = tmp_path / "hashes", tmp_path / "marks"
    with open(path, "wb") as file:
        writer = HashWriter(file, memory_bytes=MIB)
        writer.add(np.arange(10, dtype=np.uint64))
        writer.finish()
    source = HashFile(path)
    with open(marks, "wb") as file:
        mark_partition([source], file, partition=0, partitions=1, policy="drop_all", memory_bytes=MIB)
    mask = KeepMask(source, marks=[marks], number=0, policy="drop_all")
    with pytest.raises(DataError, match="fewer items"):
        mask.take(11)
    mask = KeepMask(source, marks=[marks], number=0, policy="drop_all")
    assert mask.take(9).all()
    with pytest.raises(DataError, match="more items"):
        mask.finish()


# A million lines in a process of its own, whose memory is read before and after.
MILLION = """
import json, re, sys
import numpy as np
import xxhash
from pathlib import Path
from data_tools.dedup.exact import HashFile, HashWriter, KeepMask, mark_partition
directory, memory_bytes, policy = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
hash_of = xxhash.xxh3_64_intdigest
np.argsort(np.arange(1 << 16, dtype=np.uint64)[::-1], kind="stable")  # what numpy needs itself
def peak():  # not getrusage: its ru_maxrss begins with what the parent process had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
files = []
for unit in range(4):
    path = directory / f"{unit}.hashes"
    with open(directory / f"{unit}.txt") as texts, open(path, "wb") as file:
        writer = HashWriter(file, memory_bytes=memory_bytes)
        while text := texts.read(1 << 16):
            lines = (text + texts.readline()).splitlines()
            writer.add(np.fromiter((hash_of(line.encode()) for line in lines), np.uint64, len(lines)))
        writer.finish()
    files.append(HashFile(path))
marks = [directory / f"{p}.marks" for p in range(2)]
ranges = 0
for number, path in enumerate(marks):
    with open(path, "wb") as file:
        ranges += mark_partition(
            files, file, partition=number, partitions=2, policy=policy, memory_bytes=memory_bytes
        )["ranges"]
runs = sum(len(source.runs) for source in files)
for unit, source in enumerate(files):
    mask = KeepMask(source, marks=marks, number=unit, policy=policy)
    with open(directory / f"{unit}.kept", "wb") as file:
        for _ in range(25):
            file.write(mask.take(10_000).tobytes())
    mask.finish()
print(json.dumps({"grown": peak() - before, "ranges": ranges, "runs": runs}))
"""


@pytest.mark.parametrize("policy", ["drop_all", pytest.param("keep_first", marks=pytest.mark.slow)])
def test_a_million_lines_are_those_of_a_set_and_take_the_memory_that_was_set(tmp_path: Path, policy: str) -> None:
    generator = np.random.default_rng(0)
    lines = [f"this is line {number} of the news" for number in generator.integers(0, 1_500_000, 1_000_000).tolist()]
    for unit in range(4):
        (tmp_path / f"{unit}.txt").write_text("\n".join(lines[unit * 250_000 : (unit + 1) * 250_000]) + "\n")
    memory_bytes = 8 * MIB
    done = subprocess.run(
        [sys.executable, "-c", MILLION, str(tmp_path), str(memory_bytes), policy],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent.parent,
        env={"PYTHONPATH": ".", "PATH": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout)
    kept = [bit for unit in range(4) for bit in np.fromfile(tmp_path / f"{unit}.kept", bool).tolist()]
    counts = Counter(lines)
    if policy == "drop_all":
        wanted = [counts[line] == 1 for line in lines]
    else:
        seen: set[str] = set()
        wanted = [not (line in seen or seen.add(line)) for line in lines]  # type: ignore[func-returns-value]
    assert kept == wanted
    assert found["runs"] >= 8 and found["ranges"] > 2  # it did not fit at once
    assert found["grown"] < memory_bytes + MIB  # the set alone takes 100 MB
    print(f"{found['grown'] / MIB:.1f} MiB above the start, {memory_bytes / MIB:.0f} set")
