"""Re-add the ledger of a preparation, and check every file it tells of.

    python -m data_tools.audit output=DIRECTORY

Fails with exit code 1 and names what is wrong when a unit of a stage is missing; an entry does not add up, or is not of
the plan; what a stage took in is not what the one before kept, file by file; an input file is read by no unit or by
two; an output is gone or its hash is not the ledger's; or an input file could not be read to its end.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.engine.ledger import entry_path, gaps, read_entry, told_drops, total
from data_tools.engine.plan import SHARDS_DIRECTORY, Plan, Stage, read_plan
from llamatrain.cli import run_command
from llamatrain.errors import ConfigError, DataError, LlamatrainError
from llamatrain.files import sha256_of_file

SHOWN = 50
Entry = Mapping[str, Any]


@dataclass
class AuditSettings:
    output: str = "???"  # directory of a prepared source
    hashes: bool = True  # read every output again and compare its hash; false: sizes only
    inputs: bool = False  # the same for the raw input files
    allow_failed: bool = False  # whether input files that could not be read to their end may be
    min_documents: int = 0  # that must have been kept at the end


class AuditFailed(LlamatrainError):
    """The ledger and the files do not tell the same."""


def audit(settings: AuditSettings) -> None:
    """Print the chain. Raises AuditFailed with all that is wrong."""
    if settings.output in ("", "???"):
        raise ConfigError("output is not set: output=DIRECTORY")
    plan = read_plan(Path(settings.output))
    entries = {stage.name: dict(_entries(plan, stage)) for stage in plan.stages}
    wrong = [*problems(plan, entries, settings), *_too_few(plan, entries, settings.min_documents)]
    print_chain(plan, entries)
    if settings.allow_failed:
        for unit, what in _failed(entries["clean"]):
            print(f"clean/{unit}: accepted, though not read to its end: {what}")
    if wrong:
        more = f"\nand {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise AuditFailed(f"{plan.output}: {len(wrong)} found wrong\n" + "\n".join(wrong[:SHOWN]) + more)
    print(f"{plan.output}: whole; every document is accounted for")


def _entries(plan: Plan, stage: Stage) -> Iterator[tuple[str, Entry]]:
    for unit in stage.units:
        path = entry_path(plan.output, stage.name, unit.id)
        if path.exists():
            try:
                yield unit.id, read_entry(path)
            except DataError:
                continue  # told as missing


def problems(plan: Plan, entries: Mapping[str, Mapping[str, Entry]], settings: AuditSettings) -> Iterator[str]:
    """All that is wrong, in words."""
    versions = set()
    for stage in plan.stages:
        for unit in stage.units:
            where = f"{stage.name}/{unit.id}"
            entry = entries[stage.name].get(unit.id)
            if entry is None:
                yield f"{where}: missing (no entry that can be read); run prepare again"
                continue
            versions.add(entry["version"])
            if entry["config_sha256"] != unit.config_sha256:
                yield f"{where}: made with other settings or inputs than the plan's; run prepare again"
            again = f"remove {entry_path(plan.output, stage.name, unit.id)} and run prepare again"
            yield from (f"{where}: does not add up: {gap}; {again}" for gap in gaps(entry))
        yield from _strangers(plan, stage)
    if not settings.allow_failed:
        for name, what in _failed(entries["clean"]):
            yield (
                f"clean/{name}: could not be read: {what}; get the file anew, remove "
                f"{entry_path(plan.output, 'clean', name)} and run prepare again (with overwrite=true if the file's "
                "size is another now), or accept what was whole in it: allow_failed=true"
            )
    yield from _input_files(plan, entries["clean"])
    yield from _chain(plan, entries)
    yield from _files(plan, entries, settings)
    if len(versions) > 1:
        yield f"units were made by versions {', '.join(sorted(versions))} of llamatrain; make them by one"


def _failed(cleaned: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """Units, and which input file of theirs could not be read to its end and why."""
    for unit, entry in cleaned.items():
        for file in entry["failed"]:
            yield unit, f"{file['name']}: {file['error'].removeprefix(file['name'] + ': ')}"


def _too_few(plan: Plan, entries: Mapping[str, Mapping[str, Entry]], least: int) -> Iterator[str]:
    """What became of the documents, by stage, where fewer than so many were kept."""
    stages = [stage for stage in plan.stages if stage.writes_documents and entries[stage.name]]
    added = {stage.name: total(entries[stage.name].values()) for stage in stages}
    kept = added[stages[-1].name]["kept"]["documents"] if stages else 0
    if kept < least:
        told = "; ".join(f"{name}: {told_drops(of)}" for name, of in added.items() if of["dropped"])
        yield (
            f"source {plan.settings.name}: {kept:,} documents kept, and min_documents={least} ({told or 'none read'}): "
            "look at its input and settings, or leave it out"
        )


def _strangers(plan: Plan, stage: Stage) -> Iterator[str]:
    """Files in a directory of documents that no unit wrote: a training would read them."""
    if stage.writes_documents:
        known = {unit.id for unit in stage.units}
        for path in sorted((plan.output / stage.directory).glob("*")):
            if not path.name.startswith(".") and path.name.partition(".")[0] not in known:
                yield f"{stage.directory}/{path.name}: no unit of {stage.name} wrote it; remove it"


def _input_files(plan: Plan, cleaned: Mapping[str, Entry]) -> Iterator[str]:
    read = Counter((file["name"], file["bytes"]) for entry in cleaned.values() for file in entry["inputs"])
    wanted = {(file.name, file.size) for file in plan.files}
    yield from (f"{name}: read, and not in the plan" for name, size in read if (name, size) not in wanted)
    yield from (f"{name}: read by two units" for (name, _), times in sorted(read.items()) if times > 1)
    yield from (f"{name}: an input file that no unit has read" for name, _ in sorted(wanted - set(read)))


def _chain(plan: Plan, entries: Mapping[str, Mapping[str, Entry]]) -> Iterator[str]:
    """Whether each stage took what those before it left."""
    made = {
        (file["name"]): file["sha256"]
        for stage in plan.stages
        for entry in entries[stage.name].values()
        for file in entry["outputs"]
    }
    for stage in plan.stages:
        for unit, entry in entries[stage.name].items():
            where = f"{stage.name}/{unit}"
            if stage.documents_of is None:
                continue
            for file in entry["inputs"]:
                if made.get(file["name"]) != file["sha256"]:
                    yield f"{where}: read another {file['name']} than there is now; run prepare again"
            source = entries[stage.documents_of].get(unit)
            if stage.writes_documents and source is not None and entry["in"] != source["kept"]:
                yield f"{where}: {stage.documents_of} kept {source['kept']}, and {stage.name} took {entry['in']}"
    yield from _tokens(plan, entries)


def _tokens(plan: Plan, entries: Mapping[str, Mapping[str, Entry]]) -> Iterator[str]:
    for unit, entry in entries.get("tokenize", {}).items():
        kept = total(entries[plan.last_documents.name].values())["kept"]
        facts = entry["facts"]
        if facts["read"] != kept["documents"]:
            yield f"tokenize/{unit}: {kept['documents']} documents were kept, and {facts['read']} tokenised"
        dropped = sum(count for name, count in facts.items() if name.startswith("dropped_"))
        if facts["kept"] + dropped != facts["read"] or facts["train"] + facts["validation"] != facts["kept"]:
            yield f"tokenize/{unit}: does not add up: {facts}"
        if not dropped and facts["bytes"] != kept["bytes"]:
            yield f"tokenize/{unit}: {kept['bytes']} bytes were kept, and {facts['bytes']} tokenised"


def _files(plan: Plan, entries: Mapping[str, Mapping[str, Entry]], settings: AuditSettings) -> Iterator[str]:
    checks = [
        (plan.output / file["name"], file)
        for stage in plan.stages
        for entry in entries[stage.name].values()
        for file in entry["outputs"]
    ]
    outputs = len(checks)
    if settings.inputs:
        paths = {file.name: file.path for file in plan.files}
        checks += [(paths[file["name"]], file) for entry in entries["clean"].values() for file in entry["inputs"]]

    def again(number: int) -> str:
        path, _ = checks[number]
        if number >= outputs:
            return "it has changed since it was read: put the old file back, or prepare into another output"
        if path.parent.name == SHARDS_DIRECTORY:
            return f"remove {path.parent} and run prepare again to make it anew"
        return f"remove {path} and run prepare again to make it anew"

    def problem(number: int) -> str | None:
        path, file = checks[number]
        try:
            if path.stat().st_size != file["bytes"]:
                sizes = f"has {path.stat().st_size:,} bytes, and the ledger says {file['bytes']:,}"
                return f"{file['name']}: {sizes}; {again(number)}"
            if (settings.hashes or number >= outputs) and sha256_of_file(path) != file["sha256"]:
                return f"{file['name']}: its content is not what the ledger says; {again(number)}"
        except OSError as error:
            return f"{file['name']}: cannot be read ({error.strerror}); {again(number)}"
        return None

    with ThreadPoolExecutor() as pool:  # hashing is done without Python's lock
        yield from (found for found in pool.map(problem, range(len(checks))) if found)


def print_chain(plan: Plan, entries: Mapping[str, Mapping[str, Entry]]) -> None:
    """Documents and bytes; into `clean` goes what the reader handed on, after its own cleaning."""
    print(f"{'stage':<10}{'units':>14}{'documents in':>16}{'kept':>16}{'dropped':>16}{'bytes in':>20}{'kept':>20}")
    for stage in plan.stages:
        added = total(entries[stage.name].values())
        line = f"{stage.name:<10}{f'{len(entries[stage.name])} of {len(stage.units)}':>14}"
        if stage.writes_documents and entries[stage.name]:
            came, kept = added["in"], added["kept"]
            dropped = sum(counts["documents"] for counts in added["dropped"].values())
            line += f"{came['documents']:>16,}{kept['documents']:>16,}{dropped:>16,}"
            line += f"{came['bytes']:>20,}{kept['bytes']:>20,}"
        elif stage.name == "tokenize" and entries[stage.name]:
            facts = added["facts"]
            line += f"{facts['read']:>16,}{facts['kept']:>16,}{facts['read'] - facts['kept']:>16,}"
            line += f"  {facts['tokens_train'] + facts['tokens_validation']:,} tokens"
        print(line)
    print("clean: bytes in are of texts after the reader's own cleaning, and of what it dropped as it lay in the input")


def main() -> None:
    run_command(AuditSettings, "data_tools/audit", audit, help_text=__doc__)


if __name__ == "__main__":
    main()
