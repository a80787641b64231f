"""Fully sharded data parallel (FSDP2): every rank holds its part of each weight, gathered layer by layer.

Units are gathered and freed as wholes: the embedding, each block, the last norm with the head, the root. Weights
are gathered in the compute dtype and gradients reduced in fp32. The embedding is gathered in fp32: its gradient
adds up many tokens' rows within one rank, which bf16 would round after every addition.

Gradients are summed over ranks, not averaged: the loss is already divided by the targets of the global batch.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from llamatrain.config.parallel import ParallelConfig
from llamatrain.distributed import World
from llamatrain.model.llama import Llama


def data_parallel_mesh(world: World, device: torch.device) -> DeviceMesh:
    """All ranks along `dp_shard`."""
    return init_device_mesh(device.type, (world.size,), mesh_dim_names=("dp_shard",))


def shard(model: Llama, mesh: DeviceMesh, settings: ParallelConfig) -> None:
    """Turn the parameters of a model on the meta device into DTensors over the mesh, gathered where needed."""
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    compute = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    reshard = settings.reshard_after_forward == "always"
    if model.output is not None:
        fully_shard(model.tok_embeddings, mesh=mesh, mp_policy=full, reshard_after_forward=reshard)
        # backward needs the head at once, so it stays gathered
        fully_shard([model.norm, model.output], mesh=mesh, mp_policy=compute, reshard_after_forward=False)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=compute, reshard_after_forward=reshard)
    # What is left: nothing, or a tied embedding, used at both ends of the forward, with the last norm.
    fully_shard(model, mesh=mesh, mp_policy=full, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # or NCCL is asked to multiply by 1 on the way


def free_gathered(model: Llama) -> None:
    """Free what a forward without a backward has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
