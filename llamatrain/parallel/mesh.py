"""The ranks of a run as a mesh, one named axis for each way of sharing the work."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llamatrain.config.parallel import Layout

SHARDS = "shards"  # the ranks of dp_shard and cp in one: FSDP spreads weights over both alike


def build_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """A mesh with axes `pp`, `dp_replicate` and `tp` where they are not 1, and always `shards`; all ranks call it."""
    sizes = {"pp": layout.pp, "dp_replicate": layout.dp_replicate, SHARDS: layout.shards, "tp": layout.tp}
    sizes = {axis: size for axis, size in sizes.items() if size > 1 or axis == SHARDS}
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def data_parallel_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes over which weights are sharded and copied."""
    names = mesh.mesh_dim_names or ()
    return mesh["dp_replicate", SHARDS] if "dp_replicate" in names else mesh[SHARDS]


def context_group(layout: Layout, *, timeout: timedelta) -> dist.ProcessGroup | None:
    """The ranks that share this one's sequences; None if it has them alone. All ranks call it."""
    if layout.cp == 1:
        return None
    block = layout.cp * layout.tp
    ranks = [
        [first + tp + layout.tp * cp for cp in range(layout.cp)]
        for first in range(0, layout.pp * layout.data_parallel * block, block)
        for tp in range(layout.tp)
    ]
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)
    return group
