"""Python's garbage collector, run by all ranks at the same steps.

Left to itself it runs in each process after so many new objects: on one rank now, on another then, and each time all
ranks wait for the one that collects at their next collective. It also looks at everything there is, again and again,
most of which (modules, the model, compiled kernels) stays until the end. A step makes little garbage: what is in no
cycle, tensors for one, is freed at once without it.
"""

import gc
from typing import Self


class GarbageCollection:
    """While entered, garbage is collected at every `every_steps`-th step alone; with 0, as Python sees fit.

    What exists when it is entered, and what the first collection finds in use, is not looked at again.
    """

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps
        self._warm = False

    def __enter__(self) -> Self:
        self._enabled = gc.isenabled()
        if self._every_steps:
            gc.disable()
            gc.collect()
            gc.freeze()
        return self

    def step_ended(self, step: int) -> None:
        """Collect if it is time; `step` is the same on all ranks."""
        if not self._every_steps or step % self._every_steps:
            return
        gc.collect()
        if not self._warm:  # what the first steps made to keep
            gc.freeze()
            self._warm = True

    def __exit__(self, *_: object) -> None:
        if self._every_steps:
            gc.unfreeze()
        if self._enabled:
            gc.enable()
