"""The tables of the benchmark on one GPU."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llamatrain.arithmetic import flops_per_token, peak_flops
from llamatrain.device import device_name
from tests.benchmarks.report import row, table
from tests.benchmarks.workload import Workload

GOAL_MFU, GOAL_GIB = 0.6, 135  # of llamatrain's 7B
HEAD = (
    "choice",
    "sequences",
    "tokens/s",
    "MFU",
    "of the products' rate",
    "peak memory, GiB",
    "ready, s",
    "attention ran",
)


def peak_of(device: str) -> float | None:
    """The device's FLOP/s by its data sheet; None where that is not known, as for a CPU."""
    return peak_flops(device_name(torch.device(device))) if device == "cuda" else None


def median_rate(answer: Mapping[str, Any]) -> float:
    """Tokens/s; 0 of what failed."""
    return 0.0 if "failed" in answer else statistics.median(answer["tokens_per_s"])


def head() -> str:
    return table(HEAD, [])


def case_row(told: str, answer: Mapping[str, Any], workload: Workload, peak: float | None) -> str:
    """One case of a search."""
    if "failed" in answer:
        return row(told, "", answer["failed"], *[""] * 5)
    speed = rates(median_rate(answer), answer["product_flops"], workload, peak)
    sequences = answer["case"]["workload"]["micro_batch"]
    memory, ready = f"{answer['peak_mib'] / 2**10:.1f}", f"{answer['ready_s']:.0f}"
    return row(told, sequences, *speed, memory, ready, ", ".join(kernels(answer)))


def rates(tokens_per_s: float, product_flops: float, workload: Workload, peak: float | None) -> list[str]:
    """Tokens/s, MFU by the PaLM convention, and the share of the matrix products' measured rate."""
    flops = tokens_per_s * workload.flops_per_token
    mfu = "peak not known" if peak is None else f"{flops / peak:.1%}"
    return [f"{tokens_per_s:,.0f}", mfu, f"{flops / product_flops:.1%}"]


def kernels(answer: Mapping[str, Any]) -> list[str]:
    """xformers' names of its kernels, then torch's operators of attention's forward that were seen."""
    inner = (name for name in answer.get("attention", []) if "::_" in name and "backward" not in name)
    return [*answer.get("xformers_operators", []), *inner]


def final(
    answers: Mapping[str, Sequence[Mapping[str, Any]]], workload: Workload, peak: float | None, *, ours: str
) -> str:
    """Whole steps in turns: median and range of each contender's visits, and ours against the other."""
    rows: list[list[object]] = []
    medians: dict[str, float] = {}
    for name, visits in answers.items():
        done = [visit for visit in visits if "failed" not in visit]
        if not done:
            rows.append([name, "", visits[0]["failed"] if visits else "not run", *[""] * 5])
            continue
        speeds = [median_rate(visit) for visit in done]
        medians[name] = statistics.median(speeds)
        products = statistics.median(visit["product_flops"] for visit in done)
        case = done[0]["case"]
        step = case["workload"]["micro_batches"] * case["workload"]["micro_batch"] * workload.seq_len
        setting = " ".join(f"{key}={str(value).lower()}" for key, value in case["setting"].items())
        memory = max(visit["peak_mib"] for visit in done) / 2**10
        spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}"
        figures = rates(medians[name], products, workload, peak)
        rows.append([name, setting, f"{step:,}", *figures, f"{spread} in {len(done)} visits", f"{memory:.1f}"])
    columns = ["", "setting", "tokens of a step", "tokens/s", "MFU", "of the products' rate", "", "peak memory, GiB"]
    text = table(columns, rows)
    causal = flops_per_token(workload.model, workload.seq_len, causal=True) / workload.flops_per_token
    notes = [f"Counting only what the causal mask leaves, MFU is {causal:.3f} of that."]
    if ours in medians and peak is not None:
        mfu = medians[ours] * workload.flops_per_token / peak
        memory = max(visit["peak_mib"] for visit in answers[ours] if "failed" not in visit) / 2**10
        met = "met" if mfu >= GOAL_MFU and memory < GOAL_GIB else "not met"
        notes.append(f"Goal: {GOAL_MFU:.0%} MFU under {GOAL_GIB} GiB. Found: {mfu:.1%}, {memory:.1f} GiB: {met}.")
    if ours in medians and len(medians) > 1:
        other = next(name for name in medians if name != ours)
        notes.append(f"{ours} is {medians[ours] / medians[other]:.2f} times {other}.")
    return text + "\n\n" + " ".join(notes)
