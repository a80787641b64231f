"""The order in which a step's collectives are issued, against its computation.

Communication hides behind computation only if it is issued early: the gather of the next layer before this layer is
done, in forward and in backward, and a layer's gradients as soon as they are there. FSDP2 names what it does in the
profiler's record; that record, read as an order, is the same on gloo as on NCCL, where nothing else could show it
without a GPU.
"""

from collections.abc import Sequence

from torch.profiler import ProfilerActivity, profile

from llamatrain.config.parallel import ParallelConfig
from llamatrain.data.loader import Batch
from llamatrain.trainer import Trainer

PREFIX = "FSDP::"


def issued(trainer: Trainer, batch: Batch) -> list[str]:
    """What FSDP2 did for the last micro-batch of a batch, in order: `all_gather (layers.3)`, `pre_backward (…)`, …"""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        trainer.accumulate_gradients(batch)
    trainer.optimizer.zero_grad()
    found = [(event.time_range.start, event.name) for event in record.events() if event.name.startswith(PREFIX)]
    names = [name.removeprefix(PREFIX) for _, name in sorted(found, key=lambda pair: pair[0])]
    last = max((place for place, name in enumerate(names) if name == "root_pre_forward"), default=0)
    return names[last:]


def violations(events: Sequence[str], settings: ParallelConfig, *, layers: int, gathers: bool) -> list[str]:
    """Where the order is not the one that hides communication; empty if it is.

    `gathers`: whether the weights lie on several ranks, so that there is anything to gather.
    """
    turn = next((place for place, name in enumerate(events) if name.startswith("pre_backward")), None)
    if turn is None:
        return ["the profiler's record shows nothing of FSDP2: this torch names its work otherwise"]
    forward, backward = list(events[:turn]), list(events[turn:])
    kept = settings.reshard_after_forward == "never"
    found = []
    for layer in range(layers):
        for ahead in range(1, settings.forward_prefetch + 1):
            gathered, done = f"all_gather (layers.{layer + ahead})", f"post_forward (layers.{layer})"
            if gathers and layer + ahead < layers and not _before(forward, gathered, done):
                found.append(f"forward: layers.{layer + ahead} is not gathered while layers.{layer} computes")
        for ahead in range(1, max(1, settings.backward_prefetch) + 1):
            gathered, done = f"all_gather (layers.{layer - ahead})", f"post_backward_accumulate (layers.{layer})"
            if gathers and not kept and layer >= ahead and not _before(backward, gathered, done):
                found.append(f"backward: layers.{layer - ahead} is not gathered while layers.{layer} computes")
        if kept and f"all_gather (layers.{layer})" in backward:
            found.append(f"backward: layers.{layer} is gathered although it was kept")
        leaves, below = f"post_backward_reduce (layers.{layer})", f"post_backward_accumulate (layers.{layer - 1})"
        if layer and not _before(backward, leaves, below):
            found.append(f"backward: the gradients of layers.{layer} do not leave before layers.{layer - 1} is done")
    return found


def _before(events: Sequence[str], first: str, second: str) -> bool:
    return first in events and second in events and events.index(first) < events.index(second)
