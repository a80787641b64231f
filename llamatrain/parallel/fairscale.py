"""Fully sharded data parallel by fairscale (`parallel=fairscale`), the library of the paper's day; on CUDA only.

A wrapper lays the parameters of its module end to end and cuts this flat parameter into equal pieces, one a rank,
wherever rows may end; what a rank has of each parameter is a `FlatPart`. Weight decay is a flat parameter's as a whole,
so matrices and norms must not share one: a unit (the embedding, each block, the rest) has a wrapper for its matrices
and around it one for its norms. Both gather before the unit's forward and again before its backward.

Dtypes are those of `llamatrain.parallel.fsdp`. fairscale would cast what floats come into the outermost wrapper to
fp16, whatever the compute dtype; nothing but integers does, tokens and targets. Gathering everything in fp32 instead
would take twice the traffic, and the layers' own casts would keep a bf16 copy of every weight until its backward.
The outermost wrapper computes in the model's dtype: by that, fairscale knows which of its streams has to wait for the
optimizer, and the others wait for that one. Gradients are summed over ranks, not averaged.

What is written with an underscore is fairscale's own, of 0.4.13, its last release.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import FullyShardedDataParallel
from torch import nn

from llamatrain.config.parallel import ParallelConfig
from llamatrain.flat import FlatPart
from llamatrain.model.init import canonical_name
from llamatrain.model.llama import Llama


def shard(model: Llama, device: torch.device, settings: ParallelConfig, *, world_size: int) -> Llama:
    """Of a model on the meta device, what this rank has of each parameter, its memory not yet filled.

    Units get memory one after the other, so that no more than one is ever whole here. Returns the outermost wrapper,
    which is to be called instead of the model and has its attributes. All ranks call it.
    """
    for outdated in ("TypedStorage is deprecated", "`torch.distributed._(all_gather|reduce_scatter)_base`"):
        warnings.filterwarnings("ignore", outdated)
    groups: tuple[Any, Any] = (_Alone(), _Alone())
    if world_size > 1:  # two, so that a gather need not wait for a reduction
        groups = dist.group.WORLD, dist.new_group(timeout=timedelta(seconds=settings.timeout_s))
    # a rank alone reduces nothing, and without the cast its gradients would stay in the compute dtype
    wrap = _Wrapping(groups, device, model.compute_dtype, settings.reduce_dtype == "fp32" or world_size == 1)
    reshard = settings.reshard_after_forward == "always"
    assert model.norm is not None and model.tok_embeddings is not None  # this is no pipeline's stage
    if model.output is not None:
        model.tok_embeddings = wrap(model.tok_embeddings.to_empty(device=device), torch.float32, reshard=reshard)
    for name, block in model.layers.items():
        model.layers[name] = wrap(block.to_empty(device=device), model.compute_dtype, reshard=reshard)
    # what is left: the last norm, and the head or a tied embedding; backward begins with it, so it stays gathered
    head = model.tok_embeddings if model.output is None else model.output
    for module in (model.norm, head):
        module.to_empty(device=device)
    model.rebuild_rope_tables()
    root = wrap(model, torch.float32 if model.output is None else model.compute_dtype, reshard=False)
    root.set_gradient_divide_factors(1.0, 1.0, recursive=True)
    root.register_forward_pre_hook(_forget_hooks)
    root.register_forward_hook(_free_gathered)
    return cast(Llama, root)


def named_parameters(model: nn.Module) -> dict[str, FlatPart]:
    """What this rank has of each parameter, by the names of the model without wrappers."""
    found = {}
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, FullyShardedDataParallel):
            (flat,) = wrapper.params
            first, size = wrapper.rank * flat.numel(), flat.numel()  # this rank's range of the flat parameter
            place = 0
            for name, shape, count in zip(*flat.metadata(), strict=True):
                begin, end = (min(max(edge, first), first + size) for edge in (place, place + count))
                found[canonical_name(f"{path}.{name}".lstrip("."))] = FlatPart(
                    flat, first=begin - first, count=end - begin, begin=begin - place, shape=shape
                )
                place += count
    return found


@dataclass(frozen=True)
class _Wrapping:
    """Puts wrappers around modules."""

    groups: tuple[Any, Any]  # for gathers, for reductions
    device: torch.device
    norms_dtype: torch.dtype
    reduce_in_fp32: bool

    def __call__(self, module: nn.Module, dtype: torch.dtype, *, reshard: bool) -> FullyShardedDataParallel:
        """Two wrappers around a module: one for the matrices that have none yet, gathered in `dtype`, one for norms."""
        free = [parameter for parameter in module.parameters() if not hasattr(parameter, "_is_sharded")]
        norms = [parameter for parameter in free if parameter.ndim < 2]
        if len(norms) < len(free):
            for norm in norms:
                norm._is_sharded = False  # type: ignore[attr-defined]  # passed over: fairscale takes what has none
            module = self._wrap(module, dtype, reshard=reshard)
            for norm in norms:
                del norm._is_sharded  # type: ignore[attr-defined]
        return self._wrap(_Between(module), self.norms_dtype, reshard=reshard) if norms else module

    def _wrap(self, module: nn.Module, dtype: torch.dtype, *, reshard: bool) -> FullyShardedDataParallel:
        lower = dtype != torch.float32
        return FullyShardedDataParallel(
            module,
            process_group=self.groups[0],
            process_group_reduce_scatter=self.groups[1],
            reshard_after_forward=reshard,
            mixed_precision=lower,
            fp32_reduce_scatter=lower and self.reduce_in_fp32,
            compute_dtype=dtype,
            buffer_dtype=torch.float32,  # the RoPE tables
            compute_device=self.device,
            bucket_cap_mb=0,  # a block's norms are the only small messages; gloo refuses fairscale's buckets
        )


class _Between(nn.Module):
    """Stands between two wrappers. Each calls its flat parameter the same, and would find the other's in its module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("flat_param_"):
                raise
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class _Alone:
    """The process group of one rank, which makes no collective calls."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def _wrappers(model: nn.Module) -> Iterator[FullyShardedDataParallel]:
    return (module for module in model.modules() if isinstance(module, FullyShardedDataParallel))


def _forget_hooks(model: nn.Module, inputs: Any) -> None:
    """Before a forward, take away what the one before has hooked to its gradients.

    fairscale registers a hook on each parameter in every forward and leaves it there, unless the parameter's dtype
    changes in between: after thousands of steps in fp32 backward would call thousands of them.
    """
    for wrapper in _wrappers(model):
        for parameter in wrapper.params:
            _, hook = parameter.__dict__.pop("_shard_bwd_hook", (None, None))
            if hook is not None:
                hook.remove()


def _free_gathered(model: nn.Module, inputs: Any, outputs: Any) -> None:
    """After a forward that no backward will follow, free what it has left gathered."""
    if not torch.is_grad_enabled():
        for wrapper in _wrappers(model):
            wrapper._free_full_params()
