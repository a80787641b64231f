"""What `python -m data_tools.prepare` is told: conf/data_tools/prepare/, one file of `source/` a source."""

from dataclasses import dataclass, field
from typing import Any

from data_tools.dedup.levels import DedupSettings, check_dedup
from data_tools.dedup.near import NearSettings, check_near_settings
from data_tools.documents import input_list
from llamatrain.errors import ConfigError

EXECUTORS = ("local", "slurm")
MIN_MEMORY_BYTES = 1000  # in practice megabytes: runs of a few hashes are merged for ever


@dataclass
class SlurmSettings:
    """What sbatch is asked for, for every stage alike."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "24:00:00"  # of an array task; 120 s before its end it is put back into the queue, and goes on there
    cpus_per_task: int = 4  # processes of an array task, a unit each
    mem: str | None = None  # of an array task; null: the cluster's default. Count memory_bytes for each process
    array_tasks: int = 200  # at most, and never more than the cluster's MaxArraySize
    at_once: int | None = None  # array tasks that may run at the same time; null: as many as the cluster gives
    patience_s: float = 90.0  # a stage waits for the entries of the one before: network file systems show files late
    setup: list[str] = field(default_factory=list)  # lines of bash before python starts: modules, environments
    python: str | None = None  # null: the interpreter that runs prepare
    sbatch: list[str] = field(default_factory=list)  # further options


@dataclass
class PrepareSettings:
    input: Any = "???"  # a file, directory or glob pattern, or a list of them
    output: str = "???"  # directory of the prepared source
    tokenizer: str | None = None  # tokenizer.model; null: stop at the documents

    name: str = "???"  # of the source, in the data set
    reader: str = "???"  # a module of data_tools.sources, or a dotted name of one's own
    read: dict[str, Any] = field(default_factory=dict)  # the reader's settings
    largest: int | None = None  # read so many of the input files only, those with most rows (StackExchange)
    before: list[str] = field(default_factory=list)  # filters before the deduplication, in order
    after: list[str] = field(default_factory=list)  # filters after it
    filters: dict[str, Any] = field(default_factory=dict)  # the filters' settings, by their names
    dedup: DedupSettings = field(default_factory=DedupSettings)  # exact
    near_duplicates: bool = False  # whether near-duplicate documents go (books)
    near: NearSettings = field(default_factory=NearSettings)
    tokenize: dict[str, Any] = field(default_factory=dict)  # settings of data_tools.tokenize_shards

    unit_bytes: int = 1 << 28  # of input files in a unit of work; a larger file is a unit by itself
    memory_bytes: int = 1 << 30  # that sorting hashes may take in each process
    executor: str = "local"  # local (processes on this machine) | slurm (job arrays)
    workers: int | None = None  # executor=local: processes; null: one per CPU. The result is the same
    slurm: SlurmSettings = field(default_factory=SlurmSettings)
    stage: str | None = None  # do this stage only; those before it must be complete
    part: str | None = None  # I/N: do the units of the I-th of N parts (from 0); with stage
    dry_run: bool = False  # print the plan, and do nothing
    overwrite: bool = False  # go on at output with other settings: units that they change are made again


def check_settings(settings: PrepareSettings) -> None:
    """Raises ConfigError."""
    input_list(settings.input)
    for name, value in (("output", "DIRECTORY"), ("name", "NAME"), ("reader", "NAME")):
        if getattr(settings, name) in ("", "???"):
            raise ConfigError(f"{name} is not set: {name}={value}{', or source=NAME' if name != 'output' else ''}")
    if settings.executor not in EXECUTORS:
        raise ConfigError(f"executor={settings.executor}: choose one of {', '.join(EXECUTORS)}")
    for name, least in (("unit_bytes", 1), ("memory_bytes", MIN_MEMORY_BYTES)):
        if getattr(settings, name) < least:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be at least {least}")
    if settings.largest is not None and settings.largest < 1:
        raise ConfigError(f"largest={settings.largest}: must be at least 1, or null for all input files")
    if settings.workers is not None and settings.workers < 1:
        raise ConfigError(f"workers={settings.workers}: must be at least 1, or null for one per CPU")
    check_dedup(settings.dedup)
    check_near_settings(settings.near)
    _check_slurm(settings.slurm)
    part_of(settings)


def _check_slurm(settings: SlurmSettings) -> None:
    for name in ("cpus_per_task", "array_tasks", "at_once"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"slurm.{name}={value}: must be at least 1")


def part_of(settings: PrepareSettings) -> tuple[int, int]:
    """Which part of how many. Raises ConfigError."""
    if settings.part is None:
        return 0, 1
    number, slash, parts = settings.part.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise ConfigError(f"part={settings.part}: write it as I/N, I from 0 to N-1")
    if settings.stage is None:
        raise ConfigError(f"part={settings.part}: say of which stage: stage=NAME")
    return int(number), int(parts)
