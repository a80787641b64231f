"""Parts of parameters that lie end to end in flat shards, as boxes of the whole parameters."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamatrain.config import OptimConfig
from llamatrain.flat import FlatPart, boxes_of_range, local_boxes
from llamatrain.model.init import fill_normal
from llamatrain.optim.adamw import build_adamw


@given(st.data(), st.lists(st.integers(1, 5), max_size=4))
def test_boxes_are_the_places_of_the_range_in_their_order(data: st.DataObject, shape: list[int]) -> None:
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, prod(shape))] * 2)))
    whole = torch.arange(prod(shape)).view(shape)
    boxes = list(boxes_of_range(begin, end, shape))
    parts = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))] for box in boxes]
    assert [place for part in parts for place in part.flatten().tolist()] == list(range(begin, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_a_part_is_filled_and_read_where_it_lies() -> None:
    whole = torch.empty(4, 5)
    fill_normal(whole, key=7, shape=(4, 5), offset=(0, 0), std=1.0)
    shard = torch.nn.Parameter(torch.zeros(20))
    part = FlatPart(shard, first=3, count=13, begin=4, shape=torch.Size((4, 5)))
    for box, offset in local_boxes(part):
        fill_normal(box, key=7, shape=part.shape, offset=offset, std=1.0)
    assert torch.equal(part.memory, whole.flatten()[4:17])
    assert torch.equal(shard[:3], torch.zeros(3))
    assert torch.equal(shard[16:], torch.zeros(4))
    assert part.grad is None
    shard.grad = torch.arange(20.0)
    assert part.grad is not None
    assert part.grad.memory.tolist() == list(range(3, 16))


def test_a_rank_may_have_nothing_of_a_parameter() -> None:
    assert local_boxes(FlatPart(torch.zeros(8), first=0, count=0, begin=0, shape=torch.Size((4, 5)))) == []


def test_a_flat_shard_of_matrices_and_norms_cannot_decay() -> None:
    shard = torch.nn.Parameter(torch.zeros(8))
    parts = {
        "wq.weight": FlatPart(shard, first=0, count=4, begin=0, shape=torch.Size((2, 2))),
        "norm.weight": FlatPart(shard, first=4, count=4, begin=0, shape=torch.Size((4,))),
    }
    with pytest.raises(ValueError, match=r"norm\.weight lies flat among parameters that do not decay as it does"):
        build_adamw(parts.items(), OptimConfig(decay="matrices"))
    (group,) = build_adamw(parts.items(), OptimConfig(decay="all")).param_groups
    assert group["params"] == [shard]
