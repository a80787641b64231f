"""What an accelerator and a cluster can do, by data sheet and by calibration. No torch.

A data sheet says what a GPU could do, `CALIBRATION` what of it training reaches: one pair of shares for each kind
of GPU, fitted to published throughputs (docs/planning.md tells how well they foretell those left out of the fit).
"""

import re
from dataclasses import dataclass

from llamatrain.arithmetic import board_watts, peak_flops, seconds_between_failures
from llamatrain.config.cluster import ClusterConfig
from llamatrain.errors import ConfigError

GB, GIB = 1e9, 2**30


@dataclass(frozen=True)
class Calibration:
    """What is reached of a GPU's peak."""

    products: float  # in large matrix products
    attention: float  # in attention's kernels, of whose matrix the half is counted that the causal mask leaves


@dataclass(frozen=True)
class Gpu:
    """An accelerator, by its data sheet, and what is reached of it."""

    name: str
    memory: float  # bytes
    peak: float  # dense bf16 FLOP/s
    peak_fp32: float | None  # FLOP/s of fp32 as torch multiplies it: no TF32
    bandwidth: float  # of its memory, bytes a second
    processors: int  # streaming multiprocessors, over which a product's tiles are spread
    link: float  # to the other GPUs of its node, bytes a second one way
    watts: float
    reached: Calibration
    fitted_on: str | None  # kind of GPU that `reached` was fitted on; None: it was set by hand


@dataclass(frozen=True)
class Cluster:
    """Nodes with GPUs of one kind."""

    gpu: Gpu
    gpus_per_node: int
    network: float  # bytes a second into one node
    failure_s: float  # mean time between two failures of one GPU, or of what it depends on
    price: float | None = None  # of a GPU's hour


# Fitted by python -m tests.benchmarks.bench_planning, which tells how well they foretell rows left out of the fit.
CALIBRATION = {
    "A100": Calibration(products=0.76, attention=0.40),
    "H100": Calibration(products=0.63, attention=0.18),
}


@dataclass(frozen=True)
class _Sheet:
    """Of NVIDIA's data sheets (A100, H100, H200; A800 and H800 have fewer links), memory as torch sees it."""

    memory_gib: float
    bandwidth: float
    processors: int
    link: float
    peak_fp32: float
    kind: str  # of calibration: an H200 is an H100 with other memory


# By what torch.cuda.get_device_name() gives behind "NVIDIA ".
_SHEETS = {
    r"A100-SXM4-80GB": _Sheet(79.2, 2.039e12, 108, 300e9, 19.5e12, "A100"),
    r"A100-SXM4-40GB": _Sheet(39.4, 1.555e12, 108, 300e9, 19.5e12, "A100"),
    r"A800-SXM4-80GB": _Sheet(79.2, 2.039e12, 108, 200e9, 19.5e12, "A100"),
    r"H100 80GB HBM3": _Sheet(79.1, 3.35e12, 132, 450e9, 66.9e12, "H100"),
    r"H800": _Sheet(79.1, 3.35e12, 132, 200e9, 66.9e12, "H100"),
    r"H200": _Sheet(139.8, 4.8e12, 132, 450e9, 66.9e12, "H100"),
}

REQUIRED = (
    "memory_gib",
    "peak_tflops",
    "memory_gb_s",
    "processors",
    "link_gb_s",
    "network_gb_s",
    "gpu_watts",
    "products_share",
    "attention_share",
)


def _names_with(given: str) -> list[str]:
    """The accelerators in whose names are all words of what was given, and no number cut short: an H20 is no H200."""
    words = [rf"\b{re.escape(word)}((?<!\d)|(?!\d))" for word in re.split(r"[\s-]+", given) if word]
    names = [f"NVIDIA {name}" for name in _SHEETS]
    return [name for name in names if words and all(re.search(word, name, re.IGNORECASE) for word in words)]


def cluster_of(config: ClusterConfig) -> Cluster:
    """The cluster that a file of conf/cluster describes. Raises ConfigError naming what it leaves unsaid."""
    if config.gpus_per_node < 1:
        raise ConfigError(f"cluster={config.name} has no GPUs to plan with: choose another, or cluster.gpus_per_node=N")
    given, accelerator = config.hardware, config.accelerator or ""
    name = accelerator.removeprefix("NVIDIA ")
    sheet = next((sheet for pattern, sheet in _SHEETS.items() if re.fullmatch(pattern, name)), None)
    peak = peak_flops(accelerator)
    known: dict[str, float | None] = {"peak_tflops": peak / 1e12 if peak else None}
    known |= {"gpu_watts": board_watts(accelerator), "network_gb_s": None}  # a network is the cluster's
    fp32, fitted_on = given.peak_fp32_tflops, None
    if sheet is not None:
        known |= {"memory_gib": sheet.memory_gib, "memory_gb_s": sheet.bandwidth / GB, "link_gb_s": sheet.link / GB}
        reached = CALIBRATION[sheet.kind]
        known |= {"processors": sheet.processors}
        known |= {"products_share": reached.products, "attention_share": reached.attention}
        fp32 = fp32 or sheet.peak_fp32 / 1e12
        fitted_on = sheet.kind if given.products_share is None or given.attention_share is None else None
    has: dict[str, float] = {}
    for key in REQUIRED:
        value = getattr(given, key)
        value = known.get(key) if value is None else value
        if value is not None:
            has[key] = value
    if unsaid := [f"cluster.hardware.{key}=…" for key in REQUIRED if key not in has]:
        like = _names_with(accelerator) if sheet is None else []
        meant = f"did you mean {' or '.join(like)}? if not, " if like else ""
        raise ConfigError(
            f"cluster.accelerator={accelerator or 'null'} is not known well enough: {meant}{' '.join(unsaid)}"
        )
    gpu = Gpu(
        name=name or config.name or "",
        memory=has["memory_gib"] * GIB,
        peak=has["peak_tflops"] * 1e12,
        peak_fp32=None if fp32 is None else fp32 * 1e12,
        bandwidth=has["memory_gb_s"] * GB,
        processors=int(has["processors"]),
        link=has["link_gb_s"] * GB,
        watts=has["gpu_watts"],
        reached=Calibration(products=has["products_share"], attention=has["attention_share"]),
        fitted_on=fitted_on,
    )
    hours = given.gpu_hours_between_failures
    return Cluster(
        gpu=gpu,
        gpus_per_node=config.gpus_per_node,
        network=has["network_gb_s"] * GB,
        failure_s=seconds_between_failures(1) if hours is None else 3600 * hours,
        price=given.price_per_gpu_hour,
    )
