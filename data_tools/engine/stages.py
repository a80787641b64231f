"""The stages as functions over files: from the outputs of earlier stages to this one's, and what became of what.

A unit reads only what the plan says, writes its files whole or not at all, and its entry in the ledger last.
"""

import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import data_tools
from data_tools.dedup.exact import HashFile, HashWriter, KeepMask, mark_partition
from data_tools.dedup.levels import level_of
from data_tools.dedup.near import Removal, near_duplicate_filter, propose, sketch, verify
from data_tools.documents import InputFile
from data_tools.engine import ledger
from data_tools.engine.components import Filter, filter_of, reader_of
from data_tools.engine.ledger import Size, Tally, entry_path, read_entry, read_stage, size_of, write_entry
from data_tools.engine.outputs import SUFFIX, DocumentWriter, has_size, read_documents, whole_file
from data_tools.engine.plan import Plan, Stage, Unit
from data_tools.progress import metered
from data_tools.records import Dropped, Record
from llamatrain.config.build import build
from llamatrain.data.shards import SPLITS, read_manifest
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import sha256_of_file, sha256_of_json, write_json_atomically
from llamatrain.version import VERSION

if TYPE_CHECKING:
    from data_tools.tokenize_shards import TokenizeShardsSettings

OWN_PROCESSES = ("tokenize",)  # stages that start processes themselves
REMOVALS_FILE = "removals.json"
BATCH_BYTES = 1 << 19  # of documents that a filter has one after the other

Described = dict[str, Any]  # {"name", "bytes", "sha256"}
Steps = Sequence[tuple[str, Filter]]


class DocumentSink:
    """Where the documents of a unit go: through the filters, counted, into the file.

    They are gathered to a batch, which each filter has as a whole: filters that took turns with every document would
    push one another's models out of the processor's caches (0.42 against 0.28 CPU-seconds a MB with all three).
    """

    def __init__(self, steps: Steps, tally: Tally, writer: DocumentWriter) -> None:
        self.steps, self.tally, self.writer = steps, tally, writer
        self._batch: list[tuple[Record, Size]] = []
        self._batch_bytes = 0

    def take(self, item: Record | Dropped) -> None:
        if isinstance(item, Dropped):
            size = Size(lines=0, bytes=item.bytes)
            self.tally.enter(size)
            self.tally.drop(item, size)
            return
        size = size_of(item.text)
        self.tally.enter(size)
        self._batch.append((item, size))
        self._batch_bytes += size.bytes
        if self._batch_bytes >= BATCH_BYTES:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self.writer.finish()

    def _flush(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        for name, step in self.steps:
            batch = [left for item, size in batch if (left := self._filtered(name, step, item, size))]
        for item, size in batch:
            self._write(item, size)

    def _filtered(self, name: str, step: Filter, item: Record, size: Size) -> tuple[Record, Size] | None:
        text = item.text
        result = step(item)
        if isinstance(result, Dropped):
            self.tally.drop(result, size, item)
            return None
        if result.text is text:
            return result, size
        left = size_of(result.text)
        self.tally.cut(name, size, left)
        return result, left

    def _write(self, record: Record, size: Size) -> None:
        if not record.text:
            self.tally.drop(Dropped.of(record, "empty"), size, record)
        elif (line := self.writer.line(record)) is None:
            self.tally.drop(Dropped.of(record, "lone_surrogates"), size, record)
        else:
            self.writer.write(line)
            self.tally.keep(record, size)


class Workplace:
    """Does units of a plan; what units share (filters with their models, entries) is loaded once."""

    def __init__(self, plan: Plan, *, workers: int = 1) -> None:
        """`workers`: processes for the stages that start their own."""
        self.plan, self.output, self.workers = plan, plan.output, workers
        self.settings = plan.settings
        self._entries: dict[tuple[str, str], dict[str, Any]] = {}
        self._filters: dict[str, Steps] = {}

    def do(self, stage: Stage, unit: Unit) -> None:
        """Make the unit and write its entry. Raises ConfigError and DataError."""
        begin, cpu_begin = time.perf_counter(), time.process_time()
        tally = Tally()
        make: Callable[[Stage, Unit, Tally], tuple[list[Described], list[Described]]] = getattr(self, f"_{stage.name}")
        inputs, outputs = make(stage, unit, tally)
        timing = {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu_begin,
            "input_bytes": sum(file["bytes"] for file in inputs),
            "host": socket.gethostname(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        path = self.output / ledger.TIMINGS / stage.name / f"{unit.id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(path, timing)
        header = {
            "format": ledger.FORMAT,
            "stage": stage.name,
            "unit": unit.id,
            "version": VERSION,
            "code_sha256": code_sha256(),
            "config_sha256": unit.config_sha256,
        }
        write_entry(self.output, {**header, "inputs": inputs, "outputs": outputs, **tally.as_json()})

    # ------------------------------------------------------------------ documents

    def _clean(self, stage: Stage, unit: Unit, tally: Tally) -> tuple[list[Described], list[Described]]:
        files = [self.plan.files[number] for number in unit.files]
        with whole_file(self._document_path(stage, unit)) as file:
            sink = DocumentSink(self._steps("before"), tally, DocumentWriter(file))
            for input_file in files:
                with metered(input_file.size):
                    self._read_input(input_file, sink)
            sink.finish()
        inputs = [_described(file.path, file.name) for file in files]
        return inputs, [file.described(self.output)]

    def _read_input(self, file: InputFile, sink: DocumentSink) -> None:
        if not file.path.is_file():
            raise DataError(f"{file.path}: was there when the preparation was planned, and is gone")
        items = iter(self._reader.read(file.path, file.name))
        while True:
            try:
                item = next(items, None)
            except DataError as error:  # the file's fault; an OSError may pass: it ends the unit, which is tried again
                message = str(error).replace(str(file.path), file.name)
                sink.tally.failed.append({"name": file.name, "error": message})
                return
            if item is None:
                return
            sink.take(item)

    def _filter(self, stage: Stage, unit: Unit, tally: Tally) -> tuple[list[Described], list[Described]]:
        if "hash" not in self.plan.configs:
            return self._pass_documents(stage, unit, tally, self._steps("after"), [])
        (hashes,) = self._outputs_of("hash", unit.id)
        marks = [self._outputs_of("mark", mark.id)[0] for mark in self.plan.group("mark", unit.group)]
        self._check_sizes([hashes, *marks])
        mask = KeepMask(
            HashFile(self.output / hashes["name"]),
            marks=[self.output / mark["name"] for mark in marks],
            number=unit.number,
            policy=self.settings.dedup.policy,
        )
        level = level_of(self.settings.dedup)
        steps = [("dedup", lambda record: level.keep(record, mask.take(level.count(record)))), *self._steps("after")]
        done = self._pass_documents(stage, unit, tally, steps, [hashes, *marks])
        mask.finish()
        return done

    def _select(self, stage: Stage, unit: Unit, tally: Tally) -> tuple[list[Described], list[Described]]:
        (removals,) = self._outputs_of("near", "all")
        self._check_sizes([removals])
        gone = [Removal(**removal) for removal in json.loads((self.output / removals["name"]).read_bytes())]
        return self._pass_documents(stage, unit, tally, [("near", near_duplicate_filter(gone))], [removals])

    def _pass_documents(
        self, stage: Stage, unit: Unit, tally: Tally, steps: Steps, more: list[Described]
    ) -> tuple[list[Described], list[Described]]:
        (source,) = self._outputs_of(str(stage.documents_of), unit.id)
        with whole_file(self._document_path(stage, unit)) as file:
            sink = DocumentSink(steps, tally, DocumentWriter(file))
            for record in read_documents(self.output / source["name"], source):
                sink.take(record)
            sink.finish()
        return [source, *more], [file.described(self.output)]

    # ------------------------------------------------------------------ copies

    def _hash(self, stage: Stage, unit: Unit, tally: Tally) -> tuple[list[Described], list[Described]]:
        level = level_of(self.settings.dedup)
        source, records = self._documents(stage, unit)
        with whole_file(self.output / stage.directory / f"{unit.id}.hashes") as file:
            writer = HashWriter(file, memory_bytes=self.settings.memory_bytes)
            for record in records:
                writer.add(level.hashes(record))
            tally.facts |= writer.finish()
        return [source], [file.described(self.output)]

    def _mark(self, stage: Stage, unit: Unit, tally: Tally) -> tuple[list[Described], list[Described]]:
        inputs = [self._outputs_of("hash", hashed.id)[0] for hashed in self.plan.group("hash", unit.group)]
        self._check_sizes(inputs)
        sources = [HashFile(self.output / described["name"]) for described in inputs]
        with whole_file(self.output / stage.directory / f"{unit.id}.marks") as file:
            tally.facts |= mark_partition(
                sources,
                file,
                partition=unit.number,
                partitions=len(self.plan.group("mark", unit.group)),
                policy=self.settings.dedup.policy,
                memory_bytes=self.settings.memory_bytes,
            )
        return inputs, [file.described(self.output)]

    def _sketch(self, stage: Stage, unit: Unit, tally: Tally) -> tuple[list[Described], list[Described]]:
        source, records = self._documents(stage, unit)
        stem = self.output / stage.directory / unit.id
        stem.parent.mkdir(parents=True, exist_ok=True)
        files = sketch(records, stem, self.settings.near)
        return [source], [_described(path, path.relative_to(self.output).as_posix()) for path in files]

    def _near(self, stage: Stage, unit: Unit, tally: Tally) -> tuple[list[Described], list[Described]]:
        sketched = self.plan.stage("sketch").units
        inputs = [described for unit in sketched for described in self._outputs_of("sketch", unit.id)]
        self._check_sizes(inputs)
        stems = [self.output / "sketch" / unit.id for unit in sketched]
        pairs = propose(stems, self.settings.near)
        removals = verify(stems, pairs, self.settings.near)
        with whole_file(self.output / stage.directory / REMOVALS_FILE) as file:
            file.write((json.dumps([asdict(removal) for removal in removals], indent=1) + "\n").encode())
        tally.facts |= {"pairs": len(pairs), "near_duplicates": len(removals)}
        return inputs, [file.described(self.output)]

    # ------------------------------------------------------------------ tokens

    def _tokenize(self, stage: Stage, unit: Unit, tally: Tally) -> tuple[list[Described], list[Described]]:
        from data_tools.tokenize_shards import tokenize_shards  # here: other stages need no SentencePiece

        source = self.plan.last_documents
        inputs = [self._outputs_of(source.name, unit.id)[0] for unit in source.units]
        self._check_sizes(inputs)
        directory = self.output / stage.directory
        directory.mkdir(parents=True, exist_ok=True)
        mark = directory / ".prepared_from"  # what a data set that is there, perhaps in part, was made from
        begun = mark.read_text(encoding="utf-8") if mark.exists() else None
        made_from = sha256_of_json([unit.config_sha256, inputs])
        mark.write_text(made_from, encoding="utf-8")
        tokenize_shards(tokenize_settings(self.plan, workers=self.workers, overwrite=begun != made_from))
        manifest = read_manifest(directory)
        tally.facts |= dict(manifest.documents) | {f"tokens_{split}": manifest.tokens(split) for split in SPLITS}
        tally.facts["bytes"] = sum(shard.text_bytes for split in SPLITS for shard in manifest.shards(split))
        files = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
        return inputs, [_described(path, path.relative_to(self.output).as_posix()) for path in files]

    # ------------------------------------------------------------------ what units share

    @cached_property
    def _reader(self) -> Any:
        return reader_of(self.settings.reader, self.settings.read)

    def _steps(self, when: str) -> Steps:
        if when not in self._filters:
            names: list[str] = getattr(self.settings, when)
            self._filters[when] = [
                (name, filter_of(name, self.settings.filters.get(name) or {}).make()) for name in names
            ]
        return self._filters[when]

    def _documents(self, stage: Stage, unit: Unit) -> tuple[Described, Iterator[Record]]:
        (source,) = self._outputs_of(str(stage.documents_of), unit.id)
        return source, read_documents(self.output / source["name"], source)

    def _document_path(self, stage: Stage, unit: Unit) -> Path:
        return self.output / stage.directory / f"{unit.id}{SUFFIX}"

    def _outputs_of(self, stage: str, unit: str) -> list[Described]:
        key = (stage, unit)
        if key not in self._entries:
            self._entries[key] = read_entry(entry_path(self.output, stage, unit))
        outputs: list[Described] = self._entries[key]["outputs"]
        return outputs

    def _check_sizes(self, files: list[Described]) -> None:
        for described in files:
            if not has_size(self.output / described["name"], described):
                raise DataError(f"{self.output / described['name']}: is gone or cut short; run prepare again")


def tokenize_settings(plan: Plan, *, workers: int, overwrite: bool) -> "TokenizeShardsSettings":
    """Raises ConfigError."""
    from data_tools.tokenize_shards import TokenizeShardsSettings, check_settings

    own = {"source", "input", "tokenizer", "output", "workers", "format", "overwrite"}
    if wrong := own & set(plan.settings.tokenize):
        raise ConfigError(f"tokenize.{min(wrong)}: prepare sets it")
    values = {
        **plan.settings.tokenize,
        "source": plan.settings.name,
        "input": [str(plan.output / plan.last_documents.directory)],
        "tokenizer": str(plan.settings.tokenizer),
        "output": str(plan.output / plan.stage("tokenize").directory),
        "workers": workers,
        "format": "jsonl",
        "overwrite": overwrite,
    }
    try:
        settings = build(TokenizeShardsSettings, values)
        check_settings(settings)
        return settings
    except ConfigError as error:
        raise ConfigError(f"tokenize.{error}") from None


def pending(plan: Plan, stage: Stage, units: Sequence[Unit] | None = None) -> list[Unit]:
    """Those of the units (of all, if None) that are not done.

    A unit is done if its entry was made with these settings and of what the stages before hold now, and its files have
    their sizes.
    """
    made = {
        file["name"]: file["sha256"]
        for before in plan.before(stage.name)
        for entry in read_stage(plan.output, before.name)
        for file in entry["outputs"]
    }
    return [unit for unit in units or stage.units if not _is_done(plan, stage, unit, made)]


def _is_done(plan: Plan, stage: Stage, unit: Unit, made: Mapping[str, str]) -> bool:
    path = entry_path(plan.output, stage.name, unit.id)
    if not path.exists():
        return False
    try:
        entry = read_entry(path)
        return (
            entry["config_sha256"] == unit.config_sha256
            and all(made.get(file["name"], file["sha256"]) == file["sha256"] for file in entry["inputs"])
            and all(file["name"].startswith(f"{stage.directory}/") for file in entry["outputs"])
            and all(has_size(plan.output / file["name"], file) for file in entry["outputs"])
        )
    except (DataError, KeyError, TypeError):
        return False


def _described(path: Path, name: str) -> Described:
    try:
        return {"name": name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


@cache
def code_sha256() -> str:
    """Of the sources of data_tools: what made an entry."""
    digest = hashlib.sha256()
    root = Path(data_tools.__path__[0])
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
