"""The rows of the card's tables, the same on the page and in Markdown."""

from typing import Any

from data_tools.card.content import WHAT, Card
from data_tools.mix import decimal

FILES_SHOWN = 50
READERS_CUTS = (
    "What a reader takes out of a document itself, markup and headers for instance, is not in these numbers: the first "
    "stage begins with the text that the reader hands on."
)


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "–"


def tiles(card: Card) -> list[tuple[str, str]]:
    """The numbers at the top: what, and how much."""
    first, last = card.document_stages[0].total["in"], card.document_stages[-1].total["kept"]
    found = [
        (f"documents kept of {first['documents']:,}", f"{last['documents']:,}"),
        (f"of text kept of {decimal(first['bytes'], 'B')}", decimal(last["bytes"], "B")),
    ]
    if card.manifest is not None:
        tokens = sum(card.manifest.tokens(split) for split in card.manifest.splits)
        text = sum(card.manifest.text_bytes(split) for split in card.manifest.splits)
        found.append(("tokens", f"{tokens:,}"))
        found.append(("bytes per token", f"{text / max(1, tokens):.2f}"))
        counts = card.manifest.documents
        if "byte_tokens" in counts and tokens:
            found.append(("byte tokens", f"{(counts['byte_tokens'] - counts['newline_tokens']) / tokens:.3%}"))
    return found


def stage_rows(card: Card) -> list[list[str]]:
    """The stages as a table: its head first."""
    rows = [["Stage", "Units", "Documents in", "Kept", "Text in", "Kept", "Cut", "Dropped", "MB/s per core"]]
    for stage in card.stages:
        total, lost = stage.total, stage.lost
        rate = f"{stage.timed_bytes / 1e6 / stage.cpu_seconds:,.1f}" if stage.cpu_seconds > 0 else "–"
        row = [stage.name, f"{total['units']:,}"]
        if stage.has_documents:
            row += [f"{total['in']['documents']:,}", percent(total["kept"]["documents"], total["in"]["documents"])]
            row += [decimal(total["in"]["bytes"], "B"), percent(total["kept"]["bytes"], total["in"]["bytes"])]
            row += [percent(lost[which]["bytes"], total["in"]["bytes"]) for which in ("cut", "dropped")]
        else:
            row += [""] * 6
        rows.append([*row, rate])
    return rows


def drop_rows(card: Card) -> list[tuple[str, str, dict[str, int], int]]:
    """Stage, reason, counts and the documents that came into the stage."""
    return [
        (stage.name, reason, counts, stage.total["in"]["documents"])
        for stage in card.document_stages
        for reason, counts in stage.drops()
    ]


def cut_rows(card: Card) -> list[list[str]]:
    return [
        [stage.name, where, *(f"{counts[what]:,}" for what in WHAT[:2]), decimal(counts["bytes"], "B")]
        for stage in card.document_stages
        for where, counts in sorted(stage.total["cut"].items())
    ]


def fact_rows(card: Card) -> list[list[str]]:
    found = [(stage.name, key, value) for stage in card.stages for key, value in stage.total["facts"].items()]
    return [[stage, key, f"{value:,}" if isinstance(value, int | float) else str(value)] for stage, key, value in found]


def file_rows(card: Card) -> list[list[str]]:
    """The first input files."""
    rows = [[name, decimal(size, "B")] for name, size in card.files[:FILES_SHOWN]]
    return rows if len(card.files) <= FILES_SHOWN else [*rows, [f"and {len(card.files) - FILES_SHOWN:,} more", ""]]


def files_told(card: Card) -> str:
    return f"{len(card.files):,} input files, {decimal(sum(size for _, size in card.files), 'B')}"


def sample_heading(entry: dict[str, Any]) -> str:
    scores = ", ".join(f"{name} {value:.4g}" for name, value in (entry.get("scores") or {}).items())
    return " · ".join(part for part in (str(entry["id"]), entry.get("language") or "", scores) if part)
