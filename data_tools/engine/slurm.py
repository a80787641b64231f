"""The stages as job arrays of a SLURM cluster, one array a stage, all submitted at once; nobody has to stay.

Each array task takes many units (`part I of N`), so that arrays are small whatever the plan, and never larger than the
cluster's MaxArraySize. An array starts when the one before has ended in whatever way (`afterany`), and its tasks look
into the ledger first: with `afterok` one lost task would leave all that follows in the queue for ever. What a task has
not made when it is preempted, loses its node or comes near its time limit is made when it runs again (--requeue, and
`scontrol requeue` at the time limit); nothing needs saving, since units are made whole or not at all. The last job is
the audit.

Plain sbatch, and not submitit: submitit starts pickled functions from its own folder and keeps track in a process that
waits, while here the whole state is the plan and the ledger, a task is one line of shell, and a task that somebody
requeues by hand needs no driver either.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from data_tools.engine.plan import Plan, Stage
from data_tools.engine.settings import SlurmSettings
from data_tools.engine.stages import OWN_PROCESSES, pending
from llamatrain.errors import LlamatrainError
from llamatrain.files import write_bytes_atomically, write_json_atomically

FOLDER = "slurm"
JOBS_FILE = "jobs.json"
DEFAULT_MAX_ARRAY_SIZE = 1001  # SLURM's own
SIGNAL_BEFORE_LIMIT_S = 120
REPOSITORY = Path(__file__).parent.parent.parent

SCRIPT = """\
#!/bin/bash
# {what}; written by python -m data_tools.prepare
{setup}
leave() {{ # near the time limit: back into the queue. Units are made whole or not at all, so nothing is saved.
    trap '' USR1
    kill -TERM "$worker"
    scontrol requeue "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
}}
trap leave USR1
{command} &
worker=$!
wait "$worker"
code=$?
while kill -0 "$worker" 2>/dev/null; do # a signal ended the wait
    wait "$worker"
    code=$?
done
exit "$code"
"""


class NotSubmitted(LlamatrainError):
    """SLURM did not take a job."""


def submit(plan: Plan) -> list[str]:
    """Submit what is missing; the numbers of the jobs, in order. Raises NotSubmitted."""
    folder = plan.output / FOLDER
    _refuse_while_running(folder / JOBS_FILE)
    stages = [stage for stage in plan.stages if pending(plan, stage)]
    if stages:  # what comes after a stage that is made again is looked at again
        stages = list(plan.stages[plan.stages.index(stages[0]) :])
    limit = max_array_size()
    jobs: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        parts = array_tasks(len(stage.units), plan.settings.slurm.array_tasks, limit)
        script = folder / f"{stage.name}.sh"
        command = worker_command(plan, stage, parts)
        write_bytes_atomically(script, script_text(f"stage {stage.name}", command, plan.settings.slurm).encode())
        jobs.append(_sbatch(options(plan, stage.name, parts=parts, after=jobs[-1:]), script))
        write_json_atomically(folder / JOBS_FILE, jobs)
        print(f"job {jobs[-1]}: {stage.name}, {len(stage.units)} units in {parts} array tasks", flush=True)
    script = folder / "audit.sh"
    command = f"{_python(plan.settings.slurm)} -m data_tools.audit {shlex.quote(f'output={plan.output.resolve()}')}"
    write_bytes_atomically(script, script_text("the audit", command, plan.settings.slurm).encode())
    jobs.append(_sbatch(options(plan, "audit", parts=None, after=jobs[-1:]), script))
    write_json_atomically(folder / JOBS_FILE, jobs)
    print(f"job {jobs[-1]}: audit; their output: {folder}/, scancel {' '.join(jobs)} ends all of it", flush=True)
    return jobs


def array_tasks(units: int, wanted: int, max_array_size: int) -> int:
    """How many tasks an array has: MaxArraySize bounds the index, which starts at 0."""
    return max(1, min(units, wanted, max_array_size))


def max_array_size() -> int:
    """The cluster's. Raises NotSubmitted when there is no SLURM here."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", _run(["scontrol", "show", "config"]))
    return int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE


def worker_command(plan: Plan, stage: Stage, parts: int) -> str:
    workers = "${SLURM_CPUS_PER_TASK:-1}"
    output = shlex.quote(str(plan.output.resolve()))
    return (
        f"{_python(plan.settings.slurm)} -m data_tools.engine.worker {output} {stage.name} "
        f'"$SLURM_ARRAY_TASK_ID" {parts} "{workers}"'
    )


def script_text(what: str, command: str, settings: SlurmSettings) -> str:
    path = f'export PYTHONPATH={shlex.quote(str(REPOSITORY))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    return SCRIPT.format(what=what, setup="\n".join([*settings.setup, path]), command=command)


def options(plan: Plan, name: str, *, parts: int | None, after: list[str]) -> list[str]:
    """Of sbatch. `parts`: array tasks; None: a single job."""
    settings = plan.settings.slurm
    folder = str((plan.output / FOLDER).resolve()).replace("%", "%%")
    cpus = settings.cpus_per_task if parts is not None or name in OWN_PROCESSES else 1
    given = {
        "--partition": settings.partition,
        "--account": settings.account,
        "--qos": settings.qos,
        "--time": settings.time,
        "--cpus-per-task": cpus,
        "--mem": settings.mem,
    }
    at_once = f"%{settings.at_once}" if settings.at_once else ""
    return [
        f"--job-name={re.sub(r'[^A-Za-z0-9_.+-]+', '_', plan.settings.name)}-{name}",
        "--ntasks=1",
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{SIGNAL_BEFORE_LIMIT_S}",
        f"--output={folder}/{name}-%A_%a.out" if parts is not None else f"--output={folder}/{name}-%j.out",
        *([f"--array=0-{parts - 1}{at_once}"] if parts is not None else []),
        *(f"{option}={value}" for option, value in given.items() if value is not None),
        *([f"--dependency=afterany:{after[0]}"] if after else []),
        *settings.sbatch,
    ]


def _python(settings: SlurmSettings) -> str:
    return shlex.quote(settings.python or sys.executable)


def _sbatch(arguments: list[str], script: Path) -> str:
    printed = _run(["sbatch", "--parsable", *arguments, str(script)])
    return printed.strip().partition(";")[0]


def _refuse_while_running(path: Path) -> None:
    if not path.exists():
        return
    jobs: list[str] = json.loads(path.read_text(encoding="utf-8"))
    # squeue knows nothing of old jobs and says so with an error; all jobs are listed then
    listed = {line.partition("_")[0] for line in _run(["squeue", "-h", "--me", "-o", "%i"]).splitlines()}
    if running := [job for job in jobs if job in listed]:
        raise NotSubmitted(
            f"jobs {' '.join(running)} of an earlier start are still in the queue: wait for them, or scancel "
            f"{' '.join(running)}"
        )


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise NotSubmitted(
            f"there is no {command[0]} here: run this where SLURM's commands are, or set executor=local"
        ) from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        hint = (
            "; is this machine part of a cluster? Without SLURM: executor=local, or stage=NAME part=I/N"
            if command[0] in ("scontrol", "squeue")
            else ""
        )
        raise NotSubmitted(f"{command[0]}: {said}{hint}")
    return done.stdout
