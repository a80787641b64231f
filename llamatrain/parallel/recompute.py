"""What a block's backward computes again, so that less has to stay in memory between forward and backward.

- none: nothing.
- block_backward: elementwise operations, by the paper's hand-written backward (`llamatrain.model.block_backward`).
- selective: all but the outputs that `parallel.recompute_save` names (linear layers and attention).
- full: the block, all but its last matrix product.

In this order they cost more time: block_backward adds no matrix product and no attention; selective by its default
list adds none either, but every operation of its forward passes through Python, and in backward one block as a whole
is in memory again; full repeats six of the seven products and the attention, a quarter more. `auto` takes the first
that fits the device's memory by `memory.training_memory`.

A choice is an attribute of each block, `training_forward`. No module is wrapped, so the parameters keep their names;
what checkpointing repeats lies inside the block, so FSDP2's hooks on the block run once in forward and once in
backward, and the repetition finds the weights gathered.
"""

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llamatrain.arithmetic import STATE_BYTES, parameter_count
from llamatrain.config import ParallelConfig, RunConfig
from llamatrain.config.parallel import LINEARS, RECOMPUTE, layout
from llamatrain.device import memory_total_gib
from llamatrain.errors import ConfigError
from llamatrain.memory import USABLE, training_memory
from llamatrain.model.block_backward import own_backward
from llamatrain.model.llama import Block, Llama

log = logging.getLogger("llamatrain")

MATRIX_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "matmul", "linear")}


def apply_recompute(model: Llama, settings: ParallelConfig) -> None:
    """Give each block its forward for training. Before sharding; `auto` must be resolved."""
    if settings.recompute not in RECOMPUTE:
        raise ValueError(f"recompute: {settings.recompute!r}; resolve_recompute gives one of {', '.join(RECOMPUTE)}")
    for block in model.layers.values():
        assert isinstance(block, Block)
        if settings.recompute == "block_backward":
            block.training_forward = own_backward
        elif settings.recompute == "selective":
            block.training_forward = SelectiveForward(block, settings.recompute_save)
        elif settings.recompute == "full":
            block.training_forward = checkpointed_forward


def checkpointed_forward(
    block: Block, x: Tensor, cos: Tensor, sin: Tensor, doc_lengths: Sequence[int] | None
) -> Tensor:
    """`Block.plain_forward` of which x alone is kept; backward repeats it as far as the input of w2's product."""
    out: Tensor = checkpoint(
        block.plain_forward, x, cos, sin, doc_lengths=doc_lengths, use_reentrant=False, preserve_rng_state=False
    )
    return out


class SelectiveForward:
    """`Block.plain_forward` of which x and the outputs named in `save` are kept.

    A linear layer says its name when it is entered; the first matrix product after that is its own. So the list means
    layers, however torch computes them and whatever products attention is made of. Attention is known by its
    operator: the fused kernels of torch and xformers. Attention by the formula (model.attention=reference, or sdpa
    where torch has no kernel) has none; it is repeated, as if it were not on the list.
    """

    def __init__(self, block: Block, save: Sequence[str]) -> None:
        self.save = frozenset(save)
        self.entered: str | None = None  # the linear layer whose product is yet to come
        self.products: list[str] = []  # of this forward
        for name, linear in linears(block).items():
            linear.register_forward_pre_hook(partial(self._enter, name))

    def __call__(self, block: Block, x: Tensor, cos: Tensor, sin: Tensor, doc_lengths: Sequence[int] | None) -> Tensor:
        self.products = []
        out: Tensor = checkpoint(
            block.plain_forward,
            x,
            cos,
            sin,
            doc_lengths=doc_lengths,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(create_selective_checkpoint_contexts, self._policy),
        )
        if self.products != list(LINEARS):  # a torch that computes linear layers by another operator
            raise RuntimeError(f"recompute=selective saw the products of {self.products}, not of {list(LINEARS)}")
        return out

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.entered = name

    def _policy(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """Called for each operation of the forward; by torch before 2.13 for those of the repetition too."""
        name, saved = operator.name().partition(".")[0], False
        if self.entered is not None and name in MATRIX_PRODUCTS:
            saved = self.entered in self.save
            self.products.append(self.entered)
            self.entered = None
        elif is_fused_attention(name):
            saved = "attention" in self.save
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def linears(block: Block) -> dict[str, nn.Module]:
    """The block's linear layers by the names of the LLaMA code."""
    parents = dict.fromkeys(("wq", "wk", "wv", "wo"), block.attention) | dict.fromkeys(
        ("w1", "w2", "w3"), block.feed_forward
    )
    return {name: getattr(parent, name) for name, parent in parents.items()}


def is_fused_attention(name: str) -> bool:
    """Whether an operator, by its name with namespace, is attention's forward in one kernel.

    torch's begin with `aten::_scaled_dot_product_`; xformers calls torch's inner ones, or its own, or those of
    Flash Attention 3 and of CUTLASS for Blackwell.
    """
    namespace, _, operator = name.partition("::")
    if namespace == "aten":
        by_formula = operator.startswith("_scaled_dot_product_attention")
        fused = ("_efficient_attention_forward", "_flash_attention_forward", "_cudnn_attention_forward")
        return (operator.startswith("_scaled_dot_product_") and not by_formula) or operator in fused
    attention = namespace.startswith(("xformers", "flash_attn")) or "fmha" in name
    return attention and ("fwd" in operator or "forward" in operator)


# auto


def resolve_recompute(config: RunConfig, device: torch.device, world_size: int, *, ranks_per_node: int = 1) -> str:
    """`parallel.recompute` with `auto` decided: the cheapest choice that fits; on the CPU, without a budget, none.

    Logs what each choice tried would need. Raises ConfigError if none fits, and for a choice by name if not even what
    is held all the time does. Precision and attention are resolved.
    """
    parallel = config.parallel
    if device.type == "cpu":
        refuse_more_than_the_machine(config, memory_total_gib(device), world_size, ranks_per_node=ranks_per_node)
    available = parallel.recompute_budget_gib
    if available is None and device.type != "cuda":
        return "none" if parallel.recompute == "auto" else parallel.recompute
    if available is None:
        available = USABLE * memory_total_gib(device)
    for choice in RECOMPUTE if parallel.recompute == "auto" else (parallel.recompute,):
        parts = {name: size / 2**30 for name, size in training_memory(config, choice, world_size=world_size).items()}
        needed = sum(parts.values())
        arithmetic = " + ".join(f"{name} {size:.2f}" for name, size in parts.items() if size)
        fits = "chosen" if needed <= available else "too much"
        log.info("recompute=%s needs %.2f GiB of %.2f (%s): %s", choice, needed, available, arithmetic, fits)
        if needed <= available:
            return choice
    whose = (
        "parallel.recompute_budget_gib allows" if parallel.recompute_budget_gib else f"{USABLE:.0%} of the device is"
    )
    held = parts["weights, gradients, moments"]
    if parallel.recompute != "auto" and held <= available:  # the formula estimates from above: it may still fit
        log.warning("parallel.recompute=%s may need %.2f GiB, %s %.2f", parallel.recompute, needed, whose, available)
        return parallel.recompute
    ranks = layout(parallel, world_size)
    if held > available:
        enough = math.ceil(ranks.dp_shard * held / available)
        raise ConfigError(
            f"weights, gradients and moments alone need {held:.2f} GiB on each device, {whose} {available:.2f}: "
            f"spread the weights over at least parallel.dp_shard={enough} ranks"
        )
    raise ConfigError(
        f"even parallel.recompute=full needs {needed:.2f} GiB on each device, {whose} {available:.2f}: "
        f"lower train.micro_batch={config.train.micro_batch}, or spread the weights over more than "
        f"parallel.dp_shard={ranks.dp_shard} ranks"
    )


def refuse_more_than_the_machine(config: RunConfig, memory_gib: float, world_size: int, *, ranks_per_node: int) -> None:
    """Raises ConfigError where the ranks of a node cannot all hold their weights, gradients and moments in its memory.

    What else they need is not counted: a formula of it would refuse runs that fit.
    """
    ranks = layout(config.parallel, world_size)
    copies = ranks.dp_replicate * ranks_per_node / world_size  # of the whole model, on this node
    held = STATE_BYTES * parameter_count(config.model) * copies / 2**30
    if held <= memory_gib:
        return
    enough = math.ceil(ranks.dp_shard * held / memory_gib)
    raise ConfigError(
        f"weights, gradients and moments alone need {held:.1f} GiB on each machine, which has {memory_gib:.1f}: spread "
        f"the weights over at least parallel.dp_shard={enough} ranks, {ranks_per_node} to a machine like this one, or "
        "take a smaller model"
    )
