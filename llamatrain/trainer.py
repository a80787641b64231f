"""Composes the parts of a training run, then one loop that reads like the recipe.

Order of composition: settings settled with the run's start → data → model on meta → materialised → initialised
or loaded → optimizer → loop. What a step does stands in `train_step`; what happens around it in `fit`.
"""

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from llamatrain.checkpoint import commit
from llamatrain.config import RunConfig
from llamatrain.config.build import build
from llamatrain.config.resume import differences, keep_auto_choices
from llamatrain.data.loader import Batch, Loader
from llamatrain.data.order import DataState, SampleOrder, describe_rounding, round_weights
from llamatrain.data.sources import Source, check_tokenizers, open_sources
from llamatrain.distributed import (
    PRECISIONS,
    be_deterministic,
    check_environment,
    choose_device,
    choose_precision,
    describe_environment,
    device_name,
    memory_gib,
)
from llamatrain.errors import CheckpointError, ConfigError, DataError, UnhealthyRun
from llamatrain.evaluation.validation import Validation
from llamatrain.files import write_bytes_atomically
from llamatrain.model.attention import resolve_backend
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from llamatrain.model.loss import cross_entropy_sum
from llamatrain.observe.records import MetricsLog, Record
from llamatrain.observe.sinks import Console, Sink, Wandb, duration
from llamatrain.observe.throughput import Throughput
from llamatrain.optim.adamw import build_adamw, set_learning_rate
from llamatrain.optim.schedule import learning_rate
from llamatrain.resilience.control import StopRequest
from llamatrain.run_directory import DONE, PREEMPTED, RUNNING, UNHEALTHY, RunDirectory
from llamatrain.snapshots import Snapshots
from llamatrain.tokenizer import TOKENIZER_FILE, Tokenizer

log = logging.getLogger("llamatrain")


def run(config: RunConfig, stop: StopRequest) -> None:
    """Train to the end, or until asked to stop; the run directory says which. Raises LlamatrainError."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    directory = RunDirectory(config.run_dir)
    try:
        check_environment()
        with ExitStack() as resources:
            Trainer(settle(config, directory), directory, stop, resources).fit()
    except (ConfigError, DataError) as error:
        directory.refuse(str(error))
        raise
    except (CheckpointError, UnhealthyRun) as error:
        directory.set_status(UNHEALTHY, reason=str(error))
        raise
    except BaseException as error:
        directory.set_status(RUNNING, reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        directory.close()


def settle(config: RunConfig, directory: RunDirectory) -> RunConfig:
    """The configuration with every `auto` decided: as at the run's start, or now, if this is the start.

    A run has started when its first checkpoint is there: until then, settings are free to be corrected. Says what
    differs from the start. Raises ConfigError on a structural change.
    """
    if directory.config.exists() and directory.events("checkpoint"):
        earlier = started_with(directory.config)
        config = keep_auto_choices(config, earlier)
        for key, (old, new) in differences(config, earlier).items():
            log.info("%s was %s when the run started, is %s from here on", key, old, new)
    device = choose_device(config.train.device, setting="train.device")
    train = replace(config.train, device=device.type, precision=choose_precision(config.train.precision, device))
    model = replace(config.model, attention=resolve_backend(config.model.attention, device))
    return replace(config, train=train, model=model)


def started_with(path: Path) -> RunConfig:
    """The configuration in a run's config.yaml. Raises ConfigError naming the file."""
    try:
        return build(RunConfig, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not the configuration this program wrote there ({reason}); restore it") from None


class Trainer:
    """One run in one process."""

    def __init__(self, config: RunConfig, directory: RunDirectory, stop: StopRequest, resources: ExitStack) -> None:
        self.config = config
        self.directory = directory
        self.stop = stop
        self.device = torch.device(config.train.device)
        torch.manual_seed(config.train.seed)  # nothing in training draws from it; checkpoints hold its state
        if config.train.deterministic:
            be_deterministic()
        environment = describe_environment(self.device)
        self.tokenizer, self.sources = self._open_data()
        self.model, self.optimizer = self._build_model()
        self.snapshots = Snapshots(
            config, directory, self.model, self.optimizer, self.sources, environment, self.device
        )
        restored = self.snapshots.restore()
        self.step, self.data_state = restored or (0, DataState.start(self._mixture()))
        self.saved_step = self.step if restored else None
        if restored is None:
            init_weights(self.model, config.model, seed=config.train.seed)
        self.order = SampleOrder(
            [source.name for source in self.sources],
            [source.windows for source in self.sources],
            seed=config.data.seed,
            segments=self.data_state.segments,
        )
        self.validation = Validation(config, self.sources, self.tokenizer, self.device)
        self.metrics = MetricsLog(directory.metrics, resumed_step=self.saved_step)
        resources.callback(self.metrics.close)
        self.sinks = self._open_sinks(resources)
        self.throughput = Throughput(config, device_name=device_name(self.device), world_size=1)
        self._record_start(environment, resumed_from=self.saved_step)

    # ------------------------------------------------------------------ composition

    def _open_data(self) -> tuple[Tokenizer, list[Source]]:
        data = self.config.data
        sources = open_sources(data, vocab_size=self.config.model.vocab_size)
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
        for path, content in contents.items():
            if resumed_from is None or not path.exists():
                write_bytes_atomically(path, content)
        directory.record("start", step=self.step, resumed_from=resumed_from, config=config, environment=environment)

    def _build_model(self) -> tuple[Llama, torch.optim.AdamW]:
        config = self.config
        with torch.device("meta"):
            model = Llama(config.model, compute_dtype=PRECISIONS[config.train.precision])
        model.to_empty(device=self.device)
        model.rebuild_rope_tables()
        return model, build_adamw(model.named_parameters(), config.optim)

    def _open_sinks(self, resources: ExitStack) -> list[Sink]:
        sinks: list[Sink] = [Console(total_steps=self.config.total_steps)]
        if self.config.logging.wandb != "off":
            sinks.append(
                Wandb(
                    self.config.logging,
                    name=self.config.name,
                    directory=self.directory.path,
                    config=self.config.as_dict(),
                )
            )
        for sink in sinks:
            resources.callback(sink.close)
        return sinks

    # ------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train from the step reached to the last one; validate, log and save on the way."""
        config = self.config
        self.directory.set_status(RUNNING, step=self.step)
        self._validate_if_due()
        if self._finished():
            return
        loader = Loader(
            self.sources,
            self.order,
            self.data_state,
            seq_len=config.data.seq_len,
            global_batch=config.global_batch,
            micro_batch=config.train.micro_batch,
            prefetch_steps=config.data.prefetch_steps,
            device=self.device,
            document_mask=config.data.document_mask,
        )
        started, first = time.monotonic(), self.step
        self.throughput.lap()
        with loader:
            for batch in loader:
                loss, grad_norm = self.train_step(batch)
                self.throughput.step_done(data_wait_s=batch.data_wait_s)
                self._after_step(batch, loss, grad_norm)
                if self._finished():
                    break
        log.info("%d steps in %s", self.step - first, duration(time.monotonic() - started))

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The next update: the batch's gradient, clipped, through AdamW. Nothing is read back to the host.

        Returns the loss and the gradient's norm before clipping, fp32 scalars on the device.
        """
        loss = self.accumulate_gradients(batch)
        clip_norm = self.config.optim.clip_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        self.step += 1
        set_learning_rate(self.optimizer, self._learning_rate())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.data_state = batch.state_after
        return loss, grad_norm

    def accumulate_gradients(self, batch: Batch) -> Tensor:
        """Add the gradient of the batch's loss to the parameters'; returns the loss.

        The loss is the sum over all targets divided by the number of valid ones in the whole batch, so it does
        not depend on how the batch is cut into micro-batches.
        """
        loss = torch.zeros((), device=self.device)
        for inputs, targets, document_lengths in batch.micro_batches():
            logits = self.model(inputs, doc_lengths=document_lengths)
            micro_loss = cross_entropy_sum(logits, targets) / batch.valid_targets
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def _learning_rate(self) -> float:
        return learning_rate(self.step, self.config.optim, schedule_steps=self.config.schedule_steps)

    def _after_step(self, batch: Batch, loss: Tensor, grad_norm: Tensor) -> None:
        """Log, validate and save where the step is due for it, in this order: records come before their checkpoint."""
        config = self.config
        self.directory.heartbeat(self.step)
        logging_due = self._last or self.step % config.logging.every_steps == 0
        saving_due = self._last or self.step % config.checkpoint.every_steps == 0
        if logging_due:
            self._refuse_non_finite(batch, loss, grad_norm)
            self._log(self._training_record(loss, grad_norm))
        self._validate_if_due()
        if saving_due or self._stop_reason():
            self._refuse_non_finite(batch, loss, grad_norm)
            self._save()

    @property
    def _last(self) -> bool:
        return self.step >= self.config.total_steps

    def _stop_reason(self) -> str | None:
        """Why to leave before the end, if there is a reason."""
        stop_after = self.config.train.stop_after_step
        if self.stop.reason is None and stop_after is not None and self.step >= stop_after:
            return f"train.stop_after_step={stop_after}"
        return self.stop.reason

    def _finished(self) -> bool:
        """Whether to leave here, with the status that says why; never with a step that is not saved."""
        reason = self._stop_reason()
        if self.saved_step != self.step:
            return False
        if self._last and not self._validation_due():
            self.directory.record("done", step=self.step)
            self.directory.set_status(DONE, step=self.step)
            log.info("done: step %d of %d, in %s", self.step, self.config.total_steps, self.directory.path)
            return True
        if reason is None:
            return False
        self.directory.record("stop", step=self.step, reason=reason)
        self.directory.set_status(PREEMPTED, step=self.step, reason=reason)
        log.info("stopped at step %d (%s); the same command resumes there", self.step, reason)
        return True

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        started = time.perf_counter()
        self.metrics.sync()
        self.snapshots.save(self.step, self.data_state)
        self.saved_step = self.step
        seconds = time.perf_counter() - started
        self.throughput.pause(seconds)
        log.info("saved %s in %s", commit.step_name(self.step), duration(seconds))

    # ------------------------------------------------------------------ records

    def _training_record(self, loss: Tensor, grad_norm: Tensor) -> Record:
        epochs = self.order.epochs(self.data_state.next_sample)
        return {
            "train/loss": loss.item(),
            "train/grad_norm": grad_norm.item(),
            "train/lr": self._learning_rate(),
            **{f"data/epoch.{name}": epoch for name, epoch in epochs.items()},
            **self.throughput.lap(),
            "perf/memory_gib": memory_gib(self.device),
        }

    def _log(self, fields: Record) -> None:
        tokens = self.step * self.config.global_batch * self.config.data.seq_len
        record = {"step": self.step, "tokens": tokens, "time": time.time(), **fields}
        self.metrics.write(record)
        for sink in self.sinks:
            sink.write(record)

    def _validation_due(self) -> bool:
        """Whether this step is to be validated and has not been: a stop may have come in between."""
        every = self.config.evaluation.every_steps
        return bool(every) and (self._last or self.step % every == 0) and self.metrics.validated_step != self.step

    def _validate_if_due(self) -> None:
        """Validate; a request to stop breaks it off, and the resumed run begins with it."""
        if not self._validation_due():
            return
        started = time.perf_counter()
        record = self.validation.evaluate(self.model, keep_going=self._keep_validating)
        if record is not None:
            self._log(record)
        self.throughput.pause(time.perf_counter() - started)

    def _keep_validating(self) -> bool:
        self.directory.heartbeat(self.step)
        return self.stop.reason is None or self.step == 0  # before step 1 there is nothing to save

    def _refuse_non_finite(self, batch: Batch, loss: Tensor, grad_norm: Tensor) -> None:
        if not (torch.isfinite(loss) & torch.isfinite(grad_norm)).item():
            good = commit.list_checkpoints(self.directory.checkpoints)
            raise UnhealthyRun(
                f"step {self.step}: loss {loss.item()}, gradient norm {grad_norm.item()} (samples "
                f"{batch.samples[0]} to {batch.samples[-1]}); nothing was saved from it, the last good checkpoint "
                f"is {good[0] if good else 'none'}"
            )
