"""Checkpoints: whole or absent, refused with their own message when damaged, assembled from any chunks."""

import json
import os
import pickle
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llamatrain.checkpoint import commit, store
from llamatrain.config import RunConfig
from llamatrain.errors import CheckpointError, UnhealthyRun
from llamatrain.files import sha256_of_file, sha256_of_json
from llamatrain.snapshots import Snapshots
from tests.small_run import metrics, saved_steps, saved_tensors, small_config, status, train_in_process, trainer_for

Damage = Callable[[Path], None]


def save_simple(root: Path, step: int = 1, **tensors: torch.Tensor) -> Path:
    tensors = tensors or {"weight": torch.arange(12.0).reshape(4, 3)}
    return store.save(root, step, {"model": tensors}, {"model": {}})


def read_simple(checkpoint: Path, **targets: torch.Tensor) -> None:
    store.Reader(checkpoint, store.open_checkpoint(checkpoint)).fill("model", targets)


def describe(manifest: dict[str, Any], name: str, chunks: Any) -> None:
    """Have a manifest list these chunks for a tensor."""
    entry = manifest["tensors"]["model"][name]
    entry.pop("rows", None)
    entry["chunks"] = chunks


def edit_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as somebody would who also corrects every hash in it."""
    path = checkpoint / commit.MANIFEST_FILE
    manifest = json.loads(path.read_text())
    change(manifest)
    for name, entry in manifest["files"].items():
        if (checkpoint / name).is_file():
            entry.update(size=(checkpoint / name).stat().st_size, sha256=sha256_of_file(checkpoint / name))
    del manifest["manifest_sha256"]
    path.write_bytes(commit.as_written(manifest, sha256_of_json(manifest)))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 7),
        "b": torch.randn(3).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "bytes": torch.randint(0, 255, (9,), dtype=torch.uint8),
        "strided": torch.randn(4, 6).t(),
    }
    checkpoint = save_simple(tmp_path, **tensors)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    read_simple(checkpoint, **found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_save_that_fails_leaves_the_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_simple(tmp_path, 1)

    def disk_full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(commit, "fsync_path", disk_full)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written .*No space left"):
        save_simple(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in commit.list_checkpoints(tmp_path)] == ["step-00000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_of_the_same_step_is_never_replaced(tmp_path: Path) -> None:
    checkpoint = save_simple(tmp_path)
    place = checkpoint.stat().st_ino
    assert save_simple(tmp_path) == checkpoint  # tried again, as its last sync had failed
    with pytest.raises(CheckpointError, match="another checkpoint of this step is there"):
        save_simple(tmp_path, weight=torch.ones(4, 3))
    assert [(path.name, path.stat().st_ino) for path in tmp_path.iterdir()] == [(checkpoint.name, place)]
    weight = torch.zeros(4, 3)
    read_simple(checkpoint, weight=weight)
    assert torch.equal(weight, torch.arange(12.0).reshape(4, 3))


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint = save_simple(tmp_path)
    (checkpoint / commit.MANIFEST_FILE).unlink()
    assert commit.list_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        store.open_checkpoint(checkpoint)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_box_of_a_tensor_is_assembled_from_any_chunks(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
    halves = sorted({0, columns, data.draw(st.integers(0, columns))})
    tensor = torch.randn(rows, columns)
    checkpoint = save_simple(tmp_path_factory.mktemp("chunks"), weight=tensor)
    boxes = [(top, bottom, left, right) for top, bottom in pairwise(cuts) for left, right in pairwise(halves)]
    chunks = []
    for rank, (top, bottom, left, right) in enumerate(data.draw(st.permutations(boxes))):
        piece = tensor[top:bottom, left:right].contiguous()
        save_file({"weight": piece}, checkpoint / store.file_name("model", rank))
        chunks.append([rank, [top, left], list(piece.shape)])

    def cut(manifest: dict[str, Any]) -> None:
        describe(manifest, "weight", chunks)
        manifest["files"] = {store.file_name("model", rank): {} for rank in range(len(chunks))}

    edit_manifest(checkpoint, cut)
    found = torch.zeros_like(tensor)
    read_simple(checkpoint, weight=found)
    assert torch.equal(found, tensor)

    (top, bottom), (left, right) = (sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in (rows, columns))
    here = torch.zeros_like(tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "local_boxes", lambda whole: [(whole[top:bottom, left:right], [top, left])])
        read_simple(checkpoint, weight=here)
    expected = torch.zeros_like(tensor)
    expected[top:bottom, left:right] = tensor[top:bottom, left:right]
    assert torch.equal(here, expected)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 5)
    | st.sampled_from([10**30, -(2**63), 0.5, 1e400])
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON document."""
    inside = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    return [(*path, key) for key, _ in inside] + [p for key, value in inside for p in places(value, (*path, key))]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_malformed_manifest_is_refused_and_nothing_else_happens(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    weight, scale = torch.arange(12.0).reshape(4, 3), torch.tensor(2.5)
    checkpoint = save_simple(tmp_path_factory.mktemp("malformed"), weight=weight, scale=scale)
    path = checkpoint / commit.MANIFEST_FILE
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    *way, last = data.draw(st.sampled_from(places(manifest)))
    node = manifest
    for key in way:
        node = node[key]
    if data.draw(st.integers(0, 4)):
        node[last] = data.draw(JSON)
    else:
        del node[last]
    path.write_bytes(commit.as_written(manifest, sha256_of_json(manifest)))
    for groups in (None, ["model"]):
        found = {"weight": torch.zeros(4, 3), "scale": torch.zeros(())}
        try:
            opened = store.open_checkpoint(checkpoint, groups=groups)
            store.Reader(checkpoint, opened).fill("model", found)
        except CheckpointError:
            continue
        assert torch.equal(found["weight"], weight)
        assert torch.equal(found["scale"], scale)


MALFORMED_ROWS = [0, -1, True, 1.5, "4", None, [4], 10**40]


@pytest.mark.parametrize("rows", MALFORMED_ROWS)
def test_malformed_rows_are_refused(rows: Any, tmp_path: Path) -> None:
    checkpoint = save_simple(tmp_path)
    edit_manifest(checkpoint, lambda manifest: manifest["tensors"]["model"]["weight"].update(rows=rows))
    if rows == 10**40:  # more rows than there are: still all of them on rank 0
        found = torch.zeros(4, 3)
        read_simple(checkpoint, weight=found)
        return
    with pytest.raises(CheckpointError, match=r"chunks of weight|weight lies in"):
        store.open_checkpoint(checkpoint)


def test_rows_of_ranks_that_cannot_be_are_not_counted_up(tmp_path: Path) -> None:
    checkpoint = save_simple(tmp_path)
    edit_manifest(checkpoint, lambda m: m["tensors"]["model"]["weight"].update(shape=[10**18, 3], rows=1))
    with pytest.raises(CheckpointError, match="chunks of weight"):
        store.open_checkpoint(checkpoint)


MALFORMED_CHUNKS: dict[str, Any] = {
    "not a list": {"0": [0, [0, 0], [4, 3]]},
    "an empty list": [],
    "too short": [[0, [0, 0]]],
    "too long": [[0, [0, 0], [4, 3], "weight"]],
    "a dimension less": [[0, [0], [12]]],
    "a mapping, as once": [{"offset": [0, 0], "shape": [4, 3], "file": "model.rank00000.safetensors", "key": "weight"}],
    "a rank that is true": [[False, [0, 0], [4, 3]]],
    "a rank that is text": [["0", [0, 0], [4, 3]]],
    "a rank below zero": [[-1, [0, 0], [4, 3]]],
    "a fraction": [[0, [0, 0], [4.0, 3]]],
    "beyond the edge": [[0, [1, 0], [4, 3]]],
    "before the edge": [[0, [-1, 0], [4, 3]]],
    "negative extents": [[0, [4, 3], [-4, -3]]],
    "huge": [[0, [0, 0], [10**40, 3]]],
    "twice": [[0, [0, 0], [4, 3]], [0, [0, 0], [4, 3]]],
}


@pytest.mark.parametrize("kind", MALFORMED_CHUNKS)
def test_malformed_chunks_are_refused(kind: str, tmp_path: Path) -> None:
    checkpoint = save_simple(tmp_path)
    edit_manifest(checkpoint, lambda m: describe(m, "weight", MALFORMED_CHUNKS[kind]))
    with pytest.raises(CheckpointError, match=r"chunks of weight"):
        store.open_checkpoint(checkpoint)


def test_a_chunk_of_a_rank_that_wrote_nothing_is_refused(tmp_path: Path) -> None:
    checkpoint = save_simple(tmp_path)
    edit_manifest(checkpoint, lambda m: describe(m, "weight", [[10**9, [0, 0], [4, 3]]]))
    with pytest.raises(
        CheckpointError, match=r"lies in model\.rank1000000000\.safetensors, which the manifest does not"
    ):
        store.open_checkpoint(checkpoint)


@pytest.mark.parametrize("stored", [torch.zeros(3, 4), torch.zeros(5, 3), torch.zeros(4, 3, dtype=torch.bfloat16)])
def test_a_file_that_holds_another_tensor_is_refused(stored: torch.Tensor, tmp_path: Path) -> None:
    checkpoint = save_simple(tmp_path)
    save_file({"weight": stored}, checkpoint / store.file_name("model", 0))
    edit_manifest(checkpoint, lambda manifest: None)
    with pytest.raises(CheckpointError, match="weight is not the chunk that the manifest describes"):
        read_simple(checkpoint, weight=torch.zeros(4, 3))


def test_a_manifest_nested_beyond_measure_is_refused(tmp_path: Path) -> None:
    checkpoint = save_simple(tmp_path)
    (checkpoint / commit.MANIFEST_FILE).write_text('{"format":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(CheckpointError, match="the manifest cannot be read"):
        store.open_checkpoint(checkpoint)


def test_a_group_that_was_not_proved_cannot_be_read(tmp_path: Path) -> None:
    weight = torch.ones(3)
    checkpoint = store.save(tmp_path, 1, {"model": {"w": weight}, "optimizer": {"w": weight}}, {})
    reader = store.Reader(checkpoint, store.open_checkpoint(checkpoint, groups=["model"]))
    reader.fill("model", {"w": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="lacks w"):
        reader.fill("optimizer", {"w": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="tensors of model, ema"):
        store.open_checkpoint(checkpoint, groups=["model", "ema"])


def test_the_manifest_is_compact(tmp_path: Path) -> None:
    text = (save_simple(tmp_path) / commit.MANIFEST_FILE).read_text()
    assert '"weight":{"dtype":"float32","shape":[4,3],"rows":4}' in text
    assert text.count("\n") == 1


def test_pruning_keeps_the_last_and_the_multiples(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25):
        save_simple(tmp_path, step)
    commit.prune(tmp_path, keep_last=2, keep_every_steps=10)
    assert [commit.step_of(path) for path in commit.list_checkpoints(tmp_path)] == [25, 20, 10]


# Damage: each kind is refused with a message of its own


class Sentinel:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def truncate(checkpoint: Path) -> None:
    path = next(checkpoint.glob("model*.safetensors"))
    os.truncate(path, path.stat().st_size - 1)


def flip_a_byte(checkpoint: Path) -> None:
    path = next(checkpoint.glob("optimizer*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_a_byte_of_the_manifest(checkpoint: Path) -> None:
    path = checkpoint / commit.MANIFEST_FILE
    path.write_text(path.read_text().replace('"step":8', '"step":9', 1))


def remove_a_file(checkpoint: Path) -> None:
    next(checkpoint.glob("model*.safetensors")).unlink()


def remove_a_chunk(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: describe(manifest, "norm.weight", []))


def overlap_chunks(checkpoint: Path) -> None:
    """Two chunks with the right volume together that share a row and leave one out."""

    def overlap(manifest: dict[str, Any]) -> None:
        ((rank, _, (size,)),) = store.chunks_of(manifest["tensors"]["model"]["norm.weight"])
        describe(manifest, "norm.weight", [[rank, [offset], [size // 2]] for offset in (0, size // 2 - 1)])

    edit_manifest(checkpoint, overlap)


def spoil_the_data_state(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest["data"]["state"].update(next_sample=-1))


def make_it_another_run(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest["config"]["train"].update(seed=7))


def remove_a_stored_tensor(checkpoint: Path) -> None:
    path = next(checkpoint.glob("model*.safetensors"))
    tensors = load_file(path)
    del tensors["norm.weight"]
    save_file(tensors, path)
    edit_manifest(checkpoint, lambda manifest: None)


def make_it_another_model(checkpoint: Path) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        tensors = manifest["tensors"]["model"]
        tensors["layers.7.attention_norm.weight"] = tensors.pop("layers.1.attention_norm.weight")

    edit_manifest(checkpoint, rename)


def name_a_pickle(checkpoint: Path) -> None:
    (checkpoint / "model.pt").write_bytes(pickle.dumps(Sentinel(checkpoint.parent.parent / "sentinel")))
    edit_manifest(checkpoint, lambda manifest: manifest["files"].update({"model.pt": {}}))


def disguise_a_pickle(checkpoint: Path) -> None:
    """A pickle under the name of a weights file, hashes corrected."""
    path = next(checkpoint.glob("model*.safetensors"))
    path.write_bytes(pickle.dumps(Sentinel(checkpoint.parent.parent / "sentinel")))
    edit_manifest(checkpoint, lambda manifest: None)


def point_outside(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest["files"].update({"../../x.safetensors": {}}))


def make_it_newer(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest.update(version=3))


def make_it_older(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest.update(version=1))


def empty_the_manifest(checkpoint: Path) -> None:
    (checkpoint / commit.MANIFEST_FILE).write_text("")


def config_for(run_dir: Path, sources: dict[str, Path], steps: int, **groups: dict[str, Any]) -> RunConfig:
    return small_config(run_dir, sources, train={"steps": steps}, evaluation={"every_steps": 0}, **groups)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (truncate, "bytes where the manifest says .* truncated"),
    "flipped byte": (flip_a_byte, "SHA-256 is not the manifest's"),
    "flipped byte of the manifest": (flip_a_byte_of_the_manifest, "the manifest was altered"),
    "missing file": (remove_a_file, "named in the manifest but not there"),
    "missing chunk": (remove_a_chunk, r"the chunks of norm\.weight do not cover it"),
    "overlapping chunks": (overlap_chunks, r"the chunks of norm\.weight do not cover it"),
    "spoiled data state": (spoil_the_data_state, "a field of the manifest cannot be used .*next_sample"),
    "another run": (make_it_another_run, r"it is of another run: .*train\.seed was 7, is 0"),
    "missing tensor": (remove_a_stored_tensor, "cannot be read"),
    "another model": (make_it_another_model, "it is of another model: lacks layers.1.attention_norm"),
    "named pickle": (name_a_pickle, r"names 'model\.pt'; a checkpoint holds only \.safetensors"),
    "disguised pickle": (disguise_a_pickle, "cannot be read"),
    "outside path": (point_outside, "a checkpoint holds only"),
    "newer schema": (make_it_newer, "schema version 3; this program reads version 2"),
    "older schema": (make_it_older, "schema version 1; this program reads version 2"),
    "empty manifest": (empty_the_manifest, "the manifest cannot be read"),
}


@pytest.fixture(scope="module")
def sources(tiny_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("data")
    return {"text": tiny_dataset("text", [f"{i} bottles of beer on the wall. " * 9 for i in range(60)], directory)}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    damage, message = DAMAGES[kind]
    run_dir = tmp_path / "run"
    config = config_for(run_dir, sources, 8)
    train_in_process(config)
    expected, records = saved_tensors(run_dir, 8), metrics(run_dir)
    damage(run_dir / "checkpoints" / "step-00000008")
    with ExitStack() as resources:
        trainer = trainer_for(config, resources)
        assert trainer.step == 4
        refusals = trainer.directory.events("refused")
        assert saved_steps(run_dir) == [4]  # the damaged one is set aside, or it would pass for the newest
    assert len(refusals) == 1
    assert re.search(message, refusals[0]["reason"])
    train_in_process(config)
    found = saved_tensors(run_dir, 8)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [r["train/loss"] for r in metrics(run_dir)] == [r["train/loss"] for r in records]
    assert not (run_dir / "sentinel").exists()


@pytest.mark.parametrize("kind", DAMAGES)
def test_with_no_other_checkpoint_the_run_stops(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    damage, message = DAMAGES[kind]
    run_dir = tmp_path / "run"
    config = config_for(run_dir, sources, 8, checkpoint={"every_steps": 8, "keep_last": 1})
    train_in_process(config)
    damage(run_dir / "checkpoints" / "step-00000008")
    with pytest.raises(UnhealthyRun, match=message):
        train_in_process(config)
    assert status(run_dir)["state"] == "unhealthy"
    assert not (run_dir / "sentinel").exists()


def test_a_pickle_lying_beside_is_never_opened(sources: dict[str, Path], tmp_path: Path) -> None:
    config = config_for(tmp_path, sources, 4)
    train_in_process(config)
    for name in ("extra.pt", "model.rank00001.safetensors", "checkpoint.pkl", ".metadata"):
        (tmp_path / "checkpoints" / "step-00000004" / name).write_bytes(pickle.dumps(Sentinel(tmp_path / "sentinel")))
    train_in_process(config_for(tmp_path, sources, 6))
    assert saved_steps(tmp_path) == [4, 6]
    assert not (tmp_path / "sentinel").exists()
    pickle.loads(pickle.dumps(Sentinel(tmp_path / "sentinel")))
    assert (tmp_path / "sentinel").exists()  # the trap works


def test_a_committed_run_whose_checkpoints_are_gone_stops(sources: dict[str, Path], tmp_path: Path) -> None:
    config = config_for(tmp_path, sources, 4)
    train_in_process(config)
    for checkpoint in commit.list_checkpoints(tmp_path / "checkpoints"):
        commit.delete(checkpoint)
    with pytest.raises(UnhealthyRun, match="they are gone"):
        train_in_process(config)


def test_a_refused_checkpoint_does_not_push_out_the_new_ones(sources: dict[str, Path], tmp_path: Path) -> None:
    retention = {"every_steps": 2, "keep_last": 1, "keep_every_steps": 4}
    train_in_process(config_for(tmp_path, sources, 12, checkpoint=retention))
    assert saved_steps(tmp_path) == [4, 8, 12]
    truncate(tmp_path / "checkpoints" / "step-00000012")
    for stop_at in (10, 11):
        config = config_for(tmp_path, sources, 12, checkpoint=retention)
        train_in_process(replace(config, train=replace(config.train, stop_after_step=stop_at)))
        assert saved_steps(tmp_path) == [4, 8, stop_at]


def test_a_disk_that_cannot_be_read_costs_one_checkpoint(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path, sources, 8)
    train_in_process(config)

    def failing(path: Path) -> str:
        if "step-00000008" in str(path):
            raise OSError(5, "Input/output error")
        return sha256_of_file(path)

    monkeypatch.setattr(commit, "sha256_of_file", failing)
    with ExitStack() as resources:
        trainer = trainer_for(config, resources)
        assert trainer.step == 4
        assert "cannot be read (Input/output error)" in trainer.directory.events("refused")[0]["reason"]


def test_a_run_may_move_to_another_kind_of_device(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint made on CUDA holds the state of its generator too; here it has no use."""
    plain = Snapshots._random_states

    def with_cuda(self: Snapshots) -> dict[str, torch.Tensor]:
        return {**plain(self), "rank00000.cuda": torch.zeros(16, dtype=torch.uint8)}

    monkeypatch.setattr(Snapshots, "_random_states", with_cuda)
    train_in_process(config_for(tmp_path, sources, 4))
    monkeypatch.undo()
    train_in_process(config_for(tmp_path, sources, 6))
    assert saved_steps(tmp_path) == [4, 6]
