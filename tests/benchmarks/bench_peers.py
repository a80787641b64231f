"""Training speed of llamatrain beside Hugging Face Transformers and litgpt, on a CPU.

    python -m tests.benchmarks.bench_peers [--smoke] [--rounds 20] [--precision fp32 bf16]

All in one process, in turns, on the same tokens and from the same weights, each in its best setting, which short
duels find first. The machine's matrix products have their turn in the same rounds. Memory is that of a process
of its own. Where a goal is missed, a profile says where the time goes.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from tests.benchmarks import report
from tests.benchmarks.alone import Case, run_alone
from tests.benchmarks.contenders import OURS, PEERS, build_contender, same_start, settings_on_cpu
from tests.benchmarks.peers import why_no_torchtitan
from tests.benchmarks.rounds import PRODUCT_S, Turn, fastest, prepare, products, take_turns, training
from tests.benchmarks.workload import Setting, Workload, describe, preset
from tests.hugging_face import to_hugging_face

GOALS = {"fp32": 1.05, "bf16": 1.2}  # times the best peer
SAME_LOSS = {"fp32": 1e-4, "bf16": 1e-2}  # relative, of the first step; litgpt's own bf16 rounds the loss itself to it


def arguments_of(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="turns that each contender has")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a turn")
    parser.add_argument("--precision", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--model", default="15m", help="a preset of conf/model")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[4096, 32000])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a forward")
    parser.add_argument("--micro-batches", type=int, default=1, help="of an optimizer step")
    parser.add_argument("--duel-rounds", type=int, default=5, help="by which a contender's best setting is found")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="three short rounds of a tiny model: that it runs")
    arguments = parser.parse_args(command_line)
    if arguments.rounds < 1 or arguments.steps < 1 or arguments.duel_rounds < 1:
        parser.error("--rounds, --steps and --duel-rounds must be at least 1")
    if arguments.smoke:
        arguments.rounds, arguments.steps, arguments.duel_rounds = 3, 1, 1
        arguments.vocab_size, arguments.seq_len, arguments.micro_batch = [512], 64, 2
    missing = [peer for peer in arguments.peers if find_spec(peer) is None]
    if missing:
        parser.error(f"{', '.join(missing)} must be installed: pip install -e '.[bench]', or choose --peers")
    return arguments


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """A workload for each vocabulary and precision."""
    changes = {"max_seq_len": arguments.seq_len} | ({"n_layers": 2} if arguments.smoke else {})
    return [
        Workload(
            model=preset(arguments.model, vocab_size=vocab_size, **changes),
            seq_len=arguments.seq_len,
            micro_batch=arguments.micro_batch,
            micro_batches=arguments.micro_batches,
            precision=precision,
        )
        for vocab_size in arguments.vocab_size
        for precision in arguments.precision
    ]


def first_weights(workload: Workload) -> dict[str, Tensor]:
    """The weights that llamatrain draws, by Hugging Face's names."""
    model = Llama(workload.model)
    init_weights(model, workload.model, seed=0)
    return {name: tensor.clone() for name, tensor in to_hugging_face(model.state_dict(), workload.model).items()}


def choose_settings(workload: Workload, arguments: argparse.Namespace) -> dict[str, Setting]:
    """Everyone's best setting; prints what was tried."""
    chosen: dict[str, Setting] = {}
    weights = first_weights(workload)
    rows = []
    for name in (OURS, *arguments.peers):
        settings = settings_on_cpu(name, workload.precision, smoke=arguments.smoke)
        build = partial(build_contender, name, workload, weights=weights)
        chosen[name], tried = fastest(settings, build, workload, rounds=arguments.duel_rounds)
        for one in tried:
            speed = "" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}"
            rows.append([name, describe(one.setting), speed, one.outcome])
    print(report.table(["", "setting", "tokens/s", "in a duel of one-step turns"], rows), flush=True)
    return chosen


def interleaved(
    workload: Workload, chosen: dict[str, Setting], arguments: argparse.Namespace
) -> tuple[dict[str, report.Entry], list[float]]:
    """Everyone's rates, and those of the matrix products, of the same rounds."""
    weights = first_weights(workload)
    ready = {
        name: prepare(partial(build_contender, name, workload, setting, weights), workload)
        for name, setting in chosen.items()
    }
    losses = {name: one.first_loss for name, one in ready.items()}
    print(f"\nFirst losses: {', '.join(f'{name} {loss:.5f}' for name, loss in losses.items())}.\n", flush=True)
    if not same_start(losses, tolerance=SAME_LOSS[workload.precision]):
        raise RuntimeError("the contenders do not compute the same model")
    turns: dict[str, Turn] = {
        name: training(one.contender, workload, steps=arguments.steps) for name, one in ready.items()
    }
    turns[report.PRODUCTS] = products(
        workload.precision, "cpu", seconds=PRODUCT_S / 5 if arguments.smoke else PRODUCT_S
    )
    rates = take_turns(turns, arguments.rounds)
    peaks = rates.pop(report.PRODUCTS)
    for one in ready.values():
        one.contender.close()
    torch._dynamo.reset()
    return {name: report.Entry(describe(chosen[name]), rates[name]) for name in chosen}, peaks


def compare(workload: Workload, arguments: argparse.Namespace) -> None:
    """Print one workload's tables."""
    print(f"\n## {workload.precision}: {workload.describe()}\n", flush=True)
    chosen = choose_settings(workload, arguments)
    entries, peaks = interleaved(workload, chosen, arguments)
    for name, entry in entries.items():
        entry.alone = run_alone(Case(name, workload, chosen[name], threads=arguments.threads))
    text, ratios = report.speeds(entries, peaks, workload.flops_per_token, ours=OURS)
    print(text)
    if arguments.smoke:
        return
    peer, line, met = report.verdict(ratios, GOALS[workload.precision])
    print(f"\n{line}", flush=True)
    if not met:
        cases = {
            name: Case(name, workload, chosen[name], profiled=True, threads=arguments.threads) for name in (OURS, peer)
        }
        print("\n" + report.where_time_goes({name: run_alone(case) for name, case in cases.items()}), flush=True)


def main() -> None:
    arguments = arguments_of()
    torch.set_num_threads(arguments.threads)
    machine = f"{os.cpu_count()} cores, {arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}."
    print(report.heading(("torch", *arguments.peers), machine=machine))
    if arguments.smoke:
        print("A smoke test: its figures mean nothing.")
    print(f"torchtitan cannot run on a CPU: {why_no_torchtitan()}")
    for workload in workloads(arguments):
        compare(workload, arguments)


if __name__ == "__main__":
    main()
