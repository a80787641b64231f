"""What a run is made of, into checkpoints and out of them: weights, optimizer, random state, place in the data.

`restore` takes the newest checkpoint that proves whole and fits; one that does not is told, set aside and passed
over. The trainer knows when to save, the checkpoint room how to write: this knows what. All ranks call both together;
each writes and reads its part, rank 0 decides which checkpoint.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamatrain.arithmetic import parameter_shapes, save_interval_s, seconds_between_failures
from llamatrain.checkpoint import commit, store
from llamatrain.checkpoint.background import Background, Staging, retried
from llamatrain.checkpoint.interchange.own import IMPORTED
from llamatrain.config import RunConfig
from llamatrain.config.build import build
from llamatrain.config.parallel import layout
from llamatrain.config.resume import differences, environment_changes, is_structural
from llamatrain.data.order import DataState, round_weights
from llamatrain.data.sources import Source
from llamatrain.distributed import World
from llamatrain.errors import CheckpointError, ConfigError, DataError, UnhealthyRun
from llamatrain.flat import FlatPart
from llamatrain.observe.sinks import duration
from llamatrain.optim.adamw import moment_tensors, set_step_count, step_count
from llamatrain.resilience.guard import Guard
from llamatrain.run_directory import RunDirectory

log = logging.getLogger("llamatrain")

Names = dict[str, set[str]]  # of tensors, by group of the checkpoint


@dataclass
class Snapshots:
    """Saves and restores one run. What it holds is filled or read in place."""

    config: RunConfig
    directory: RunDirectory
    parameters: dict[str, nn.Parameter | FlatPart]
    optimizer: torch.optim.AdamW
    sources: list[Source]
    environment: dict[str, Any]
    device: torch.device
    world: World
    guard: Guard

    def __post_init__(self) -> None:
        self.changed: dict[str, tuple[Any, Any]] = {}  # structural settings since the checkpoint restored: then, now
        self._known_data: dict[str, str] = {}  # manifests' hashes by source, of sources since left out as well
        self._staging = Staging(self.device)
        self._background = Background(daemon=self.world.size > 1)
        self._beside = self.world.aside(self.config.parallel)
        self._failures = 0  # saves in a row
        self._unsaved: CheckpointError | None = None  # why there is no checkpoint of the last save
        self._began: float | None = None  # the save before
        self._advised = False

    def save(self, step: int, data_state: DataState) -> None:
        """Write, commit and record the checkpoint of `step`, then prune. Raises CheckpointError if that fails."""
        self.start_save(step, data_state)
        self.finish_save()

    def start_save(
        self,
        step: int,
        data_state: DataState,
        *,
        records_on_disk: Callable[[], None] | None = None,
        committed: Callable[[], None] | None = None,
    ) -> None:
        """Begin `save`: when this returns the tensors may change, and the rest is done beside training.

        Waits for the save before, if that is still under way. Without checkpoint.asynchronous all is done here.
        Of rank 0, `records_on_disk` is called before anything is written, `committed` when all is; both perhaps by
        another thread. Raises CheckpointError if so many saves in a row failed that the run is to stop.
        """
        began, settings = time.perf_counter(), self.config.checkpoint
        self._look_at_last_save(give_up_after=settings.max_failures)
        self._unsaved = None
        share, beside = store.Share.of(self._groups()), settings.asynchronous
        job = partial(
            self._write_with_retries,
            step,
            self._content(data_state),
            self._staging.copy(share) if beside else share,
            began=began,
            blocked_s=time.perf_counter() - began if beside else None,
            records_on_disk=records_on_disk,
            committed=committed,
        )
        self._background.start(job)
        if not beside:
            self._look_at_last_save(give_up_after=settings.max_failures)

    def finish_save(self) -> None:
        """Wait until the save under way is done. Raises CheckpointError if it failed."""
        self._look_at_last_save(give_up_after=1)

    def _look_at_last_save(self, *, give_up_after: int) -> None:
        try:
            if self._background.wait():
                self._failures = 0
        except CheckpointError as error:
            self._failures, self._unsaved = self._failures + 1, error
            if self._failures < give_up_after:
                log.warning("training goes on without that checkpoint; saves that failed in a row: %d", self._failures)
        if self._unsaved is not None and self._failures >= give_up_after:
            saved = commit.list_checkpoints(self.directory.checkpoints)
            newest = f"the newest checkpoint is {saved[0].name}" if saved else "there is no checkpoint yet"
            many = f"; {self._failures} saves in a row failed (checkpoint.max_failures)" if give_up_after > 1 else ""
            raise CheckpointError(
                f"{self._unsaved}{many}; {newest}: when that is mended, the same command goes on from there"
            ) from self._unsaved

    def _content(self, data_state: DataState) -> dict[str, Any]:
        """What the manifest says beside tensors and files."""
        return {
            "tokens": data_state.samples_read * self.config.data.seq_len,
            "mesh": {"world_size": self.world.size, **layout(self.config.parallel, self.world.size).sizes()},
            "model": asdict(self.config.model),
            "config": self.config.as_dict(),
            "environment": self.environment,
            "tokenizer_sha256": self.sources[0].manifest.tokenizer_sha256,
            "data": {"state": data_state.to_json(), "manifests": {**self._known_data, **self._data_identity()}},
            "optimizer": {"step": step_count(self.optimizer)},
            "guard": self.guard.to_json(),
        }

    def _groups(self) -> store.TensorGroups:
        return {**self.weights_and_moments(), "rng": self._random_states()}

    def _write_with_retries(
        self,
        step: int,
        content: dict[str, Any],
        share: store.Share,
        *,
        began: float,
        blocked_s: float | None,
        records_on_disk: Callable[[], None] | None,
        committed: Callable[[], None] | None,
    ) -> None:
        """What is done beside training; `blocked_s`: how long that waited, None for all the time."""
        committed_as: list[Path] = []  # not written again if only the journal's line is refused

        def write() -> None:
            self._decided(records_on_disk or (lambda: None))  # decided by all: only rank 0 has records
            if not committed_as:
                root = self.directory.checkpoints
                committed_as.append(store.write(root, step, share, content, world=self._beside))
            self._decided(lambda: note(committed_as[0]))

        def note(path: Path) -> None:
            seconds = time.perf_counter() - began
            blocked = seconds if blocked_s is None else blocked_s
            self.directory.record("checkpoint", step=step, path=path.name, seconds=seconds, blocked_s=blocked)
            log.info("saved %s in %s; training waited %s", path.name, duration(seconds), duration(blocked))
            self._advise(began, blocked)
            if committed is not None:
                committed()
            if content["guard"]["in_a_row"]:  # if the weights are bad, the good ones before must stay
                return
            try:
                commit.prune(
                    self.directory.checkpoints, keep_last=settings.keep_last, keep_every_steps=settings.keep_every_steps
                )
            except OSError as error:
                log.warning("%s: an older checkpoint cannot be removed (%s)", self.directory.checkpoints, error)

        def tell(error: CheckpointError) -> None:
            log.warning("%s", error)
            with suppress(OSError):
                self.directory.record("checkpoint failed", step=step, reason=str(error))

        settings = self.config.checkpoint
        retried(write, retries=settings.retries, told=tell)

    def _advise(self, began: float, blocked_s: float) -> None:
        """Say once how often to save, when there were two saves: the first one's staging takes memory anew."""
        before, self._began = self._began, began
        hours = self.config.checkpoint.hours_between_failures
        if self._advised or before is None:
            return
        self._advised = True
        failure_s = seconds_between_failures(self.world.size) if hours is None else 3600 * hours
        log.info(
            "a save costs training %s; with a failure every %s (checkpoint.hours_between_failures), saving every %s "
            "loses least time; now it is every %s",
            duration(blocked_s),
            duration(failure_s),
            duration(save_interval_s(blocked_s, failure_s)),
            duration(began - before),
        )

    def _decided(self, do: Callable[[], None]) -> None:
        """What rank 0 does beside training, the others waiting: here there is time, in a step's collective not."""

        def refusing() -> None:
            try:
                do()
            except OSError as error:
                raise CheckpointError(f"{self.directory.path}: cannot be written ({error})") from error

        self._beside.decide(refusing)

    def restore(self) -> tuple[int, DataState] | None:
        """Load the newest checkpoint that can be used; its step and data state, or None if the run has none yet.

        Raises UnhealthyRun if checkpoints were committed and none of them can be used, DataError if the run was
        started on other data.
        """
        with suppress(CheckpointError):  # told already; what it was to write is not there
            self._background.wait()
        self._unsaved = None
        root, world = self.directory.checkpoints, self.world
        refused: list[tuple[Path, str]] = []
        names = self.names_everywhere()
        allowed = world.decide(lambda: [key for event in self.directory.events("changed") for key in event["settings"]])
        for name in world.decide(self._candidates):
            checkpoint = root / name
            try:
                hashes = self.config.checkpoint.verify_hashes
                manifest = store.open_checkpoint(checkpoint, hashes=hashes, world=world)
                with world.together():
                    restored = self._load(manifest, store.Reader(checkpoint, manifest), names, allowed)
            except CheckpointError as error:
                log.warning("passing over a checkpoint: %s", error)
                refused.append((checkpoint, str(error)))
                continue
            if world.leads:
                self._set_aside(refused)
            log.info("resuming from %s", checkpoint)
            return restored
        committed = world.decide(lambda: bool(self.directory.events("checkpoint")))
        if refused or committed:
            reason = refused[0][1] if refused else "they are gone"
            raise UnhealthyRun(
                f"{root}: checkpoints were written, none can be used: {reason}; restore one, or start anew with name=…"
            )
        log.info("%s has no checkpoint: starting at step 0", self.directory.path)
        return None

    def _candidates(self) -> list[str]:
        commit.clean(self.directory.checkpoints)
        return [checkpoint.name for checkpoint in commit.list_steps(self.directory.checkpoints)]

    def _set_aside(self, refused: list[tuple[Path, str]]) -> None:
        for checkpoint, reason in refused:
            aside = commit.set_aside(checkpoint)
            self.directory.record("refused", path=checkpoint.name, reason=reason, moved_to=aside.name)

    def _load(
        self, manifest: commit.Manifest, reader: store.Reader, names: Names, allowed: list[str]
    ) -> tuple[int, DataState]:
        """`allowed` are structural settings that the run has changed before, perhaps after this checkpoint."""
        if IMPORTED in manifest:
            raise CheckpointError(
                f"{reader.checkpoint}: it is an import, weights alone; a run of its own begins with them by "
                f"init.from={reader.checkpoint.parent.parent}"
            )
        try:
            step, updates = manifest["step"], manifest["optimizer"]["step"]
            if type(updates) is not int or not 0 <= updates <= step:
                raise ValueError(f"{updates!r} updates in {step} steps")
            data_state = DataState.from_json(manifest["data"]["state"])
            identity = dict(manifest["data"]["manifests"])
            ranks = int(manifest["mesh"]["world_size"])
            environment = dict(manifest["environment"])
            earlier = build(RunConfig, manifest["config"])
            self.guard.load(manifest["guard"])
        except (KeyError, TypeError, ValueError, ArithmeticError, DataError, ConfigError) as error:
            raise CheckpointError(f"{reader.checkpoint}: a field of the manifest cannot be used ({error})") from None
        try:
            changed = differences(self.config, earlier, allowed=allowed)
        except ConfigError as error:
            raise CheckpointError(f"{reader.checkpoint}: it is of another run: {error}") from None
        self.changed = {key: values for key, values in changed.items() if is_structural(key)}
        self._check_length(step, data_state)
        self._compare_environment(environment)
        self.fill(reader, names)
        self._check_data(identity)
        self._load_random_states(reader)
        set_step_count(self.optimizer, updates)
        if ranks != self.world.size:
            log.info("%d processes wrote the checkpoint, %d go on from it", ranks, self.world.size)
        weights = {name: source.weight for name, source in self.config.data.sources.items()}
        return step, data_state.change_weights(round_weights(weights))

    def _check_length(self, step: int, data_state: DataState) -> None:
        """Raises ConfigError if a length in tokens would be counted in steps of a size that not all have."""
        if self.config.train.tokens is not None and data_state.samples_read != step * self.config.global_batch:
            raise ConfigError(
                "train.global_batch_tokens has changed since the run's start, so train.tokens does not say how many "
                "steps it has: give the length as train.steps=N train.tokens=null"
            )

    def _compare_environment(self, then: dict[str, Any]) -> None:
        """Tell, or refuse, other versions and another machine than wrote the checkpoint."""
        changed = environment_changes(self.environment, then)
        if changed and self.config.train.same_environment:
            told = "; ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items())
            raise ConfigError(
                f"train.same_environment=true, and the checkpoint was written elsewhere: {told}; go back there, or set "
                "train.same_environment=false"
            )
        for name, (old, new) in changed.items():
            log.info("%s was %s where the checkpoint was written, is %s here", name, old, new)

    def _check_data(self, identity: dict[str, str]) -> None:
        """Raises DataError if a source is another data set than the one of its name that the run has read."""
        self._known_data = identity
        for name, sha256 in self._data_identity().items():
            added = name not in identity and f"data.sources.{name}.weight" in self.changed
            if identity.get(name) != sha256 and not added:
                raise DataError(
                    f"data.sources.{name}: its data set is not the one the run was started on; "
                    "give the path of that one, or start another run with name=…"
                )

    def _data_identity(self) -> dict[str, str]:
        return {source.name: source.manifest.hash for source in self.sources}

    def weights_and_moments(self) -> dict[str, dict[str, Tensor | FlatPart]]:
        """What training changes, by group of the checkpoint; the tensors themselves, or what of them is here."""
        moments = moment_tensors(self.optimizer, self.parameters.items())
        return {"model": {**self.parameters}, "optimizer": moments}

    def names_everywhere(self) -> Names:
        """Of each group, the tensors that some rank has; all ranks call it. Raises ValueError if the model has others.

        A pipeline's stages must be the whole model between them: of what no rank has, no rank would notice the loss.
        """
        own = {group: set(tensors) for group, tensors in self.weights_and_moments().items()}
        names = own
        if layout(self.config.parallel, self.world.size).pp > 1:
            shares = self.world.gather_to_leader(own)
            names = self.world.decide(lambda: {group: set().union(*(s[group] for s in shares or ())) for group in own})
        if names["model"] != parameter_shapes(self.config.model).keys():
            lost = names["model"] ^ parameter_shapes(self.config.model).keys()
            raise ValueError(f"the ranks have not between them the parameters of the model: {min(lost)}")
        return names

    def fill(self, reader: store.Reader, names: Names) -> None:
        """Read what this rank has of weights and moments; `names` as all ranks together have them."""
        for group, tensors in self.weights_and_moments().items():
            reader.fill(group, tensors, everywhere=names[group])

    def _random_states(self) -> dict[str, Tensor]:
        states = {f"rank{self.world.rank:05d}.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states[f"rank{self.world.rank:05d}.cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _load_random_states(self, reader: store.Reader) -> None:
        """Nothing in training draws from these generators; a rank or a device that is new starts its own anew."""
        states = {name: state for name, state in self._random_states().items() if name in reader.names("rng")}
        reader.fill("rng", states, partly=True)
        for name, state in states.items():
            try:
                if name.endswith(".cuda"):
                    torch.cuda.set_rng_state(state, self.device)
                else:
                    torch.set_rng_state(state)
            except RuntimeError as error:
                raise CheckpointError(f"{reader.checkpoint}: {name} is no state of a generator ({error})") from None
