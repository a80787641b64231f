"""Training speed of llamatrain on one GPU: each choice of recompute, attention, compile; and Transformers beside it.

    python -m tests.benchmarks.bench_gpu --shapes 7b --seq-len 2048 --minutes 20 --log FILE.jsonl

Weights, gradients and moments are fp32 and resident, products are in bf16, a step has at least --batch-tokens tokens
by accumulation, and the optimizer counts. A 7B fills the GPU, so every case is a process of its own. First a search,
with short steps: one choice after the other, each with the best of those before (--all: every combination). Then the
best of llamatrain and the best of Transformers take whole steps in turns, each --visits times. Every case is logged,
as a JSON line, as soon as it is done.

    python -m tests.benchmarks.bench_gpu --device cpu --tiny

runs all of that on a CPU in a few minutes, to see that it runs.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from llamatrain.config.parallel import RECOMPUTE
from llamatrain.device import device_name, memory_total_gib
from tests.benchmarks import report, report_gpu
from tests.benchmarks.alone import Case, run_alone
from tests.benchmarks.contenders import OURS
from tests.benchmarks.fitting import largest_micro_batch, layers_that_fit, needed_gib
from tests.benchmarks.paired import turn_order
from tests.benchmarks.workload import Setting, Workload, preset

SHAPES = ("7b", "1b", "13b-blocks")
ATTENTION: dict[str, tuple[str, str | None]] = {  # model.attention, and the one kernel that sdpa may take
    "xformers": ("xformers", None),
    "sdpa-flash": ("sdpa", "flash"),
    "sdpa-cudnn": ("sdpa", "cudnn"),
    "sdpa": ("sdpa", None),
}
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
PEER = "transformers"
OUT_OF_MEMORY = "out of memory"


Choice = dict[str, Any]  # a value for each axis of a search


def our_setting(choice: Choice) -> Setting:
    return {
        "parallel.recompute": choice["recompute"],
        "model.attention": ATTENTION[choice["attention"]][0],
        "train.compile": choice["compile"] == "on",
    }


def best_choice(axes: Mapping[str, Sequence[Any]], speed: Callable[[Choice], float], *, every: bool) -> Choice:
    """The fastest of every combination; or by one axis after the other, each with the best of those before."""
    combinations = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    if every:
        return max(combinations, key=speed)
    best = combinations[0]
    for axis, values in axes.items():
        best = max(({**best, axis: value} for value in values), key=speed)
    return best


def arguments_of(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--seq-len", type=int, nargs="+", default=[2048, 4096])
    order = ["block_backward", *(choice for choice in RECOMPUTE if choice != "block_backward")]
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTE, default=order)
    parser.add_argument("--attention", nargs="+", choices=list(ATTENTION), default=list(ATTENTION)[:3])
    parser.add_argument("--compile", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--all", action="store_true", help="search every combination")
    parser.add_argument("--batch-tokens", type=int, default=262_144, help="of an optimizer step, at least")
    parser.add_argument("--search-tokens", type=int, default=32_768, help="the same in the search")
    parser.add_argument("--micro-batch", type=int, help="sequences of a forward; by default as many as fit")
    parser.add_argument("--memory-gib", type=float, default=135.0, help="what llamatrain may take")
    parser.add_argument("--steps", type=int, default=1, help="whole optimizer steps of a visit")
    parser.add_argument("--visits", type=int, default=3, help="turns of the best of each")
    parser.add_argument("--no-peer", action="store_true", help="leave Transformers out")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so long")
    parser.add_argument("--log", type=Path, default=Path("runs/bench_gpu.jsonl"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens: that it runs")
    arguments = parser.parse_args(command_line)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --device cpu --tiny sees that everything runs")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu is for --tiny")
    if arguments.tiny:
        arguments.seq_len, arguments.batch_tokens, arguments.search_tokens = [64], 512, 256
        arguments.attention = ["sdpa"] if arguments.device == "cpu" else arguments.attention
    return arguments


def workload_of(shape: str, seq_len: int, arguments: argparse.Namespace) -> Workload:
    """A shape at a length; of 13b-blocks as many layers as fit with llamatrain's own backward."""
    changes = {"max_seq_len": seq_len}
    if arguments.tiny:
        changes |= {"dim": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 512}
    model = preset(shape.removesuffix("-blocks"), **changes)
    workload = Workload(model, seq_len, micro_batch=1, precision="bf16", device=arguments.device)
    if shape.endswith("-blocks"):
        layers = layers_that_fit(workload, "block_backward", budget_gib=arguments.memory_gib)
        workload = replace(workload, model=replace(model, n_layers=layers))
    return workload


def sized(workload: Workload, micro_batch: int, tokens: int) -> Workload:
    """With a step of at least so many tokens."""
    micro_batches = -(-tokens // (micro_batch * workload.seq_len))
    return replace(workload, micro_batch=micro_batch, micro_batches=micro_batches)


class Bench:
    """The cases of a run, while there is time for them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self._deadline = time.monotonic() + 60 * arguments.minutes

    def case(self, contender: str, workload: Workload, setting: Setting, **options: Any) -> dict[str, Any]:
        """What came of it, with the case itself; logged."""
        case = Case(contender, workload, setting, warm_up_micro_batches=2, **options)
        left = self._deadline - time.monotonic()
        if left <= 0:
            answer: dict[str, Any] = {"failed": "not run: the time is up"}
        else:
            answer = run_alone(case, timeout_s=None if math.isinf(left) else left)
        answer |= {"case": asdict(case), "at": time.time()}
        self.arguments.log.parent.mkdir(parents=True, exist_ok=True)
        with self.arguments.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(answer) + "\n")
        return answer

    def halving(
        self, contender: str, workload: Workload, tokens: int, setting: Setting, **options: Any
    ) -> dict[str, Any]:
        """With the workload's micro-batch, or half of it as often as memory runs out."""
        micro_batch = workload.micro_batch
        while True:
            answer = self.case(contender, sized(workload, micro_batch, tokens), setting, **options)
            if micro_batch == 1 or not answer.get("failed", "").startswith(OUT_OF_MEMORY):
                return answer
            micro_batch //= 2

    def try_ours(self, workload: Workload, choice: Choice) -> dict[str, Any]:
        arguments, setting = self.arguments, our_setting(choice)
        recompute, compiled = choice["recompute"], choice["compile"] == "on"
        first = arguments.micro_batch or self.largest(workload, recompute, arguments.memory_gib, compiled=compiled)
        if first is None:
            needed = needed_gib(workload, recompute, compiled=compiled)
            return {"failed": f"does not fit: needs {needed:.0f} GiB", "case": {"setting": setting}}
        options = {"sdp_kernel": ATTENTION[choice["attention"]][1], "profiled": True}
        return self.halving(OURS, replace(workload, micro_batch=first), arguments.search_tokens, setting, **options)

    def try_peer(self, workload: Workload, choice: Choice) -> dict[str, Any]:
        """Its micro-batch begins with what would be much for llamatrain; halving finds what fits."""
        memory = 1.1 * memory_total_gib(torch.device(self.arguments.device))
        first = self.largest(workload, "full" if choice["checkpointing"] else "none", memory, compiled=True) or 1
        sequences = replace(workload, micro_batch=first)
        return self.halving(PEER, sequences, self.arguments.search_tokens, choice, profiled=True)

    def largest(self, workload: Workload, recompute: str, budget_gib: float, *, compiled: bool) -> int | None:
        tokens = self.arguments.search_tokens
        sizes = [n for n in MICRO_BATCHES if n == 1 or n * workload.seq_len <= tokens]
        return largest_micro_batch(workload, recompute, budget_gib=budget_gib, sizes=sizes, compiled=compiled)

    def search(
        self,
        name: str,
        axes: Mapping[str, Sequence[Any]],
        attempt: Callable[[Choice], dict[str, Any]],
        workload: Workload,
    ) -> dict[str, Any] | None:
        """What came of the fastest choice, or None if none ran; prints each as it is done."""
        found: dict[str, dict[str, Any]] = {}

        def speed(choice: Choice) -> float:
            told = " ".join([name, *(f"{axis}={str(value).lower()}" for axis, value in choice.items())])
            if told not in found:
                found[told] = attempt(choice)
                print(report_gpu.case_row(told, found[told], workload, self.peak), flush=True)
            return report_gpu.median_rate(found[told])

        best_choice(axes, speed, every=self.arguments.all)
        best = max(found.values(), key=report_gpu.median_rate)
        return best if report_gpu.median_rate(best) > 0 else None

    @property
    def peak(self) -> float | None:
        return report_gpu.peak_of(self.arguments.device)

    def compare(self, shape: str, seq_len: int) -> None:
        """Search, then whole steps in turns."""
        arguments = self.arguments
        workload = workload_of(shape, seq_len, arguments)
        print(f"\n## {shape}, {workload.describe()}\n\n{report_gpu.head()}", flush=True)
        axes = {"recompute": arguments.recompute, "attention": arguments.attention, "compile": arguments.compile}
        finalists = {OURS: self.search(OURS, axes, partial(self.try_ours, workload), workload)}
        if not arguments.no_peer:
            finalists[PEER] = self.search(
                PEER, peer_axes(tiny=arguments.tiny), partial(self.try_peer, workload), workload
            )
        running = {name: found for name, found in finalists.items() if found is not None}
        answers = self.visits(workload, running)
        print("\n" + report_gpu.final(answers, workload, self.peak, ours=OURS), flush=True)
        print("\nA step of two micro-batches:\n\n" + report.where_time_goes(running), flush=True)

    def visits(self, workload: Workload, finalists: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """What came of whole steps, in turns, with what the search found."""
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in finalists}
        for visit in range(self.arguments.visits):
            for name in turn_order(list(finalists), visit):
                case = finalists[name]["case"]
                whole = sized(workload, case["workload"]["micro_batch"], self.arguments.batch_tokens)
                options = {"steps": self.arguments.steps, "sdp_kernel": case["sdp_kernel"]}
                answers[name].append(self.case(name, whole, case["setting"], **options))
        return answers


def peer_axes(*, tiny: bool) -> dict[str, Sequence[Any]]:
    """What may be Transformers' best on a GPU."""
    if tiny:
        return {"checkpointing": [False], "weights": ["autocast", "copies"], "compile": ["off"]}
    return {"checkpointing": [False, True], "weights": ["autocast", "copies"], "compile": ["layers", "off"]}


def main() -> None:
    arguments = arguments_of()
    name = device_name(torch.device(arguments.device))
    machine = f"{name}, {memory_total_gib(torch.device(arguments.device)):.0f} GiB, {os.cpu_count()} cores."
    packages = ["torch", *([] if arguments.no_peer else [PEER]), "xformers"]
    print(report.heading(packages, machine=machine))
    if arguments.tiny:
        print("A smoke test: its figures mean nothing.")
    bench = Bench(arguments)
    for shape in arguments.shapes:
        for seq_len in arguments.seq_len:
            bench.compare(shape, seq_len)


if __name__ == "__main__":
    main()
