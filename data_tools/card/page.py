"""The data card as one HTML page that needs nothing else: no script, no network."""

from collections.abc import Iterable, Sequence
from typing import Any

from data_tools.card.charts import Bar, bars, columns, legend
from data_tools.card.content import Card, StageCard, language_bars, length_histogram, score_histograms
from data_tools.card.html import Html, element
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

REASONS_SHOWN = 40
COLUMNS_OF_TEXT = ("File", "Stage", "Reason", "By", "What", "What happened", "Setting", "Value")
SERIES = ("kept", "cut", "dropped")
# What a page may load or run: nothing, if ever something should slip through the escaping.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --paper: #fff; --box: #f5f7f9;
        --kept: #2166ac; --cut: #e0a32e; --dropped: #c8502d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa6b5; --line: #37414e; --paper: #151a21;
        --box: #1e252e; --kept: #5aa2e0; --cut: #e3b456; --dropped: #e2795a; } }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h2, h1 { border-bottom: 1px solid var(--line); padding-bottom: .25rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
table { border-collapse: collapse; font-size: .87rem; } td, th { padding: .22rem .7rem .22rem 0; text-align: right;
       border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; vertical-align: top; }
.text { text-align: left; overflow-wrap: anywhere; } th, th.text { overflow-wrap: normal; white-space: nowrap; }
.scroll { overflow-x: auto; margin: .8rem 0; } .tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.tile { background: var(--box); border-radius: .4rem; padding: .6rem 1rem; min-width: 8rem; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600; } .tile span, .soft, .legend { color: var(--soft);
       font-size: .87rem; } .bad { color: var(--dropped); font-weight: 600; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .2em; }
.legend span { margin-right: 1.2em; } svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--ink); } svg .value { fill: var(--soft); } svg .axis { stroke: var(--soft); }
rect.kept { fill: var(--kept); } rect.cut { fill: var(--cut); } rect.dropped { fill: var(--dropped); }
i.kept { background: var(--kept); } i.cut { background: var(--cut); } i.dropped { background: var(--dropped); }
details { margin: .35rem 0; } summary { cursor: pointer; } pre { background: var(--box); border-radius: .4rem;
       padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; margin: .3rem 0 1rem;
       max-height: 24rem; overflow-y: auto; unicode-bidi: isolate; } .id { overflow-wrap: anywhere; }
"""


def render(card: Card) -> str:
    """The whole page."""
    sections = [
        element("h1", f"Data card: {card.name}"),
        *_made_by(card),
        _tiles(card),
        *_failures(card),
        *_chain(card),
        *_drops(card),
        *_cuts(card),
        *(part for stage in card.document_stages for part in _distributions(stage)),
        *_facts(card),
        *_made_from(card),
        *_samples(card),
    ]
    head = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        element("title", f"Data card: {card.name}"),
        Html(f"<style>{STYLE}</style>"),
    ]
    page = element("html", element("head", *head), element("body", *sections), lang="en")
    return f"<!doctype html>\n{page}\n"


def _made_by(card: Card) -> list[Html]:
    return [element("p", "; ".join(card.made_by), class_="soft")]


def _tiles(card: Card) -> Html:
    return element("div", *(element("div", element("b", value), element("span", label), class_="tile")
                            for label, value in tiles(card)), class_="tiles")  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    def line(name: str, cells: Sequence[object]) -> Html:
        written = (
            element(name, cell, class_="text") if title in COLUMNS_OF_TEXT else element(name, cell)
            for title, cell in zip(head, cells, strict=True)
        )
        return element("tr", *written)

    whole = element("table", line("th", head), *(line("td", row) for row in rows))
    return element("div", whole, class_="scroll")


def _failures(card: Card) -> list[Html]:
    parts = []
    if card.problems:
        parts.append(element("p", "The counts do not add up: ", "; ".join(card.problems), class_="bad"))
    else:
        parts.append(element("p", "Every stage adds up: in = kept + dropped + cut, and each was given what the one "
                             "before it kept.", class_="soft"))  # fmt: skip
    if card.failed:
        parts.append(element("p", f"Files that could not be read to their end: {len(card.failed)}", class_="bad"))
        failed = ([file["name"], stage, file["error"]] for stage, file in card.failed)
        parts.append(table(("File", "Stage", "What happened"), failed))
    return parts


def _chain(card: Card) -> list[Html]:
    head, *rows = stage_rows(card)
    shown = []
    for stage in card.document_stages:
        lost = stage.lost
        values = {which: counts["bytes"] for which, counts in ({"kept": stage.total["kept"]} | lost).items()}
        shown.append(Bar(stage.name, values, decimal(stage.total["in"]["bytes"], "B")))
    note = "MB of input files (compressed as they lie) per second of one core, where the time is known."
    return [
        element("h2", "From input to documents"), legend(SERIES), bars(shown), table(head, rows),
        element("p", note, class_="soft"),
    ]  # fmt: skip


def _drops(card: Card) -> list[Html]:
    rows = drop_rows(card)
    if not rows:
        return [element("h2", "Why documents were dropped"), element("p", "None was.")]
    frequent = sorted(rows, key=lambda row: -row[2]["documents"])[:REASONS_SHOWN]
    chart = [
        Bar(f"{stage}: {reason}", {"dropped": counts["documents"]},
            f"{counts['documents']:,} ({percent(counts['documents'], came)})")
        for stage, reason, counts, came in frequent
    ]  # fmt: skip
    details = table(
        ("Stage", "Reason", "Documents", "of the stage's", "Lines", "Text"),
        ([stage, reason, f"{counts['documents']:,}", percent(counts["documents"], came), f"{counts['lines']:,}",
          decimal(counts["bytes"], "B")] for stage, reason, counts, came in rows),
    )  # fmt: skip
    return [element("h2", "Why documents were dropped"), bars(chart), _folded("All reasons", details)]


def _cuts(card: Card) -> list[Html]:
    parts = [element("h2", "What was cut out of documents")]
    rows = cut_rows(card)
    counts = [(stage.name, key, value) for stage in card.stages for key, value in stage.total["counts"].items()]
    counted = [[stage, key, f"{value:,}"] for stage, key, value in counts]
    if rows:
        parts.append(table(("Stage", "By", "Documents", "Lines", "Text"), rows))
    else:
        parts.append(element("p", "Nothing, by filters and deduplication."))
    parts.append(element("p", READERS_CUTS, class_="soft"))
    return [*parts, _folded("What filters counted", table(("Stage", "What", "Count"), counted))] if counted else parts


def _distributions(stage: StageCard) -> list[Html]:
    histograms = [histogram for histogram in (length_histogram(stage), *score_histograms(stage)) if histogram.columns]
    if not histograms:
        return []
    parts = [element("h2", f"Documents of stage {stage.name}"), legend(("kept", "dropped"))]
    for histogram in histograms:
        parts += [element("h3", histogram.title), columns(histogram.columns, histogram.ticks)]
    return [*parts, element("h3", "Languages"), bars(language_bars(stage))]


def _facts(card: Card) -> list[Html]:
    rows = fact_rows(card)
    return [element("h2", "Numbers of the stages"), table(("Stage", "What", "Value"), rows)] if rows else []


def _made_from(card: Card) -> list[Html]:
    parts = []
    if card.files:
        parts += [element("h2", "Input"), _folded(files_told(card), table(("File", "Size"), file_rows(card)))]
    if card.settings:
        parts.append(element("h2", "Settings"))
        parts.append(_folded("All that decides the result", table(("Stage", "Setting", "Value"), card.settings)))
    return parts


def _samples(card: Card) -> list[Html]:
    parts = [element("h2", "Samples"), element("p", "Their beginnings; chosen by a hash of their ids.", class_="soft")]
    kept = card.document_stages[-1].total["samples"]["kept"]
    parts.append(_folded(f"Kept ({len(kept)})", map(sample, kept), unfolded=True))
    for stage in card.document_stages:
        for reason, samples in sorted(stage.total["samples"]["dropped"].items()):
            parts.append(_folded(f"Dropped by {stage.name}: {reason}", map(sample, samples)))
    return parts


def sample(entry: dict[str, Any]) -> Html:
    return element(
        "div", element("div", sample_heading(entry), class_="id soft"), element("pre", entry["text"], dir="auto")
    )


def _folded(title: str, content: object, *, unfolded: bool = False) -> Html:
    attributes = {"open": ""} if unfolded else {}
    return element("details", element("summary", title), content, **attributes)
