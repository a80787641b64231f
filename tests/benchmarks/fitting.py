"""How much of a workload fits a GPU's memory, by llamatrain's own arithmetic, which estimates from above."""

from collections.abc import Iterable
from dataclasses import replace

from llamatrain.config import DataConfig, RunConfig, TrainConfig
from llamatrain.memory import training_memory
from tests.benchmarks.workload import Workload


def needed_gib(workload: Workload, recompute: str, *, compiled: bool = False) -> float:
    """Memory of llamatrain's training on one device, with an attention that keeps no matrix."""
    config = RunConfig(
        model=replace(workload.model, attention="xformers"),
        data=DataConfig(seq_len=workload.seq_len),
        train=TrainConfig(
            precision=workload.precision,
            micro_batch=workload.micro_batch,
            global_batch_tokens=workload.tokens_per_step,
            compile=compiled,
        ),
    )
    return sum(training_memory(config, recompute, world_size=1).values()) / 2**30


def largest_micro_batch(
    workload: Workload, recompute: str, *, budget_gib: float, sizes: Iterable[int], compiled: bool = False
) -> int | None:
    """The largest of `sizes` that fits; None if none does."""
    needed = {n: needed_gib(replace(workload, micro_batch=n), recompute, compiled=compiled) for n in sizes}
    return max((n for n, gib in needed.items() if gib <= budget_gib), default=None)


def layers_that_fit(workload: Workload, recompute: str, *, budget_gib: float) -> int:
    """As many layers of the model as fit; at most its own."""
    model = workload.model
    for layers in range(model.n_layers, 0, -1):
        if needed_gib(replace(workload, model=replace(model, n_layers=layers)), recompute) <= budget_gib:
            return layers
    return 0
