"""Rates measured in turns: contenders' tokens and the machine's matrix products, and which setting is the fastest.

A contender that falls back to uncompiled code is an error here, not a slow figure.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tests.benchmarks.contenders import Contender
from tests.benchmarks.paired import Ratio, paired_ratio, turn_order
from tests.benchmarks.workload import Setting, Workload, describe

PRODUCT_S = 0.5  # of a turn of matrix products
WARM_UP_STEPS = 2
RECOMPILE_LIMIT = 64  # several models of one class share torch's cache of compiled code

Turn = Callable[[int], float]  # by the round's number, to a rate


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(turns: Mapping[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Everyone's rates, round by round."""
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in turn_order(list(turns), number):
            rates[name].append(turns[name](number))
    return rates


def training(contender: Contender, workload: Workload, *, steps: int) -> Turn:
    """Tokens per second over whole optimizer steps, on tokens that depend on the round only."""

    def turn(number: int) -> float:
        batches = [workload.rows(number * steps + i) for i in range(steps)]
        synchronize(workload.device)
        begin = time.perf_counter()
        for rows in batches:
            contender.step(rows)
        synchronize(workload.device)
        return steps * workload.tokens_per_step / (time.perf_counter() - begin)

    return turn


def products(precision: str, device: str, *, seconds: float = PRODUCT_S) -> Turn:
    """FLOP/s of square matrix products, large enough to be the machine's best."""
    size = 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def turn(number: int) -> float:
        torch.mm(left, right)
        synchronize(device)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            for _ in range(4):
                torch.mm(left, right)
            synchronize(device)
            count += 4
        return 2 * size**3 * count / (time.perf_counter() - begin)

    return turn


def refuse_uncompiled() -> None:
    """Raise where torch would go on with uncompiled code because it has compiled a function too often."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True


@dataclass
class Prepared:
    """A contender that has been built and has taken its first steps, so that nothing is compiled any more."""

    contender: Contender
    first_loss: float
    seconds: float  # of building and of the first steps


def prepare(build: Callable[[], Contender], workload: Workload) -> Prepared:
    """Raises whatever keeps it from running."""
    refuse_uncompiled()
    begin = time.perf_counter()
    contender = build()
    losses = [contender.step(workload.rows(0))[0].item() for _ in range(WARM_UP_STEPS)]
    return Prepared(contender, losses[0], time.perf_counter() - begin)


@dataclass(frozen=True)
class Tried:
    """What came of a setting."""

    setting: Setting
    outcome: str
    tokens_per_s: float | None = None


def fastest(
    settings: Sequence[Setting], build: Callable[[Setting], Contender], workload: Workload, *, rounds: int
) -> tuple[Setting, list[Tried]]:
    """The best setting, each against the best before it in turns of one step, and what came of each.

    Raises RuntimeError if none runs.
    """
    best: Prepared | None = None
    best_setting: Setting = {}
    tried: list[Tried] = []
    for setting in settings:
        try:
            challenger = prepare(partial(build, setting), workload)
        except Exception as error:  # whatever it is, it is why this setting cannot be the best
            reason = str(error).strip().partition("\n")[0]
            tried.append(Tried(setting, f"cannot run: {type(error).__name__}: {reason}"))
            continue
        speed, ratio = duel(challenger, best, workload, rounds=rounds)
        outcome = "the first" if ratio is None else f"{ratio} times {describe(best_setting)}"
        tried.append(Tried(setting, f"{outcome}; ready in {challenger.seconds:.0f} s", speed))
        loser: Prepared | None = challenger
        if ratio is None or ratio.median > 1:
            loser, best, best_setting = best, challenger, setting
        if loser is not None:
            loser.contender.close()
        del challenger, loser
        gc.collect()
    if best is None:
        raise RuntimeError("no setting runs: " + "; ".join(f"{describe(t.setting)}: {t.outcome}" for t in tried))
    best.contender.close()
    torch._dynamo.reset()
    return best_setting, tried


def duel(challenger: Prepared, best: Prepared | None, workload: Workload, *, rounds: int) -> tuple[float, Ratio | None]:
    """The challenger's median tokens/s, and how much faster than the best it is, if there is one."""
    turns = {"challenger": training(challenger.contender, workload, steps=1)}
    if best is not None:
        turns["best"] = training(best.contender, workload, steps=1)
    take_turns(turns, 1)  # building the one may have thrown away what was compiled for the other
    rates = take_turns(turns, rounds)
    speed = statistics.median(rates["challenger"])
    return speed, None if best is None else paired_ratio(rates["challenger"], rates["best"])
