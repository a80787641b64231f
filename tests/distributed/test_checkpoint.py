"""Checkpoints of several ranks: each writes its share, any number reads them, and all fail together."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from llamatrain.checkpoint import commit, store
from llamatrain.distributed import World
from llamatrain.errors import CheckpointError
from tests.ranks import on_ranks

CUT_ALONG = {"rows": 0, "few": 0, "vector": 0, "columns": 1, "scale": None, "single": 0}


def whole_tensors() -> dict[str, Tensor]:
    """Sizes that 2 and 4 do not divide, two ranks' worth of rows for four ranks, no dimension at all."""
    torch.manual_seed(5)
    return {
        "rows": torch.randn(7, 3),
        "few": torch.randn(2, 5).to(torch.bfloat16),
        "vector": torch.randn(5).to(torch.bfloat16),
        "columns": torch.randn(3, 6),
        "scale": torch.tensor(2.5),
        "single": torch.randn(1, 4),
    }


def spread(tensors: dict[str, Tensor], world: World, *, turned: bool = False) -> dict[str, Tensor]:
    """Each tensor over all ranks along its dimension, or the other one if `turned`; whole where there is one rank."""
    if world.size == 1:
        return tensors
    mesh = init_device_mesh("cpu", (world.size,))
    cut: dict[str, Placement] = {
        name: Replicate() if dim is None else Shard((tensors[name].dim() - 1 - dim) if turned else dim)
        for name, dim in CUT_ALONG.items()
    }
    return {name: distribute_tensor(tensor, mesh, [cut[name]]) for name, tensor in tensors.items()}


def save_spread(world: World, root: Path, step: int = 1) -> Path:
    own = {f"rank{world.rank:05d}.cpu": torch.full((3,), world.rank, dtype=torch.uint8)}
    return store.save(root, step, {"model": spread(whole_tensors(), world), "rng": own}, {}, world=world)


def load_spread(world: World, checkpoint: Path) -> list[str]:
    """The names of tensors that come back with other bits, along the dimensions they were cut or the others."""
    expected = whole_tensors()
    manifest = store.open_checkpoint(checkpoint, world=world)
    wrong = []
    for turned in (False, True):
        targets = spread({n: torch.full_like(t, float("nan")) for n, t in expected.items()}, world, turned=turned)
        with world.together():
            store.Reader(checkpoint, manifest).fill("model", targets)
        found = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in targets.items()}
        wrong += [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    return wrong


def refusal(world: World, action: Callable[..., Any], *args: Any) -> str:
    """What the CheckpointError says that the action ends in."""
    with pytest.raises(CheckpointError) as caught:
        action(world, *args)
    return str(caught.value)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("writers", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(writers: int, tmp_path: Path) -> None:
    paths = on_ranks(writers, save_spread, tmp_path)
    assert paths == [tmp_path / "step-00000001"] * writers
    for readers in (1, 2, 4):
        assert on_ranks(readers, load_spread, paths[0]) == [[]] * readers
    manifest = store.open_checkpoint(paths[0])
    model = manifest["tensors"]["model"]
    assert {chunk[0] for chunk in store.chunks_of(model["few"])} == set(range(min(writers, 2)))
    assert list(store.chunks_of(model["scale"])) == [[0, [], []]]
    assert "rows" in model["rows"]  # what all ranks share row by row is told in a word
    states = {f"rank{rank:05d}.cpu": torch.zeros(3, dtype=torch.uint8) for rank in range(writers)}
    store.Reader(paths[0], manifest).fill("rng", states)
    assert [int(state[0]) for state in states.values()] == list(range(writers))


def save_on_a_square(world: World, root: Path) -> tuple[Path, list[str]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    whole = torch.arange(35.0).reshape(7, 5)
    cuts: dict[str, list[Placement]] = {
        "copied": [Replicate(), Shard(0)],
        "late": [Shard(1), Replicate()],
        "tiles": [Shard(0), Shard(1)],
    }
    only_copied = {"few": distribute_tensor(whole[:1], mesh, [Replicate(), Shard(0)])}
    groups = {"model": {name: distribute_tensor(whole, mesh, cut) for name, cut in cuts.items()}, "only": only_copied}
    path = store.save(root, 1, groups, {}, world=world)
    targets = {name: distribute_tensor(torch.zeros(7, 5), mesh, cut) for name, cut in cuts.items()}
    with world.together():
        store.Reader(path, store.open_checkpoint(path, world=world)).fill("model", targets)
    return path, [name for name, target in targets.items() if not torch.equal(target.full_tensor(), whole)]


def test_copies_are_written_once(tmp_path: Path) -> None:
    results = on_ranks(4, save_on_a_square, tmp_path)
    checkpoint = results[0][0]
    assert results == [(checkpoint, [])] * 4
    manifest = store.open_checkpoint(checkpoint)
    model = manifest["tensors"]["model"]
    assert list(store.chunks_of(model["copied"])) == [[0, [0, 0], [4, 5]], [1, [4, 0], [3, 5]]]
    assert list(store.chunks_of(model["late"])) == [[0, [0, 0], [7, 3]], [2, [0, 3], [7, 2]]]
    assert [chunk[0] for chunk in store.chunks_of(model["tiles"])] == [0, 1, 2, 3]
    assert list(store.chunks_of(manifest["tensors"]["only"]["few"])) == [[0, [0, 0], [1, 5]]]
    assert sorted(path.name for path in checkpoint.glob("only.*")) == ["only.rank00000.safetensors"]
    found = {name: torch.zeros(7, 5) for name in model}
    store.Reader(checkpoint, manifest).fill("model", found)
    assert all(torch.equal(tensor, torch.arange(35.0).reshape(7, 5)) for tensor in found.values())


def save_with_a_full_disk(world: World, root: Path, name: str, on_rank: int) -> list[Any]:
    """A second checkpoint fails on one rank in the function `name` of the commit; then a third is made."""

    def disk_full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    save_spread(world, root, 1)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == on_rank:
            patch.setattr(commit, name, disk_full)
        message = refusal(world, save_spread, root, 2)
    left = sorted(root.iterdir())  # all are told after the temporary directory is gone
    save_spread(world, root, 3)
    return [message, left, load_spread(world, root / "step-00000001"), load_spread(world, root / "step-00000003")]


@pytest.mark.parametrize(
    ("name", "on_rank"), [("fsync_path", 1), ("sha256_of_file", 0), ("begin", 0), ("write_bytes_atomically", 0)]
)
def test_a_write_that_fails_on_one_rank_fails_on_all(name: str, on_rank: int, tmp_path: Path) -> None:
    results = on_ranks(2, save_with_a_full_disk, tmp_path, name, on_rank)
    assert results[0] == results[1]
    message, left, *wrong = results[0]
    assert re.search(rf"unfinished-step-00000002: the checkpoint of step 2 .*rank {on_rank}: .*No space left", message)
    assert "earlier ones are whole" in message
    assert left == [tmp_path / "step-00000001"]
    assert wrong == [[], []]


def save_without_the_file(world: World, root: Path) -> Path:
    """As on a file system of its own: what rank 1 wrote, rank 0 does not see."""
    if world.rank == 1:
        plain = commit.seal

        def seal(path: Path) -> commit.FileEntry:
            entry = plain(path)
            os.rename(path, path.with_name("elsewhere"))
            return entry

        commit.seal = seal
    return save_spread(world, root)


def save_a_plain_tensor_everywhere(world: World, root: Path) -> Path:
    return store.save(root, 1, {"model": {"weight": torch.ones(3)}}, {}, world=world)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (save_without_the_file, "model.rank00001.safetensors"),
        (save_a_plain_tensor_everywhere, r"wrote 6 elements of weight, whose shape is \[3\]"),
    ],
)
def test_what_would_not_load_is_not_committed(action: Callable[..., Path], message: str, tmp_path: Path) -> None:
    first, second = on_ranks(2, refusal, action, tmp_path)
    assert first == second
    assert re.search(message, first)
    assert list(tmp_path.iterdir()) == []


def save_a_sum(world: World, root: Path) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    total = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(ValueError, match="weight is a sum that is not reduced yet"):
        store.save(root, 1, {"model": {"weight": total}}, {}, world=world)


def test_a_sum_that_is_not_reduced_is_not_stored(tmp_path: Path) -> None:
    on_ranks(2, save_a_sum, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_is_refused_by_all(tmp_path: Path) -> None:
    checkpoint = on_ranks(3, save_spread, tmp_path)[0]
    flip_a_byte(checkpoint / "model.rank00001.safetensors")
    messages = on_ranks(2, refusal, load_spread, checkpoint)
    assert re.search(r"model\.rank00001\.safetensors: its SHA-256 is not the manifest's", messages[0])
    assert messages[0] == messages[1]


def fill_without_the_file(world: World, checkpoint: Path) -> None:
    """One rank's file goes between the check and the reading."""
    manifest = store.open_checkpoint(checkpoint, world=world)
    world.gather(None)
    if world.leads:
        (checkpoint / "model.rank00001.safetensors").unlink()
    world.gather(None)
    with world.together():
        store.Reader(checkpoint, manifest).fill("model", spread(whole_tensors(), world))


def test_a_file_that_one_rank_cannot_read_is_refused_by_all(tmp_path: Path) -> None:
    checkpoint = on_ranks(2, save_spread, tmp_path)[0]
    messages = on_ranks(2, refusal, fill_without_the_file, checkpoint)
    assert re.search(r"model\.rank00001\.safetensors: cannot be read", messages[0])
    assert messages[0] == messages[1]


def work_of_each_rank(world: World, root: Path) -> dict[str, list[str]]:
    """The files this rank hashes in a save and in a load, the tensors it proves, the files it reads."""
    work: dict[str, list[str]] = {"hashed in save": [], "hashed in load": [], "proved": [], "read": []}
    plain = commit.sha256_of_file, store._check_entry, store.safe_open
    with pytest.MonkeyPatch.context() as patch:

        def watch(what: str) -> Callable[[Path], str]:
            return lambda path: work[what].append(path.name) or plain[0](path)  # type: ignore[func-returns-value]

        def check_entry(checkpoint: Path, group: str, name: str, *rest: Any) -> None:
            work["proved"].append(f"{group} {name}")
            plain[1](checkpoint, group, name, *rest)

        def open_file(path: Path, **options: Any) -> Any:
            work["read"].append(path.name)
            return plain[2](path, **options)

        patch.setattr(commit, "sha256_of_file", watch("hashed in save"))
        tensors = {"a": torch.randn(8, 3), "b": torch.randn(4)}
        mesh = init_device_mesh("cpu", (world.size,))
        groups = {"model": {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}}
        checkpoint = store.save(root, 1, groups, {}, world=world)
        patch.setattr(commit, "sha256_of_file", watch("hashed in load"))
        patch.setattr(store, "_check_entry", check_entry)
        patch.setattr(store, "safe_open", open_file)
        manifest = store.open_checkpoint(checkpoint, world=world)
        store.Reader(checkpoint, manifest).fill("model", groups["model"])
    return work


def test_the_ranks_divide_the_work(tmp_path: Path) -> None:
    own = [[f"model.rank{rank:05d}.safetensors"] for rank in range(4)]
    work = on_ranks(4, work_of_each_rank, tmp_path)
    assert [w["hashed in save"] for w in work] == own
    assert [w["hashed in load"] for w in work] == own
    assert [w["read"] for w in work] == own
    assert [w["proved"] for w in work] == [["model a"], ["model b"], [], []]


def test_ranks_that_wait_for_one_another_are_not_left_waiting() -> None:
    """The helper itself: what one rank raises comes out, while another waits for it."""
    with pytest.raises(KeyError, match="sought") as caught:
        on_ranks(2, raise_on_the_last)
    assert "on rank 1" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="rank 1 died with exit status 7"):
        on_ranks(2, die_on_the_last)


def raise_on_the_last(world: World) -> None:
    if world.rank == world.size - 1:
        raise KeyError("sought")
    dist.barrier()


def die_on_the_last(world: World) -> None:
    if world.rank == world.size - 1:
        os._exit(7)
    dist.barrier()
