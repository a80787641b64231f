"""A cluster: how SLURM is asked for its nodes, and what they can do. A file of conf/cluster. No torch."""

from dataclasses import dataclass, field, fields

from llamatrain.errors import ConfigError


@dataclass
class HardwareConfig:
    """What llamatrain.plan reckons with. None: what it knows of the accelerator (docs/planning.md)."""

    memory_gib: float | None = None  # of a GPU
    peak_tflops: float | None = None  # dense bf16
    peak_fp32_tflops: float | None = None  # asked for by train.precision=fp32 alone
    memory_gb_s: float | None = None  # from a GPU's memory, GB a second
    processors: int | None = None  # streaming multiprocessors of a GPU
    link_gb_s: float | None = None  # from a GPU to the others of its node, GB a second one way
    network_gb_s: float | None = None  # into one node, GB a second
    gpu_watts: float | None = None
    price_per_gpu_hour: float | None = None  # in any currency; None: no cost is told
    gpu_hours_between_failures: float | None = None  # of one GPU; None: Llama 3's rate
    # of the peak, in large matrix products and in causal attention; None: by calibration
    products_share: float | None = None
    attention_share: float | None = None


@dataclass
class ClusterConfig:
    """A file of conf/cluster. None: nothing is asked for, and SLURM or NCCL decides."""

    name: str | None = None
    accelerator: str | None = None  # as torch.cuda.get_device_name() says
    gpus_per_node: int = 0
    processes_per_node: int | None = None  # None: one per GPU
    gpu_option: str | None = "--gpus-per-node={}"  # how sbatch is asked for GPUs, {} their number
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    exclusive: bool = True
    signal_before_limit_s: int = 300
    sbatch: list[str] = field(default_factory=list)  # further options
    network_interface: str | None = None  # between the hosts, for NCCL and gloo
    env: dict[str, str | None] = field(default_factory=dict)  # exported on every node, as they stand here
    setup: list[str] = field(default_factory=list)  # lines of bash, for the batch shell and every node
    python: str | None = None  # None: the interpreter that runs launch.slurm
    container_image: str | None = None
    container_mounts: list[str] = field(default_factory=list)
    container_python: str = "python3"
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    @property
    def processes(self) -> int:
        """Of each node."""
        return max(1, self.gpus_per_node) if self.processes_per_node is None else self.processes_per_node


def check_hardware(hardware: HardwareConfig) -> None:
    """Raises ConfigError."""
    for name in (own.name for own in fields(hardware)):
        value = getattr(hardware, name)
        if value is not None and not value > 0:
            raise ConfigError(f"cluster.hardware.{name}={value}: must be above 0, or null for what is known")
        if value is not None and name.endswith("_share") and value > 1:
            raise ConfigError(f"cluster.hardware.{name}={value}: must be at most 1, the whole of the peak")
