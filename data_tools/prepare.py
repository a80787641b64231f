"""Prepare a source: raw files to cleaned, deduplicated documents and, with a tokenizer, to token shards.

    python -m data_tools.prepare source=NAME input=FILES output=DIRECTORY [tokenizer=tokenizer.model] [key=value …]

source=NAME is a file of conf/data_tools/prepare/source: which reader, filters and deduplication, with every threshold.
--cfg job prints all settings, dry_run=true the plan. Started again, it goes on where it was killed, and the result is
that of an unbroken run, byte for byte, with any number of workers.

  executor=local   processes on this machine, workers=N (default: one per CPU)
  executor=slurm   job arrays, slurm.partition=… slurm.time=… slurm.cpus_per_task=…; submits and returns
  stage=NAME       that stage only; part=I/N the I-th of N shares of it, for schedulers of one's own

DIRECTORY gets documents/*.jsonl.zst, shards/ and ledger/, which says what became of every document:
python -m data_tools.audit output=DIRECTORY re-adds it.
"""

import os
import shutil
import sys

from data_tools.engine import slurm
from data_tools.engine.checks import check_ahead, check_used
from data_tools.engine.executors import at_work, check_complete, remove_left_overs, run_stages
from data_tools.engine.inputs import DIRECTORIES
from data_tools.engine.ledger import LEDGER, TIMINGS, read_stage, told_drops, total
from data_tools.engine.plan import Plan, make_plan, write_plan
from data_tools.engine.settings import PrepareSettings, check_settings, part_of
from data_tools.engine.stages import pending
from llamatrain.errors import DataError

CONFIG = "data_tools/prepare/prepare"
CARDS = ("data_card.md", "data_card.html")  # of data_tools.data_card


def prepare(settings: PrepareSettings) -> None:
    """Make the output, or go on with it. Raises LlamatrainError."""
    check_settings(settings)
    plan = make_plan(settings)
    part = part_of(settings)
    stages = [plan.stage(settings.stage)] if settings.stage else list(plan.stages)
    check_ahead(plan)
    if settings.dry_run:
        print_plan(plan)
        return
    try:
        with at_work(plan.output, shared=settings.part is not None):
            write_plan(plan)
            if settings.overwrite:
                _forget_changed(plan)
            if settings.part is None:
                remove_left_overs(plan.output)
            if settings.executor == "slurm" and settings.part is None:
                slurm.submit(plan)
                return
            workers = settings.workers or os.cpu_count() or 1
            if settings.stage:
                check_complete(plan, plan.before(settings.stage))
            run_stages(plan, stages, workers=workers, part=part)
            print_summary(plan)
    except OSError as error:
        raise DataError(f"{plan.output}: cannot be written ({error.strerror or error})") from None


def _forget_changed(plan: Plan) -> None:
    """Remove entries and outputs that this plan does not know, or makes otherwise."""
    known = {stage.name: stage for stage in plan.stages}
    for directory in [path for path in (plan.output / LEDGER).glob("*") if path.is_dir()]:
        stage = known.get(directory.name)
        good = {unit.id for unit in stage.units} - {unit.id for unit in pending(plan, stage)} if stage else set()
        for path in directory.glob("*.json"):
            if path.stem not in good:
                path.unlink()
                (plan.output / TIMINGS / directory.name / path.name).unlink(missing_ok=True)
    for stage in plan.stages:
        if stage.name == "tokenize":
            continue
        units = {unit.id: unit for unit in stage.units}
        for path in (plan.output / stage.directory).glob("*"):
            if path.name.partition(".")[0] not in units and stage.name != "near":
                path.unlink()
    _remove_unknown_directories(plan)
    for name in CARDS:  # they would tell of what was there
        if any(pending(plan, stage) for stage in plan.stages) and (plan.output / name).exists():
            (plan.output / name).unlink()
            print(f"{plan.output / name}: removed, as it would be out of date; make it again with data_tools.data_card")


def _remove_unknown_directories(plan: Plan) -> None:
    for name in DIRECTORIES - {stage.directory for stage in plan.stages}:
        shutil.rmtree(plan.output / name, ignore_errors=True)


def print_plan(plan: Plan) -> None:
    size = sum(file.size for file in plan.files)
    print(f"{len(plan.files)} files, {size:,} bytes")
    for stage in plan.stages:
        done = len(stage.units) - len(pending(plan, stage))
        print(f"{stage.name:<10}{len(stage.units):>7} units, {done} done -> {plan.output / stage.directory}")


def print_summary(plan: Plan) -> None:
    failed = 0
    for stage in plan.stages:
        entries = read_stage(plan.output, stage.name)
        added = total(entries)
        if not stage.writes_documents or not added["units"]:
            continue
        failed += len(added["failed"])
        came, kept = added["in"], added["kept"]
        print(f"{stage.name}: {kept['documents']:,} of {came['documents']:,} documents kept, {kept['bytes']:,} bytes")
        for reason, counts in sorted(added["dropped"].items(), key=lambda item: -item[1]["documents"]):
            print(f"    dropped {reason:<28}{counts['documents']:>14,} documents {counts['bytes']:>18,} bytes")
        for where, counts in added["cut"].items():
            print(f"    cut by {where:<29}{counts['documents']:>14,} documents {counts['bytes']:>18,} bytes")
        empty = sum(not entry["kept"]["documents"] for entry in entries)
        if not kept["documents"] and (came["documents"] or stage.documents_of is None):
            print(f"WARNING: {plan.output}: {stage.name} kept nothing: {told_drops(added)}", file=sys.stderr)
        elif empty:
            print(f"    {empty} of {len(entries)} units kept nothing")
    if failed:
        print(f"{failed} input files could not be read to the end: python -m data_tools.audit output={plan.output}")


def main() -> None:
    from llamatrain.cli import given_overrides, run_command  # here: every process of the pool imports this module

    def checked(settings: PrepareSettings) -> None:
        check_used(settings, given_overrides())
        prepare(settings)

    run_command(PrepareSettings, CONFIG, checked, help_text=__doc__)


if __name__ == "__main__":
    main()
