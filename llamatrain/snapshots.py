"""What a run is made of, into checkpoints and out of them: weights, optimizer, random state, place in the data.

`restore` takes the newest checkpoint that proves whole and fits; one that does not is told, set aside and passed
over. The trainer knows when to save, the checkpoint room how to write: this knows what. All ranks call both together;
each writes and reads its part, rank 0 decides which checkpoint.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamatrain.arithmetic import parameter_shapes
from llamatrain.checkpoint import commit, store
from llamatrain.config import RunConfig
from llamatrain.config.build import build
from llamatrain.config.parallel import layout
from llamatrain.config.resume import differences
from llamatrain.data.order import DataState
from llamatrain.data.sources import Source
from llamatrain.distributed import World
from llamatrain.errors import CheckpointError, ConfigError, DataError, UnhealthyRun
from llamatrain.flat import FlatPart
from llamatrain.optim.adamw import moment_tensors, set_step_count, step_count
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

    def save(self, step: int, data_state: DataState) -> None:
        """Write, commit and record the checkpoint of `step`, then prune. Raises CheckpointError."""
        settings = self.config.checkpoint
        content = {
            "tokens": step * self.config.global_batch * self.config.data.seq_len,
            "mesh": {"world_size": self.world.size, **layout(self.config.parallel, self.world.size).sizes()},
            "model": asdict(self.config.model),
            "config": self.config.as_dict(),
            "environment": self.environment,
            "tokenizer_sha256": self.sources[0].manifest.tokenizer_sha256,
            "data": {"state": data_state.to_json(), "manifests": self._data_identity()},
            "optimizer": {"step": step_count(self.optimizer)},
            "guard": {},
        }
        groups: store.TensorGroups = {**self.weights_and_moments(), "rng": self._random_states()}
        root = self.directory.checkpoints
        path = store.save(root, step, groups, content, world=self.world)
        self.directory.record("checkpoint", step=step, path=path.name)
        # decided, so that the others wait here, where there is time, and not in a collective of the next step
        self.world.decide(
            lambda: commit.prune(root, keep_last=settings.keep_last, keep_every_steps=settings.keep_every_steps)
        )

    def restore(self) -> tuple[int, DataState] | None:
        """Load the newest checkpoint that can be used; its step and data state, or None if the run has none yet.

        Raises UnhealthyRun if checkpoints were committed and none of them can be used, DataError if the run was
        started on other data.
        """
        root, world = self.directory.checkpoints, self.world
        refused: list[tuple[Path, str]] = []
        names = self.names_everywhere()
        for name in world.decide(self._candidates):
            checkpoint = root / name
            try:
                hashes = self.config.checkpoint.verify_hashes
                manifest = store.open_checkpoint(checkpoint, hashes=hashes, world=world)
                with world.together():
                    restored = self._load(manifest, store.Reader(checkpoint, manifest), names)
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
        return [checkpoint.name for checkpoint in commit.list_checkpoints(self.directory.checkpoints)]

    def _set_aside(self, refused: list[tuple[Path, str]]) -> None:
        for checkpoint, reason in refused:
            aside = commit.set_aside(checkpoint)
            self.directory.record("refused", path=checkpoint.name, reason=reason, moved_to=aside.name)

    def _load(self, manifest: commit.Manifest, reader: store.Reader, names: Names) -> tuple[int, DataState]:
        try:
            step, updates = int(manifest["step"]), int(manifest["optimizer"]["step"])
            data_state = DataState.from_json(manifest["data"]["state"])
            identity = dict(manifest["data"]["manifests"])
            ranks = int(manifest["mesh"]["world_size"])
            earlier = build(RunConfig, manifest["config"])
        except (KeyError, TypeError, ValueError, DataError) as error:
            raise CheckpointError(f"{reader.checkpoint}: a field of the manifest cannot be used ({error})") from None
        try:
            differences(self.config, earlier)
        except ConfigError as error:
            raise CheckpointError(f"{reader.checkpoint}: it is of another run: {error}") from None
        self.fill(reader, names)
        self._check_data(identity)
        self._load_random_states(reader)
        set_step_count(self.optimizer, updates)
        if ranks != self.world.size:
            log.info("%d processes wrote the checkpoint, %d go on from it", ranks, self.world.size)
        return step, data_state

    def _check_data(self, identity: dict[str, str]) -> None:
        for name, sha256 in self._data_identity().items():
            if identity.get(name) != sha256:
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
            if name.endswith(".cuda"):
                torch.cuda.set_rng_state(state, self.device)
            else:
                torch.set_rng_state(state)
