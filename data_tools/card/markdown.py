"""The data card as Markdown."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from data_tools.card.charts import Bar, Column
from data_tools.card.content import Card, StageCard, language_bars, length_histogram, score_histograms
from data_tools.card.html import shown
from data_tools.card.rows import (
    READERS_CUTS,
    cut_rows,
    drop_rows,
    fact_rows,
    file_rows,
    files_told,
    percent,
    sample_heading,
    stage_rows,
    tiles,
)
from data_tools.mix import decimal

BAR_CHARACTERS = 30
ACTIVE = re.compile(r"([\\`*_{}\[\]<>|~&$@]|:(?=//)|(?<=www)\.)", re.IGNORECASE)  # what means something in a line


def text(content: object) -> str:
    """Text within a line, with nothing in it that Markdown or HTML would act on."""
    return ACTIVE.sub(r"\\\1", re.sub(r"\s+", " ", shown(str(content))))


def fenced(content: str) -> str:
    """A block of literal text; its fence is longer than any in the text."""
    content = shown(content)
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{content}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    written = ["| " + " | ".join(text(cell) for cell in row) + " |" for row in (head, *rows)]
    return [written[0], "|" + "---|" * len(head), *written[1:], ""]


def render(card: Card) -> str:
    lines = [f"# Data card: {text(card.name)}", "", text("; ".join(card.made_by)), ""]
    lines += [f"- {value} {text(label)}" for label, value in tiles(card)]
    lines += ["", *_state(card), "## From input to documents", ""]
    head, *rows = stage_rows(card)
    lines += table(head, rows)
    lines += ["## Why documents were dropped", "", *_drops(card), "## What was cut out of documents", ""]
    cuts = cut_rows(card)
    lines += (
        table(("Stage", "By", "Documents", "Lines", "Text"), cuts)
        if cuts
        else ["Nothing, by filters and deduplication.", ""]
    )
    lines += [READERS_CUTS, ""]
    for stage in card.document_stages:
        lines += _distributions(stage)
    if facts := fact_rows(card):
        lines += ["## Numbers of the stages", "", *table(("Stage", "What", "Value"), facts)]
    return "\n".join([*lines, *_made_from(card), *_samples(card)]) + "\n"


def _made_from(card: Card) -> list[str]:
    lines = []
    if card.files:
        lines += ["## Input", "", text(files_told(card)) + ".", "", *table(("File", "Size"), file_rows(card))]
    if card.settings:
        lines += ["## Settings", "", *table(("Stage", "Setting", "Value"), card.settings)]
    return lines


def _state(card: Card) -> list[str]:
    lines = [f"**The counts do not add up**: {text('; '.join(card.problems))}", ""] if card.problems else []
    if card.failed:
        lines += [f"**Files that could not be read to their end: {len(card.failed)}**", ""]
        lines += table(("File", "Stage", "What happened"), ((f["name"], stage, f["error"]) for stage, f in card.failed))
    return lines or ["Every stage adds up: in = kept + dropped + cut.", ""]


def _drops(card: Card) -> list[str]:
    rows = [
        (stage, reason, f"{counts['documents']:,}", percent(counts["documents"], came), decimal(counts["bytes"], "B"))
        for stage, reason, counts, came in drop_rows(card)
    ]
    return table(("Stage", "Reason", "Documents", "of the stage's", "Text"), rows) if rows else ["None was.", ""]


def _distributions(stage: StageCard) -> list[str]:
    histograms = [histogram for histogram in (length_histogram(stage), *score_histograms(stage)) if histogram.columns]
    if not histograms:
        return []
    lines = [f"## Documents of stage {text(stage.name)}", ""]
    for histogram in histograms:
        lines += [f"### {text(histogram.title)}", "", *_columns(histogram.columns)]
    return [*lines, "### Languages", "", *_bars(language_bars(stage))]


def _columns(columns: Sequence[Column]) -> list[str]:
    return _bars([Bar(column.label, column.values, "") for column in columns if sum(column.values.values())])


def _bars(rows: Sequence[Bar]) -> list[str]:
    """A table with bars of blocks: full ones for what was kept, light ones for what was dropped."""
    largest = max((sum(row.values.values()) for row in rows), default=0) or 1

    def drawn(row: Bar) -> str:
        kept = round(BAR_CHARACTERS * row.values["kept"] / largest)
        return "█" * kept + "░" * (round(BAR_CHARACTERS * sum(row.values.values()) / largest) - kept)

    cells = ((row.label, f"{row.values['kept']:,}", f"{row.values['dropped']:,}", drawn(row)) for row in rows)
    return table(("", "Kept", "Dropped", ""), cells)


def _samples(card: Card) -> list[str]:
    kept = card.document_stages[-1].total["samples"]["kept"]
    lines = ["## Samples", "", "Their beginnings; chosen by a hash of their ids.", "", "### Kept", "", *_shown(kept)]
    for stage in card.document_stages:
        for reason, samples in sorted(stage.total["samples"]["dropped"].items()):
            lines += [f"### Dropped by {text(stage.name)}: {text(reason)}", "", *_shown(samples)]
    return lines


def _shown(samples: Sequence[dict[str, Any]]) -> list[str]:
    return [line for one in samples for line in (f"Document {text(sample_heading(one))}", "", fenced(one["text"]), "")]
