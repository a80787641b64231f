"""Runs compared in the terminal: one line each, then what they differ in."""

import shutil
from collections.abc import Sequence

from llamatrain import words
from llamatrain.reporting.comparison import (
    at_equal_tokens,
    differing_environments,
    differing_settings,
    summary,
)
from llamatrain.reporting.runs import Run

LONGEST = 44  # characters of a cell
OTHER_TEXTS = "validated on other texts (evaluation.max_tokens, data.sources): not to be compared"


def compared(runs: Sequence[Run], *, power_watts: float | None = None, width: int | None = None) -> str:
    """The whole text; a table too wide for `width` characters (None: the terminal's) is turned round."""
    width = width or shutil.get_terminal_size((120, 24)).columns
    names = [run.name for run in runs]
    parts = [_fitting(overview(runs, power_watts=power_watts), width)]
    if len(runs) > 1:
        found = at_equal_tokens(runs)
        rows = [
            [
                f"{one.metric}, {words.count(one.tokens)}{'' if one.same_texts else ' *'}",
                *map(words.decimal, one.values),
            ]
            for one in found
        ]
        if rows:
            note = "" if all(one.same_texts for one in found) else f"\n* {OTHER_TEXTS}"
            parts.append("at equal tokens\n" + table([["", *names], *rows]) + note)
        settings = differing_settings(runs)
        for title, differences in (
            ("settings that differ", settings),
            ("machines and versions that differ", differing_environments(runs)),
        ):
            if differences:
                lines = [[key, *map(words.value, values)] for key, values in differences.items()]
                parts.append(f"{title}\n" + table([["", *names], *lines]))
        if not settings:
            parts.append("their settings are the same")
    return "\n\n".join(parts)


def overview(runs: Sequence[Run], *, power_watts: float | None = None) -> list[list[str]]:
    """A table with a line for each run below the headings."""
    headings = [
        "run", "state", "step", "tokens", "loss", "best validation", "tok/s", "MFU", "goodput", "restarts",
        "device hours", "CO2eq",
    ]  # fmt: skip
    rows = [headings]
    for run in runs:
        one = summary(run, power_watts=power_watts)
        steps = f"{one.step:,}" if one.total_steps is None else f"{one.step:,}/{one.total_steps:,}"
        best = words.ABSENT
        if one.validation is not None:
            best = f"{one.validation[0]:.3f} at {words.count(one.validation[1])}"
        rows.append(
            [
                run.name,
                one.state,
                steps,
                words.count(one.tokens),
                words.decimal(one.loss),
                best,
                words.count(one.tokens_per_s),
                words.share(one.mfu),
                words.share(one.goodput),
                str(one.restarts),
                words.figure(one.carbon.device_hours),
                words.ABSENT if one.carbon.tonnes is None else words.emissions(one.carbon.tonnes),
            ]
        )
    return rows


def _fitting(rows: list[list[str]], width: int) -> str:
    text = table(rows)
    if max(map(len, text.splitlines())) <= width:
        return text
    return table([list(column) for column in zip(*rows, strict=True)])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left, below a line; long cells are cut in the middle."""
    cells = [[_cut(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join([lines[0].rstrip(), "─" * len(lines[0]), *(line.rstrip() for line in lines[1:])])


def _cut(cell: str) -> str:
    cell = "".join(char if char.isprintable() else "?" for char in cell)
    half = LONGEST // 2
    return cell if len(cell) <= LONGEST else f"{cell[: half - 1]}…{cell[-half:]}"
