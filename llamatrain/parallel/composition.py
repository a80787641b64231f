"""The model of a run, spread over its ranks: the order in which the ways of sharing are put together.

Model on meta → compiled → pipeline stage → shared layers → shared sequences → recompute → sharded → memory. Each works
on what the ones before have left, and none needs weights, which have values only afterwards.
"""

from datetime import timedelta
from typing import NamedTuple

import torch
from torch import nn

from llamatrain.config import ModelConfig, ParallelConfig, RunConfig
from llamatrain.config.parallel import Layout, layout
from llamatrain.device import PRECISIONS
from llamatrain.flat import FlatPart
from llamatrain.model.compilation import apply_compile
from llamatrain.model.llama import Llama
from llamatrain.parallel import fsdp
from llamatrain.parallel.context import share_sequences
from llamatrain.parallel.mesh import build_mesh, context_group, data_parallel_mesh
from llamatrain.parallel.pipeline import OneStage, Pipeline, keep_stage
from llamatrain.parallel.recompute import apply_recompute
from llamatrain.parallel.tensor import share_layers


class Spread(NamedTuple):
    """What a rank has of a model."""

    model: Llama
    passes: OneStage  # how micro-batches pass through it
    parameters: dict[str, nn.Parameter | FlatPart]  # by name; those that the model itself shows change while gathered


def build_model(config: RunConfig, device: torch.device, *, world_size: int) -> Spread:
    """This rank's part of the model, in memory without values; all ranks call it. Every `auto` is settled."""
    with torch.device("meta"):
        model = Llama(config.model, compute_dtype=PRECISIONS[config.train.precision])
    if config.train.compile:
        apply_compile(model)
    if config.parallel.sharding == "fairscale":
        return _by_fairscale(model, config, device, world_size)
    if world_size > 1:
        return _over_mesh(model, config, device, world_size)
    apply_recompute(model, config.parallel)
    return _in_memory(model, OneStage(model, config.parallel), device)


def build_spread(
    config: ModelConfig, parallel: ParallelConfig, ranks: Layout, device: torch.device, *, compute_dtype: torch.dtype
) -> Llama:
    """This rank's part of a model without a pipeline, in memory without values, to be evaluated; all ranks call it.

    With one shard every rank has whole layers, or its part of each by tp, and gathers nothing.
    """
    with torch.device("meta"):
        model = Llama(config, compute_dtype=compute_dtype)
    if ranks.pp * ranks.dp_replicate * ranks.shards * ranks.tp > 1:
        mesh = build_mesh(ranks, device)
        if ranks.tp > 1:
            share_layers(model, mesh["tp"])
        sequence_group = context_group(ranks, timeout=timedelta(seconds=parallel.timeout_s))
        if sequence_group is not None:
            share_sequences(model, sequence_group)
        if ranks.shards > 1:
            fsdp.shard(model, data_parallel_mesh(mesh), parallel)
    model.to_empty(device=device)
    model.rebuild_rope_tables()
    return model


def _over_mesh(model: Llama, config: RunConfig, device: torch.device, world_size: int) -> Spread:
    parallel, ranks = config.parallel, layout(config.parallel, world_size)
    mesh = build_mesh(ranks, device)
    if ranks.pp > 1:
        keep_stage(model, mesh["pp"])
    if ranks.tp > 1:
        share_layers(model, mesh["tp"])
    sequence_group = context_group(ranks, timeout=timedelta(seconds=parallel.timeout_s))
    if sequence_group is not None:
        share_sequences(model, sequence_group)
    apply_recompute(model, parallel)
    fsdp.shard(model, data_parallel_mesh(mesh), parallel)
    if ranks.pp == 1:
        return _in_memory(model, OneStage(model, parallel), device)
    return _in_memory(model, Pipeline(model, parallel, mesh["pp"], tokens_shared_by=ranks.cp * ranks.tp), device)


def _in_memory(model: Llama, passes: OneStage, device: torch.device) -> Spread:
    model.to_empty(device=device)
    model.rebuild_rope_tables()
    return Spread(model, passes, dict(model.named_parameters()))


def _by_fairscale(model: Llama, config: RunConfig, device: torch.device, world_size: int) -> Spread:
    from llamatrain.parallel import fairscale  # imports fairscale, which few use

    apply_recompute(model, config.parallel)
    model = fairscale.shard(model, device, config.parallel, world_size=world_size)
    return Spread(model, OneStage(model, config.parallel), {**fairscale.named_parameters(model)})
