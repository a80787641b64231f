"""Fully sharded data parallel (FSDP2): every rank holds its part of each weight, gathered layer by layer.

Units are gathered and freed as wholes: the embedding, each block, the last norm with the head, the root. Weights
are gathered in the compute dtype and gradients reduced in fp32 unless asked otherwise. The embedding is gathered in
fp32: its gradient adds up many tokens' rows within one rank, which bf16 would round after every addition.

With `dp_replicate` (HSDP, "hybrid sharding") the weights exist that many times: gathers and reduce-scatters stay
within the ranks of one copy, a node say, and one all-reduce a step adds the copies' gradients up.

Gradients are summed over ranks, not averaged: the loss is already divided by the targets of the global batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llamatrain.config.parallel import ParallelConfig
from llamatrain.model.llama import Llama
from llamatrain.parallel.mesh import SHARDS

REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shard(model: Llama, mesh: DeviceMesh, settings: ParallelConfig) -> None:
    """Turn the parameters of a model on the meta device into DTensors over the mesh, gathered where needed.

    `mesh` has the data-parallel axes. Parameters that are DTensors over others already become so over all.
    """
    reduce_dtype = REDUCE_DTYPES[settings.reduce_dtype]
    full = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    compute = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    reshard = settings.reshard_after_forward == "always"
    blocks = list(model.layers.values())
    if model.tok_embeddings is not None and not model.config.tied_embeddings:
        fully_shard(model.tok_embeddings, mesh=mesh, mp_policy=full, reshard_after_forward=reshard)
    if model.norm is not None and model.output is not None:
        # backward needs the head at once, so it stays gathered
        fully_shard([model.norm, model.output], mesh=mesh, mp_policy=compute, reshard_after_forward=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=compute, reshard_after_forward=reshard)
    # What is left: nothing, or a tied embedding, used at both ends of the forward, with the last norm.
    fully_shard(model, mesh=mesh, mp_policy=full, reshard_after_forward=False)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # or NCCL is asked to multiply by 1 on the way
    layers: list[Any] = blocks  # to sharding's eye: it gave each block's class the methods of FSDPModule
    for place, layer in enumerate(layers):
        if settings.forward_prefetch:
            layer.set_modules_to_forward_prefetch(layers[place + 1 : place + 1 + settings.forward_prefetch])
        if settings.backward_prefetch:
            layer.set_modules_to_backward_prefetch(layers[max(0, place - settings.backward_prefetch) : place][::-1])


def units(model: Llama) -> Iterator[FSDPModule]:
    """The modules that are gathered as wholes; none if the model is not sharded."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def begin_micro_batch(model: Llama, settings: ParallelConfig, *, last: bool) -> None:
    """Say whether this micro-batch's gradients leave for the other ranks, or wait for the last one's.

    Nothing partial is left after the last: what was kept back leaves with it.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last or settings.reduce_scatter == "each")
        model.set_requires_all_reduce(last or settings.all_reduce == "each")


def after_forward(model: Llama, look: Callable[[dict[str, Tensor], dist.ProcessGroup], None]) -> None:
    """Let `look` see, after every forward, the weights that are gathered then, by name, and the ranks that have them.

    Those are all with reshard_after_forward=never, and the head otherwise.
    """
    spread = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    if not spread or not isinstance(model, FSDPModule) or spread[0].device_mesh[SHARDS].size() == 1:
        return
    group = spread[0].device_mesh[SHARDS].get_group()

    def hook(*_: object) -> None:
        gathered = {}
        for name, parameter in model.named_parameters():
            memory: Tensor = parameter
            if isinstance(memory, DTensor):
                if SHARDS in (memory.device_mesh.mesh_dim_names or ()):
                    continue
                memory = memory.to_local()  # of a share of the layer, gathered
            gathered[name] = memory
        look(gathered, group)

    model.register_forward_hook(hook)


def free_gathered(model: Llama) -> None:
    """Free what a forward without a backward has left gathered."""
    for unit in units(model):
        unit.reshard()
