"""One contender in a process of its own: its memory, the operators its time goes to, or a run that fills a GPU.

    python -m tests.benchmarks.alone < case.json

The parent calls `run_alone`; what comes back are plain values. A case that fails says why and ends nothing else.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from llamatrain.config.build import build
from tests.benchmarks.contenders import OURS, build_contender
from tests.benchmarks.rounds import products, refuse_uncompiled, synchronize, training
from tests.benchmarks.workload import Setting, Workload

REPOSITORY = Path(__file__).parent.parent.parent
SDP_KERNELS = ("flash", "cudnn", "mem_efficient", "math")
IMPORTS = {  # what a contender's memory is counted without
    OURS: "llamatrain.trainer",
    "transformers": "transformers.models.llama.modeling_llama",
    "litgpt": "litgpt.model",
}
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # fewer gaps, for every contender
OPERATORS_KEPT = 40
ATTENTION_WORDS = ("flash", "fmha", "efficient_attention", "cudnn_attention", "scaled_dot_product")


@dataclass(frozen=True)
class Case:
    contender: str
    workload: Workload
    setting: Setting
    sdp_kernel: str | None = None  # the only one that torch's attention may take on CUDA, of SDP_KERNELS
    warm_up_steps: int = 2
    warm_up_micro_batches: int = 1  # of such a step: as many as it takes for everything to have happened once
    steps: int = 2
    profiled: bool = False
    threads: int = field(default_factory=torch.get_num_threads)


def run_alone(case: Case, *, timeout_s: float | None = None) -> dict[str, Any]:
    """What came of a case; `failed` says why there is nothing else."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.alone"],
            input=json.dumps(asdict(case)),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**ALLOCATOR, **os.environ},
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {timeout_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"failed": f"exit status {done.returncode}: {said}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def measure(case: Case) -> dict[str, Any]:
    """Build, warm up, take the steps; a profiled one comes after them, as short as the warm-up's."""
    workload, device = case.workload, case.workload.device
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    refuse_uncompiled()
    if device == "cuda" and case.sdp_kernel is not None:
        allow_only(case.sdp_kernel)
    if case.profiled:  # compiled code then tells its kernels' names
        torch._inductor.config.cpp.enable_kernel_profile = True
    import_module(IMPORTS[case.contender])
    before = resident_mib()
    begin = time.perf_counter()
    contender = build_contender(case.contender, workload, case.setting)
    short = replace(workload, micro_batches=min(workload.micro_batches, case.warm_up_micro_batches))
    losses = [contender.step(short.rows(number))[0].item() for number in range(case.warm_up_steps)]
    answer: dict[str, Any] = {"ready_s": time.perf_counter() - begin, "first_loss": losses[0]}
    reset_peak(device)
    turn = training(contender, workload, steps=1)
    answer |= {"tokens_per_s": [turn(number) for number in range(case.steps)], "before_mib": before}
    answer |= peak_memory(device)
    answer["product_flops"] = products(workload.precision, device)(0)
    if case.profiled:
        answer |= profile(partial(contender.step, short.rows(0)), device)
    if case.setting.get("model.attention") == "xformers":
        answer["xformers_operators"] = xformers_operators(workload)
    contender.close()
    return answer


def allow_only(kernel: str) -> None:
    """Leave torch's attention on CUDA one kernel."""
    for name in SDP_KERNELS:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(name == kernel)


# Memory


def resident_mib() -> float:
    return _status("VmRSS")


def reset_peak(device: str) -> None:
    """Forget the peak so far: on a CPU, where compiling counts; on CUDA the peak is that of the whole process."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to what is resident now


def peak_memory(device: str) -> dict[str, float]:
    """In MiB: of the process, on a CPU; of torch's allocator, on CUDA."""
    if device == "cuda":
        return {
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
            "reserved_mib": torch.cuda.max_memory_reserved() / 2**20,
        }
    return {"peak_mib": _status("VmHWM"), "with_start_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def _status(name: str) -> float:
    """A size of this process by the kernel, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**10


# Operators


def profile(step: Callable[[], object], device: str) -> dict[str, Any]:
    """The milliseconds each operator of a step took itself, the longest of them, and the step's; attention's names.

    On CUDA the operators are the kernels, and their times the device's.
    """
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if device == "cuda" else [kinds.CPU]) as profiler:
        begin = time.perf_counter()
        step()
        synchronize(device)
        milliseconds = 1e3 * (time.perf_counter() - begin)
    events = profiler.key_averages()
    if device == "cuda":  # an operator of the host repeats the times of the kernels that it started
        on_host = torch.autograd.DeviceType.CPU
        times = {e.key: e.self_device_time_total / 1e3 for e in events if e.device_type != on_host}
    else:
        times = {e.key: e.self_cpu_time_total / 1e3 for e in events}
    longest = dict(sorted(times.items(), key=lambda item: -item[1])[:OPERATORS_KEPT])
    return {
        "operators": longest | {"everything": sum(times.values())},
        "profiled_ms": milliseconds,
        "attention": sorted({e.key for e in events if any(word in e.key for word in ATTENTION_WORDS)}),
    }


def xformers_operators(workload: Workload) -> list[str]:
    """What xformers calls the kernels, forward and backward, that it takes for the workload's attention."""
    from xformers.ops import fmha

    m = workload.model
    shape = (workload.micro_batch, workload.seq_len, m.n_heads, m.head_dim)
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=workload.device).requires_grad_() for _ in range(3))
    inputs = fmha.Inputs(q, k, v, attn_bias=fmha.attn_bias.LowerTriangularMask())
    forward = fmha._dispatch_fw(inputs, needs_gradient=True)
    return [forward.NAME, fmha._dispatch_bw(inputs, varlen_lse_packed=None).NAME]


def main() -> None:
    case = build(Case, json.loads(sys.stdin.read()))
    try:
        answer = measure(case)
    except torch.OutOfMemoryError as error:
        answer = {"failed": f"out of memory: {str(error).partition(chr(10))[0]}"}
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
