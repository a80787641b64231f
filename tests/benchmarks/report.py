"""What was measured, as markdown tables. No torch."""

import platform
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from typing import Any

from llamatrain.version import VERSION
from tests.benchmarks.paired import Ratio, median_share, paired_ratio

PRODUCTS = "matrix products"
REST = "Python, and waiting"
# Kinds of operators by their names, the first that matches: torch's own, inductor's and CUDA kernels.
KINDS = {
    "attention": r"flash|fmha|efficient_attention|cudnn_attention|scaled_dot_product|cudnn_generated_fort_native_sdpa",
    PRODUCTS: r"aten::(add|b|badd)?mm_?$|aten::(matmul|linear|einsum)$|mkldnn.*linear|gemm|nvjet|xmma|cutlass",
    "optimizer and clipping": r"adam|_foreach_|clip_coef|linalg_vector_norm|multi_tensor_apply",
    "loss": r"softmax|nll_loss|logsumexp|cross_entropy",
    "compiled elementwise kernels": r"cpp_fused|triton_",
    "calls into compiled code": r"Compiled|TorchDynamo",
    "copies and casts": r"aten::(copy_|_to_copy|clone|cat|contiguous|to)$|memcpy|memset",
    "elementwise and other operators": "",
}


@dataclass
class Entry:
    """A contender's figures, round by round, and what its process took."""

    setting: str
    rates: list[float]  # tokens/s
    alone: dict[str, Any] = field(default_factory=dict)  # what `run_alone` gave

    @property
    def memory(self) -> str:
        """Peak of its steps above what its imports took."""
        if "failed" in self.alone:
            return str(self.alone["failed"])
        return f"{self.alone['peak_mib'] - self.alone['before_mib']:,.0f}"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join([row(*head), "|" + "---|" * len(head), *(row(*cells) for cells in rows)])


def heading(packages: Sequence[str], *, machine: str) -> str:
    """When, with what, by which command."""
    module = re.sub(r".*/(tests/benchmarks/\w+)\.py$", r"\1", sys.argv[0]).replace("/", ".")
    command = " ".join(["python -m", module, *sys.argv[1:]])
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    python = f"llamatrain {VERSION}, Python {platform.python_version()}"
    return f"`{command}`, {date.today()}. {python}, {versions}. {machine}"


def speeds(
    entries: Mapping[str, Entry], products: Sequence[float], flops_per_token: int, *, ours: str
) -> tuple[str, dict[str, Ratio]]:
    """The table of one precision, and how much faster ours was than each peer."""
    ratios = {name: paired_ratio(entries[ours].rates, e.rates) for name, e in entries.items() if name != ours}
    rows: list[list[object]] = []
    for name, entry in entries.items():
        rates = entry.rates
        share = median_share([rate * flops_per_token for rate in rates], products)
        spread = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        rows.append([name, entry.setting, spread, f"{share:.1%}", entry.memory, ratios.get(name, "")])
    spread = f"{min(products) / 1e9:,.0f} to {max(products) / 1e9:,.0f}"
    rows.append([PRODUCTS, f"{statistics.median(products) / 1e9:,.0f} ({spread}) GFLOP/s", "", "100%", "", ""])
    head = ["", "best setting", "tokens/s, median (min to max)", "of the products' rate", "peak memory, MiB"]
    return table([*head, f"{ours} / it, median (95 %)"], rows), ratios


def verdict(ratios: Mapping[str, Ratio], goal: float) -> tuple[str, str, bool]:
    """The best peer, a line that says how the goal fared, and whether it was met."""
    peer = min(ratios, key=lambda name: ratios[name].median)
    met = ratios[peer].median >= goal
    line = f"Goal: {goal} times the best peer. Found: {ratios[peer]} times {peer}: {'met' if met else 'not met'}."
    return peer, line, met


# Where the time goes


def kind_of(operator: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, operator, re.IGNORECASE))


def by_kind(profile: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of a profiled step by kind of operator; what no operator took is Python's."""
    operators: dict[str, float] = dict(profile["operators"])
    everything = operators.pop("everything")
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, time in operators.items():
        kinds[kind_of(name)] += time
    kinds[list(KINDS)[-1]] += everything - sum(operators.values())  # operators too short to be kept by name
    kinds[REST] = max(0.0, profile["profiled_ms"] - everything)
    return kinds


def where_time_goes(profiles: Mapping[str, Mapping[str, Any]], *, longest: int = 8) -> str:
    """A step of each contender by kind of operator, and the operators that took longest themselves."""
    failed = [f"{name}: no profile, {p['failed']}" for name, p in profiles.items() if "failed" in p]
    if failed:
        return "\n".join(failed)
    kinds = {name: by_kind(profile) for name, profile in profiles.items()}
    head = ["milliseconds of a step", *kinds]
    rows: list[list[object]] = []
    for kind in next(iter(kinds.values())):
        shares = ((of_one[kind], of_one[kind] / sum(of_one.values())) for of_one in kinds.values())
        rows.append([kind, *(f"{time:,.0f} ({share:.0%})" for time, share in shares)])
    parts = [table(head, rows)]
    for name, profile in profiles.items():
        operators = {key: time for key, time in profile["operators"].items() if key != "everything"}
        slowest = sorted(operators.items(), key=lambda item: -item[1])[:longest]
        parts.append(f"Longest in {name}: " + ", ".join(f"{shortened(key)} {time:,.0f}" for key, time in slowest) + ".")
    return "\n\n".join(parts)


def shortened(operator: str, *, width: int = 60) -> str:
    return operator if len(operator) <= width else f"{operator[: width - 1]}…"
