"""What is drawn of runs: each function gives a plot, or says why there is none. A run keeps its colour throughout."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llamatrain import words
from llamatrain.reporting.comparison import is_result, told
from llamatrain.reporting.runs import LOSS, VALIDATION_LOSS, Run
from llamatrain.reporting.series import Series, nothing_in, reach, series, smoothed, thinned, window_of
from llamatrain.reporting.style import (
    INK,
    PALE,
    VERMILLION,
    NoPlot,
    Plot,
    above,
    colour,
    dashes,
    from_zero,
    label,
    legend,
    name_among,
    token_axes,
)

MFU = "Model FLOP/s utilisation"
HEAD = 0.04  # of the tokens: how much of a loss may lie above the frame
MOST_TASKS = 30  # with a plot each
FIRST_METRICS = ("accuracy", "exact_match", "pass@1", "bits_per_byte")

Runs = Sequence[Run]
Drawn = Plot | NoPlot


def loss(runs: Runs) -> Drawn:
    """Training loss against tokens: the paper's Figure 1."""
    found = [series(run.training, LOSS) for run in runs]
    if not any(found):
        return NoPlot("Training loss", nothing_in(found))
    bottom, top = _frame(found)

    def draw(figure: Any) -> None:
        axes = token_axes(figure, ylabel="loss, nats per token")
        for number, (run, one) in enumerate(zip(runs, found, strict=True)):
            _noisy(axes, one, window_of(found), number, name_among(runs, run))
        if top is not None:
            axes.set_ylim(bottom, top)
        if len(runs) == 1:
            _mark_events(axes, runs[0])
            above(axes, ncols=3)
        else:
            legend(axes, loc="upper right")

    window = window_of(found)
    caption = f"Line: the mean over {words.count(window)} tokens; pale: what was logged. "
    caption = caption if any(reach(one, window) for one in found) else "Each logged step. "
    return Plot("loss", "Training loss", draw, caption + _cropped(found, top), wide=True)


def _frame(found: Sequence[Series]) -> tuple[float | None, float | None]:
    """Where to cut the fall of the first steps, which would leave little room for the rest; None for a few points."""
    lines = [smoothed(one, window_of(found)) for one in found if one]
    if max(map(len, lines)) < 50:
        return None, None
    most = max(float(one.tokens[-1]) for one in lines)
    later = [one.values[one.tokens >= HEAD * most] for one in lines]
    high = max((float(values.max()) for values in later if len(values)), default=math.nan)
    low = min(float(one.finite().values.min()) for one in found if one)
    margin = 0.06 * (high - low)
    return (low - margin, high + margin) if math.isfinite(high) else (None, None)


def _cropped(found: Sequence[Series], top: float | None) -> str:
    if top is None or all(float(np.nanmax(one.values)) <= top for one in found if one):
        return ""
    return "What lies above the frame, at the beginning or as spikes, is cut off."


def _noisy(axes: Any, one: Series, window: float, number: int, name: str | None) -> None:
    """A line through the middle of what is noisy, and the noise behind it."""
    if not one:
        return
    line, band = smoothed(one, window), thinned(one)
    if reach(one, window):
        if len(line) > len(band.tokens):
            axes.fill_between(band.tokens, band.least, band.greatest, color=colour(number), alpha=0.2, linewidth=0.5)
        else:
            axes.plot(band.tokens, band.mean, color=colour(number), alpha=0.25, linewidth=0.9)
    drawn = thinned(line)
    marker = "o" if len(line) == 1 else ""
    axes.plot(drawn.tokens, drawn.mean, color=colour(number), linestyle=dashes(number), marker=marker, label=name)


def _mark_events(axes: Any, run: Run) -> None:
    """Where training went on after a restart, or went back after a spike; and, along the foot, where spikes were."""
    steps = series(run.records, "step")
    known = sorted(set(zip(steps.values, steps.tokens, strict=True)))
    counts, tokens = zip(*known, strict=True)
    restarts = [attempt.from_step for attempt in run.trained[1:]]
    rollbacks, spikes = (
        [entry[field] for entry in run.journal if entry["event"] == event and field in entry]
        for event, field in (("rollback", "to_step"), ("spike", "step"))
    )
    for found, name, tint in ((restarts, "restart", PALE), (rollbacks, "rollback", VERMILLION)):
        for number, at in enumerate(np.interp(found, counts, tokens)):
            axes.axvline(at, color=tint, linewidth=0.9, linestyle=(0, (2, 3)), label=None if number else name)
    if spikes:
        places = np.interp(spikes, counts, tokens)
        foot = axes.get_xaxis_transform()
        axes.plot(places, [0.02] * len(places), "|", color=VERMILLION, markersize=7, transform=foot, label="spike")


def simple(
    key: str, name: str, title: str, ylabel: str, *, caption: str = "", numbers: Callable[[float], str] | None = None
) -> Callable[[Runs], Drawn]:
    """A plot of one field of the training records, which is not negative; `numbers`: how the ordinate's are told."""

    def plot(runs: Runs) -> Drawn:
        found = [series(run.training, key) for run in runs]
        if not any(found):
            return NoPlot(title, nothing_in(found))

        def draw(figure: Any) -> None:
            axes = token_axes(figure, ylabel=ylabel)
            for number, (run, one) in enumerate(zip(runs, found, strict=True)):
                _noisy(axes, one, window_of(found), number, name_among(runs, run))
            if numbers is not None:
                axes.yaxis.set_major_formatter(lambda number, _: numbers(number))
            from_zero(axes)
            legend(axes)

        return Plot(name, title, draw, caption)

    return plot


learning_rate = simple("train/lr", "learning-rate", "Learning rate", "learning rate")
throughput = simple(
    "perf/tokens_per_s_per_device",
    "throughput",
    "Throughput",
    "tokens per second and device",
    caption="Without validation and saving.",
    numbers=words.count,
)
memory = simple(
    "perf/memory_gib",
    "memory",
    "Memory",
    "GiB",
    caption="The most so far on rank 0: allocated on an accelerator, on a CPU resident in the process.",
)


def gradient_norm(runs: Runs) -> Drawn:
    """With the norm above which gradients are clipped."""
    found = [series(run.training, "train/grad_norm") for run in runs]
    if not any(found):
        return NoPlot("Gradient norm", nothing_in(found))
    limits: set[float] = {limit for run in runs if (limit := run.settings.get("optim.clip_norm"))}
    values = np.concatenate([one.finite().values for one in found])
    spread = values[values > 0]
    logarithmic = len(spread) > 0 and float(spread.max()) > 12 * float(np.median(spread))

    def draw(figure: Any) -> None:
        axes = token_axes(figure, ylabel="norm")
        for number, (run, one) in enumerate(zip(runs, found, strict=True)):
            _noisy(axes, one, window_of(found), number, name_among(runs, run))
        if logarithmic:
            axes.set_yscale("log", subs=(2, 5))
            axes.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
            axes.yaxis.set_minor_formatter(lambda number, _: f"{number:g}")
        else:
            from_zero(axes)
        for limit in sorted(limits):
            axes.axhline(limit, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=f"clipped to {limit:g}")
        above(axes, ncols=2)

    return Plot("gradient-norm", "Gradient norm", draw, "Before clipping.")


_mfu = simple(
    "perf/mfu",
    "mfu",
    MFU,
    "share of the peak",
    caption="By the PaLM convention, in which recomputed products do not count.",
    numbers="{:.0%}".format,
)


def mfu(runs: Runs) -> Drawn:
    """Model FLOP/s utilisation, of devices whose peak is known."""
    if not any(series(run.training, "perf/mfu") for run in runs):
        devices = " and ".join(sorted({run.device for run in runs}))
        return NoPlot(MFU, f"not told for {devices}: only of accelerators whose peak is known is there a share of it")
    return _mfu(runs)


# -------------------------------------------------------------------------- evaluation


def validation(runs: Runs) -> list[Drawn]:
    """Of one run, all sources in one plot; of several, a plot for each source."""
    keys = list(dict.fromkeys(key for run in runs for record in run.records for key in record if _is_validation(key)))
    keys = [key for key in keys if any(series(run.records, key) for run in runs)]
    keys.sort(key=lambda key: key != VALIDATION_LOSS)
    if not keys:
        return [NoPlot("Validation loss", "none yet (evaluation.every_steps asks for it)")]
    if len(runs) == 1:
        return [_validation_of_one(runs[0], keys)]
    return [_validation_of_all(runs, key) for key in keys]


def _is_validation(key: str) -> bool:
    return key.startswith("eval/validation") and key.endswith("/loss")


def _validation_of_one(run: Run, keys: Sequence[str]) -> Plot:
    def draw(figure: Any) -> None:
        axes = token_axes(figure, ylabel="loss, nats per token")
        for number, key in enumerate(keys):
            whole = key == VALIDATION_LOSS
            one = series(run.records, key).finite()
            axes.plot(
                one.tokens,
                one.values,
                color=INK if whole else colour(number - 1 + (VALIDATION_LOSS not in keys)),
                linewidth=2.2 if whole else 1.5,
                linestyle="-" if whole else dashes(number - 1),
                marker="o",
                markersize=3,
                label=label("all" if whole else key.split("/")[1].partition(".")[2]),
            )
        legend(axes)

    caption = "On held-out documents, of each source and of all of them together."
    return Plot("validation", "Validation loss", draw, caption)


def _validation_of_all(runs: Runs, key: str) -> Plot:
    def draw(figure: Any) -> None:
        axes = token_axes(figure, ylabel="loss, nats per token")
        for number, run in enumerate(runs):
            one = series(run.records, key).finite()
            _points(axes, one, number, name_among(runs, run))
        legend(axes)

    return Plot(_safe(key.split("/")[1].replace(".", "-")), told(key).partition(":")[0].capitalize(), draw)


def _points(axes: Any, one: Series, number: int, name: str | None) -> None:
    if len(one):
        axes.plot(
            one.tokens,
            one.values,
            color=colour(number),
            linestyle=dashes(number),
            marker="o",
            markersize=3,
            label=name,
        )


def evaluations(runs: Runs) -> list[Drawn]:
    """Each task's foremost metric against tokens: the paper's Figure 2. Bars are 95 % intervals."""
    tasks: dict[str, str] = {}
    for task, metric in evaluated(runs):
        if task not in tasks or _rank(metric) < _rank(tasks[task]):
            tasks[task] = metric
    shown = list(tasks.items())[:MOST_TASKS]
    return [_task(runs, task, metric, number) for number, (task, metric) in enumerate(shown, start=1)]


def evaluated(runs: Runs) -> list[tuple[str, str]]:
    """Every (task, metric) that some run was evaluated on, validation left out."""
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        for key in dict.fromkeys(key for record in run.records for key in record if is_result(key)):
            _, task, metric = key.split("/", 2)
            if task.partition(".")[0] != "validation":
                found[task, metric] = None
        found.update(dict.fromkeys((one.task, one.metric) for one in run.evaluations))
    return list(found)


def _rank(metric: str) -> int:
    return next((place for place, name in enumerate(FIRST_METRICS) if metric.startswith(name)), len(FIRST_METRICS))


Point = tuple[float, float, float | None, float | None]  # tokens, value, low, high


def results(run: Run, task: str, metric: str) -> list[Point]:
    """What a run has reached, at which tokens, and its interval; one of a checkpoint goes before one on the way."""
    on_the_way = series(run.records, f"eval/{task}/{metric}").finite()
    found: dict[float, Point] = {
        float(at): (float(at), float(value), None, None)
        for at, value in zip(on_the_way.tokens, on_the_way.values, strict=True)
    }
    for one in run.evaluations:
        if (one.task, one.metric) == (task, metric):
            found[float(one.tokens)] = (float(one.tokens), one.value, one.low, one.high)
    return [found[at] for at in sorted(found)]


def _task(runs: Runs, task: str, metric: str, number: int) -> Plot:
    def draw(figure: Any) -> None:
        axes = token_axes(figure, ylabel=metric.replace("_", " "))
        for number, run in enumerate(runs):
            points = results(run, task, metric)
            tokens, values = (np.array([point[place] for point in points]) for place in (0, 1))
            _points(axes, Series(tokens, values), number, name_among(runs, run))
            for at, value, low, high in points:
                if low is not None and high is not None:
                    arms = [[max(0.0, value - low)], [max(0.0, high - value)]]
                    axes.errorbar([at], [value], arms, color=colour(number), alpha=0.5, linewidth=1, capsize=2)
        legend(axes)

    return Plot(f"evaluation-{number}-{_safe(task)}", task, draw)


def _safe(name: str) -> str:
    return "".join(char if char.isascii() and (char.isalnum() or char in "-_") else "-" for char in name)[:80]
