"""State that several ranks have must be the same bit for bit on all of them: compared every so many steps.

Copies differ when a device computes wrongly, a memory cell or a message lost a bit, or a reduction was left out. What
has copies depends on the layout: all weights and moments with dp_replicate, norm weights and their moments with tp, the
gathered weights with reshard_after_forward=never. What exists once has nothing to be compared with; it is covered by
running a step twice (`llamatrain.resilience.replay`).

Each rank reduces each tensor to one number, the sum of its bits as integers, which any flipped bit changes. The ranks
that have copies exchange these; with three or more the majority is right, with two it is only known that they differ.
"""

import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llamatrain.distributed import World, all_gather_single
from llamatrain.errors import UnhealthyRun

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 24  # numbers at a time: their sum is taken in 8 bytes each


def fingerprint(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as integers, modulo 2^64: an int64 scalar on its device."""
    bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(CHUNK):
        total += chunk.sum(dtype=torch.int64)
    return total


@dataclass(frozen=True)
class Copies:
    """Tensors of which every rank of a group has the same."""

    group: dist.ProcessGroup
    tensors: dict[str, Tensor]  # by name; the memory of this rank


def copies_of(tensors: Mapping[str, Tensor]) -> list[Copies]:
    """Of spread tensors, what this rank has copies of: a `Copies` for each axis of the mesh that has some."""
    found: dict[str, Copies] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            continue
        for axis, placement in enumerate(tensor.placements):
            if placement.is_replicate() and tensor.device_mesh.size(axis) > 1:
                group = tensor.device_mesh.get_group(axis)
                copies = found.setdefault(group.group_name, Copies(group, {}))
                copies.tensors[name] = tensor.to_local()
    return list(found.values())


class DivergenceCheck:
    """Compares copies: `begin` asks, without waiting for the device; `finish` looks at the answers."""

    def __init__(self, world: World, copies: Sequence[Copies]) -> None:
        self._rank, self._copies = world.rank, list(copies)
        self._hosts: list[str] = world.gather(socket.gethostname())
        self._asked: list[tuple[Copies, int, Tensor]] = []  # step; a row of fingerprints for each rank of the group

    def begin(self, step: int, copies: Sequence[Copies] | None = None) -> None:
        """Exchange fingerprints of the state after `step`, or of other `copies`; the ranks of each group call it."""
        for one in self._copies if copies is None else copies:
            own = torch.stack([fingerprint(tensor) for tensor in one.tensors.values()])
            everyones = own.new_empty(one.group.size() * len(own))
            all_gather_single(everyones, own, group=one.group)
            self._asked.append((one, step, everyones.view(one.group.size(), -1)))

    def finish(self, describe_good: Callable[[], str]) -> None:
        """Raises UnhealthyRun if copies differ; `describe_good` says which checkpoint is. Waits for the device."""
        asked, self._asked = self._asked, []
        for copies, step, everyones in asked:
            rows = everyones.tolist()
            names = list(copies.tensors)
            differing = [n for n in range(len(names)) if len({row[n] for row in rows}) > 1]
            if differing:
                ranks = dist.get_process_group_ranks(copies.group)
                culprits = self._told(ranks, [row[differing[0]] for row in rows])
                others = f" and {len(differing) - 1} other tensors" if len(differing) > 1 else ""
                raise UnhealthyRun(
                    f"step {step}: copies of {names[differing[0]]}{others} have come apart: {culprits}; do not use "
                    f"that device before it is tested. {describe_good()}"
                )

    def _told(self, ranks: Sequence[int], fingerprints: Sequence[int]) -> str:
        """Who has another copy than the others; if most do not agree, who has what."""
        (common, count), *_ = Counter(fingerprints).most_common()
        if 2 * count > len(ranks):
            odd = [rank for rank, found in zip(ranks, fingerprints, strict=True) if found != common]
            whose = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in odd)
            return f"{whose} has another than the {count} others"
        whose = " and ".join(f"rank {rank} on {self._hosts[rank]}" for rank in ranks)
        return f"{whose} differ, and there is no majority to tell which is right"
