"""Bar charts as SVG that stands inside a page: no script, no network, the page's own colours and fonts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_tools.card.html import Html, element

WIDTH = 760
LABEL_WIDTH = 190
VALUE_WIDTH = 130
ROW_HEIGHT = 22
COLUMNS_HEIGHT = 170
MAX_COLUMNS = 60
LABEL_CHARACTERS = 27


@dataclass(frozen=True)
class Bar:
    label: str
    values: Mapping[str, float]  # by series, drawn one after the other
    note: str  # beside the bar


def legend(series: Sequence[str]) -> Html:
    """Which colour is which; the classes are the names of the series."""
    entries = (element("span", element("i", class_=f"key {name}"), f" {name}") for name in series)
    return element("p", *entries, class_="legend")


def bars(rows: Sequence[Bar]) -> Html:
    """Horizontal bars; negative values are left out."""
    largest = max((sum(max(0.0, v) for v in row.values.values()) for row in rows), default=0) or 1
    room = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    parts: list[Html] = []
    for number, row in enumerate(rows):
        middle = number * ROW_HEIGHT + ROW_HEIGHT / 2
        label = row.label if len(row.label) <= LABEL_CHARACTERS else f"{row.label[: LABEL_CHARACTERS - 1]}…"
        parts.append(element("text", label, x=LABEL_WIDTH - 8, y=f"{middle + 4:.0f}", text_anchor="end"))
        left = float(LABEL_WIDTH)
        for name, value in row.values.items():
            width = room * max(0.0, value) / largest
            if value > 0:
                width = max(width, 1.0)  # that there is something is to be seen
                parts.append(_rectangle(name, left, middle - 7, width, 14, f"{row.label}: {name} {row.note}"))
            left += width
        parts.append(element("text", row.note, x=f"{left + 6:.1f}", y=f"{middle + 4:.0f}", class_="value"))
    return _svg(len(rows) * ROW_HEIGHT, parts)


@dataclass(frozen=True)
class Column:
    low: float  # edge on the axis
    high: float
    values: Mapping[str, float]  # by series, stacked
    label: str  # what it covers, in words


def columns(of: Sequence[Column], ticks: Sequence[tuple[float, str]]) -> Html:
    """Neighbouring columns over an axis with ticks at places of it."""
    if not of:
        return element("p", "none")
    first, last = of[0].low, of[-1].high
    tallest = max(sum(column.values.values()) for column in of) or 1
    scale = (WIDTH - 20) / (last - first)
    base, height_of_all = COLUMNS_HEIGHT - 22, COLUMNS_HEIGHT - 40
    parts: list[Html] = []
    for column in of:
        left, width = 10 + (column.low - first) * scale, max(1.0, (column.high - column.low) * scale - 1.5)
        top = float(base)
        for name, value in column.values.items():
            height = height_of_all * value / tallest
            if value > 0:
                height = max(height, 1.0)
                title = f"{column.label}: {value:,.0f} {name}"
                parts.append(_rectangle(name, left, top - height, width, height, title))
                top -= height
    parts.append(element("line", x1=10, x2=WIDTH - 10, y1=base, y2=base, class_="axis"))
    parts.append(element("text", f"tallest: {tallest:,.0f}", x=WIDTH - 10, y=12, text_anchor="end", class_="value"))
    for place, label in ticks:
        if first <= place <= last:
            middle = 10 + (place - first) * scale
            anchor = "start" if middle < 20 else "end" if middle > WIDTH - 20 else "middle"
            parts.append(element("line", x1=f"{middle:.1f}", x2=f"{middle:.1f}", y1=base, y2=base + 4, class_="axis"))
            parts.append(element("text", label, x=f"{middle:.1f}", y=base + 17, text_anchor=anchor, class_="value"))
    return _svg(COLUMNS_HEIGHT, parts)


def _rectangle(name: str, x: float, y: float, width: float, height: float, title: str) -> Html:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    return element("rect", element("title", title), class_=name, **place)


def _svg(height: int, parts: Sequence[Html]) -> Html:
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {max(height, 1)}", role="img")


# Histograms of the ledger


def merged(
    bins: Mapping[str, Mapping[int, int]], *, most: int = MAX_COLUMNS
) -> tuple[list[tuple[int, dict[str, float]]], int]:
    """Neighbouring bins from the first to the last, so many joined that few are left: lower edges and what each holds.

    And how many bins are joined.
    """
    indices = [index for counts in bins.values() for index in counts]
    if not indices:
        return [], 1
    low, high = min(indices), max(indices)
    together = max(1, -(-(high - low + 1) // most))
    low -= low % together
    values: list[dict[str, float]] = [dict.fromkeys(bins, 0) for _ in range((high - low) // together + 1)]
    for name, counts in bins.items():
        for index, count in counts.items():
            values[(index - low) // together][name] += count
    return [(low + number * together, value) for number, value in enumerate(values)], together
