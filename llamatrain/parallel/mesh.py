"""The ranks of a run as a mesh, one named axis for each way of sharing the work."""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llamatrain.config.parallel import Layout


def build_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """A mesh with an axis for everything in the layout that is not 1, and always `dp_shard`; all ranks call it."""
    sizes = {axis: size for axis, size in layout.sizes().items() if size > 1 or axis == "dp_shard"}
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
