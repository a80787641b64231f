"""How plots look, and plots as SVG for a page and as PNG. The only file that knows matplotlib, which is optional.

A plot is drawn for the width at which it is shown, so that its text has the size of the page's on a phone, too:
narrow, one of three columns or a phone's whole width; or wide, over all columns.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from llamatrain import words
from llamatrain.errors import ConfigError
from llamatrain.reporting.runs import Run

# Okabe and Ito's, which those who see few colours can tell apart (tests/test_reporting.py); yellow only for areas.
BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, YELLOW, GREY = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#c4c4c4",
)  # fmt: skip
RUN_COLOURS = (BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, "#332288", "#661100")
PART_COLOURS = {
    "productive": GREEN,
    "data_wait": YELLOW,
    "validating": SKY,
    "saving": BLUE,
    "other": GREY,
    "lost": VERMILLION,
    "starting": ORANGE,
    "restarting": PINK,
}
INK, PALE, FAINT = "#1f2933", "#7b8794", "#e4e7eb"
NARROW_IN, WIDE_IN, HEIGHT_IN, WIDE_HEIGHT_IN = 5.0, 15.2, 3.1, 5.0
LONGEST_LABEL = 28  # characters
MOST_IN_LEGEND = 8
PNG_DPI = 150
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": PALE,
    "axes.edgecolor": "#cbd2d9",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "text.parse_math": False,
    "axes.xmargin": 0.01,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.8,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
    "legend.labelspacing": 0.3,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text, in the page's own font
}


def check_plots() -> None:
    """Raises ConfigError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "format=html draws with matplotlib, which is not installed: pip install 'llamatrain[plots]'; "
            "format=terminal compares runs without it"
        ) from None


@dataclass(frozen=True)
class Plot:
    """A plot that can be drawn at any width."""

    name: str  # of its PNG
    title: str
    draw: Callable[[Any], None]  # on a matplotlib Figure
    caption: str = ""
    wide: bool = False
    height: float = HEIGHT_IN  # inches
    wide_height: float = WIDE_HEIGHT_IN


@dataclass(frozen=True)
class NoPlot:
    """What cannot be drawn, and why."""

    title: str
    reason: str


def as_svg(plot: Plot, *, wide: bool = False) -> str:
    """For a page: without size, which the page gives it, and without anything that could be fetched."""
    buffer = io.StringIO()
    _save(plot, buffer, wide=wide, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", svg, flags=re.S)
    head, rest = svg[: svg.index(">")], svg[svg.index(">") :]
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    rest = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", rest)
    rest = re.sub(r'(<g id=")[^"]*(")', r"\1\2", rest).replace('<g id="">', "<g>")
    label = escape(f"{plot.title}. {plot.caption}", quote=True)
    return f'<svg {view[0]} role="img" aria-label="{label}"{rest}'.replace("\n", "")


def as_png(plot: Plot, *, of: str = "") -> bytes:
    """For a talk: as wide as it can be shown, with its title, and what it is of."""
    buffer = io.BytesIO()
    _save(plot, buffer, wide=plot.wide, title=f"{plot.title}{of and f' · {of}'}", format="png", dpi=PNG_DPI)
    return buffer.getvalue()


def _save(plot: Plot, into: Any, *, wide: bool, title: str | None = None, **how: Any) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    size = (WIDE_IN * (0.7 if title else 1), plot.wide_height) if wide else (NARROW_IN, plot.height)
    salt = f"{plot.name}{'-wide' * wide}"  # so that the parts of two drawings on a page have names of their own
    style: Any = {**STYLE, "svg.hashsalt": salt}
    with rc_context(style):
        figure = Figure(figsize=size)
        plot.draw(figure)
        if title:
            figure.suptitle(label(title, longest=90), x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(into, **how)


# -------------------------------------------------------------------------- pieces of plots


def token_axes(figure: Any, *, ylabel: str = "") -> Any:
    """Axes whose abscissa counts tokens, from 0 on."""
    axes = figure.subplots()
    axes.update_datalim([(0, 0)], updatey=False)
    count_axis(axes.xaxis)
    axes.set_xlabel("tokens")
    axes.set_ylabel(ylabel)
    return axes


def from_zero(axes: Any) -> None:
    """Let the ordinate of values that are not negative begin at 0, with room above the greatest."""
    axes.update_datalim([(0, 0)], updatex=False)
    axes.autoscale_view(scalex=False)
    axes.set_ylim(bottom=0)


def count_axis(axis: Any) -> None:
    """Numbers as 1.4T and 820k."""
    axis.set_major_formatter(lambda number, _: words.count(number))


def legend(axes: Any, **how: Any) -> None:
    """If there is something named, and not too much; where to look for the rest, the page says."""
    handles, labels = axes.get_legend_handles_labels()
    if 0 < len(labels) <= MOST_IN_LEGEND:
        axes.legend(handles, labels, **how)


def above(axes: Any, **how: Any) -> None:
    """A legend that covers nothing."""
    legend(axes, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, **how)


def label(name: str, *, longest: int = LONGEST_LABEL) -> str:
    """A name short enough for a legend, from which matplotlib would leave out one that begins with an underscore."""
    short = name if len(name) <= longest else f"{name[: longest - 9]}…{name[-8:]}"
    return f"\u200b{short}" if short.startswith("_") else short


def name_among(runs: Sequence[Run], run: Run) -> str | None:
    """For the legend; the name of one alone stands above."""
    return label(run.name) if len(runs) > 1 else None


def colour(number: int) -> str:
    return RUN_COLOURS[number % len(RUN_COLOURS)]


def dashes(number: int) -> str:
    """Of lines beyond the colours there are."""
    return ("-", "--", ":", "-.")[number // len(RUN_COLOURS) % 4]
