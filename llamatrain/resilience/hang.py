"""What is found out about a hang: one report a rank, and the conclusion which rank holds the others up. No torch.

All ranks stand still when one does, so that each has come no further says nothing. The guilty one is told by what
distinguishes it, in this order: it does not answer at all; it was stopped; it cannot write its stacks; its interpreter
does not answer; it is in another collective than the others, at the same place of their common sequence; it has not
entered the collective in which others wait, and waits in none itself; it is at an earlier step, or in no collective.
If nothing distinguishes the ranks, no rank is to blame but what lies between them.
"""

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

LIBRARY = os.path.dirname(os.__file__)
SOURCES = f"{Path(__file__).resolve().parents[2]}/"
WATCHDOG = "llamatrain/resilience/watchdog.py"
FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)$')
UNEVEN = ("gather", "scatter", "all_to_all", "all_to_all_base", "alltoall", "alltoall_base")  # inputs may differ

STOPPED = ("T", "t")  # states of a process: by a signal, by a debugger

Frame = tuple[str, int, str]  # file, line, function


@dataclass
class Report:
    """What a rank's watchman found."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    last_beat: float  # seconds since 1970
    silent_s: float
    why: str  # it was looked at
    state: str = "?"  # of its main thread, as /proc has it: R running, S asleep, D in the kernel, T stopped
    kernel_function: str = ""  # in which it sleeps, where /proc tells
    has_stacks: bool = False
    in_collective: bool = False  # the main thread, by its stack
    lines: list[str] = field(default_factory=list)  # innermost own line of each thread, the main one's first
    collectives: list[dict[str, Any]] | None = None  # None: it could not be asked


class LastSign(NamedTuple):
    """Of a rank that left no report."""

    host: str
    pid: int
    step: int
    phase: str
    time: float


class Conclusion(NamedTuple):
    guilty: list[int]  # empty if nothing distinguishes the ranks
    message: str


# ---------------------------------------------------------------------- stacks


def threads_of(text: str) -> list[list[Frame]]:
    """The stacks in faulthandler's output, frames innermost first, the main thread's first of all."""
    threads: list[list[Frame]] = []
    for line in text.splitlines():
        if "(most recent call first)" in line:
            threads.append([])
        elif threads and (found := FRAME.match(line)):
            threads[-1].append((found["file"], int(found["line"]), found["name"]))
    return threads[::-1]  # written youngest first


def own_line(frames: Iterable[Frame]) -> str:
    """The innermost line that is neither Python's nor a package's, as `file:line in function`; "" if there is none."""
    for file, line, name in frames:
        _, packages, inside = file.rpartition("-packages/")
        if packages:
            own, shown = inside.startswith("llamatrain/"), inside
        else:
            own = not file.startswith((LIBRARY, "<"))
            shown = file.removeprefix(SOURCES) if file.startswith(SOURCES) else "/".join(file.split("/")[-2:])
        if own and shown != WATCHDOG:  # where a thread waits to be asked
            return f"{shown}:{line} in {name}"
    return ""


def add_stacks(report: Report, text: str) -> None:
    """Fill in what the stacks tell."""
    threads = threads_of(text)
    report.has_stacks = bool(threads)
    report.lines = [line for line in map(own_line, threads) if line]
    report.in_collective = bool(threads) and any("torch/distributed/" in file for file, _, _ in threads[0])


# ---------------------------------------------------------------------- whose fault


def judge(reports: Sequence[Report], missing: dict[int, LastSign | None]) -> Conclusion:
    """Which ranks hold the run up, from the reports there are; `missing` are the ranks without one."""
    if missing:
        told = "; ".join(_describe_lost(rank, sign) for rank, sign in sorted(missing.items()))
        return Conclusion(sorted(missing), f"{told}; the node may be gone, or its network or file system")
    if len(reports) == 1:
        return Conclusion([reports[0].rank], _describe(reports[0]))
    for apart in (
        [report for report in reports if report.state in STOPPED],
        [report for report in reports if not report.has_stacks],
        [report for report in reports if report.collectives is None],
    ):
        if 0 < len(apart) < len(reports):
            return _blame(apart, _waiting(reports, apart))
    in_steps = _without_groups_beside(reports)  # a save under way is no hang, if anything else is
    for seen in (in_steps, reports):
        if found := _by_mismatch(seen) or _by_sequence(seen):
            return found
    return _by_place(reports)


def _without_groups_beside(reports: Sequence[Report]) -> list[Report]:
    """The reports without the groups that threads beside training use."""
    groups = {entry["group"] for report in reports for entry in report.collectives or () if entry["beside"]}
    return [
        replace(report, collectives=[entry for entry in report.collectives or () if entry["group"] not in groups])
        for report in reports
    ]


def _by_mismatch(reports: Sequence[Report]) -> Conclusion | None:
    """The ranks whose collective is another than the others', where these have the same number of the same group."""
    at: dict[tuple[str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for report in reports:
        for entry in report.collectives or ():
            at[entry["group"], entry["number"]][report.rank] = entry
    for (group, number), entries in sorted(at.items(), key=lambda item: item[0][1]):
        kinds = Counter(map(_kind, entries.values())).most_common()
        if len(kinds) == 1 or all(entry["done"] for entry in entries.values()):
            continue
        told = []
        for kind, _ in reversed(kinds):  # the fewest first
            ranks = [rank for rank, entry in sorted(entries.items()) if _kind(entry) == kind]
            told.append(f"{_ranks(ranks)} in {_describe_collective(entries[ranks[0]])}")
        tie = kinds[0][1] == kinds[1][1]
        guilty = [rank for rank, entry in sorted(entries.items()) if tie or _kind(entry) != kinds[0][0]]
        message = f"ranks are in different collectives, where each has number {number} of group {group}: "
        return Conclusion(guilty, message + "; ".join(told))
    return None


def _kind(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same on all ranks of a group."""
    return (entry["op"],) if entry["op"] in UNEVEN else (entry["op"], entry["elements"], entry["dtype"])


def _by_sequence(reports: Sequence[Report]) -> Conclusion | None:
    """The ranks that have not entered a collective in which others wait, and wait in none themselves."""
    reached: dict[str, dict[int, int]] = defaultdict(dict)  # group -> rank -> number of its last
    for report in reports:
        for entry in report.collectives or ():
            reached[entry["group"]][report.rank] = entry["number"]
    awaited: dict[int, dict[str, Any]] = {}  # rank -> in what others wait for it
    blocked = set()
    for report in reports:
        for entry in report.collectives or ():
            late = [rank for rank, number in reached[entry["group"]].items() if number < entry["number"]]
            if late and not entry["done"]:
                blocked.add(report.rank)
                awaited |= dict.fromkeys(late, entry)
    guilty = [report for report in reports if report.rank in awaited and report.rank not in blocked]
    guilty = guilty or [report for report in reports if report.rank in awaited]
    if not guilty:
        return None
    return _blame(guilty, f"others wait for it in {_describe_collective(awaited[guilty[0].rank])}")


def _by_place(reports: Sequence[Report]) -> Conclusion:
    """By what the stacks and the heartbeats say alone."""
    behind = [report for report in reports if report.step < max(report.step for report in reports)]
    outside = [report for report in reports if not report.in_collective]
    for apart in (behind, outside):
        if 0 < len(apart) < len(reports):
            return _blame(apart, _waiting(reports, apart))
    message = f"no rank is behind the others, so it is what lies between them, or the devices: {_describe(reports[0])}"
    return Conclusion([], message)


def _blame(guilty: Sequence[Report], waiting: str) -> Conclusion:
    told = "; ".join(map(_describe, guilty[:4])) + (f"; and {len(guilty) - 4} more" if len(guilty) > 4 else "")
    return Conclusion([report.rank for report in guilty], f"{told}; {waiting}")


def _waiting(reports: Sequence[Report], apart: Sequence[Report]) -> str:
    """What one of the others is at."""
    other = next(report for report in reports if report not in apart)
    unfinished = [entry for entry in other.collectives or () if not entry["done"]]
    if unfinished:
        return f"rank {other.rank} waits in {_describe_collective(unfinished[-1])}"
    return f"rank {other.rank} is at {other.lines[0]}" if other.lines else "the others wait"


# ---------------------------------------------------------------------- words


def _describe(report: Report) -> str:
    """One rank: who, how far, where."""
    text = f"rank {report.rank} on {report.host} (pid {report.pid}) is at step {report.step} ({report.phase}) "
    text += f"for {report.silent_s:.0f} s"
    if report.state in STOPPED:
        text += ", stopped from outside (SIGSTOP, or a debugger)"
    elif not report.has_stacks:
        text += f", cannot even write its stacks (state {report.state}{_in_kernel(report)})"
    elif report.collectives is None:
        text += ", and Python there answers nothing, as if something held its lock"
    if report.lines:
        text += f", at {report.lines[0]}"
    if len(report.lines) > 1:
        text += f" (other threads: {', '.join(report.lines[1:4])})"
    return text


def _in_kernel(report: Report) -> str:
    return f" in {report.kernel_function}" if report.kernel_function else ""


def _describe_lost(rank: int, sign: LastSign | None) -> str:
    if sign is None:
        return f"rank {rank} gives no sign, and never did"
    when = time.strftime("%H:%M:%S", time.localtime(sign.time))
    return (
        f"rank {rank} gives no sign: it ran on {sign.host} (pid {sign.pid}), where at {when} it was at step "
        f"{sign.step} ({sign.phase})"
    )


def _describe_collective(entry: dict[str, Any]) -> str:
    at = f" at {entry['line']}" if entry["line"] else ""
    return f"{entry['op']} of {entry['elements']:,} {entry['dtype']}{at}"


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
