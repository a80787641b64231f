"""What the preflight found, and what it means: who is the odd one out, what is refused, what is only told. No torch.

A rank stands out where most have something else, or where it is far slower than the median of the others. The lists
here have an entry for each rank, in order.
"""

import errno
import os
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llamatrain.errors import ConfigError

T = TypeVar("T", bound=Hashable)

GIB, MIB = 2**30, 2**20
SLOW = {"cpu": 0.5, "cuda": 0.8}  # of the median of the others: products
SLOW_LINK = 0.5  # links, and disks of nodes: what they share with others varies more
SLOW_OF_PEAK = 0.4  # of the data sheet; large products reach 0.6 to 0.9
USED_GIB = 2.0  # of a GPU before anything is on it: this process takes less
CLOCK_S = 1.0
NAMED = 3  # odd ones in a message


@dataclass(frozen=True)
class Need:
    """Room for checkpoints: one of them has so many bytes and files, and so many more are to be kept."""

    size: int
    files: int
    more: int


@dataclass(frozen=True)
class Facts:
    """What a rank sees of itself without measuring."""

    node: str
    packages: Mapping[str, str | None] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)  # alike on all ranks of a cluster of one kind
    gpu: str | None = None  # which of all there are
    gpus_left: int = 0  # visible on the node, without a rank of their own
    used_gib: float = 0.0  # of the GPU's memory
    written: float | None = None  # bytes a second to the run's folder, by the first rank of a node
    run_dir_error: str | None = None  # why files there cannot be written, or those of rank 0 not seen
    free: int = 0  # bytes on the disk of the run's folder
    free_files: int | None = None
    clock_s: tuple[float, ...] = ()  # the time of day at moments that are the same on all ranks, or nearly


@dataclass(frozen=True)
class Speeds:
    """What a rank measured; None where there is nothing to compare with."""

    product: float | None = None  # FLOP/s
    peak: float | None = None  # the data sheet's
    all_reduce: float | None = None  # bytes a second
    link: float | None = None  # bytes a second each way, between this rank and the next


def judge_facts(facts: Sequence[Facts], need: Need, run_dir: str) -> list[str]:
    """What is odd and can be borne. Raises ConfigError, with all that is to be mended, for what cannot."""
    refused = [
        *(f"{told}; install the same on all nodes" for told in odd_ones(facts, lambda rank: rank.packages)),
        *_unusable(facts, run_dir),
        *_shared_gpus(facts),
        *_no_room(facts[0], need, run_dir),
    ]
    if refused:
        raise ConfigError(f"{'; '.join(refused)} (resilience.preflight=false starts without looking)")
    warnings = odd_ones(facts, lambda rank: rank.machine)
    used = [rank for rank, found in enumerate(facts) if found.used_gib > USED_GIB]
    if used:
        warnings.append(
            f"{who(facts, *used)}: {facts[used[0]].used_gib:.1f} GiB of its GPU are in use by something else"
        )
    left = {found.node: found.gpus_left for found in facts if found.gpus_left}
    warnings += [f"{node}: {count} GPUs there have no process" for node, count in left.items()]
    return [*warnings, *_clocks(facts), *_little_room(facts[0], need, run_dir)]


def judge_speeds(speeds: Sequence[Speeds], facts: Sequence[Facts], device: str) -> list[str]:
    """Who is far slower than the others, or than the data sheet."""
    warnings = [
        f"{who(facts, rank)}: matrix products at {told_flops(rate)}, the others' median is {told_flops(median)}"
        for rank, rate, median in slow_ones([found.product for found in speeds], SLOW[device])
    ]
    for peak in {found.peak for found in speeds if found.peak}:
        rates = {rank: found.product for rank, found in enumerate(speeds) if found.peak == peak and found.product}
        lame = sorted((rank for rank, rate in rates.items() if rate < SLOW_OF_PEAK * peak), key=lambda r: rates[r])
        if lame:
            told = f"{told_flops(rates[lame[0]])}, {rates[lame[0]] / peak:.0%} of what the data sheet has"
            warnings.append(f"{who(facts, *lame)}: matrix products at {told}")
    for place, ranks in links(facts).items():
        if place == "inside" and device == "cpu":  # memory that all ranks share, and no link
            continue
        for number, rate, median in slow_ones([speeds[rank].link for rank in ranks], SLOW_LINK):
            ends = f"{who(facts, ranks[number])} and {who(facts, ranks[number] + 1)}"
            warnings.append(
                f"{ends}: {rate / GIB:.3g} GiB/s between them, the others' median {place} nodes is {median / GIB:.3g}"
            )
    for rank, rate, median in slow_ones([found.written for found in facts], SLOW_LINK):
        warnings.append(
            f"{facts[rank].node}: writes to run_dir at {rate / MIB:.0f} MiB/s, the other nodes' median is "
            f"{median / MIB:.0f}"
        )
    return warnings


def links(facts: Sequence[Facts]) -> dict[str, list[int]]:
    """The ranks whose link to the next one stays inside a node, and those whose link does not."""
    first = range(len(facts) - 1)
    inside = [rank for rank in first if facts[rank].node == facts[rank + 1].node]
    return {"inside": inside, "between": [rank for rank in first if rank not in set(inside)]}


def slow_ones(rates: Sequence[float | None], share: float) -> list[tuple[int, float, float]]:
    """Who is below `share` of the median of the others: number, rate and that median; the slowest NAMED."""
    known = sorted((rate, number) for number, rate in enumerate(rates) if rate is not None)
    slow = []
    for place, (rate, number) in enumerate(known[:NAMED]):
        others = [other for other, _ in known[:place] + known[place + 1 :]]
        if others and rate < share * statistics.median(others):
            slow.append((number, rate, statistics.median(others)))
    return slow


def odd_ones(facts: Sequence[Facts], view: Callable[[Facts], Mapping[str, Any]]) -> list[str]:
    """For each key whose values differ: who has another value than most, which, and what most have."""
    told = []
    for key in dict.fromkeys(key for found in facts for key in view(found)):
        values = [view(found).get(key) for found in facts]
        usual, _ = Counter(values).most_common(1)[0]  # of equally many, the one of the lowest rank
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            told.append(f"{who(facts, *odd)}: {key} is {values[odd[0]]} there, {usual} elsewhere")
    return told


def who(facts: Sequence[Facts], *ranks: int) -> str:
    """Ranks with their nodes, as messages name them."""
    named = ", ".join(f"rank {rank} on {facts[rank].node}" for rank in ranks[:NAMED])
    return named + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")


def _unusable(facts: Sequence[Facts], run_dir: str) -> list[str]:
    """Each kind of trouble by the first rank that has it; what rank 0 cannot write, the others cannot see."""
    errors: dict[str, int] = {}
    for rank, found in enumerate(facts):
        if found.run_dir_error is not None and facts[0].run_dir_error in (None, found.run_dir_error):
            errors.setdefault(found.run_dir_error, rank)
    full = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    return [
        f"run_dir={run_dir}: {who(facts, rank)} {error}; "
        + ("make room there" if any(text in error for text in full) else "it must lie where all nodes can write")
        for error, rank in errors.items()
    ]


def _shared_gpus(facts: Sequence[Facts]) -> list[str]:
    users: dict[str, list[int]] = {}
    for rank, found in enumerate(facts):
        if found.gpu is not None:
            users.setdefault(found.gpu, []).append(rank)
    return [
        f"{who(facts, *ranks)} have one GPU between them; start a process for each GPU"
        for ranks in users.values()
        if len(ranks) > 1
    ]


def _no_room(leader: Facts, need: Need, run_dir: str) -> list[str]:
    if leader.run_dir_error is not None:
        return []
    if need.more and leader.free < need.size:
        return [
            f"run_dir={run_dir}: {told_bytes(leader.free)} are free there, a checkpoint takes "
            f"{told_bytes(need.size)}; make room, or give another run_dir"
        ]
    if need.more and leader.free_files is not None and leader.free_files < need.files:
        return [
            f"run_dir={run_dir}: room for {leader.free_files} files there, a checkpoint has {need.files}; remove some"
        ]
    return []


def _little_room(leader: Facts, need: Need, run_dir: str) -> list[str]:
    if leader.free >= need.more * need.size:
        return []
    return [
        f"run_dir={run_dir}: {told_bytes(leader.free)} are free there, the {need.more} checkpoints to come take "
        f"{told_bytes(need.more * need.size)} (checkpoint.keep_last, checkpoint.keep_every_steps)"
    ]


def clock_offsets(facts: Sequence[Facts]) -> list[float]:
    """How far each clock is from rank 0's, seconds: the least over all moments, as whoever comes late seems ahead."""
    first = facts[0].clock_s
    return [
        min((own - reference for own, reference in zip(found.clock_s, first, strict=True)), key=abs, default=0.0)
        for found in facts
    ]


def _clocks(facts: Sequence[Facts]) -> list[str]:
    of_nodes: dict[str, tuple[int, float]] = {}
    for rank, offset in enumerate(clock_offsets(facts)):
        of_nodes.setdefault(facts[rank].node, (rank, offset))
    offsets = [offset for _, offset in of_nodes.values()]
    usual = min(statistics.median_low(offsets), statistics.median_high(offsets), key=abs)  # of two, rank 0's
    return [
        f"{who(facts, rank)}: its clock is {abs(offset - usual):.1f} s {'ahead of' if offset > usual else 'behind'} "
        "the others'; time stamps from there mislead"
        for rank, offset in of_nodes.values()
        if abs(offset - usual) > CLOCK_S
    ]


# ---------------------------------------------------------------------- what was found, in a line and in the journal


def told_bytes(size: float) -> str:
    """Bytes as people read them."""
    for unit, bytes_of in (("TiB", 2**40), ("GiB", GIB)):
        if size >= bytes_of:
            return f"{size / bytes_of:.1f} {unit}"
    return f"{size / MIB:.1f} MiB"


def told_flops(rate: float) -> str:
    """FLOP/s as people read them."""
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def numbers(speeds: Sequence[Speeds], facts: Sequence[Facts], need: Need) -> dict[str, Any]:
    """What the journal keeps, plain values: of each speed the median, and the slowest with its rank and node."""
    offsets = clock_offsets(facts)
    found: dict[str, Any] = {
        "ranks": len(facts),
        "nodes": len({rank.node for rank in facts}),
        "free_bytes": facts[0].free,
        "checkpoint_bytes": need.size,
        "checkpoints_to_come": need.more,
        "clock_spread_s": max(offsets) - min(offsets),
    }
    by_link = {f"link_{name}_bytes_per_s": [(r, speeds[r].link) for r in ranks] for name, ranks in links(facts).items()}
    rates = {
        "product_flops": [(rank, found.product) for rank, found in enumerate(speeds)],
        "all_reduce_bytes_per_s": [(rank, found.all_reduce) for rank, found in enumerate(speeds)],
        "written_bytes_per_s": [(rank, found.written) for rank, found in enumerate(facts)],
        **by_link,
    }
    for name, of_ranks in rates.items():
        known = [(rate, rank) for rank, rate in of_ranks if rate is not None]
        if known:
            slowest, rank = min(known)
            median = statistics.median(rate for rate, _ in known)
            found[name] = {"median": median, "slowest": slowest, "rank": rank, "node": facts[rank].node}
    return found


def told(found: Mapping[str, Any]) -> str:
    """`numbers` in a line."""
    room = f"{told_bytes(found['free_bytes'])} free, {found['checkpoints_to_come']} checkpoints to come take "
    parts = [room + told_bytes(found["checkpoints_to_come"] * found["checkpoint_bytes"])]
    if rate := found.get("written_bytes_per_s"):
        parts.append(f"writes {told_bytes(rate['median'])}/s")
    if rate := found.get("product_flops"):
        parts.append(f"products {told_flops(rate['median'])}, the slowest {told_flops(rate['slowest'])} {_where(rate)}")
    if rate := found.get("all_reduce_bytes_per_s"):
        parts.append(f"all-reduce {told_bytes(rate['median'])}/s")
    for place in ("inside", "between"):
        if rate := found.get(f"link_{place}_bytes_per_s"):
            slowest = f"the slowest {told_bytes(rate['slowest'])}/s {_where(rate)}"
            parts.append(f"neighbours {place} nodes {told_bytes(rate['median'])}/s, {slowest}")
    if found["ranks"] > 1:
        parts.append(f"clocks within {1e3 * found['clock_spread_s']:.0f} ms")
        parts.insert(0, f"{found['ranks']} ranks on {found['nodes']} node{'s' if found['nodes'] > 1 else ''}")
    return "; ".join(parts)


def _where(rate: Mapping[str, Any]) -> str:
    return f"on rank {rate['rank']} ({rate['node']})"
