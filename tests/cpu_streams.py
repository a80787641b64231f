"""CUDA streams without CUDA, so that the wiring of fairscale's FSDP can be tried on gloo ranks.

fairscale makes streams only where there is CUDA, and uses them everywhere. Here all work happens at once, whatever
stream it is put on. What is kept of streams is who waits for whom: a weight that is cast or gathered on a stream that
has not waited for the optimizer's last step is counted, as on a GPU it might be the old one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist


class Stream:
    """A queue of work, of which nothing is queued."""

    def __init__(self) -> None:
        self.step = 0  # the last optimizer step that its work comes after

    def wait_stream(self, other: "Stream") -> None:
        self.step = max(self.step, other.step)


class Streams:
    """The streams of this process."""

    def __init__(self) -> None:
        self.computing = self.current = Stream()
        self.gathers = 0
        self.too_early = 0  # weights read that the optimizer might not have updated yet

    def optimizer_stepped(self) -> None:
        self.computing.step += 1

    def weight_read(self) -> None:
        self.gathers += 1
        self.too_early += self.current.step < self.computing.step

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


@contextmanager
def cpu_streams() -> Iterator[Streams]:
    """fairscale's FSDP works on the CPU in here."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    streams = Streams()
    gather = dist._all_gather_base
    cast = FullyShardedDataParallel._cast_fp32_param_shards_to_fp16
    step = torch.optim.AdamW.step

    def gathering(output: torch.Tensor, own: torch.Tensor, **kwargs: Any) -> Any:
        streams.weight_read()
        return gather(output, own, **kwargs)

    def casting(self: Any, *args: Any) -> None:
        cast(self, *args)
        with streams.on(self._streams["fp32_to_fp16"]):
            streams.weight_read()

    def stepping(self: Any, *args: Any) -> Any:
        result = step(self, *args)
        streams.optimizer_stepped()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", streams.on)
        patch.setattr(torch.cuda, "current_stream", lambda: streams.current)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        for name in ("_setup_streams", "_wait_for_previous_optim_step"):
            patch.setattr(FullyShardedDataParallel, name, as_with_cuda(getattr(FullyShardedDataParallel, name)))
        patch.setattr(FullyShardedDataParallel, "_cast_fp32_param_shards_to_fp16", casting)
        patch.setattr(dist, "_all_gather_base", gathering)
        patch.setattr(torch.optim.AdamW, "step", stepping)
        yield streams


def as_with_cuda(method: Any) -> Any:
    """A method that asks whether there is CUDA, and is told so."""

    def wrapped(self: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            method(self)

    return wrapped
