"""Copies of state that have come apart, and steps that do not repeat."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llamatrain.distributed import World
from llamatrain.errors import UnhealthyRun
from llamatrain.resilience.divergence import DivergenceCheck, copies_of, fingerprint
from llamatrain.resilience.replay import Replay
from tests.ranks import on_ranks


@given(st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 10**9))
def test_any_flipped_bit_changes_the_fingerprint(dtype: torch.dtype, place: int) -> None:
    tensor = torch.randn(7, 5).to(dtype)
    before = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == before
    bits = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16).view(-1)
    element, bit = place % 35, place // 35 % (8 * tensor.element_size())
    bits[element] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(bits.dtype)
    assert fingerprint(tensor) != before


def test_large_tensors_are_summed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    whole = fingerprint(tensor)
    monkeypatch.setattr("llamatrain.resilience.divergence.CHUNK", 7)
    assert fingerprint(tensor) == whole


def check(world: World, sizes: Sequence[int], flips: Sequence[tuple[int, str]]) -> str:
    """Weights over a mesh of `sizes` (copies, shards); bits flipped on ranks; what the check says."""
    mesh = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=("dp_replicate", "shards"))
    whole = torch.arange(24.0).view(6, 4)
    tensors: dict[str, Tensor] = {
        "w": distribute_tensor(whole.clone(), mesh, [Replicate(), Shard(0)]),
        "v": distribute_tensor(whole.clone(), mesh, [Replicate(), Shard(1)]),
        "plain": whole,
    }
    copies = copies_of(tensors)
    assert bool(copies) == (sizes[0] > 1)
    compared = DivergenceCheck(world, copies)
    compared.begin(6)
    compared.finish(lambda: "")
    for rank, name in flips:
        if rank == world.rank:
            tensor = tensors[name]
            assert isinstance(tensor, DTensor)
            tensor.to_local().view(torch.int32)[0, 0] ^= 1
    compared.begin(7)
    try:
        compared.finish(lambda: "step-00000004 is good.")
    except UnhealthyRun as error:
        return str(error)
    return ""


def test_the_copy_that_differs_from_the_others_is_named() -> None:
    messages = on_ranks(3, check, (3, 1), ((1, "v"),))
    assert len(set(messages)) == 1
    assert messages[0].startswith("step 7: copies of v have come apart: rank 1 on ")
    assert "has another than the 2 others" in messages[0]
    assert messages[0].endswith("step-00000004 is good.")


@pytest.mark.slow
def test_of_two_copies_the_pair_is_named_and_the_other_pair_has_nothing_to_say() -> None:
    messages = on_ranks(4, check, (2, 2), ((3, "w"), (3, "v")))
    assert messages[0] == messages[2] == ""
    assert messages[1] == messages[3]
    assert "copies of w and 1 other tensors have come apart: rank 1 on " in messages[1]
    assert "and rank 3 on " in messages[1] and "no majority" in messages[1]


# ---------------------------------------------------------------------- replay


def test_a_step_that_repeats_is_undone() -> None:
    weight, steps = torch.ones(3), []

    def step() -> dict[str, Tensor]:
        steps.append(weight.clone())
        weight.mul_(2).add_(1)
        return {"loss": weight.sum()}

    assert Replay({"weight": weight}).run(step) == []
    assert torch.equal(weight, torch.ones(3))
    assert [torch.equal(before, torch.ones(3)) for before in steps] == [True, True]


def test_what_does_not_repeat_is_named_in_order() -> None:
    weight, moment, runs = torch.ones(3), torch.zeros(2), 0

    def step() -> dict[str, Tensor]:
        nonlocal runs
        runs += 1
        if runs == 2:
            weight[1] += 2**-20
        return {"own loss": torch.tensor(1.0), "loss": torch.tensor(float(runs))}

    assert Replay({"weight": weight, "moment": moment}).run(step) == ["loss", "weight"]
