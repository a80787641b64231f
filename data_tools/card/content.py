"""What a data card shows, out of the ledger of a prepared source."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.card.charts import Bar, Column, merged
from data_tools.engine.ledger import (
    LEDGER,
    LINEAR_BINS,
    LOG_BINS_PER_DOUBLING,
    NOT_POSITIVE,
    TIMINGS,
    gaps,
    read_stage,
    total,
)
from llamatrain.data.shards import MANIFEST_FILE, Manifest, read_manifest
from llamatrain.errors import DataError

PLAN_FILE, RUN_FILE = "plan.json", "run.json"  # of data_tools.engine.plan, whose imports a card does not need
LANGUAGES_SHOWN = 24
OWN_PROCESSES = ("tokenize",)  # stages whose timings leave out the processes that they start
TICKS = 10
WHAT = ("documents", "lines", "bytes")


@dataclass(frozen=True)
class Histogram:
    title: str
    columns: list[Column]
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class StageCard:
    """One stage: its entries in the ledger added up, and the time its units took."""

    name: str
    total: dict[str, Any]
    cpu_seconds: float
    timed_bytes: int  # of input, of the units whose time is known

    @property
    def has_documents(self) -> bool:
        return bool(self.total["in"]["documents"])

    @property
    def lost(self) -> dict[str, dict[str, int]]:
        """All that was dropped, and all that was cut, as counts like `in` and `kept`."""
        return {which: {w: sum(c[w] for c in self.total[which].values()) for w in WHAT} for which in ("cut", "dropped")}

    def drops(self) -> list[tuple[str, dict[str, int]]]:
        """Reasons and counts, the most frequent first."""
        return sorted(self.total["dropped"].items(), key=lambda item: (-item[1]["documents"], item[0]))


@dataclass(frozen=True)
class Card:
    name: str  # of the source
    stages: list[StageCard]
    manifest: Manifest | None  # of its shards
    made_by: list[str]  # versions and hashes, for the record
    settings: list[tuple[str, str, str]]  # stage, key, value: all that decides what a stage makes
    files: list[tuple[str, int]]  # input files and their bytes

    @property
    def document_stages(self) -> list[StageCard]:
        return [stage for stage in self.stages if stage.has_documents]

    @property
    def failed(self) -> list[tuple[str, dict[str, str]]]:
        return [
            (stage.name, {**file, "error": file["error"].removeprefix(f"{file['name']}: ")})
            for stage in self.stages
            for file in stage.total["failed"]
        ]

    @property
    def problems(self) -> list[str]:
        """Where the counts do not add up, within a stage or from one to the next."""
        found = [f"{stage.name}: {gap}" for stage in self.stages for gap in gaps(stage.total)]
        for before, after in zip(self.document_stages, self.document_stages[1:], strict=False):
            for what in WHAT:
                kept, entered = before.total["kept"][what], after.total["in"][what]
                if kept != entered:
                    found.append(f"{what}: {before.name} kept {kept:,}, {after.name} was given {entered:,}")
        return found


def read_card(output: Path) -> Card:
    """Raises DataError where there is no ledger or one that cannot be read."""
    there = {path.name for path in (output / LEDGER).glob("*") if path.is_dir()}
    if not there:
        raise DataError(f"{output}: no {LEDGER} there; name the output of python -m data_tools.prepare")
    planned = [stage["name"] for stage in _read(output / PLAN_FILE).get("stages", [])]
    names = [name for name in planned if name in there] + sorted(there - set(planned))
    entries = {name: read_stage(output, name) for name in names}
    stages = [_stage(output, name, entries[name]) for name in names if entries[name]]
    if not any(stage.has_documents for stage in stages):
        raise DataError(f"{output}: no document has gone through yet; run python -m data_tools.prepare first")
    manifests = [path.parent for depth in ("", "*/") for path in sorted(output.glob(depth + MANIFEST_FILE))]
    everything = [entry for of_stage in entries.values() for entry in of_stage]
    run = _read(output / RUN_FILE)
    return Card(
        name=str(run.get("settings", {}).get("name") or output.resolve().name),
        stages=stages,
        manifest=read_manifest(manifests[0]) if manifests else None,
        made_by=_made_by(everything),
        settings=[(stage, *row) for stage, config in run.get("configs", {}).items() for row in _flat(config)],
        files=[(str(name), int(size)) for name, size, *_ in run.get("files", [])],
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run prepare again") from None
    return content if isinstance(content, dict) else {}


def _flat(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Settings with dots in their names; the filters, pairs of a name and settings, in their order."""
    if isinstance(config, dict) and config.keys() == {"content"}:  # a file, in the place of its path
        yield key, ", ".join(str(name) for name, _ in config["content"])
    elif isinstance(config, dict):
        for name, value in config.items():
            yield from _flat(value, f"{key}.{name}" if key else name)
    elif key == "filters":
        for name, values in config:
            yield from _flat(values, f"{name}") if values else [(str(name), "")]
    else:
        yield key, config if isinstance(config, str) else json.dumps(config, ensure_ascii=False)


def _stage(output: Path, name: str, entries: list[dict[str, Any]]) -> StageCard:
    cpu_seconds, timed_bytes = 0.0, 0
    for entry in entries if name not in OWN_PROCESSES else ():
        try:
            timing = json.loads((output / TIMINGS / name / f"{entry['unit']}.json").read_text(encoding="utf-8"))
            cpu_seconds += timing["cpu_seconds"]
            timed_bytes += sum(file["bytes"] for file in entry["inputs"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no part of the ledger: the rate is of the units whose time is known
    return StageCard(name, total(entries), cpu_seconds, timed_bytes)


def _made_by(entries: list[dict[str, Any]]) -> list[str]:
    lines = []
    for key, what in (("version", "llamatrain"), ("code_sha256", "code"), ("config_sha256", "settings")):
        values = sorted({str(entry[key])[:12] for entry in entries if key in entry})
        more = f" and {len(values) - 4} more" if len(values) > 4 else ""
        if values:
            lines.append(f"{what} {', '.join(values[:4])}{more}")
    return lines


# Histograms


def length_histogram(stage: StageCard) -> Histogram:
    bins = _bins(stage, "characters")
    joined, together = merged(bins)

    def length(index: int) -> int:
        return 1 << (index - 1) if index > 0 else 0

    def label(edge: int) -> str:
        return f"{length(edge):,} to {max(0, length(edge + together) - 1):,} characters"

    columns = [Column(edge, edge + together, values, label(edge)) for edge, values in joined]
    step = max(1, math.ceil(len(joined) * together / TICKS))
    ticks = [(float(index), _short(length(index))) for index in range(0, 64, step)]
    return Histogram("Length in characters", columns, ticks)


def score_histograms(stage: StageCard) -> list[Histogram]:
    found = {name for which in ("kept", "dropped") for name in stage.total["histograms"][which].get("scores", {})}
    return [_score_histogram(stage, name) for name in sorted(found)]


def _score_histogram(stage: StageCard, name: str) -> Histogram:
    scores = [stage.total["histograms"][which].get("scores", {}).get(name) for which in ("kept", "dropped")]
    logarithmic = any(score and score["scale"] == "log" for score in scores)
    bins = {
        which: {int(index): count for index, count in (score or {}).get("bins", {}).items()}
        for which, score in zip(("kept", "dropped"), scores, strict=True)
    }
    without = sum(counts.pop(NOT_POSITIVE, 0) for counts in bins.values())
    per_unit = LOG_BINS_PER_DOUBLING if logarithmic else LINEAR_BINS
    joined, together = merged(bins)

    def value(index: int) -> str:
        return f"{2 ** (index / per_unit):.4g}" if logarithmic else f"{index / per_unit:.4g}"

    columns = [
        Column(edge / per_unit, (edge + together) / per_unit, values, f"{value(edge)} to {value(edge + together)}")
        for edge, values in joined
    ]
    note = f" ({without:,} not positive or no number)" if without else ""
    low, high = (columns[0].low, columns[-1].high) if columns else (0.0, 1.0)
    step = max(1.0, _nice_step(high - low)) if logarithmic else _nice_step(high - low)
    places = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    ticks = [(place, _power_of_two(place) if logarithmic else f"{place:.3g}") for place in places]
    return Histogram(f"Score: {name}{note}", columns, ticks)


def language_bars(stage: StageCard) -> list[Bar]:
    """The most frequent languages, and the others together."""
    both = {which: stage.total["histograms"][which].get("languages", {}) for which in ("kept", "dropped")}
    names = {name for counts in both.values() for name in counts}
    frequent = sorted(names, key=lambda name: (-sum(counts.get(name, 0) for counts in both.values()), name))
    shown, others = frequent[:LANGUAGES_SHOWN], frequent[LANGUAGES_SHOWN:]
    rows = [(name, {which: counts.get(name, 0) for which, counts in both.items()}) for name in shown]
    if others:
        rest = {which: sum(counts.get(name, 0) for name in others) for which, counts in both.items()}
        rows.append((f"{len(others)} others", rest))
    return [Bar(name, values, f"{values['kept']:,} of {sum(values.values()):,}") for name, values in rows]


def _bins(stage: StageCard, what: str) -> dict[str, dict[int, int]]:
    histograms = stage.total["histograms"]
    return {
        which: {int(index): n for index, n in histograms[which].get(what, {}).items()} for which in ("kept", "dropped")
    }


def _nice_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, at most TICKS times in the span."""
    power = 10.0 ** math.floor(math.log10(span / TICKS))
    return next(power * step for step in (1, 2, 5, 10, 20) if span / (power * step) <= TICKS)


def _power_of_two(exponent: float) -> str:
    return f"{2**exponent:,.0f}" if 0 <= exponent <= 20 else f"{2**exponent:.2g}"


def _short(number: int) -> str:
    for size, prefix in ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")):
        if number >= size:
            return f"{number // size}{prefix}"
    return str(number)
