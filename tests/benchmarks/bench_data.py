"""MB of text a CPU-second of one core, stage by stage of data_tools, beside the peers that are installed.

    python -m tests.benchmarks.bench_data [--smoke] [--repetitions 5]

The contenders of a stage have their turns on the same text, in an order that changes from round to round; ratios are
of the same round. What is counted is CPU time of this process: others on the machine slow it by the caches they take,
not by the time. The hash of a block of bytes, before and after, says how fast the machine was. The models are trained
first, on text that nothing is timed on (`--models` keeps them). A peer that is not installed is named as that. No
speed is asserted.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha1
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.benchmarks import data_models, data_stages
from tests.benchmarks.data_chain import STAGES, ChainRun, run_chain
from tests.benchmarks.data_models import Models, ModelSizes, trained_models
from tests.benchmarks.data_peers import PACKAGES, Pass, trafilatura_is_quiet
from tests.benchmarks.data_stages import Contender, Sizes, Stage, Unmeasured, all_stages
from tests.benchmarks.data_texts import Texts
from tests.benchmarks.paired import paired_ratio, turn_order
from tests.benchmarks.report import heading, table

OURS = ("numpy", "xxhash", "sentencepiece", "fasttext-numpy2-wheel", "kenlm", "resiliparse", "selectolax")
HEAD = ("stage", "on", "MB/s, median (min to max)", "times as fast (95 %)", "goal", "met")
DROPPED, NOTHING_DROPPED = "the paper's settings", "nothing dropped"
CHAIN_GOAL = 2.0  # MB/s with nothing dropped
ENOUGH_FOR_TOKENS = 3_000_000  # bytes
BLOCK = bytes(1 << 22)  # whose SHA-1 is the speed of the machine


@dataclass
class Measured:
    """Rates of a stage's contenders, round by round, ours first; of those not installed none."""

    stage: Stage
    rates: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # why they are


def measure(stage: Stage, *, rounds: int, seconds: float) -> Measured:
    """Everyone has a pass before the first round, which counts for nothing."""
    measured = Measured(stage)
    passes: dict[str, tuple[Contender, Pass]] = {}
    for contender in [stage.ours, *stage.peers]:
        try:
            passes[contender.name] = contender, contender.start()
        except ModuleNotFoundError:
            measured.missing[contender.name] = "not installed"
            continue
        except ImportError as error:
            measured.missing[contender.name] = f"cannot be imported: {str(error).splitlines()[0]}"
            continue
        passes[contender.name][1]()
        measured.rates[contender.name] = []
    for number in range(rounds):
        for name in turn_order(list(passes), number):
            measured.rates[name].append(stage.size / seconds_of_a_pass(*passes[name], at_least=seconds))
    return measured


def seconds_of_a_pass(contender: Contender, work: Pass, *, at_least: float) -> float:
    """CPU-seconds, over as many passes as take `at_least` in all."""
    taken, count = 0.0, 0
    while taken < at_least:
        if contender.fresh:
            work = contender.start()
        begin = time.process_time()
        work()
        taken += time.process_time() - begin
        count += 1
    return taken / count


def machine_speed() -> float:
    """MB/s of SHA-1."""
    begin = time.process_time()
    sha1(BLOCK, usedforsecurity=False).digest()
    return len(BLOCK) / 1e6 / (time.process_time() - begin)


def stage_rows(measured: Measured) -> list[list[str]]:
    """The row of a stage, and one for each peer."""
    stage = measured.stage
    ours = measured.rates[stage.ours.name]
    unit = "" if stage.unit == "MB/s" else f" {stage.unit}"
    met = _met(statistics.median(ours), stage.goal)
    rows = [[stage.name, stage.text, spread(ours) + unit, "", _goal(stage.goal), met]]
    for peer in stage.peers:
        name = f"– {peer.name}"
        goal, unmeasured = ("", "") if peer.times_goal is None else (f"{peer.times_goal:g} times", "not measured")
        if peer.name in measured.missing:
            rows.append([name, "", measured.missing[peer.name], "", goal, unmeasured])
            continue
        theirs = measured.rates[peer.name]
        ratio = paired_ratio(ours, theirs)
        rows.append([name, "", spread(theirs) + unit, str(ratio), goal, _met(ratio.median, peer.times_goal)])
    return rows


def spread(rates: Sequence[float]) -> str:
    digits = 2 if statistics.median(rates) < 10 else 0 if statistics.median(rates) >= 100 else 1
    return f"{statistics.median(rates):,.{digits}f} ({min(rates):,.{digits}f} to {max(rates):,.{digits}f})"


def _goal(goal: float | None) -> str:
    return "" if goal is None else f"{goal:g}"


def _met(rate: float, goal: float | None) -> str:
    return "" if goal is None else "yes" if rate >= goal else "no"


def chain_rows(runs: Sequence[ChainRun], *, drop: bool, text: str) -> list[list[str]]:
    """To documents; to token shards only where there is enough text that the tokenizer's loading does not count."""
    ends = {"documents": STAGES[:-1], "token shards": STAGES}
    what = f"{text}, {100 * runs[0].kept:.0f} % of the bytes kept"
    goal = None if drop else CHAIN_GOAL
    rows = []
    for end, stages in ends.items():
        if not set(stages) <= set(_stages_to_count(runs)):
            continue
        rates = [run.rate(stages) for run in runs]
        name = f"whole chain to {end}, {DROPPED if drop else NOTHING_DROPPED}"
        rows.append([name, what, spread(rates), "", _goal(goal), _met(statistics.median(rates), goal)])
    return rows


def chain_shares(runs: Sequence[ChainRun]) -> str:
    """CPU-seconds of a MB by stage."""
    cost = {
        stage: statistics.median(run.seconds[stage] / run.bytes_in * 1e6 for run in runs)
        for stage in _stages_to_count(runs)
    }
    return ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in cost.items())


def _stages_to_count(runs: Sequence[ChainRun]) -> Sequence[str]:
    return STAGES if runs[0].bytes_in > ENOUGH_FOR_TOKENS else STAGES[:-1]


def packages() -> list[str]:
    """Ours, and those of the peers that are here."""
    return [name for name in (*OURS, *PACKAGES) if _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def arguments_of(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5, help="rounds in which every contender has a turn")
    parser.add_argument("--only", default="", help="stages whose name holds this")
    parser.add_argument("--models", help="directory to keep the trained models in; they are used again")
    parser.add_argument(
        "--build-binary", default="build_binary", help="KenLM's program: without it the chain takes two minutes longer"
    )
    parser.add_argument("--smoke", action="store_true", help="one short round on little text: that it runs")
    arguments = parser.parse_args(command_line)
    if arguments.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    if arguments.smoke:
        arguments.repetitions = 1
    return arguments


def _print_rows(rows: Iterable[Sequence[str]]) -> None:
    for cells in rows:
        print(f"| {' | '.join(cells)} |", flush=True)


def run_stages(texts: Texts, models: Models, folder: Path, sizes: Sizes, arguments: argparse.Namespace) -> None:
    for stage in all_stages(texts, models, folder, sizes):
        if arguments.only not in stage.name:
            continue
        if isinstance(stage, Unmeasured):
            _print_rows([[stage.name, stage.why, "not measured", "", "", ""]])
        else:
            _print_rows(stage_rows(measure(stage, rounds=arguments.repetitions, seconds=sizes.seconds)))


def run_chains(texts: Texts, models: Models, folder: Path, sizes: Sizes, arguments: argparse.Namespace) -> list[str]:
    """Prints the rows; returns lines on where the time went."""
    english, web = texts.english[0].first(sizes.chain), texts.web[0].first(sizes.chain) if texts.web else None
    cases = [(english, False)] if web is None else [(english, False), (web, False), (web, True)]
    runs: list[list[ChainRun]] = [[] for _ in cases]
    for number in range(arguments.repetitions):
        for case in turn_order(range(len(cases)), number):
            text, drop = cases[case]
            runs[case].append(run_chain(folder / "chain", text.documents, models, drop=drop))
    notes = []
    for (text, drop), of_case in zip(cases, runs, strict=True):
        _print_rows(chain_rows(of_case, drop=drop, text=text.kind))
        what = DROPPED if drop else NOTHING_DROPPED
        notes.append(f"CPU-seconds a MB, {text.kind}, {what}: {chain_shares(of_case)}")
    return notes


def main() -> None:
    arguments = arguments_of()
    texts = Texts.here()
    sizes, model_sizes = (data_stages.SMOKE, data_models.SMOKE) if arguments.smoke else (Sizes(), ModelSizes())
    trafilatura_is_quiet()
    cores = f"{os.cpu_count()} cores ({platform.machine()}), of which one is used."
    print(heading(packages(), machine=cores))
    if arguments.smoke:
        print("\nA smoke, on little text with small models: it shows that everything runs, not how fast.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kept = Path(arguments.models) if arguments.models else folder / "models"
        begin = time.process_time()
        models = trained_models(kept, texts, model_sizes, build_binary=arguments.build_binary)
        trained = time.process_time() - begin
        before, begin = [machine_speed() for _ in range(20)], time.process_time()
        print(f"\n{table(HEAD, [])}")
        run_stages(texts, models, folder, sizes, arguments)
        notes = run_chains(texts, models, folder, sizes, arguments) if arguments.only in "whole chain" else []
        speeds = before + [machine_speed() for _ in range(20)]
    print("\n" + "\n".join(notes))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"machine: SHA-1 {spread(speeds)} MB/s; load of the last 1, 5 and 15 minutes {load}")
    print(f"CPU-seconds: models {trained:.0f}, everything else {time.process_time() - begin:.0f}")


if __name__ == "__main__":
    main()
