"""From a launch to texts: sbatch's options, the setup file, the arguments of the training. Pure functions.

Nothing here is put together as a line for a shell but the setup file and what `dry_run=true` prints, and there
`shlex.quote` writes every word. Of the environment only the cluster's own file says what is written down.
"""

import hashlib
import re
import shlex
from pathlib import Path

from launch.slurm.config import ClusterConfig, LaunchConfig
from llamatrain.errors import ConfigError

SCRIPT = Path(__file__).parent / "train.sbatch"
FOLDER = "launch"  # in the run's directory
OWN_KEYS = ("cluster", "nodes", "chain", "job_name", "dry_run")
CONFIG_DIRECTORY_FLAGS = ("--config-dir", "-cd")


def training_arguments(arguments: list[str]) -> list[str]:
    """What of the launcher's command line is the training's, as it was typed. Raises ConfigError for other flags."""
    kept: list[str] = []
    for position, argument in enumerate(arguments):
        flag, key = argument.partition("=")[0], argument.lstrip("+~").partition("=")[0]
        is_value = position > 0 and arguments[position - 1] in CONFIG_DIRECTORY_FLAGS
        if argument.startswith("-") and flag not in CONFIG_DIRECTORY_FLAGS and not is_value:
            raise ConfigError(f"{argument}: not for launch.slurm, which submits one run; it takes key=value")
        if "\n" in argument or "\r" in argument:
            raise ConfigError(f"{argument!r}: a line break in a setting cannot be handed to a job")
        if is_value or key.partition(".")[0] not in OWN_KEYS:
            kept.append(argument)
    return kept


def folder(config: LaunchConfig) -> Path:
    """Where the setup file and the jobs' output lie."""
    return Path(config.run_dir).absolute() / FOLDER


def setup_file(cluster: ClusterConfig, *, python: str) -> str:
    """What the batch shell and every node source before anything else; `python`: where the cluster names none."""
    exports: dict[str, str | None] = {
        "NPROC_PER_NODE": str(cluster.processes),
        "PYTHON": cluster.python or python,
        "NCCL_SOCKET_IFNAME": cluster.network_interface,
        "GLOO_SOCKET_IFNAME": cluster.network_interface,
        "CONTAINER_IMAGE": cluster.container_image,
        "CONTAINER_MOUNTS": ",".join(cluster.container_mounts) or None,
        "CONTAINER_PYTHON": cluster.container_python if cluster.container_image else None,
    }
    exports |= {name: value for name, value in cluster.env.items() if value is not None}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items() if value is not None]
    head = f"# written by python -m launch.slurm, cluster={cluster.name}; sourced by the batch shell and on every node"
    return "\n".join([head, *cluster.setup, *lines]) + "\n"  # ours last: a module may set such variables too


def setup_path(config: LaunchConfig, content: str) -> Path:
    """Named by its content: a job in the queue keeps the file that it was submitted with."""
    return folder(config) / f"setup-{hashlib.sha256(content.encode()).hexdigest()[:12]}.sh"


def sbatch_options(config: LaunchConfig) -> list[str]:
    """All options but the dependency of one job of a chain on the one before."""
    cluster = config.cluster
    given = {
        "--partition": cluster.partition,
        "--account": cluster.account,
        "--qos": cluster.qos,
        "--constraint": cluster.constraint,
        "--time": cluster.time,
        "--cpus-per-task": cluster.cpus_per_task,
        "--mem": cluster.mem,
    }
    gpus = cluster.gpu_option if cluster.gpus_per_node else None
    output = str(folder(config)).replace("%", "%%")
    return [
        f"--job-name={re.sub(r'[^A-Za-z0-9_.+-]+', '_', config.job_name or config.name)}",
        f"--nodes={config.nodes}",
        *([gpus.replace("{}", str(cluster.gpus_per_node))] if gpus else []),
        *(f"{option}={value}" for option, value in given.items() if value is not None),
        *(["--exclusive"] if cluster.exclusive else []),
        f"--signal=B:USR1@{cluster.signal_before_limit_s}",
        f"--output={output}/job-%j.out",
        "--export=ALL",  # whatever SBATCH_EXPORT says: LLAMATRAIN_SETUP must arrive
        *(["--no-requeue"] if config.chain > 1 else []),
        *cluster.sbatch,
    ]


def sbatch_command(config: LaunchConfig, arguments: list[str], *, after: str | None = None) -> list[str]:
    """One job; `after`: that of the chain which must have ended."""
    waits = [f"--dependency=afterany:{after}"] if after else []
    return ["sbatch", *waits, "--parsable", *sbatch_options(config), str(SCRIPT), *arguments]


def variables(config: LaunchConfig, setup: Path, *, chain_id: str) -> dict[str, str]:
    """What sbatch is given in its environment."""
    chain = {"LLAMATRAIN_CHAIN": chain_id} if config.chain > 1 else {}
    return {"LLAMATRAIN_SETUP": str(setup), **chain}


def job_number(answer: str) -> str:
    """Of what sbatch --parsable prints: NUMBER or NUMBER;CLUSTER. Raises ConfigError."""
    last = answer.strip().rpartition("\n")[2].partition(";")[0]
    if not last.isdigit():
        raise ConfigError(f"sbatch was to print a job's number and printed {answer!r}")
    return last


def shell_script(config: LaunchConfig, arguments: list[str], *, content: str, chain_id: str) -> str:
    """Bash that does what the launcher would do: it writes the setup file and submits the jobs."""
    setup = setup_path(config, content)
    mark = "SETUP"
    while mark in content.splitlines():
        mark += "_"
    exports = variables(config, setup, chain_id=chain_id).items()
    lines = [
        f"mkdir -p {shlex.quote(str(setup.parent))}",
        f"cat > {shlex.quote(str(setup))} <<'{mark}'\n{content}{mark}",
        *(f"export {name}={shlex.quote(value)}" for name, value in exports),
    ]
    first, *others = sbatch_command(config, arguments)
    waits = ' --dependency=afterany:"${job%%;*}"'
    jobs = [
        f'job=$({first}{waits if number else ""} {shlex.join(others)}) && echo "$job"' for number in range(config.chain)
    ]
    return "\n".join([*lines, " &&\n".join(jobs)]) + "\n"
