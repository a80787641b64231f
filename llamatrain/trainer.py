"""Composes the parts of a training run, then one loop that reads like the recipe.

Order of composition: data → model, spread over the ranks (`llamatrain.parallel.composition`) → optimizer → initialised
or loaded → loop. What a step does stands in `train_step`; what happens around it in `fit`. Every rank runs the same
lines; rank 0 alone writes, prints and decides. Before it, ranks meet and settings are settled: `llamatrain.session`.
"""

import logging
import math
import socket
import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import torch
import yaml
from torch import Tensor

from llamatrain import rollback
from llamatrain.arithmetic import micro_batches, parameter_count
from llamatrain.config import RunConfig
from llamatrain.config.parallel import layout
from llamatrain.data.loader import Batch, Loader
from llamatrain.data.order import DataState, SampleOrder, describe_rounding, round_weights
from llamatrain.data.sources import Source, check_tokenizers, open_sources
from llamatrain.device import (
    be_deterministic,
    current_device,
    describe_environment,
    device_name,
    memory_gib,
)
from llamatrain.distributed import World
from llamatrain.evaluator import Evaluator
from llamatrain.files import write_bytes_atomically
from llamatrain.garbage import GarbageCollection
from llamatrain.initial_weights import make_weights
from llamatrain.integrity import OWN_LOSS, Integrity
from llamatrain.observe.goodput import Accounts
from llamatrain.observe.profiler import Profiler, aside
from llamatrain.observe.records import Record
from llamatrain.observe.run_records import RunRecords
from llamatrain.observe.sinks import duration
from llamatrain.observe.stragglers import Stragglers
from llamatrain.observe.throughput import Throughput
from llamatrain.optim.adamw import build_adamw, set_learning_rate, start_anew
from llamatrain.optim.clipping import clip_gradients
from llamatrain.optim.schedule import learning_rate
from llamatrain.parallel import fsdp, overlap
from llamatrain.parallel.composition import build_model
from llamatrain.resilience.agreement import Agreement
from llamatrain.resilience.bad_steps import BadSteps
from llamatrain.resilience.control import SAVE_FILE, STOP_FILE, StopRequest
from llamatrain.resilience.guard import Guard
from llamatrain.run_directory import (
    DONE,
    PREEMPTED,
    RUNNING,
    SAVING,
    STARTING,
    TRAINING,
    VALIDATING,
    RunDirectory,
)
from llamatrain.snapshots import Snapshots
from llamatrain.tokenizer import TOKENIZER_FILE, Tokenizer

log = logging.getLogger("llamatrain")


class Trainer:
    """One run, as one rank of it sees it."""

    def __init__(
        self, config: RunConfig, directory: RunDirectory, stop: StopRequest, world: World, resources: ExitStack
    ) -> None:
        self.config = config
        self.directory = directory
        self.world = world
        self.layout = layout(config.parallel, world.size)
        self.share = self.layout.share(world.rank)
        self.device = current_device(config.train.device)
        torch.manual_seed(config.train.seed)  # nothing in training draws from it; checkpoints hold its state
        if config.train.deterministic:
            be_deterministic()
        nodes = world.gather(socket.gethostname())
        environment = {**describe_environment(self.device), "hosts": len(set(nodes))}
        with world.together():
            self.tokenizer, self.sources = self._open_data()
        world.check_same("data", {source.name: source.manifest.hash for source in self.sources})
        self.model, self.passes, self.parameters = build_model(config, self.device, world_size=world.size)
        self.optimizer = build_adamw(self.parameters.items(), config.optim)
        guard = Guard(config.resilience)
        self.bad_steps = BadSteps(guard, self.optimizer, directory, self.device)
        self.rollbacks = 0  # by this process
        self.save_put_off = False  # until an update is made again
        self.snapshots = Snapshots(
            config, directory, self.parameters, self.optimizer, self.sources, environment, self.device, world, guard
        )
        self._begin()
        self.integrity = Integrity(config, directory, world, self.model, self.snapshots)
        self.agreement = Agreement(
            stop, directory, world, save_every_s=60 * (config.checkpoint.every_minutes or math.inf)
        )
        with world.together():
            self.evaluator = Evaluator(config, self.sources, self.tokenizer, self.device, world, self.layout)
        self.records = RunRecords(config, directory, world, resumed_step=self.saved_step, resources=resources)
        self.evaluator.begin(self.records)
        self.throughput = Throughput(config, device_name=device_name(self.device), world_size=world.size)
        slow = config.logging.straggler_factor
        self.stragglers = Stragglers(self.model, world=world, device=self.device, nodes=nodes, factor=slow)
        self._record_start(environment, resumed_from=self.saved_step)
        self.accounts = Accounts(directory, self.throughput.counted)
        log.info(self.describe())

    def describe(self) -> str:
        """One line for the log: on what the run is spread, and how."""
        train, mesh = self.config.train, self.layout
        spread = " x ".join(f"{axis} {size}" for axis, size in mesh.sizes().items() if size > 1 or axis == "dp_shard")
        per_rank = micro_batches(self.config, self.world.size)
        return (
            f"{parameter_count(self.config.model):,} parameters on {self.world.size} x {train.device} ({spread}), "
            f"{train.precision}{', compiled' if train.compile else ''}, recompute {self.config.parallel.recompute}, "
            f"attention {self.config.model.attention}; "
            f"a step is {per_rank} micro-batches of {train.micro_batch} on each{self.passes.remark(per_rank)}"
        )

    # ------------------------------------------------------------------ composition

    def _begin(self) -> None:
        """Go to where the newest checkpoint stands, or to the start; without the samples of rollbacks."""
        restored = self.snapshots.restore()
        if restored is None:
            make_weights(
                self.config,
                self.parameters,
                tokenizer_sha256=self.tokenizer.sha256,
                directory=self.directory,
                world=self.world,
            )
            start_anew(self.optimizer)
            self.bad_steps.guard.load({})
        self.step, state = restored or (0, DataState.start(self._mixture()))
        self.saved_step = self.step if restored else None
        self.data_state = rollback.without_passed_over(state, self.directory, self.world)
        self.order = SampleOrder(
            [source.name for source in self.sources],
            [source.windows for source in self.sources],
            seed=self.config.data.seed,
            segments=self.data_state.segments,
        )

    def _open_data(self) -> tuple[Tokenizer, list[Source]]:
        data = self.config.data
        share = (self.world.rank, self.world.size)
        sources = open_sources(data, vocab_size=self.config.model.vocab_size, share=share)
        tokenizer = Tokenizer(data.tokenizer or sources[0].manifest.directory / TOKENIZER_FILE)
        check_tokenizers(sources, tokenizer.sha256)
        for source in sources:
            log.info(source.describe())
        if tokenizer.vocab_size < self.config.model.vocab_size:
            log.info(
                "the tokenizer has %d ids, the model %d: model.vocab_size=%d would save the rest",
                tokenizer.vocab_size,
                self.config.model.vocab_size,
                tokenizer.vocab_size,
            )
        return tokenizer, sources

    def _mixture(self) -> dict[str, int]:
        weights = {name: source.weight for name, source in self.config.data.sources.items()}
        log.info(describe_rounding(weights))
        return round_weights(weights)

    def _record_start(self, environment: dict[str, Any], *, resumed_from: int | None) -> None:
        directory, config = self.directory, self.config.as_dict()
        contents = {
            directory.config: yaml.safe_dump(config, sort_keys=False).encode(),
            directory.path / TOKENIZER_FILE: self.tokenizer.path.read_bytes(),
        }
        changed = self.snapshots.changed
        if changed:  # of the run from here on, whatever the start's were
            directory.record("changed", step=self.step, settings=changed)
        for path, content in contents.items():
            if self.world.leads and (resumed_from is None or changed or not path.exists()):
                write_bytes_atomically(path, content)
        directory.record(
            "start",
            step=self.step,
            resumed_from=resumed_from,
            world_size=self.world.size,
            config=config,
            environment=environment,
        )

    # ------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train from the step reached to the last one; validate, log and save on the way."""
        self.directory.set_status(RUNNING, step=self.step, phase=TRAINING)
        self._evaluate_if_due()
        if self._finished():
            return
        overlap.tell(self.config, self.parameters, self.device, self.world)
        started, first = time.monotonic(), self.step
        self.agreement.post()
        self.throughput.lap()
        with (
            closing(self._batches()) as batches,
            GarbageCollection(self.config.train.collect_garbage_every_steps) as garbage,
            self._profiler() as profiler,
        ):
            for batch in profiler.watched(batches):
                self.stragglers.step_begins(data_wait_s=batch.data_wait_s)
                self.integrity.before_step(self.step + 1, partial(self._trial, batch))
                loss, grad_norm = self.train_step(batch)
                garbage.step_ended(self.step)
                self.throughput.step_done(data_wait_s=batch.data_wait_s)
                self._after_step(loss, grad_norm)
                self.stragglers.step_ended(send=self._logging_due(self.step + 1))
                if self._finished():
                    break
        self.agreement.close()
        self.stragglers.close()
        log.info("%d steps in %s", self.step - first, duration(time.monotonic() - started))

    def _profiler(self) -> Profiler:
        config, run_dir, pause = self.config, self.directory.path, self.throughput.pause
        last = min(config.total_steps, config.train.stop_after_step or config.total_steps)
        return Profiler(
            config.logging,
            run_dir,
            step=self.step,
            last_step=last,
            world=self.world,
            device=self.device,
            pause=pause,
        )

    def _batches(self) -> Generator[Batch, None, None]:
        """Batches from the step reached on; after a rollback, from there."""
        while True:
            opened_after = self.rollbacks
            with self.open_loader() as loader:
                for batch in loader:
                    yield batch
                    if self.rollbacks > opened_after:
                        break

    def open_loader(self) -> Loader:
        """This rank's batches from the step reached on."""
        config = self.config
        return Loader(
            self.sources,
            self.order,
            self.data_state,
            seq_len=config.data.seq_len,
            global_batch=config.global_batch,
            micro_batch=config.train.micro_batch,
            rank=self.share.data_rank,
            world_size=self.layout.data_parallel,
            prefetch_steps=config.data.prefetch_steps,
            device=self.device,
            document_mask=config.data.document_mask,
        )

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The next update: the batch's gradient, clipped, through AdamW. The host does not wait for it.

        Returns the loss and the gradient's norm before clipping, fp32 scalars on the device, the same on all ranks.
        """
        loss = self.accumulate_gradients(batch)
        grad_norm = self._clip()
        self.step += 1
        set_learning_rate(self.optimizer, self._learning_rate())
        self.bad_steps.update(self.step, loss, grad_norm, self.data_state.span(self.config.global_batch))
        self.data_state = batch.state_after
        return loss, grad_norm

    def _trial(self, batch: Batch) -> dict[str, Tensor]:
        """What `train_step` would do to weights, moments and counts, and its numbers; all else stays as it is."""
        own = self._accumulate(batch)
        loss, grad_norm = self._over_ranks(own), self._clip()
        self.bad_steps.apply(loss, grad_norm)
        return {OWN_LOSS: own, "loss": loss, "gradient norm": grad_norm}

    def accumulate_gradients(self, batch: Batch) -> Tensor:
        """Add the gradient of the batch's loss to the parameters'; returns the loss, over all ranks' shares.

        The loss is the sum over all targets divided by the number of valid ones in the whole batch, so it does
        not depend on how the batch is cut into micro-batches, or spread over ranks.
        """
        self.stragglers.first_collective()
        return self._over_ranks(self._accumulate(batch))

    def _accumulate(self, batch: Batch) -> Tensor:
        """The same, of this rank's share alone."""
        return self.passes.accumulate(list(batch.micro_batches()), self._valid_targets(batch))

    def _over_ranks(self, loss: Tensor) -> Tensor:
        return self.world.sum(loss * self.share.has_loss)

    def _clip(self) -> Tensor:
        return clip_gradients(self.parameters.values(), self.config.optim.clip_norm or math.inf, self.world)

    def _valid_targets(self, batch: Batch) -> int | Tensor:
        """Targets that carry loss in the whole step, over all ranks."""
        if not self.config.data.document_mask:
            return batch.valid_targets * self.layout.data_parallel
        # filled, not copied, into the device: a copy from the host would wait for the step before
        counted = batch.valid_targets * self.share.counts_targets
        own = torch.full((), counted, dtype=torch.int64, device=self.device)
        return self.world.sum(own)

    def _learning_rate(self) -> float:
        return learning_rate(self.step, self.config.optim, schedule_steps=self.config.schedule_steps)

    def _after_step(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Log, validate and save where the step is due for it, in this order: records come before their checkpoint."""
        self.directory.heartbeat(self.step)
        self.agreement.step_ended()
        logging_due = self._logging_due(self.step)
        self.integrity.after_step(self.step)
        if logging_due or self._saving_due() or self.evaluator.due(self.step):
            # the host waits for this step anyway
            self.bad_steps.settle()
            self.integrity.look()
        if self._rolled_back():
            return
        if logging_due:
            self.records.write(self._where(), self._training_record(loss, grad_norm))
        self._evaluate_if_due()
        if self._saving_due():
            self._save_unless_bad()

    def _save_unless_bad(self) -> None:
        """Save, or put it off while steps bring no update: it may be the weights that are bad. A stop does not wait."""
        leaving = self._last or self._stop_reason() is not None
        if self.bad_steps.guard.in_a_row and not leaving:
            if not self.save_put_off:
                log.warning("step %d: not saved while steps bring no update", self.step)
            self.save_put_off = True
        else:
            self._save()

    def _rolled_back(self) -> bool:
        """Whether a spike took the run back to a checkpoint. Raises UnhealthyRun after too many bad steps."""
        rollback.refuse_too_many(self.bad_steps, self.directory, self.world)
        if self.bad_steps.spike is None:
            return False
        started, from_step, spike = time.perf_counter(), self.step, self.bad_steps.spike
        self.directory.heartbeat(self.step, phase=STARTING)
        with aside():
            self._begin()
            fsdp.free_gathered(self.model)
        samples = rollback.samples_of(spike, self.step, self.data_state, self.config)
        rollback.record(spike, samples, from_step, self.step, self.config, self.directory, self.world)
        self.data_state = self.data_state.pass_over(*samples)
        self.records.back_to(self.step)
        self.evaluator.begin(self.records)
        self.bad_steps.forget()
        self.rollbacks += 1
        self.throughput.pause(time.perf_counter() - started)
        self.accounts.write(self.step)  # what was counted until here is lost with the rest
        return True

    def _logging_due(self, step: int) -> bool:
        return step >= self.config.total_steps or step % self.config.logging.every_steps == 0

    def _saving_due(self) -> bool:
        by_number = self._last or self.save_put_off or self.step % self.config.checkpoint.every_steps == 0
        return by_number or self.agreement.save_requested or self._stop_reason() is not None

    @property
    def _last(self) -> bool:
        return self.step >= self.config.total_steps

    def _stop_reason(self) -> str | None:
        """Why to leave before the end, if there is a reason; the same on all ranks."""
        stop_after = self.config.train.stop_after_step
        if self.agreement.stop_reason is None and stop_after is not None and self.step >= stop_after:
            return f"train.stop_after_step={stop_after}"
        return self.agreement.stop_reason

    def _finished(self) -> bool:
        """Whether to leave here, with the status that says why; never with a step that is not saved."""
        reason = self._stop_reason()
        if self.saved_step != self.step:
            return False
        if self._last or reason is not None:
            started = time.perf_counter()
            self.snapshots.finish_save()
            self.throughput.pause(time.perf_counter() - started, SAVING)
        if self._last and not self.evaluator.due(self.step):
            self.accounts.end(self.step)
            self.directory.record("done", step=self.step)
            self.directory.set_status(DONE, step=self.step)
            log.info("done: step %d of %d, in %s", self.step, self.config.total_steps, self.directory.path)
        elif reason is not None:
            self.accounts.end(self.step)
            self.directory.record("stop", step=self.step, reason=reason)
            self.directory.set_status(PREEMPTED, step=self.step, reason=reason)
            without = f" without {reason}" if reason.startswith("train.") else ""
            log.info("stopped at step %d (%s); the same command%s goes on from there", self.step, reason, without)
        else:
            return False
        self.agreement.honoured(STOP_FILE)
        self.agreement.honoured(SAVE_FILE)  # this very step is saved
        return True

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        self.save_put_off = False
        started = time.perf_counter()
        self.directory.heartbeat(self.step, phase=SAVING)
        self.integrity.before_save(self.step)
        committed = partial(self.agreement.honoured, SAVE_FILE) if self.agreement.save_requested else None
        with aside():
            self.snapshots.start_save(
                self.step, self.data_state, records_on_disk=self.records.sync, committed=committed
            )
        self.agreement.save_begun()
        self.saved_step = self.step
        self.throughput.pause(time.perf_counter() - started, SAVING)
        self.accounts.write(self.step)

    # ------------------------------------------------------------------ records and evaluation

    def _training_record(self, loss: Tensor, grad_norm: Tensor) -> Record:
        epochs = self.order.epochs(self.data_state.next_sample)
        return {
            "train/loss": loss.item(),
            "train/grad_norm": grad_norm.item(),
            "train/lr": self._learning_rate(),
            "train/skipped": self.bad_steps.guard.skipped,
            **{f"data/epoch.{name}": epoch for name, epoch in epochs.items()},
            **self.throughput.lap(),
            **self.stragglers.record(),
            **self.accounts.record(),
            "perf/memory_gib": memory_gib(self.device),
        }

    def _where(self) -> Record:
        return {"step": self.step, "tokens": self.data_state.samples_read * self.config.data.seq_len}

    def _evaluate_if_due(self) -> None:
        """Validation and tasks; a request to stop breaks them off, and the resumed run begins with them."""
        if not self.evaluator.due(self.step):
            return
        started = time.perf_counter()
        with aside():
            self.evaluator.evaluate(
                self.model, self.passes.loss, self._where(), self.records, keep_going=self._keep_validating
            )
        self.throughput.pause(time.perf_counter() - started, VALIDATING)

    def _keep_validating(self) -> bool:
        self.directory.heartbeat(self.step, phase=VALIDATING)
        self.agreement.look_now()
        return self.agreement.stop_reason is None or self.step == 0  # before step 1 there is nothing to save
