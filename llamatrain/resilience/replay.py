"""A step run twice from the same state must end in the same bits: for state that exists once.

Weights, moments and Adam's counts are kept in host memory, the step is run, its results reduced to a number each; the
state is put back, and the step is run again. What differs was computed wrongly once: by a device, a link or a kernel
that is not repeatable (on CUDA only train.deterministic=true makes all of them so). Then the state is put back once
more, and training goes on as if nothing had been.

A fault in one rank's forward shows in its own loss, before anything is summed; one in a backward spreads with the
gradients over all ranks at once.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llamatrain.resilience.divergence import fingerprint


class Replay:
    """Runs steps twice. `state` is all that a step reads and changes, the memory of this rank, by name."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = dict(state)
        self._kept: dict[str, Tensor] = {}

    def run(self, step: Callable[[], Mapping[str, Tensor]]) -> list[str]:
        """Run `step`, which returns what it computed, twice, and undo it. Names of what came out differently."""
        self._keep()
        first, second = (self._once(step) for _ in range(2))
        return [name for name in first if first[name] != second[name]]

    @torch.no_grad()
    def _once(self, step: Callable[[], Mapping[str, Tensor]]) -> dict[str, int]:
        with torch.enable_grad():
            computed = step()
        found = self._fingerprints(computed)
        for name, tensor in self._state.items():
            tensor.copy_(self._kept[name])
        return found

    def _keep(self) -> None:
        for name, tensor in self._state.items():
            if name not in self._kept:
                self._kept[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
            self._kept[name].copy_(tensor, non_blocking=True)

    def _fingerprints(self, computed: Mapping[str, Tensor]) -> dict[str, int]:
        numbers = {name: fingerprint(tensor) for name, tensor in {**computed, **self._state}.items()}
        values = torch.stack([number.cpu() for number in numbers.values()]).tolist()
        return dict(zip(numbers, values, strict=True))
