"""Forwards that ranks make together, though each has work of its own.

Sharded weights are gathered by all ranks at once, so each forward of one is a forward of all. Before each, the ranks
count who has work; who has none left makes a forward of one token beside the others, until nobody has. So neither the
number of batches nor the length of what a model writes need be the same on all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llamatrain.distributed import World
from llamatrain.model.llama import KVCache, Llama

ASK_EVERY = 8  # forwards


class Interrupted(Exception):
    """The ranks have agreed to stop."""


class Lockstep:
    """The model as all ranks call it: `forward` while there is work, then `catch_up`, as often as the others."""

    def __init__(self, model: Llama, world: World, *, apart: bool, keep_going: Callable[[], bool]) -> None:
        """apart: ranks may have different work. keep_going: asked by all at the same time, and says the same to all."""
        self._model, self._world, self._apart, self._keep_going = model, world, apart, keep_going
        self._forwards = 0

    def forward(self, tokens: Tensor, *, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        """The model's logits. Raises Interrupted on all ranks at once."""
        self._anybody_works(1)
        logits: Tensor = self._model(tokens, cache=cache, at=at)
        return logits

    def catch_up(self) -> None:
        """Go along until nobody has work. Raises Interrupted on all ranks at once."""
        while self._apart and self._anybody_works(0):
            nothing = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
            self._model(nothing, at=nothing[0])

    def _anybody_works(self, own: int) -> bool:
        if self._forwards % ASK_EVERY == 0 and not self._keep_going():
            raise Interrupted
        self._forwards += 1
        return not self._apart or bool(self._world.sum(torch.tensor(own, device=self._device)).item())

    @property
    def _device(self) -> torch.device:
        return self._model.rope_cos.device
