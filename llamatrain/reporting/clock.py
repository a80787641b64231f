"""Plots of time: what a step's goes to, and what the run's went to."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llamatrain import words
from llamatrain.observe.goodput import PARTS
from llamatrain.reporting.runs import Record, Run
from llamatrain.reporting.series import Series, nothing_in, series, thinned
from llamatrain.reporting.style import (
    GREEN,
    GREY,
    HEIGHT_IN,
    INK,
    NARROW_IN,
    PALE,
    PART_COLOURS,
    SKY,
    VERMILLION,
    YELLOW,
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

PROFILE_PARTS = {
    "compute": ("compute", GREEN),
    "exposed_communication": ("exposed communication", VERMILLION),
    "data_wait": ("waiting for data", YELLOW),
    "host_gaps": ("host gaps", GREY),
}
PART_NAMES = {"data_wait": "waiting for data"}
CLOCK_UNITS = ((2 * 86_400.0, 86_400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))

Drawn = Plot | NoPlot


def step_time(runs: Sequence[Run]) -> Drawn:
    """Of one run, what a step waits for data and all else; of several, whole steps."""
    title = "Step time"
    found = [series(run.training, "perf/step_ms") for run in runs]
    if not any(found):
        return NoPlot(title, nothing_in(found))

    def draw(figure: Any) -> None:
        axes = token_axes(figure, ylabel="ms")
        if len(runs) == 1:
            _stack(axes, runs[0], found[0])
        else:
            for number, (run, one) in enumerate(zip(runs, found, strict=True)):
                band = thinned(one)
                axes.plot(
                    band.tokens, band.mean, color=colour(number), linestyle=dashes(number), label=name_among(runs, run)
                )
        from_zero(axes)
        above(axes)

    caption = "The mean step between two log lines."
    if len(runs) == 1:
        caption = "The mean step between two log lines: what it waited for its data, on rank 0, and all else."
    return Plot("step-time", title, draw, caption)


def _stack(axes: Any, run: Run, whole: Series) -> None:
    step, wait = thinned(whole), thinned(series(run.training, "perf/data_wait_ms"))
    waited = np.interp(step.tokens, wait.tokens, wait.mean) if len(wait.tokens) else np.zeros_like(step.mean)
    parts = [("waiting for data", waited, YELLOW)]
    own = thinned(series(run.training, "perf/compute_ms_mean"))
    rest = np.maximum(0, step.mean - waited)
    if len(own.tokens):
        forward = np.minimum(rest, np.interp(step.tokens, own.tokens, own.mean))
        parts.append(("forward of the first micro-batch", forward, SKY))
        rest = rest - forward
    parts.append(("computing and communicating" if len(own.tokens) == 0 else "all else", rest, GREEN))
    axes.stackplot(
        step.tokens,
        *(values for _, values, _ in parts),
        labels=[name for name, _, _ in parts],
        colors=[tint for _, _, tint in parts],
        alpha=0.85,
        linewidth=0,
    )


def profiles(runs: Sequence[Run]) -> Drawn:
    """What a profiler has found a few steps' time to go to."""
    title = "A step's time, profiled"
    rows = [(run, profile) for run in runs for profile in run.profiles if profile.get("ranks")]
    if not rows:
        return NoPlot(title, "no step was profiled (logging.profile_steps=3 asks for it)")

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, (run, profile) in enumerate(rows):
            _profile_row(axes, place, profile, first=place == 0)
            text = f"{run.name}, steps {profile['steps'][0]}–{profile['steps'][-1]}"
            axes.text(0, place - 0.36, label(text), fontsize=9, va="bottom")
        _bars(axes, len(rows))

    height = max(HEIGHT_IN, 1.5 + 0.75 * len(rows))
    return Plot("profile", title, draw, "Mean over the ranks.", height=height)


def _profile_row(axes: Any, place: int, profile: Record, *, first: bool) -> None:
    ranks, left = profile["ranks"], 0.0
    wall = sum(rank["wall_s"] for rank in ranks)
    for part, (name, tint) in PROFILE_PARTS.items():
        share = sum(rank[f"{part}_s"] for rank in ranks) / wall
        axes.barh(place, share, left=left, height=0.5, color=tint, label=name if first else None)
        if share > 0.08:
            milliseconds = 1e3 * share * wall / len(ranks) / len(profile["steps"])
            axes.text(left + share / 2, place, f"{milliseconds:.0f} ms", ha="center", va="center", fontsize=8)
        left += share


def _bars(axes: Any, rows: int, *, columns: int = 2) -> None:
    """The frame of horizontal bars of shares, with the legend below."""
    axes.set_xlim(0, 1)
    axes.set_ylim(rows - 0.4, -0.7)
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=columns, fontsize=9)


def goodput(runs: Sequence[Run]) -> Drawn:
    """What the wall clock went to, in shares."""
    if not any(run.ledger.wall_s for run in runs):
        return NoPlot("Goodput", "no time has passed yet")
    present = [part for part in PARTS if any(run.ledger.parts[part] > 0 for run in runs)]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, run in enumerate(runs):
            left, wall = 0.0, run.ledger.wall_s or 1.0
            for part in present:
                share = run.ledger.parts[part] / wall
                name = PART_NAMES.get(part, part) if place == 0 else None
                axes.barh(place, share, left=left, height=0.5, color=PART_COLOURS[part], label=name)
                left += share
            axes.text(0, place - 0.36, label(run.name), fontsize=9, va="bottom")
            told = f"{words.share(run.goodput)} of {words.duration(run.ledger.wall_s)}"
            axes.text(1, place - 0.36, told, fontsize=9, va="bottom", ha="right", color=PALE)
        _bars(axes, len(runs), columns=columns(figure))

    height, low = 1.9 + 0.75 * len(runs), 0.9 + 0.6 * len(runs)
    caption = "Shares of the wall clock. Productive are steps that were kept."
    return Plot("goodput", "Goodput", draw, caption, True, height, low)


def columns(figure: Any) -> int:
    """Of a legend."""
    return 8 if figure.get_figwidth() > NARROW_IN else 2


def wall_clock(runs: Sequence[Run]) -> Drawn:
    """The same in the order of time, restarts marked."""
    whole = max((_span(run) for run in runs), default=0.0)
    if not whole:
        return NoPlot("On the clock", "no time has passed yet")
    unit, name = next(((size, name) for least, size, name in CLOCK_UNITS if whole >= least), (1.0, "seconds"))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, run in enumerate(runs):
            _attempts(axes, place, run, unit)
            again = len(run.restarts)
            told = f"{again} restart{'s' * (again != 1)}"
            axes.text(whole / unit, place - 0.36, told, fontsize=9, va="bottom", ha="right", color=PALE)
        for tint, what in (("starting", "starting, restarting"), ("productive", "at work"), ("lost", "lost")):
            axes.barh(0, 0, color=PART_COLOURS[tint], label=what)
        axes.plot([], [], marker="^", color=INK, linestyle="", markersize=5, label="restart")
        axes.set_xlim(0, whole / unit)
        axes.set_ylim(len(runs) - 0.5, -0.7)
        axes.set_yticks([])
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{name} since the first launch")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=columns(figure), fontsize=9)

    height, low = 1.9 + 0.75 * len(runs), 1.1 + 0.6 * len(runs)
    caption = "Green holds validation and saving too. White: nobody at work."
    return Plot("wall-clock", "On the clock", draw, caption, True, height, low)


def _span(run: Run) -> float:
    at_work = [attempt for attempt in run.attempts if not attempt.is_idle]
    return at_work[-1].ended - at_work[0].launched if at_work else 0.0


def _attempts(axes: Any, place: int, run: Run, unit: float) -> None:
    at_work = [attempt for attempt in run.attempts if not attempt.is_idle]
    if not at_work:
        return
    zero = at_work[0].launched

    def bar(since: float, until: float, part: str) -> None:
        axes.barh(place, (until - since) / unit, left=(since - zero) / unit, height=0.5, color=PART_COLOURS[part])

    for attempt in at_work:
        started = attempt.ended if attempt.started is None else attempt.started
        bar(attempt.launched, started, "starting")
        bar(started, attempt.ended, "productive")
        for since, until in attempt.lost:
            bar(since, until, "lost")
    for attempt in run.restarts:
        axes.plot((attempt.launched - zero) / unit, place + 0.33, "^", color=INK, markersize=5)
    axes.text(0, place - 0.36, label(run.name), fontsize=9, va="bottom")


def ranks(runs: Sequence[Run]) -> Drawn:
    """Each rank's own compute time: how far apart they are."""
    found = [[series(run.training, f"perf/compute_ms_{what}") for what in ("min", "mean", "max")] for run in runs]
    if not any(mean for _, mean, _ in found):
        return NoPlot("Ranks apart", "only of several ranks is it measured which is slow")

    def draw(figure: Any) -> None:
        axes = token_axes(figure, ylabel="ms")
        for number, (run, (least, mean, most)) in enumerate(zip(runs, found, strict=True)):
            if mean:
                low, middle, high = thinned(least), thinned(mean), thinned(most)
                axes.fill_between(middle.tokens, low.mean, high.mean, color=colour(number), alpha=0.2, linewidth=0)
                axes.plot(middle.tokens, middle.mean, color=colour(number), label=name_among(runs, run))
        from_zero(axes)
        legend(axes)

    caption = "What ranks need for themselves in a part of a step: the fastest, the mean, the slowest."
    return Plot("ranks", "Ranks apart", draw, caption)
