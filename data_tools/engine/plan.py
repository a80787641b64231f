"""The plan of a preparation: its stages and their units, a pure function of the settings and the input files.

Stages, those that the settings ask for:

    clean     unit of input files -> documents     read, filters `before`
    hash      unit -> hashes of its lines (documents, spans)
    mark      partition of a group's hashes -> which stay
    filter    unit -> documents                     what stays, then filters `after`
    sketch    unit -> sketches of its documents     (near duplicates)
    near      all sketches -> which documents go
    select    unit -> documents                     those that stay
    tokenize  all documents -> token shards

The last stage of documents writes to `documents`, the others into folders of their names. Input files are grouped into
units by bytes, in their order; a file is never split. A group is what copies are looked for in (dedup.scope).

Each unit has a hash of the settings of its stage and of all it is made from, down to the names and sizes of the input
files and the contents of models. An entry of the ledger with that hash is what makes a unit done, so that other
settings for a late stage leave the early ones as they are. plan.json is written once; run.json beside it says where
the files lie on this machine, and is no part of the plan.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.dedup.levels import DedupSettings
from data_tools.documents import InputFile, content_sample
from data_tools.engine.components import filter_of, reader_of, values_by_name
from data_tools.engine.inputs import by_bytes, groups_of, input_files
from data_tools.engine.settings import PrepareSettings
from llamatrain.config.build import build
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import sha256_of_file, sha256_of_json, write_json_atomically

PLAN_FILE, RUN_FILE = "plan.json", "run.json"
FORMAT = 1
PARTITION_BYTES = 1 << 32  # of input for each partition of hashes
MAX_PARTITIONS = 4096
LAST_DIRECTORY = "documents"
SHARDS_DIRECTORY = "shards"
WITHOUT_EFFECT = ("temporary",)  # settings of readers and filters that do not change what they make


@dataclass(frozen=True)
class Unit:
    id: str
    bytes: int  # of input files: what its work is measured by
    config_sha256: str
    files: tuple[int, ...] = ()  # of the stage clean: which input files
    group: int = 0  # of dedup.scope
    number: int = 0  # which of its group's units, or partitions


@dataclass(frozen=True)
class Stage:
    name: str
    directory: str
    units: tuple[Unit, ...]
    documents_of: str | None = None  # the stage whose documents it reads; None: it reads the input files
    writes_documents: bool = False


@dataclass(frozen=True)
class Plan:
    settings: PrepareSettings
    files: tuple[InputFile, ...]
    configs: dict[str, Any]  # by stage, what decides its result
    stages: tuple[Stage, ...]

    @property
    def output(self) -> Path:
        return Path(self.settings.output)

    def stage(self, name: str) -> Stage:
        """Raises ConfigError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = ", ".join(stage.name for stage in self.stages)
        raise ConfigError(f"stage={name}: the plan has no such stage; choose of {known}")

    def before(self, name: str) -> list[Stage]:
        names = [stage.name for stage in self.stages]
        return list(self.stages[: names.index(name)])

    def group(self, stage: str, group: int) -> list[Unit]:
        return [unit for unit in self.stage(stage).units if unit.group == group]

    @property
    def last_documents(self) -> Stage:
        return next(stage for stage in self.stages if stage.directory == LAST_DIRECTORY)

    def as_json(self) -> dict[str, Any]:
        """What plan.json holds: nothing of this machine."""
        stages = []
        for stage in self.stages:
            units = [{**asdict(unit), "files": list(unit.files)} for unit in stage.units]
            own = {"name": stage.name, "directory": stage.directory, "documents_of": stage.documents_of}
            stages.append({**own, "units": units})
        files = [[file.name, file.size] for file in self.files]
        return {"format": FORMAT, "configs": self.configs, "files": files, "stages": stages}


def make_plan(settings: PrepareSettings) -> Plan:
    """Look at the inputs and models and plan. Raises ConfigError and DataError."""
    settings = replace(settings, filters=values_by_name(settings.filters, [*settings.before, *settings.after]))
    reader = reader_of(settings.reader, settings.read)
    files = input_files(settings, reader)
    return planned(settings, files, _configs(settings, reader.settings))


def planned(settings: PrepareSettings, files: Sequence[InputFile], configs: Mapping[str, Any]) -> Plan:
    """The plan, from what is known of inputs and models."""
    groups = [by_bytes(files, group, settings.unit_bytes) for group in groups_of(files, settings.dedup)]
    plan = _Planning(configs)
    plan.add_documents("clean", _clean_units(files, groups, configs["clean"]))
    marked: tuple[Unit, ...] = ()
    if "hash" in configs:
        hashed = plan.following("hash")
        plan.add("hash", hashed)
        marked = _mark_units(hashed, settings.dedup, configs["mark"])
        plan.add("mark", marked)
    if "filter" in configs:
        plan.add_documents("filter", plan.following("filter", _by_group(marked)))
    if "near" in configs:
        sketched = plan.following("sketch")
        plan.add("sketch", sketched)
        near = plan.single("near", sketched)
        plan.add("near", (near,))
        plan.add_documents("select", plan.following("select", {unit.group: near.config_sha256 for unit in sketched}))
    plan.end_documents()
    if "tokenize" in configs:
        plan.add("tokenize", (plan.single("tokenize", plan.source.units),), SHARDS_DIRECTORY)
    return Plan(settings, tuple(files), dict(configs), tuple(plan.stages))


class _Planning:
    """Stages as they are added, one after the other."""

    def __init__(self, configs: Mapping[str, Any]) -> None:
        self.configs = configs
        self.stages: list[Stage] = []

    @property
    def source(self) -> Stage:
        """The last stage of documents."""
        return next(stage for stage in reversed(self.stages) if stage.writes_documents)

    def add(self, name: str, units: tuple[Unit, ...], directory: str | None = None) -> None:
        self.stages.append(Stage(name, directory or name, units, self.source.name))

    def add_documents(self, name: str, units: tuple[Unit, ...]) -> None:
        source = self.source.name if self.stages else None
        self.stages.append(Stage(name, name, units, source, writes_documents=True))

    def end_documents(self) -> None:
        last = self.source
        self.stages[self.stages.index(last)] = replace(last, directory=LAST_DIRECTORY)

    def following(self, name: str, more: Mapping[int, str] | None = None) -> tuple[Unit, ...]:
        """Units for each of the last documents; `more`: a hash of what else a group's units are made from."""
        units = []
        for unit in self.source.units:
            config = sha256_of_json([name, self.configs[name], unit.config_sha256, (more or {}).get(unit.group)])
            units.append(Unit(unit.id, unit.bytes, config, group=unit.group, number=unit.number))
        return tuple(units)

    def single(self, name: str, made_from: Sequence[Unit]) -> Unit:
        config = sha256_of_json([name, self.configs[name], [unit.config_sha256 for unit in made_from]])
        return Unit("all", sum(unit.bytes for unit in made_from), config)


def _clean_units(
    files: Sequence[InputFile], groups: Sequence[Sequence[Sequence[int]]], config: Any
) -> tuple[Unit, ...]:
    units: list[Unit] = []
    for group, members in enumerate(groups):
        for number, indices in enumerate(members):
            named = [[files[index].name, files[index].size] for index in indices]
            size = sum(files[index].size for index in indices)
            unit_config = sha256_of_json(["clean", config, named])
            units.append(Unit(f"{len(units):05d}", size, unit_config, tuple(indices), group, number))
    return tuple(units)


def _mark_units(hashed: Sequence[Unit], settings: DedupSettings, config: Any) -> tuple[Unit, ...]:
    marked = []
    for group, members in _units_by_group(hashed).items():
        size = sum(unit.bytes for unit in members)
        partitions = settings.partitions or min(MAX_PARTITIONS, max(1, -(-size // PARTITION_BYTES)))
        made_from = [unit.config_sha256 for unit in members]
        for partition in range(partitions):
            unit_config = sha256_of_json(["mark", config, made_from, partition, partitions])
            name = f"{group:04d}-{partition:05d}"
            marked.append(Unit(name, size // partitions, unit_config, group=group, number=partition))
    return tuple(marked)


def _units_by_group(units: Sequence[Unit]) -> dict[int, list[Unit]]:
    groups: dict[int, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.group, []).append(unit)
    return groups


def _by_group(units: Sequence[Unit]) -> dict[int, str]:
    """One hash of each group's units."""
    return {group: sha256_of_json([u.config_sha256 for u in of]) for group, of in _units_by_group(units).items()}


def _configs(settings: PrepareSettings, reader_settings: Any) -> dict[str, Any]:
    """What decides the result of each stage, as plain values."""
    for name, values in settings.filters.items():
        filter_of(name, values or {})  # also those that are not used now must be known
    own = {"dedup": asdict(settings.dedup), "near": asdict(settings.near)}
    before, after = (list(_filter_configs(settings, names)) for names in (settings.before, settings.after))
    configs: dict[str, Any] = {
        "clean": {"reader": settings.reader, "read": _by_content(reader_settings), "filters": before}
    }
    if settings.dedup.level != "none":
        in_hash = ("level", "hash", "key", "span_sentences")
        configs["hash"] = {name: own["dedup"][name] for name in in_hash}
        configs["mark"] = {"policy": settings.dedup.policy}
    if settings.dedup.level != "none" or after:
        configs["filter"] = {"filters": after, "min_words": settings.dedup.min_words}
    if settings.near_duplicates:
        own["near"].pop("memory_gib")
        configs |= {"sketch": own["near"], "near": own["near"], "select": {}}
    if settings.tokenizer is not None:
        configs["tokenize"] = {"tokenizer": _file_sha256(settings.tokenizer), "settings": settings.tokenize}
    return configs


def _filter_configs(settings: PrepareSettings, names: Sequence[str]) -> Iterator[list[Any]]:
    for name in names:
        yield [name, _by_content(filter_of(name, settings.filters.get(name) or {}).settings)]


def _by_content(settings: Any) -> Any:
    """Settings as plain values, what a file holds in the place of its path: where a model lies does not matter."""

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: of(entry) for key, entry in value.items() if key not in WITHOUT_EFFECT}
        if isinstance(value, list | tuple):
            return [of(entry) for entry in value]
        if isinstance(value, str) and ("/" in value or "." in value) and (path := Path(value)).exists():
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            found = [InputFile(file, file.name, file.stat().st_size) for file in files if file.is_file()]
            return {"content": [[file.name, content_sample(file)] for file in found]}
        return value

    return of(asdict(settings))


def _file_sha256(path: str) -> str:
    try:
        return sha256_of_file(Path(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


# Files


def write_plan(plan: Plan) -> None:
    """Write plan.json and run.json. Raises DataError when another plan is there and may not be replaced.

    One that ends earlier (without `tokenizer`, say) may be. One that goes further stays: it has all that is asked for.
    """
    path = plan.output / PLAN_FILE
    content = json.loads(json.dumps(plan.as_json()))
    found = _read(path) if path.exists() else None
    if found is not None and found != content and _goes_on(content, found):
        return
    if found is not None and not _goes_on(found, content) and not plan.settings.overwrite:
        raise DataError(
            f"{plan.output}: was begun with {_difference(found, content)}; set overwrite=true to go on with what is "
            "asked for now (units that this changes are made again), or another output"
        )
    plan.output.mkdir(parents=True, exist_ok=True)
    if found != content:
        write_json_atomically(path, content)
    files = [[file.name, file.size, str(file.path.absolute())] for file in plan.files]
    settings = asdict(plan.settings) | {"stage": None, "part": None, "overwrite": False, "dry_run": False}
    write_json_atomically(plan.output / RUN_FILE, {"settings": settings, "configs": plan.configs, "files": files})


def _goes_on(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether all that was planned is planned still."""
    same = all(found.get(key) == wanted[key] for key in ("format", "files"))
    stages = found.get("stages", [])
    configs: Mapping[str, Any] = found.get("configs", {})
    return same and wanted["stages"][: len(stages)] == stages and configs.items() <= wanted["configs"].items()


def read_plan(output: Path) -> Plan:
    """What write_plan wrote. Raises DataError."""
    content = _read(output / RUN_FILE)
    try:
        files = [InputFile(path=Path(path), name=name, size=size) for name, size, path in content["files"]]
        settings = build(PrepareSettings, content["settings"] | {"output": str(output)})
        plan = planned(settings, files, content["configs"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{output / RUN_FILE}: cannot be used ({error}); start prepare again") from None
    if json.loads(json.dumps(plan.as_json())) != _read(output / PLAN_FILE):
        raise DataError(f"{output}: {PLAN_FILE} and {RUN_FILE} do not fit together; start prepare again")
    return plan


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; run data_tools.prepare first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); start prepare again with overwrite=true") from None
    return content if isinstance(content, dict) else {}


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    if found.get("files") != wanted["files"]:
        return "other input files"
    configs = found.get("configs", {})
    names = [name for name in {**configs, **wanted["configs"]} if configs.get(name) != wanted["configs"].get(name)]
    return f"other settings for {', '.join(names)}" if names else "another unit_bytes, scope or number of partitions"
