"""The report as one HTML file that needs nothing else: no network, no script. Its plots lie beside it as PNGs.

Text from runs (names, samples, reasons) is shown as it is and never becomes markup; the page's own policy forbids
whatever could be loaded or run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import yaml

from llamatrain import words
from llamatrain.arithmetic import KG_PER_KWH, PUE
from llamatrain.errors import ConfigError
from llamatrain.files import write_bytes_atomically
from llamatrain.reporting import clock, figures
from llamatrain.reporting.comparison import (
    Summary,
    at_equal_tokens,
    carbon_of,
    differing_environments,
    differing_settings,
    summary,
)
from llamatrain.reporting.runs import Run
from llamatrain.reporting.style import NoPlot, Plot, as_png, as_svg, colour
from llamatrain.reporting.stylesheet import STYLESHEET
from llamatrain.reporting.terminal import OTHER_TEXTS, overview
from llamatrain.version import VERSION

PAGE_FILE = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
SAMPLED_STEPS = 8  # of which samples are shown

Drawn = Plot | NoPlot


@dataclass(frozen=True)
class Section:
    title: str
    body: str

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-").replace(",", "")


def write_report(runs: Sequence[Run], directory: Path, *, title: str | None, power_watts: float | None) -> Path:
    """Write the page and its plots into a directory, which is made; returns the page's path. Raises ConfigError."""
    groups = plots_of(runs)
    name = runs[0].name if len(runs) == 1 else ""
    page = page_of(runs, groups, title=title, power_watts=power_watts)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for group in groups.values():
            for plot in group:
                if isinstance(plot, Plot):
                    write_bytes_atomically(directory / f"{plot.name}.png", as_png(plot, of=name))
        write_bytes_atomically(directory / PAGE_FILE, page.encode())
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written ({error.strerror}); choose another with output=…") from None
    return directory / PAGE_FILE


def plots_of(runs: Sequence[Run]) -> dict[str, list[Drawn]]:
    """By section."""
    return {
        "Training": [
            figures.loss(runs),
            *figures.validation(runs),
            figures.learning_rate(runs),
            figures.gradient_norm(runs),
        ],
        "Evaluation": figures.evaluations(runs) or [NoPlot("Evaluation", _how_to_evaluate(runs))],
        "Speed and memory": [
            figures.throughput(runs),
            figures.mfu(runs),
            figures.memory(runs),
            clock.step_time(runs),
            clock.profiles(runs),
            clock.ranks(runs),
        ],
        "Time": [clock.wall_clock(runs), clock.goodput(runs)],
    }


def _how_to_evaluate(runs: Sequence[Run]) -> str:
    return f"no task has been evaluated yet (python -m llamatrain.evaluate checkpoint={runs[0].path})"


def page_of(
    runs: Sequence[Run], groups: dict[str, list[Drawn]], *, title: str | None = None, power_watts: float | None = None
) -> str:
    """The whole page."""
    summaries = [summary(run, power_watts=power_watts) for run in runs]
    sections = [Section(name, _plots(group)) for name, group in groups.items()]
    extra = {
        "Training": validation_table(runs),
        "Evaluation": evaluation_table(runs),
        "Time": attempts_table(runs),
    }
    sections = [Section(one.title, one.body + extra.get(one.title, "")) for one in sections]
    sections += [
        Section("Energy and carbon", carbon_section(runs, power_watts)),
        Section("Samples", samples_section(runs)),
    ]
    if len(runs) > 1:
        sections.append(Section("Differences", differences_section(runs)))
    sections.append(Section("Configuration and environment", described(runs)))
    heading = title or " · ".join(run.name for run in runs)
    links = "".join(f'<a href="#{one.anchor}">{escape(one.title)}</a>' for one in sections)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    places = ", ".join(str(run.path) for run in runs)
    top = tiles(summaries[0], runs[0]) if len(runs) == 1 else _key(runs) + _overview(runs, power_watts)
    body = "".join(f'<section id="{one.anchor}"><h2>{escape(one.title)}</h2>{one.body}</section>' for one in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(heading)}</title><style>{STYLESHEET}</style></head>\n'
        f'<body><header><h1>{escape(heading)}</h1><p class="pale">{escape(places)} · {made}</p>'
        f"{top}<nav>{links}</nav></header>\n<main>{body}"
        f'<footer class="pale">llamatrain {VERSION} · python -m llamatrain.report</footer></main></body></html>\n'
    )


# -------------------------------------------------------------------------- pieces


def table(rows: Sequence[Sequence[str]], *, texts: bool = False) -> str:
    """Plain cells; the first row holds the headings."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    kind = ' class="texts"' if texts else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _of_runs(rows: list[list[str]], runs: Sequence[Run]) -> list[list[str]]:
    """Without the first column, the run's name, where there is one run."""
    return [row[1:] for row in rows] if len(runs) == 1 else rows


def _plots(group: Sequence[Drawn]) -> str:
    last_what_is_absent = sorted(group, key=lambda one: isinstance(one, NoPlot))
    return f'<div class="plots">{"".join(map(_card, last_what_is_absent))}</div>'


def _card(one: Drawn) -> str:
    if isinstance(one, NoPlot):
        return f'<div class="absent"><h3>{escape(one.title)}</h3><p>{escape(one.reason)}</p></div>'
    drawn, kind = as_svg(one), ""
    if one.wide:
        kind = ' class="wide"'
        drawn = f'<div class="on-phones">{drawn}</div><div class="on-screens">{as_svg(one, wide=True)}</div>'
    caption = f"<figcaption>{escape(one.caption)}</figcaption>" if one.caption else ""
    return f"<figure{kind}><h3>{escape(one.title)}</h3>{drawn}{caption}</figure>"


def _swatch(number: int) -> str:
    return f'<span class="swatch" style="background:{colour(number)}"></span>'


def _key(runs: Sequence[Run]) -> str:
    return f'<ul class="key">{"".join(f"<li>{_swatch(n)}{escape(run.name)}</li>" for n, run in enumerate(runs))}</ul>'


def _overview(runs: Sequence[Run], power_watts: float | None) -> str:
    return table(overview(runs, power_watts=power_watts))


def tiles(one: Summary, run: Run) -> str:
    """What a run has come to, at a glance."""
    steps = f"{one.step:,}" if one.total_steps is None else f"{one.step:,} of {one.total_steps:,}"
    best = one.validation
    unknown = ": power_watts= is not told" if one.carbon.watts is None else ""
    found = [
        (one.state, f"{steps} steps"),
        (words.count(one.tokens), "tokens"),
        (words.decimal(one.loss), "training loss, last steps"),
        (words.decimal(best[0] if best else None), f"best validation loss{_at(best)}"),
        (words.decimal(one.bits_per_byte), "bits per byte, validation"),
        (words.count(one.tokens_per_s), f"tokens per second, {run.devices} × {run.device}"),
        (words.share(one.mfu), "MFU" if run.peak_is_known else f"MFU: the peak of {run.device} is not known"),
        (words.count(one.memory_gib), "GiB of memory, the most on rank 0"),
        (words.share(one.goodput), f"goodput, {one.restarts} restart{'s' * (one.restarts != 1)}"),
        (
            _tonnes(one.carbon.tonnes),
            f"CO₂ equivalent, of {words.figure(one.carbon.device_hours)} device hours{unknown}",
        ),
    ]
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in found
    )
    reason = f'<p class="reason">{escape(run.status["reason"])}</p>' if run.status.get("reason") else ""
    return f'<div class="tiles">{cells}</div>{reason}'


def _at(best: tuple[float, float] | None) -> str:
    return "" if best is None else f", at {words.count(best[1])} tokens"


def _tonnes(tonnes: float | None) -> str:
    return words.ABSENT if tonnes is None else words.emissions(tonnes)


def validation_table(runs: Sequence[Run]) -> str:
    """The last validation of each run: loss, bits per byte, and what a model of token frequencies alone would reach."""
    rows = [["run", "held-out documents", "tokens seen", "loss", "bits per byte", "unigram entropy"]]
    for run in runs:
        records = [record for record in run.records if "eval/validation/loss" in record]
        for key in records[-1] if records else ():
            task, _, metric = key.removeprefix("eval/").partition("/")
            if metric == "loss" and task.startswith("validation"):
                fields = [
                    records[-1].get(f"eval/{task}/{name}") for name in ("loss", "bits_per_byte", "unigram_entropy")
                ]
                source = task.partition(".")[2] or "all"
                rows.append([run.name, source, words.count(records[-1]["tokens"]), *map(words.decimal, fields)])
    return "" if len(rows) == 1 else table(_of_runs(rows, runs))


def evaluation_table(runs: Sequence[Run]) -> str:
    """The last result of each run for every metric of every task."""
    rows = [["task", "metric", *(run.name for run in runs)]]
    for task, metric in figures.evaluated(runs):
        cells = []
        for run in runs:
            points = figures.results(run, task, metric)
            cells.append(_result(*points[-1]) if points else words.ABSENT)
        rows.append([task, metric.replace("_", " "), *cells])
    return "" if len(rows) == 1 else table(rows)


def _result(tokens: float, value: float, low: float | None, high: float | None) -> str:
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{value:.3f}{interval} at {words.count(tokens)}"


def attempts_table(runs: Sequence[Run]) -> str:
    """Each attempt: when, on what, from where to where, and how it ended."""
    rows = [["run", "launched", "lasted", "devices", "steps", "ended as", "reason"]]
    for run in runs:
        for attempt in run.attempts:
            when = datetime.fromtimestamp(attempt.launched, UTC).strftime("%Y-%m-%d %H:%M:%S")
            steps = f"{attempt.from_step:,} to {attempt.to_step:,}" if attempt.started else words.ABSENT
            lasted = words.duration(attempt.ended - attempt.launched)
            rows.append([run.name, when, lasted, str(attempt.world_size), steps, attempt.end, attempt.reason or ""])
    return "" if len(rows) == 1 else table(_of_runs(rows, runs), texts=True)


def carbon_section(runs: Sequence[Run], power_watts: float | None) -> str:
    """By the paper's method, as its Table 15."""
    rows = [["run", "device", "power", "device hours", "energy", "CO₂ equivalent"]]
    unknown = []
    for run in runs:
        found = carbon_of(run, power_watts=power_watts)
        if found.watts is None:
            unknown.append(run.device)
        if found.mwh is None or found.tonnes is None or found.watts is None:
            more = [words.ABSENT, words.figure(found.device_hours), words.ABSENT, words.ABSENT]
        else:
            more = [
                f"{found.watts:g} W",
                words.figure(found.device_hours),
                words.energy(found.mwh),
                words.emissions(found.tonnes),
            ]
        rows.append([run.name, run.device, *more])
    method = (
        f"The paper's method: device hours, from each launch to its end, × the device's full power × a PUE of {PUE} × "
        f"{KG_PER_KWH} kg of CO₂ equivalent per kWh (the average in the United States). Hosts and network are left out."
    )
    how = ""
    if unknown:
        names = " and ".join(sorted(set(unknown)))
        how = f"<p>What one {escape(names)} draws is not known: power_watts=… tells it, in watts for each device.</p>"
    return f'{how}{table(_of_runs(rows, runs))}<p class="pale">{method}</p>'


def samples_section(runs: Sequence[Run]) -> str:
    """For each prompt what was written after it, the last first."""
    if not any(run.samples for run in runs):
        return (
            '<div class="absent"><p>None was asked for: evaluation.samples=[Once upon a time] has a run write on from '
            "prompts at each validation.</p></div>"
        )
    parts = []
    for number, run in enumerate(runs):
        if not run.samples:
            continue
        prompts = dict.fromkeys(sample["prompt"] for line in run.samples for sample in line["samples"])
        cards = "".join(_prompt(run, prompt) for prompt in prompts)
        name = f"<h3>{_swatch(number)}{escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(f'{name}<div class="samples">{cards}</div>')
    return '<p class="pale">The likeliest token each time. Grey: the prompt.</p>' + "".join(parts)


def _prompt(run: Run, prompt: str) -> str:
    found = [(line, s) for line in run.samples for s in line["samples"] if s["prompt"] == prompt][::-1]
    shown = found
    if len(found) > SAMPLED_STEPS:
        last = len(found) - 1
        shown = [found[round(place * last / (SAMPLED_STEPS - 1))] for place in range(SAMPLED_STEPS)]
    texts = [
        f'<p class="written"><span class="at">{words.count(line["tokens"])} tokens, step {line["step"]:,}</span>'
        f"<i>{escape(prompt)}</i>{escape(sample['continuation'].rstrip())}{' ∎' if sample.get('ended') else ''}</p>"
        for line, sample in shown
    ]
    left = f", {len(shown)} of {len(found)}" if len(shown) < len(found) else ""
    earlier = f"<details><summary>earlier{left}</summary>{''.join(texts[1:])}</details>" if texts[1:] else ""
    return f'<div class="card">{texts[0]}{earlier}</div>'


def differences_section(runs: Sequence[Run]) -> str:
    """Metrics at equal tokens, and what differs of settings and machines."""
    names = [run.name for run in runs]
    parts = []
    found = at_equal_tokens(runs)
    if found:
        rows = [
            [
                f"{one.metric}{'' if one.same_texts else ' *'}",
                words.count(one.tokens),
                *map(words.decimal, one.values),
            ]
            for one in found
        ]
        note = "" if all(one.same_texts for one in found) else f" * {OTHER_TEXTS}."
        parts.append(f"<h3>At equal tokens</h3>{table([['metric', 'tokens', *names], *rows])}")
        parts.append(
            '<p class="pale">Where the shortest run ends; between two points, on the line between them.' + note + "</p>"
        )
    for title, differences in (
        ("Settings", differing_settings(runs)),
        ("Machines and versions", differing_environments(runs)),
    ):
        told = _differing(names, differences) if differences else '<p class="pale">the same</p>'
        parts.append(f"<h3>{title}</h3>{told}")
    return "".join(parts)


def _differing(names: Sequence[str], differences: dict[str, list[object]]) -> str:
    rows = [[key, *map(words.value, values)] for key, values in differences.items()]
    return table([["", *names], *rows], texts=True)


def described(runs: Iterable[Run]) -> str:
    """Of each run its configuration and environment, folded."""
    parts = []
    for run in runs:
        for what, content in (("configuration", run.config), ("environment", run.environment)):
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True) if content else "not told"
            parts.append(f"<details><summary>{escape(run.name)}: {what}</summary><pre>{escape(text)}</pre></details>")
    return "".join(parts)
