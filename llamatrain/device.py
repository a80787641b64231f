"""The device a process computes on, and what the machine is."""

import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from llamatrain.errors import ConfigError
from llamatrain.version import VERSION

MINIMUM_TORCH = (2, 11)
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check_torch() -> None:
    """Refuse a torch that is too old. Raises ConfigError."""
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < MINIMUM_TORCH:
        raise ConfigError(
            f"torch {torch.__version__} is installed; llamatrain needs torch >= "
            f"{'.'.join(map(str, MINIMUM_TORCH))}: pip install 'torch>={'.'.join(map(str, MINIMUM_TORCH))}'"
        )


def choose_device(name: str, *, setting: str, local_rank: int = 0) -> torch.device:
    """The device that `setting` names; `auto` is CUDA where there is one. Raises ConfigError.

    On CUDA each process of a node has the GPU of its local rank, and makes it torch's current one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"{setting}={name}: this machine has no CUDA device; use {setting}=cpu")
    if torch.cuda.device_count() == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        local_rank = 0  # srun --gpus-per-task=1 shows each task its own GPU alone
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} of {socket.gethostname()} has no GPU of its own, there are "
            f"{torch.cuda.device_count()}: start torchrun with --nproc_per_node {torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def be_deterministic() -> None:
    """Make CUDA bitwise repeatable, at a cost; on CPU everything is already."""
    # cuBLAS is repeatable only with a fixed workspace, read when its first handle is made
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def current_device(kind: str) -> torch.device:
    """The device of a settled `train.device`."""
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def choose_precision(name: str, device: torch.device) -> str:
    """`train.precision` with `auto` decided: bf16 on CUDA, fp32 on CPU."""
    if name == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return name


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def finish(device: torch.device) -> None:
    """Wait until the device has done all it was asked to; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on a CUDA device, resident of the process on CPU; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_total_gib(device: torch.device) -> float:
    """Memory of the CUDA device, or of the machine; GiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for the journal and the checkpoints."""
    packages: dict[str, str | None] = {}
    for package in ("torch", "numpy", "sentencepiece", "safetensors", "hydra-core", "xformers", "fairscale"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "llamatrain": VERSION,
        "python": platform.python_version(),
        "packages": packages,
        "host": socket.gethostname(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
