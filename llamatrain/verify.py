"""Verify that every layout gives the same model as one process does.

python -m llamatrain.verify                     layouts on 1, 2 and 4 processes of this machine's CPU
torchrun … -m llamatrain.verify suite=cluster workspace=SHARED_DIRECTORY     layouts on your ranks, before a real run

A small model is trained for 20 steps by each layout and by one process alone, from the same weights on the same
batches. Compared are the samples of every step, the initial weights (bit for bit), losses, gradient norms, the first
gradient of every parameter, checkpoints in both directions (bit for bit), and the order of collectives against
computation. Exit status 0: all within the tolerances of docs/design.md; 1: not all, and the table says which.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

from llamatrain.cli import run_command
from llamatrain.config.parallel import ParallelConfig
from llamatrain.config.verify import VerifyConfig, check_verify
from llamatrain.errors import ConfigError, LlamatrainError
from llamatrain.process import this_process
from llamatrain.verification.cases import VOCAB_SIZE, Case, all_cases

WORLD_SIZES = (1, 2, 4)  # of suite=cpu
WORK, RESULTS = "work", "results-{}.json"


class VerificationFailed(LlamatrainError):
    """Some layout does not give the model that it should."""

    exit_code = 1


def verify(settings: VerifyConfig) -> None:
    """Run the suite; raises VerificationFailed naming the cases that failed."""
    check_verify(settings)
    workspace = Path(settings.workspace).absolute()
    if os.environ.get("WORLD_SIZE"):
        verify_here(settings, workspace)
    elif settings.suite == "cluster":
        raise ConfigError(
            "suite=cluster verifies the ranks it is started on: start it with torchrun, or take suite=cpu"
        )
    else:
        start_on_this_machine(settings, workspace)


def start_on_this_machine(settings: VerifyConfig, workspace: Path) -> None:
    """One torchrun after the other, each with all its cases."""
    results: list[dict[str, Any]] = []
    planned = {size: len(chosen_cases(settings, size, ranks_per_node=size)) for size in WORLD_SIZES}
    told = ", ".join(f"{layouts} on {size}" for size, layouts in planned.items())
    print(f"{sum(planned.values())} layouts to try, by number of processes: {told}", flush=True)
    for size in (size for size, layouts in planned.items() if layouts):
        results_file = workspace / RESULTS.format(size)
        results_file.unlink(missing_ok=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        arguments = ["-m", "llamatrain.verify", "suite=cpu", f"workspace={workspace}"]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": ""}
        only = [f"only={settings.only}"] if settings.only else []
        done = subprocess.run([*launcher, *arguments, *only], env=environment, stderr=subprocess.PIPE, text=True)
        if not results_file.exists():
            raise VerificationFailed(f"the launch of {size} processes did not come to an end:\n{done.stderr}")
        results += json.loads(results_file.read_text(encoding="utf-8"))
    refuse_failures(results)


def chosen_cases(settings: VerifyConfig, ranks: int, *, ranks_per_node: int) -> list[Case]:
    """What is to be tried on so many ranks."""
    cases = all_cases(ranks, ranks_per_node=ranks_per_node)
    return [case for case in cases if settings.only is None or settings.only in case.name]


def verify_here(settings: VerifyConfig, workspace: Path) -> None:
    """All cases for the ranks that this process is one of."""
    import torch

    from llamatrain.distributed import World
    from llamatrain.verification.corpus import write_corpus
    from llamatrain.verification.runner import Result, Runner

    process = this_process()
    world = World(process)
    world.join(ParallelConfig())
    torch.set_num_threads(max(1, torch.get_num_threads() // process.local_world_size))
    work = workspace / WORK

    def prepare() -> None:
        shutil.rmtree(work, ignore_errors=True)
        write_corpus(work / "corpus", vocab_size=VOCAB_SIZE)

    chosen = chosen_cases(settings, world.size, ranks_per_node=process.local_world_size)
    number, began = count(1), time.monotonic()

    def tell(result: Result) -> None:
        if world.leads:
            done = next(number)
            left = (time.monotonic() - began) / done * (len(chosen) - done)
            print(f"{row(result.as_json())}  ({done} of {len(chosen)}, {left:.0f} s left)", flush=True)

    world.decide(prepare)
    if world.leads and settings.suite == "cluster":
        print(f"{len(chosen)} layouts to try on {world.size} processes", flush=True)
    results = [result.as_json() for result in Runner(world, work, work / "corpus").run(chosen, tell)]
    if world.leads:
        (workspace / RESULTS.format(world.size)).write_text(json.dumps(results, indent=1), encoding="utf-8")
        shutil.rmtree(work, ignore_errors=True)
    world.leave()
    if world.leads and settings.suite == "cluster":
        refuse_failures(results)


def row(result: dict[str, Any]) -> str:
    """One line of the table."""
    numbers = " ".join(
        f"{name} {result[name]:.1e}" if result[name] is not None else f"{name} -"
        for name in ("loss", "norm", "gradient")
    )
    verdict = "ok" if not result["failures"] else "FAILED: " + "; ".join(result["failures"])
    return f"{result['ranks']} ranks  {result['layout']:<60} {numbers}  {result['seconds']:5.1f}s  {verdict}"


def refuse_failures(results: list[dict[str, Any]]) -> None:
    """Say how many cases passed. Raises VerificationFailed if not all did, or there was none."""
    failed = [result for result in results if result["failures"]]
    seconds = sum(result["seconds"] for result in results)
    if failed or not results:
        names = "; ".join(f"{result['layout']} on {result['ranks']} ranks" for result in failed)
        raise VerificationFailed(f"{len(failed)} of {len(results)} layouts failed: {names}")
    print(f"all {len(results)} layouts give the model of one process ({seconds:.0f} s)")


def main() -> None:
    run_command(VerifyConfig, "commands/verify", verify, help_text=__doc__)


if __name__ == "__main__":
    main()
