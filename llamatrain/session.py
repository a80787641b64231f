"""A run from the meeting of its ranks to their parting, whatever the end.

Ranks meet → configurations compared → run directory opened → settings settled with the run's start → preflight →
trainer. A failure is told once, by whoever failed first, and stands in the status, the journal, the ranks' logs, and
torchrun's summary.
"""

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import yaml

from llamatrain.checkpoint.interchange.conversion import RECORD_FILE
from llamatrain.config import RunConfig
from llamatrain.config.build import build
from llamatrain.config.parallel import check_sharding
from llamatrain.config.resume import changes, check_allowed, differences, flatten, keep_auto_choices
from llamatrain.device import check_torch, choose_device, choose_precision
from llamatrain.distributed import World
from llamatrain.errors import ConfigError, LlamatrainError, UnhealthyRun
from llamatrain.initial_weights import origin_hash
from llamatrain.model.attention_choice import resolve_backend
from llamatrain.model.compilation import check_compile, resolve_compile
from llamatrain.observe.rank_log import CONSOLE_FORMAT, RankLog
from llamatrain.parallel.recompute import resolve_recompute
from llamatrain.preflight.inspection import preflight
from llamatrain.process import attempt_id, this_process, write_error_file
from llamatrain.resilience.control import StopRequest
from llamatrain.resilience.watchdog import Watchdog, hang_name
from llamatrain.run_directory import BAD_INPUT, RUNNING, STARTING, UNHEALTHY, RunDirectory
from llamatrain.trainer import Trainer

log = logging.getLogger("llamatrain")

DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
FAILED_STATES = {ConfigError.exit_code: BAD_INPUT, UnhealthyRun.exit_code: UNHEALTHY}  # any other is a crash


def run(config: RunConfig, stop: StopRequest, *, work: Callable[[Trainer], None] | None = None) -> None:
    """Train to the end, or until asked to stop; the run directory says which. Raises LlamatrainError.

    On many processes every rank calls this. A failure is told by the rank that failed first; the others leave with
    its exit status. `work` is what is done with the trainer instead of `Trainer.fit`.
    """
    logging.basicConfig(level=logging.INFO, format=CONSOLE_FORMAT, force=True)
    world = World(this_process())
    world.join(config.parallel)
    run_on(world, config, stop, work=work)
    world.leave()


def run_on(
    world: World, config: RunConfig, stop: StopRequest, *, work: Callable[[Trainer], None] | None = None
) -> None:
    """`run` on ranks that have met."""
    with world.together():
        check_torch()
    world.check_same("configuration", flatten(config.as_dict()))
    with ExitStack() as resources:
        directory = open_run_directory(config, world)
        resources.callback(directory.close)
        with world.together():
            try:
                watchdog = resources.enter_context(watch(config, directory, world))
                rank_log = resources.enter_context(RankLog(directory.logs, world.process))
            except OSError as error:
                raise cannot_be_written(directory, error) from error
        try:
            if not directory.was_done:  # it stays done if what was typed now is refused
                directory.set_status(RUNNING, phase=STARTING)
            world.decide(lambda: give_up_if_hopeless(config, directory))
            directory.record("launch", world_size=world.size, last_heartbeat=directory.last_heartbeat)
            opened = resources.enter_context(ExitStack())  # closed after a failure is told: closing may hang
            settled = settle(config, directory, world)
            if settled.resilience.preflight:
                preflight(settled, directory, world)
            trainer = Trainer(settled, directory, stop, world, opened)
            (work or Trainer.fit)(trainer)
        except BaseException as error:
            watchdog.report_if_timed_out(error)
            told = disk_told(error, directory)
            tell_failure(told, directory, world, rank_log)
            if told is error:
                raise
            raise told from error


def open_run_directory(config: RunConfig, world: World) -> RunDirectory:
    """The run's folder, opened by rank 0 for all. Raises ConfigError, also if another rank does not see it."""
    path, attempt = world.decide(lambda: (os.path.abspath(config.run_dir), attempt_id()))
    if world.leads:
        path = config.run_dir
    with world.together():
        if world.leads and os.path.isfile(os.path.join(path, RECORD_FILE)):  # it stays as it is: others begin with it
            raise ConfigError(
                f"run_dir={path}: llamatrain.convert wrote it; a run begins with it by init.from={path}, in a "
                "directory of its own"
            )
        directory = RunDirectory(path, attempt=attempt) if world.leads else None
    with world.together():
        return directory or RunDirectory(path, leads=False, attempt=attempt)


def watch(config: RunConfig, directory: RunDirectory, world: World) -> Watchdog:
    """Of this rank; it hears of every sign of life."""
    hang = world.decide(hang_name)
    watchdog = Watchdog(config.resilience, directory.path, world.process, hang=hang, attempt=directory.attempt)
    directory.on_beat = watchdog.beat
    return watchdog


def disk_told(error: BaseException, directory: RunDirectory) -> BaseException:
    """What a disk refused, as an error for the user; any other error as it is."""
    if not isinstance(error, OSError) or error.errno not in DISK_REFUSES:
        return error
    return cannot_be_written(directory, error)


def cannot_be_written(directory: RunDirectory, error: OSError) -> UnhealthyRun:
    return UnhealthyRun(
        f"{directory.path}: the run's records cannot be written ({error}); make room or mend the disk, then start "
        "again: it goes on from its newest checkpoint"
    )


def give_up_if_hopeless(config: RunConfig, directory: RunDirectory) -> None:
    """Raises UnhealthyRun if start after start came to nothing; the next attempt, a person's, counts anew."""
    starts = directory.starts_without_progress()
    if starts >= config.train.max_starts_without_progress:
        raise UnhealthyRun(
            f"{config.run_dir}: {starts} starts in a row ended without a checkpoint; see logs/ there for what "
            "ended them, mend it, and start again (train.max_starts_without_progress allows more)"
        )


def tell_failure(error: BaseException, directory: RunDirectory, world: World, rank_log: RankLog) -> None:
    """Put the failure into the status, the rank's log and torchrun's summary. One process alone then raises it.

    Of many, whichever rank fails first writes the status and tells the user; all leave with that failure's exit
    status. Rank 0 writes the status again, as its own heartbeat may have come in between.
    """
    failure = world.first_failure(error)
    reason = f"rank {failure.rank} on {failure.host}: {failure.message}" if world.size > 1 else failure.message
    write_error_file(reason)
    first = failure.rank == world.rank
    if not first:
        world.wait_until_told()
        rank_log.write(f"{reason}\nThat rank failed first. What this one saw:")
    rank_log.write("".join(traceback.format_exception(error)))
    if first or world.leads:
        directory.note_failure(FAILED_STATES.get(failure.exit_code, RUNNING), reason)
    if world.size == 1:
        return
    if first:
        in_a_line = isinstance(error, LlamatrainError) or failure.another_is_gone
        rank_log.give_console_back()
        if in_a_line and os.environ.get("LLAMATRAIN_TRACEBACK") != "1":
            print(f"error: {failure.message}", file=sys.stderr, flush=True)
        else:
            print(failure.trace, file=sys.stderr, flush=True)
        world.failure_is_told()
    sys.exit(failure.exit_code)


def settle(config: RunConfig, directory: RunDirectory, world: World) -> RunConfig:
    """The configuration with every `auto` decided: as at the run's start, or now on rank 0, if this is the start.

    A run has started when its first checkpoint is there: until then, settings are free to be corrected. Says what
    differs from the start. Raises ConfigError on a structural change that train.resume_allow does not name.
    """

    def the_start() -> tuple[RunConfig, RunConfig] | None:
        if not (directory.config.exists() and directory.events("checkpoint")):
            return None
        started = started_with(directory.config)
        return started, started_before(directory) or started

    check_allowed(config)
    earlier = world.decide(the_start)
    if earlier is not None:
        started, before = earlier
        config = keep_auto_choices(config, started)
        differences(config, started)
        for key, (old, new) in changes(config, before).items():
            log.info("%s was %s before, is %s from here on%s", key, old, new, _consequence(key, config))
    with world.together():
        device = choose_device(config.train.device, setting="train.device", local_rank=world.process.local_rank)
    train = config.train
    precision = choose_precision(train.precision, device)
    world.check_same("device", {"train.device": device.type, "train.precision": precision})
    check_sharding(config.parallel, device=device.type, precision=precision)
    compiled = world.decide(lambda: resolve_compile(train.compile, device))
    with world.together():
        if compiled:
            check_compile(device)
    config = replace(config, train=replace(train, device=device.type, precision=precision, compile=compiled))
    attention = world.decide(lambda: resolve_backend(config, device))
    config = replace(config, model=replace(config.model, attention=attention))
    if config.init.from_ is not None and config.init.sha256 is None:
        origin = world.decide(lambda: origin_hash(config))
        config = replace(config, init=replace(config.init, sha256=origin))
    per_node = world.process.local_world_size
    recompute = world.decide(lambda: resolve_recompute(config, device, world.size, ranks_per_node=per_node))
    return replace(config, parallel=replace(config.parallel, recompute=recompute))


def _consequence(key: str, config: RunConfig) -> str:
    if key in ("train.steps", "train.tokens") and config.optim.schedule_steps is None:
        return " (the learning rate's schedule is stretched to it; optim.schedule_steps would hold it)"
    return ""


def started_before(directory: RunDirectory) -> RunConfig | None:
    """The configuration of the attempt before, if this program can read what stands in the journal."""
    starts = directory.events("start")
    try:
        return build(RunConfig, starts[-1]["config"]) if starts else None
    except (ConfigError, KeyError, TypeError):
        return None


def started_with(path: Path) -> RunConfig:
    """The configuration in a run's config.yaml. Raises ConfigError naming the file."""
    try:
        return build(RunConfig, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not the configuration this program wrote there ({reason}); restore it") from None
