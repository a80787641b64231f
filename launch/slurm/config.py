"""What a launch is asked for: a training run, how many nodes of which cluster, and in how many jobs. No torch."""

import re
from dataclasses import dataclass, field

from llamatrain.cli import config_directory
from llamatrain.config import RunConfig, validate
from llamatrain.config.cluster import ClusterConfig, check_hardware
from llamatrain.errors import ConfigError

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OWN_VARIABLE = re.compile(r"PYTHON|NPROC_PER_NODE|(CONTAINER|LLAMATRAIN|SLURM)_\w+")
SECRET = re.compile(r"(?i)(^|_)(key|token|secret|password|passwd|credentials?)($|_)")
TIME_LIMIT = re.compile(r"(\d+-)?\d+:\d\d:\d\d|\d+-\d+(:\d\d)?")  # a bare number would be minutes, or YAML's 24:00:00
LONGEST_SIGNAL_S = 65_535  # sbatch --signal takes no more
OPTION = re.compile(r"--?[A-Za-z]")
OWN_OPTIONS = {  # of sbatch, that would undo what train.sbatch and the launcher rely on, and what there is instead
    "--export": "the job needs this shell's environment; cluster.env exports more",
    "--ntasks-per-node": "a node has one task, torchrun; cluster.processes_per_node=N",
    "--nodes": "nodes=N",
    "--output": "the output lies in the run's directory",
    "--signal": "cluster.signal_before_limit_s=N",
    "--dependency": "chain=N makes jobs that wait for one another",
    "--requeue": "a job by itself is requeued already, those of chain=N never are",
    "--array": "every job of a run would work in the same directory",
    "--wrap": "what is submitted is train.sbatch",
}


@dataclass
class LaunchConfig(RunConfig):
    """A run, and where it is submitted."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    nodes: int | None = None
    chain: int = 1
    job_name: str | None = None
    dry_run: bool = False

    @property
    def processes(self) -> int:
        """Of the whole run."""
        return (self.nodes or 0) * self.cluster.processes


def check_launch(config: LaunchConfig) -> None:
    """Check the launch, then the run for that many processes. Raises ConfigError."""
    if config.cluster.name is None:
        known = ", ".join(sorted(path.stem for path in (config_directory() / "cluster").glob("*.yaml")))
        raise ConfigError(f"cluster=… is missing: choose one of {known}, or a file of your own (docs/clusters.md)")
    if config.nodes is None:
        raise ConfigError("nodes=… is missing: nodes=N")
    for key, value in (("nodes", config.nodes), ("chain", config.chain)):
        if value < 1:
            raise ConfigError(f"{key}={value}: must be at least 1")
    if config.train.dry_run and config.chain > 1:
        raise ConfigError(f"train.dry_run=true is one job, and chain={config.chain}: chain=1")
    check_cluster(config.cluster)
    if config.cluster.gpus_per_node == 0 and config.train.device == "cuda":
        raise ConfigError("train.device=cuda and cluster.gpus_per_node=0: train.device=cpu, or another cluster=…")
    validate(config, world_size=config.processes)


def check_cluster(cluster: ClusterConfig) -> None:
    """Raises ConfigError."""
    check_hardware(cluster.hardware)
    for name, least in (("gpus_per_node", 0), ("processes_per_node", 1), ("cpus_per_task", 1)):
        value = getattr(cluster, name)
        if value is not None and value < least:
            raise ConfigError(f"cluster.{name}={value}: must be at least {least}")
    if not 1 <= cluster.signal_before_limit_s <= LONGEST_SIGNAL_S:
        raise ConfigError(
            f"cluster.signal_before_limit_s={cluster.signal_before_limit_s}: must lie in [1, {LONGEST_SIGNAL_S}]"
        )
    if cluster.time is not None and not TIME_LIMIT.fullmatch(cluster.time):
        raise ConfigError(
            f"cluster.time={cluster.time}: write hours:minutes:seconds or days-hours:minutes:seconds, in a file within "
            "quotes (to YAML 24:00:00 is a number): cluster.time=24:00:00"
        )
    if cluster.gpu_option is not None and "{}" not in cluster.gpu_option:
        raise ConfigError(
            f"cluster.gpu_option={cluster.gpu_option}: has no {{}} for the number, as in --gres=gpu:{{}}; "
            "null asks for none"
        )
    for variable in cluster.env:
        if not VARIABLE.fullmatch(variable):
            raise ConfigError(f"cluster.env.{variable}: is no name of a variable; letters, digits and _ make one")
        if OWN_VARIABLE.fullmatch(variable):
            raise ConfigError(
                f"cluster.env.{variable}: the launcher sets it, from cluster.processes_per_node, cluster.python and "
                "cluster.container_image"
            )
        if SECRET.search(variable):
            raise ConfigError(
                f"cluster.env.{variable}: a secret has no place in a file; exported in this shell, it reaches the job"
            )
    for option in cluster.sbatch:
        if not OPTION.match(option):
            raise ConfigError(f"cluster.sbatch: {option!r} is no option: each stands by itself, as in [--switches=1]")
        if instead := OWN_OPTIONS.get(option.partition("=")[0]):
            raise ConfigError(f"cluster.sbatch: {option} cannot be given there: {instead}")
    if cluster.container_mounts and cluster.container_image is None:
        raise ConfigError("cluster.container_mounts without cluster.container_image: cluster.container_image=…")
    for mount in cluster.container_mounts:
        if "," in mount:
            raise ConfigError(f"cluster.container_mounts: {mount!r} has a comma, and srun would cut it there")
