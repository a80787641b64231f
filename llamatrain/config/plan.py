"""What is to be planned: a training run, how many nodes of which cluster, and what is served afterwards. No torch."""

from dataclasses import dataclass, field

from llamatrain.config.cluster import ClusterConfig, check_hardware
from llamatrain.config.run import RunConfig
from llamatrain.errors import ConfigError

FORMATS = ("text", "json")
FITS = ("hoffmann", "besiroglu")
PLOTS = (".svg", ".png")


@dataclass
class ServeConfig:
    """The model's life after its training."""

    tokens: float | None = None  # over its life, read and written
    loss: float | None = None  # to be reached; None: that of the run as it is asked for
    fit: str = "hoffmann"  # of the loss over size and tokens
    utilisation: float = 0.2  # of the GPUs' peak that serving reaches
    plot: str | None = None  # file for the cost over the size


@dataclass
class PlanConfig(RunConfig):
    """A run, and where it would go."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    nodes: int | None = None
    layouts: int = 5
    format: str = "text"
    restart_minutes: float = 15.0  # from a failure until the run is where its checkpoint was
    save_gb_s: float = 10.0  # from each GPU to its host's memory, where its part of a save is put
    storage_gb_s: float = 50.0  # from all hosts together to files
    pue: float = 1.1
    kg_per_kwh: float = 0.385
    serve: ServeConfig = field(default_factory=ServeConfig)

    @property
    def processes(self) -> int:
        """Of the whole run."""
        return (self.nodes or 0) * self.cluster.gpus_per_node


def check_plan(config: PlanConfig, *, clusters: list[str]) -> None:
    """What does not concern the run itself; `clusters` are the names to choose from. Raises ConfigError."""
    if config.cluster.name is None:
        raise ConfigError(
            f"cluster=… is missing: choose one of {', '.join(clusters)}, or a file of your own (docs/clusters.md)"
        )
    if config.nodes is None:
        raise ConfigError("nodes=… is missing: nodes=N")
    for key, number in (("nodes", config.nodes), ("layouts", config.layouts)):
        if number < 1:
            raise ConfigError(f"{key}={number}: must be at least 1")
    for key, value in (
        ("save_gb_s", config.save_gb_s),
        ("storage_gb_s", config.storage_gb_s),
        ("serve.tokens", config.serve.tokens),
        ("serve.loss", config.serve.loss),
        ("serve.utilisation", config.serve.utilisation),
        ("kg_per_kwh", config.kg_per_kwh),
    ):
        if value is not None and not value > 0:
            raise ConfigError(f"{key}={value}: must be above 0")
    if config.restart_minutes < 0:
        raise ConfigError(f"restart_minutes={config.restart_minutes}: must not be negative")
    if config.serve.utilisation > 1:
        raise ConfigError(f"serve.utilisation={config.serve.utilisation}: must be at most 1, the whole of the peak")
    if config.pue < 1:
        raise ConfigError(f"pue={config.pue}: must be at least 1, where nothing but the GPUs draws power")
    if config.format not in FORMATS:
        raise ConfigError(f"format={config.format}: choose one of {', '.join(FORMATS)}")
    if config.serve.fit not in FITS:
        raise ConfigError(f"serve.fit={config.serve.fit}: choose one of {', '.join(FITS)}")
    if config.serve.plot and config.serve.tokens is None:
        raise ConfigError("serve.plot draws what serve.tokens asks: serve.tokens=N")
    if config.serve.plot and not config.serve.plot.endswith(PLOTS):
        raise ConfigError(f"serve.plot={config.serve.plot}: must end in {' or '.join(PLOTS)}")
    check_hardware(config.cluster.hardware)
