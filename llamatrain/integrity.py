"""Whether the run's state is what it should be: copies compared, steps run twice, every so many steps.

What a layout lets be seen: docs/reliability.md. Nothing here waits for the device but at the steps that are run twice;
copies are looked at where the host waits anyway, before a step is logged and before it is saved.
"""

import logging
from collections.abc import Callable, Mapping

import torch.distributed as dist
from torch import Tensor

from llamatrain.checkpoint import commit
from llamatrain.config import RunConfig
from llamatrain.distributed import World
from llamatrain.errors import UnhealthyRun
from llamatrain.flat import local_boxes
from llamatrain.model.llama import Llama
from llamatrain.parallel import fsdp
from llamatrain.resilience.divergence import Copies, DivergenceCheck, copies_of
from llamatrain.resilience.replay import Replay
from llamatrain.run_directory import RunDirectory
from llamatrain.snapshots import Snapshots

log = logging.getLogger("llamatrain")

OWN_LOSS = "own loss"  # of a rank's share of the batch, before anything is added up


class Integrity:
    """The checks of one run, as one rank takes part in them."""

    def __init__(
        self, config: RunConfig, directory: RunDirectory, world: World, model: Llama, snapshots: Snapshots
    ) -> None:
        self._directory, self._world = directory, world
        tensors = {name: tensor for group in snapshots.weights_and_moments().values() for name, tensor in group.items()}
        spread = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        self._divergence = DivergenceCheck(world, copies_of(spread))
        self._compare_every = config.resilience.compare_copies_every_steps
        self._replay_every = _replay_interval(config)
        self._replay = Replay(
            {f"{name}#{n}": box for name, tensor in tensors.items() for n, (box, _) in enumerate(local_boxes(tensor))}
            | {f"count {n}": state["step"] for n, state in enumerate(snapshots.optimizer.state.values())}
        )
        self._comparing: int | None = None  # the step whose gathered weights are still to be seen
        fsdp.after_forward(model, self._compare_gathered)

    def before_step(self, step: int, trial: Callable[[], Mapping[str, Tensor]]) -> None:
        """To be called before each step; `trial` takes it and returns what it computed, `OWN_LOSS` among it.

        Raises UnhealthyRun if the step does not repeat.
        """
        if self._replay_every and step % self._replay_every == 0:
            self._refuse_other(step, self._world.gather(self._replay.run(trial)))
        self._comparing = step if self._comparison_due(step) else None

    def after_step(self, step: int) -> None:
        """To be called after each step."""
        if self._comparison_due(step):
            self._divergence.begin(step)

    def before_save(self, step: int) -> None:
        """To be called before a save: what is saved was compared. Raises UnhealthyRun if copies differ."""
        if self._compare_every and not self._comparison_due(step):
            self._divergence.begin(step)
        self.look()

    def look(self) -> None:
        """Raises UnhealthyRun if copies were found to differ; where the host waits for the device anyway."""
        self._divergence.finish(self._good)

    def _comparison_due(self, step: int) -> bool:
        return bool(self._compare_every) and step % self._compare_every == 0

    def _compare_gathered(self, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> None:
        if self._comparing is not None and tensors:
            step, self._comparing = self._comparing, None
            self._divergence.begin(step, [Copies(group, tensors)])

    def _refuse_other(self, step: int, differing: list[list[str]]) -> None:
        ranks = [rank for rank, names in enumerate(differing) if names]
        if not ranks:
            return
        by_own_loss = [rank for rank in ranks if OWN_LOSS in differing[rank]]
        told = ", ".join(map(str, (by_own_loss or ranks)[:8])) + (
            " and others" if len(by_own_loss or ranks) > 8 else ""
        )
        where = (
            f"the loss of rank {told} alone, before anything was added up: that device computed wrongly"
            if by_own_loss
            else f"not the loss of any rank's share, but {differing[ranks[0]][0]} and what follows on rank {told}: a "
            "backward, a reduction or an update went wrong"
        )
        raise UnhealthyRun(f"step {step}, run twice from the same state, gave other bits in {where}. {self._good()}")

    def _good(self) -> str:
        good = commit.list_checkpoints(self._directory.checkpoints)
        return f"The newest checkpoint is {good[0].name if good else 'none'}, in {self._directory.path}"


def _replay_interval(config: RunConfig) -> int:
    every, train = config.train.replay_check_every_steps, config.train
    if every and train.device == "cuda" and not train.deterministic:
        log.info(
            "steps are not run twice to compare them (train.replay_check_every_steps=%d): on CUDA that needs "
            "train.deterministic=true",
            every,
        )
        return 0
    return every
