"""A rehearsal of a run: everything is built at full shape, makes one step, is saved, wiped, loaded, and compared.

What would end a run in its first hours (memory, disk, a rank that sees other files) ends this within minutes. The
step is the heaviest there is: every sample one whole document, and two micro-batches, since gradients of the first
are still held during the second; in a pipeline one more than it keeps in memory. It happens in a directory of its own
beside the run's, which is removed.
"""

import os
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llamatrain import session
from llamatrain.arithmetic import micro_batches_in_flight
from llamatrain.config import RunConfig
from llamatrain.data.loader import Batch
from llamatrain.device import memory_gib, memory_total_gib
from llamatrain.errors import CheckpointError
from llamatrain.flat import local_boxes
from llamatrain.observe.sinks import duration
from llamatrain.process import this_process
from llamatrain.resilience.control import StopRequest
from llamatrain.trainer import Trainer


def run(config: RunConfig, stop: StopRequest) -> None:
    """Rehearse the run that `config` describes; on many processes every rank calls this. Raises LlamatrainError."""
    run_dir = Path(os.path.abspath(config.run_dir))
    aside = replace(
        config,
        run_dir=f"{run_dir}.dry_run",
        evaluation=replace(config.evaluation, every_steps=0),
        logging=replace(config.logging, wandb="off"),
    )
    leads = this_process().leads
    missing = [parent for parent in run_dir.parents if not parent.exists()]
    if leads:  # what a killed rehearsal left would be resumed
        shutil.rmtree(aside.run_dir, ignore_errors=True)
    try:
        session.run(aside, stop, work=rehearse)
    finally:
        if leads:
            shutil.rmtree(aside.run_dir, ignore_errors=True)
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()


def rehearse(trainer: Trainer) -> None:
    """One step, save, load; rank 0 prints what it took. Raises CheckpointError if another state comes back."""
    with trainer.open_loader() as loader:
        batch = longest(next(loader), 1 + micro_batches_in_flight(trainer.config, trainer.world.size))
    began = time.perf_counter()
    loss, grad_norm = (value.item() for value in trainer.train_step(batch))
    step_s, memory = time.perf_counter() - began, memory_gib(trainer.device)

    before = checksums(trainer)
    began = time.perf_counter()
    trainer.snapshots.save(trainer.step, trainer.data_state)
    save_s = time.perf_counter() - began
    wipe(trainer)
    began = time.perf_counter()
    trainer.snapshots.restore()
    load_s = time.perf_counter() - began
    with trainer.world.together():
        if checksums(trainer) != before:
            raise CheckpointError(f"{trainer.directory.checkpoints}: another state was loaded than had been saved")

    peaks = trainer.world.gather(memory)
    if trainer.world.leads:
        size = sum(file.stat().st_size for file in trainer.directory.checkpoints.rglob("*.safetensors"))
        highest = max(range(len(peaks)), key=lambda rank: peaks[rank])
        print(
            f"dry run: {trainer.describe()}\n"
            f"  peak memory   {peaks[highest]:.2f} GiB on rank {highest}, {min(peaks):.2f} GiB on the lowest, of "
            f"{memory_total_gib(trainer.device):.2f} GiB\n"
            f"  first step    {duration(step_s)} for {len(batch.samples) // batch.micro_batch} "
            f"micro-batches on each (start-up costs included); loss {loss:.4f}, gradient norm {grad_norm:.4f}\n"
            f"  checkpoint    {size / 2**30:.2f} GiB, saved in {duration(save_s)}, loaded in {duration(load_s)}, "
            "and what came back is what was saved",
            flush=True,
        )


def longest(batch: Batch, micro_batches: int) -> Batch:
    """The first so many micro-batches of a batch, or all, each sample taken as one whole document."""
    rows = min(len(batch.samples), micro_batches * batch.micro_batch)
    lengths = [[batch.seq_len] * batch.micro_batch] * (rows // batch.micro_batch)
    return replace(
        batch,
        samples=batch.samples[:rows],
        sources=batch.sources[:rows],
        rows=batch.tokens[:rows],  # without the targets apart, in which documents are masked
        document_lengths=lengths if batch.document_lengths is not None else None,
        valid_targets=rows * batch.seq_len,
    )


def checksums(trainer: Trainer) -> list[int]:
    """One number per weight and moment: the sum of this rank's bits, as integers."""
    return [int(local.view(torch.int32).sum(dtype=torch.int64)) for local in _state(trainer)]


def wipe(trainer: Trainer) -> None:
    """Overwrite weights and moments with zeros."""
    for local in _state(trainer):
        local.zero_()


def _state(trainer: Trainer) -> list[Tensor]:
    groups = trainer.snapshots.weights_and_moments().values()
    return [box for tensors in groups for tensor in tensors.values() for box, _ in local_boxes(tensor)]
