"""Results as tables: the paper's, with the model's row among the published ones, and a plain one. No torch.

The published numbers stand in published.yaml, which also says which metric of which task belongs in which column.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from llamatrain.config.build import build
from llamatrain.errors import ConfigError
from llamatrain.evaluation.results import Metric, TaskResult

NONE = "–"
NOT_RUN = "not run"


@dataclass
class Table:
    """The schema of an entry of published.yaml."""

    title: str = ""
    scale: float = 1.0  # what a metric is multiplied with
    columns: dict[str, str | None] = field(default_factory=dict)  # TASK.METRIC, None where no metric is the like
    rows: dict[str, list[float | None]] = field(default_factory=dict)  # by model

    def tasks(self) -> list[str]:
        """The tasks it shows, in order."""
        return list(dict.fromkeys(place.partition(".")[0] for place in self.columns.values() if place))


def published() -> dict[str, Table]:
    """The tables by name."""
    path = Path(str(files("llamatrain"))) / "evaluation" / "published.yaml"
    return {name: build(Table, entry) for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items()}


def choose(names: Sequence[str]) -> dict[str, Table]:
    """The published tables of these names. Raises ConfigError."""
    known = published()
    for name in names:
        if name not in known:
            raise ConfigError(f"tables: there is no {name}; there are {', '.join(known)}")
    return {name: known[name] for name in names}


def own_row(table: Table, results: Mapping[str, TaskResult]) -> dict[str, Metric | None]:
    """The model's metrics by column, scaled; None where there is none."""
    row: dict[str, Metric | None] = {}
    for column, place in table.columns.items():
        task, _, name = (place or "").partition(".")
        metric = results[task].metrics.get(name) if task in results else None
        row[column] = _scaled(metric, table.scale) if metric else None
    return row


def _scaled(metric: Metric, scale: float) -> Metric:
    low, high = [None if end is None else scale * end for end in (metric.low, metric.high)]
    return Metric(scale * metric.value, low, high, metric.questions)


def paper_table(
    table: Table, results: Mapping[str, TaskResult], skipped: Mapping[str, str], *, model: str, notes: Mapping[str, str]
) -> str:
    """A table in Markdown: the published rows, then the model's with its 95 % intervals.

    Under it stands which of its tasks were not run and why, and `notes` by task.
    """
    digits = 1 if table.scale == 100 else 3
    rows = [
        [name, *(NONE if value is None else f"{value:.{digits}f}" for value in values)]
        for name, values in table.rows.items()
    ]
    own = [f"**{_plain(model)}**"]
    for column, metric in own_row(table, results).items():
        task = (table.columns[column] or "").partition(".")[0]
        own.append(_cell(metric, digits) if metric else (NOT_RUN if task in skipped else NONE))
    text = f"**{table.title}**\n\n" + markdown(["model", *table.columns], [*rows, own])
    said = [f"- {task}: {told[task]}" for task in table.tasks() for told in (skipped, notes) if task in told]
    return "\n".join([text, *said, ""] if said else [text])


def _cell(metric: Metric, digits: int) -> str:
    text = f"{metric.value:.{digits}f}"
    if metric.low is None or metric.high is None:
        return text
    return f"{text} ({metric.low:.{digits}f}–{metric.high:.{digits}f})"


def plain_table(results: Mapping[str, TaskResult], skipped: Mapping[str, str], notes: Mapping[str, str]) -> str:
    """Every metric of every task in Markdown; those that could not be run, and `notes` by task, below."""
    rows = []
    for task, result in results.items():
        for name, metric in result.metrics.items():
            bounds = metric.low is not None and metric.high is not None
            interval = f"{_number(metric.low)} – {_number(metric.high)}" if bounds else NONE
            rows.append([task, name, _number(metric.value), interval, f"{metric.questions:,}"])
            task = ""
    table = markdown(["task", "metric", "value", "95 % interval", "questions"], rows)
    return "\n".join([table, *(f"- {task}: {said}" for told in (skipped, notes) for task, said in told.items())])


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return NONE
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its columns padded so that it is one in a terminal too; the first is left-aligned."""
    table = [[_plain(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[n]) for row in table)) for n in range(len(header))]
    texts = [n == 0 or any(row[n][:1].isalpha() and row[n] != NOT_RUN for row in table[1:]) for n in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if text else c.rjust(w) for c, w, text in zip(row, widths, texts, strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = [("-" * w) if text else ("-" * (w - 1) + ":") for w, text in zip(widths, texts, strict=True)]
    return "\n".join([line(table[0]), line(rule), *(line(row) for row in table[1:])]) + "\n"


def _plain(cell: str) -> str:
    """A cell of one line, with no bar that would end it."""
    return " ".join(str(cell).split()).replace("|", "\\|")


def table_content(table: Table, results: Mapping[str, TaskResult]) -> dict[str, Any]:
    """The JSON form of a table with the model's row."""
    own = {column: vars(metric) if metric else None for column, metric in own_row(table, results).items()}
    return {"title": table.title, "columns": list(table.columns), "published": table.rows, "model": own}
