"""Submit a training run to SLURM.

    python -m launch.slurm cluster=h100 nodes=4 model=7b data.sources.NAME.path=DIRECTORY [group=choice …] [key=value …]

Composes and checks the run for so many processes, as llamatrain.train would, and submits train.sbatch with it. The
settings of the run are those of python -m llamatrain.train. The launch's own:

  cluster=a100_80gb|h100|h200|local   a file of conf/cluster: what to ask sbatch for, what a node needs first
  cluster.partition=NAME cluster.account=NAME cluster.time=24:00:00 cluster.network_interface=ib0 …
  cluster.setup=['module load cuda','source /shared/venv/bin/activate']     lines run on every node
  cluster.env.NCCL_IB_HCA=mlx5        exported on every node
  nodes=256                           how many
  chain=5                             five jobs, each for when the one before has ended, where none is requeued
  job_name=NAME                       otherwise the run's name
  dry_run=true                        print the shell commands that would submit it, and do nothing
  --config-dir=DIR                    a folder of your own beside conf: DIR/cluster/ours.yaml is cluster=ours

The setup file that is made and the jobs' output lie in RUN_DIR/launch. docs/clusters.md tells the rest; --cfg job
prints the composed configuration.
"""

import os
import secrets
import shlex
import subprocess
import sys
from functools import partial

from launch.slurm.config import LaunchConfig, check_launch
from launch.slurm.job import (
    folder,
    job_number,
    sbatch_command,
    setup_file,
    setup_path,
    shell_script,
    training_arguments,
    variables,
)
from llamatrain.cli import run_command
from llamatrain.errors import ConfigError, LlamatrainError
from llamatrain.files import write_bytes_atomically


class NotSubmitted(LlamatrainError):
    """SLURM did not take a job."""


def launch(config: LaunchConfig, typed: list[str]) -> None:
    """Check everything, then submit, or print how; `typed`: the command line."""
    arguments = training_arguments(typed)
    check_launch(config)
    if own := os.environ.get("LLAMATRAIN_SETUP"):
        raise ConfigError(
            f"LLAMATRAIN_SETUP={own} is set, and launch.slurm writes a setup file of its own: unset it, and make "
            f"`source {shlex.quote(own)}` one of the lines of cluster.setup"
        )
    content = setup_file(config.cluster, python=sys.executable)
    chain_id = secrets.token_hex(4)
    devices = f" ({config.cluster.accelerator})" if config.cluster.accelerator else ""
    print(f"# {config.nodes} nodes x {config.cluster.processes} = {config.processes} processes{devices}")
    if config.dry_run:
        print(shell_script(config, arguments, content=content, chain_id=chain_id), end="")
        return
    submit(config, arguments, content=content, chain_id=chain_id)


def submit(config: LaunchConfig, arguments: list[str], *, content: str, chain_id: str) -> None:
    """Write the setup file and hand the jobs to sbatch. Raises NotSubmitted."""
    setup = setup_path(config, content)
    try:
        setup.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(setup, content.encode())
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir}: cannot be written ({error.strerror})") from None
    environment = {**os.environ, **variables(config, setup, chain_id=chain_id)}
    jobs: list[str] = []
    for _ in range(config.chain):
        command = sbatch_command(config, arguments, after=jobs[-1] if jobs else None)
        try:
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            raise NotSubmitted(
                "there is no sbatch here: run this where SLURM's commands are; dry_run=true prints what would be done"
            ) from None
        if done.returncode != 0:
            left = f"; submitted before: {' '.join(jobs)} (scancel {' '.join(jobs)} takes them back)" if jobs else ""
            raise NotSubmitted(f"sbatch did not take job {len(jobs) + 1} of {config.chain}, see above{left}")
        jobs.append(job_number(done.stdout))
        print(f"job {jobs[-1]}, its output: {folder(config)}/job-{jobs[-1]}.out", flush=True)
    if len(jobs) > 1:
        print(f"a chain: each waits for the one before; scancel {' '.join(jobs)} ends all of it")


def main() -> None:
    run_command(LaunchConfig, "launch", partial(launch, typed=sys.argv[1:]), help_text=__doc__)


if __name__ == "__main__":
    main()
