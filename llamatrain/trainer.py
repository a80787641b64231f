"""Composes the parts of a training run, then one loop that reads like the recipe.

Order of composition: settings settled with the run's start → data → model on meta → materialised → initialised
or loaded → optimizer → loop. What a step does stands in `train_step`; what happens around it in `fit`.
"""

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from llamatrain.checkpoint import commit, store
from llamatrain.config import RunConfig
from llamatrain.config.build import build
from llamatrain.config.resume import differences, keep_auto_choices
from llamatrain.data.loader import Batch, Loader
from llamatrain.data.order import DataState, SampleOrder, describe_rounding, round_weights
from llamatrain.data.sources import Source, open_sources
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
from llamatrain.model.attention import resolve_backend
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from llamatrain.model.loss import cross_entropy_sum
from llamatrain.observe.records import MetricsLog, Record
from llamatrain.observe.sinks import Console, Sink, Wandb, duration
from llamatrain.observe.throughput import Throughput
from llamatrain.optim.adamw import build_adamw, moment_tensors, set_learning_rate, set_step_count, step_count
from llamatrain.optim.schedule import learning_rate
from llamatrain.resilience.control import StopRequest
from llamatrain.run_directory import BAD_INPUT, DONE, PREEMPTED, RUNNING, UNHEALTHY, RunDirectory
from llamatrain.tokenizer import Tokenizer

log = logging.getLogger("llamatrain")


def run(config: RunConfig, stop: StopRequest) -> None:
    """Train to the end, or until asked to stop; the run directory says which. Raises LlamatrainError."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    check_environment()
    directory = RunDirectory(config.run_dir)
    try:
        directory.set_status(RUNNING, step=0, reason="starting")
        with ExitStack() as resources:
            Trainer(settle(config, directory), directory, stop, resources).fit()
    except (ConfigError, DataError) as error:
        directory.set_status(BAD_INPUT, reason=str(error))
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

    Writes config.yaml at the start; later says what differs from it. Raises ConfigError on a structural change.
    """
    if directory.config.exists():
        earlier = build(RunConfig, yaml.safe_load(directory.config.read_text(encoding="utf-8")))
        config = keep_auto_choices(config, earlier)
        for key, (old, new) in differences(config, earlier).items():
            log.info("%s was %s when the run started, is %s from here on", key, old, new)
    device = choose_device(config.train.device)
    train = replace(config.train, device=device.type, precision=choose_precision(config.train.precision, device))
    model = replace(config.model, attention=resolve_backend(config.model.attention, device))
    config = replace(config, train=train, model=model)
    directory.write_once(directory.config, yaml.safe_dump(config.as_dict(), sort_keys=False).encode())
    return config


class Trainer:
    """One run in one process."""

    def __init__(self, config: RunConfig, directory: RunDirectory, stop: StopRequest, resources: ExitStack) -> None:
        self.config = config
        self.directory = directory
        self.stop = stop
        self.device = torch.device(config.train.device)
        if config.train.deterministic:
            be_deterministic()
        self.environment = describe_environment(self.device)
        self.tokenizer, self.sources = self._open_data()
        self.model, self.optimizer = self._build_model()
        self.step = 0
        self.saved_step: int | None = None
        weights = {name: source.weight for name, source in config.data.sources.items()}
        log.info(describe_rounding(weights))
        self.data_state = DataState.start(round_weights(weights))
        resumed = self._restore()
        if resumed is None:
            init_weights(self.model, config.model, seed=config.train.seed)
        self.order = SampleOrder(
            [source.name for source in self.sources],
            [source.windows for source in self.sources],
            seed=config.data.seed,
            segments=self.data_state.segments,
        )
        self.validation = Validation(config, self.sources, self.tokenizer, self.device)
        self.metrics = MetricsLog(directory.metrics, resumed_step=resumed)
        resources.callback(self.metrics.close)
        self.sinks = self._open_sinks(resources)
        self.throughput = Throughput(config, device_name=device_name(self.device), world_size=1)
        directory.record(
            "start",
            step=self.step,
            resumed_from=resumed,
            config=config.as_dict(),
            environment=self.environment,
        )

    # ------------------------------------------------------------------ composition

    def _open_data(self) -> tuple[Tokenizer, list[Source]]:
        data = self.config.data
        first = next(source for source in data.sources.values() if source.weight > 0)
        tokenizer = Tokenizer(data.tokenizer or Path(first.path) / store.TOKENIZER_FILE)
        sources = open_sources(data, vocab_size=self.config.model.vocab_size, tokenizer_sha256=tokenizer.sha256)
        for source in sources:
            log.info(source.describe())
        self.directory.write_once(self.directory.path / store.TOKENIZER_FILE, tokenizer.path.read_bytes())
        return tokenizer, sources

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
        if self._finished():
            return
        if self.step == 0 and config.evaluation.every_steps:
            self._validate()
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
                self.step += 1
                self.data_state = batch.state_after
                self.throughput.step_done(data_wait_s=batch.data_wait_s)
                self._after_step(batch, loss, grad_norm)
                if self._finished():
                    break
        log.info("%d steps in %s", self.step - first, duration(time.monotonic() - started))

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One update: the batch's gradient, clipped, through AdamW. Nothing is read back to the host.

        Returns the loss and the gradient's norm before clipping, fp32 scalars on the device.
        """
        loss = self.accumulate_gradients(batch)
        clip_norm = self.config.optim.clip_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        set_learning_rate(self.optimizer, self._learning_rate(self.step + 1))
        self.optimizer.step()
        self.optimizer.zero_grad()
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

    def _learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config.optim, schedule_steps=self.config.schedule_steps)

    def _after_step(self, batch: Batch, loss: Tensor, grad_norm: Tensor) -> None:
        """Log, validate and save where the step is due for it, in this order: records come before their checkpoint."""
        config = self.config
        last = self.step == config.total_steps
        leaving = last or self.stop.reason is not None or self.step == config.train.stop_after_step
        logging_due = last or self.step % config.logging.every_steps == 0
        saving_due = leaving or self.step % config.checkpoint.every_steps == 0
        if logging_due or saving_due:
            self._refuse_non_finite(batch, loss, grad_norm)
        if logging_due:
            self._log(self._training_record(loss, grad_norm))
        if config.evaluation.every_steps and (last or self.step % config.evaluation.every_steps == 0):
            self._validate()
        if saving_due:
            self._save()
        self.directory.heartbeat(self.step)

    def _finished(self) -> bool:
        """Whether to leave here, with the status that says why."""
        if self.step >= self.config.total_steps:
            self.directory.record("done", step=self.step)
            self.directory.set_status(DONE, step=self.step)
            log.info("done: step %d of %d, in %s", self.step, self.config.total_steps, self.directory.path)
            return True
        stop_after = self.config.train.stop_after_step
        reason = self.stop.reason
        if reason is None and stop_after is not None and self.step >= stop_after:
            reason = f"train.stop_after_step={stop_after}"
        if reason is None or self.saved_step != self.step:
            return False
        self.directory.record("stop", step=self.step, reason=reason)
        self.directory.set_status(PREEMPTED, step=self.step, reason=reason)
        log.info("stopped at step %d (%s); the same command resumes there", self.step, reason)
        return True

    # ------------------------------------------------------------------ records

    def _training_record(self, loss: Tensor, grad_norm: Tensor) -> Record:
        epochs = self.order.epochs(self.data_state.next_sample)
        return {
            "train/loss": loss.item(),
            "train/grad_norm": grad_norm.item(),
            "train/lr": self._learning_rate(self.step),
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

    def _validate(self) -> None:
        started = time.perf_counter()
        self._log(self.validation.evaluate(self.model))
        self.throughput.pause(time.perf_counter() - started)

    def _refuse_non_finite(self, batch: Batch, loss: Tensor, grad_norm: Tensor) -> None:
        if not (torch.isfinite(loss) & torch.isfinite(grad_norm)).item():
            good = commit.list_checkpoints(self.directory.checkpoints)
            raise UnhealthyRun(
                f"step {self.step}: loss {loss.item()}, gradient norm {grad_norm.item()} (samples "
                f"{batch.samples[0]} to {batch.samples[-1]}); nothing was saved from it, the last good checkpoint "
                f"is {good[0] if good else 'none'}"
            )

    # ------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        started = time.perf_counter()
        self.metrics.sync()
        settings = self.config.checkpoint
        content = {
            "tokens": self.step * self.config.global_batch * self.config.data.seq_len,
            "mesh": {"world_size": 1},
            "model": asdict(self.config.model),
            "config": self.config.as_dict(),
            "environment": self.environment,
            "data": {"state": self.data_state.to_json(), "manifests": self._data_identity()},
            "optimizer": {"step": step_count(self.optimizer)},
            "guard": {},
        }
        path = store.save(self.directory.checkpoints, self.step, self._tensor_groups(), content)
        self.directory.record("checkpoint", step=self.step, path=path.name)
        commit.prune(
            self.directory.checkpoints,
            keep_last=settings.keep_last,
            keep_every_steps=settings.keep_every_steps,
        )
        self.saved_step = self.step
        seconds = time.perf_counter() - started
        self.throughput.pause(seconds)
        log.info("saved %s in %s", path, duration(seconds))

    def _tensor_groups(self) -> dict[str, dict[str, Tensor]]:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        parameters = dict(self.model.named_parameters())
        return {
            "model": dict(parameters),
            "optimizer": moment_tensors(self.optimizer, parameters.items()),
            "rng": rng,
        }

    def _data_identity(self) -> dict[str, str]:
        return {source.name: source.manifest.hash for source in self.sources}

    def _restore(self) -> int | None:
        """Load the newest checkpoint that verifies; returns its step, or None if the run has none yet.

        Raises UnhealthyRun if checkpoints were committed and none of them can be used.
        """
        root = self.directory.checkpoints
        commit.clean(root)
        refusals = []
        for checkpoint in commit.list_checkpoints(root):
            try:
                manifest = store.open_checkpoint(checkpoint, hashes=self.config.checkpoint.verify_hashes)
                self._load(checkpoint, manifest)
            except CheckpointError as error:
                log.warning("passing over a checkpoint: %s", error)
                self.directory.record("refused", path=checkpoint.name, reason=str(error))
                refusals.append(str(error))
                continue
            log.info("resuming from %s", checkpoint)
            return self.step
        if refusals or self.directory.events("checkpoint"):
            raise UnhealthyRun(
                f"{root}: checkpoints were written and none can be used"
                f"{': ' + refusals[0] if refusals else ' (they are gone)'}; restore one, or start anew with name=…"
            )
        log.info("%s has no checkpoint: starting at step 0", self.directory.path)
        return None

    def _load(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        groups = self._tensor_groups()
        for group, tensors in groups.items():
            store.load_group(checkpoint, manifest, group, tensors)
        torch.set_rng_state(groups["rng"]["cpu"])
        if "cuda" in groups["rng"]:
            torch.cuda.set_rng_state(groups["rng"]["cuda"], self.device)
        try:
            step, updates = int(manifest["step"]), int(manifest["optimizer"]["step"])
            data_state = DataState.from_json(manifest["data"]["state"])
            identity = manifest["data"]["manifests"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint}: the manifest lacks a field ({error})") from None
        self._check_data_identity(checkpoint, identity)
        set_step_count(self.optimizer, updates)
        self.step = self.saved_step = step
        self.data_state = data_state

    def _check_data_identity(self, checkpoint: Path, identity: dict[str, str]) -> None:
        for name, sha256 in self._data_identity().items():
            if identity.get(name) != sha256:
                raise DataError(
                    f"data.sources.{name}: its data set is not the one {checkpoint} was trained on; "
                    "give the path of that one, or start another run with name=…"
                )
