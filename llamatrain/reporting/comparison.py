"""Runs side by side: what each has come to, what their settings differ in, how they stand at equal tokens."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamatrain import words
from llamatrain.arithmetic import carbon
from llamatrain.config.resume import flatten
from llamatrain.reporting.runs import LOSS, VALIDATION_LOSS, Run
from llamatrain.reporting.series import Series, equal_tokens, series, tail_mean, trailing_mean
from llamatrain.run_directory import RUNNING

SILENT_S = 600.0  # without a heartbeat, of which there are many in that time
NOT_COMPARED = ("name", "run_dir")


@dataclass(frozen=True)
class Carbon:
    """What a run's accelerators have drawn so far; the numbers are None where their power is not known."""

    device_hours: float | None  # None: no launch is told of
    watts: float | None
    mwh: float | None
    tonnes: float | None


def carbon_of(run: Run, *, power_watts: float | None = None) -> Carbon:
    """By the paper's method; `power_watts` goes before what is known of the device."""
    watts = power_watts if power_watts is not None else run.watts
    if watts is None or run.device_hours is None:
        return Carbon(run.device_hours, watts, None, None)
    mwh, tonnes = carbon(run.device_hours, watts=watts)
    return Carbon(run.device_hours, watts, mwh, tonnes)


@dataclass(frozen=True)
class Summary:
    """What a run has come to."""

    state: str
    step: int
    total_steps: int | None
    tokens: int
    loss: float | None  # mean of the last log lines
    validation: tuple[float, float] | None  # the best, and at how many tokens
    bits_per_byte: float | None  # of the last validation
    tokens_per_s: float | None  # on all devices there were, the median log line's
    mfu: float | None
    memory_gib: float | None  # the most on rank 0
    goodput: float | None  # None: no time is told of
    restarts: int
    carbon: Carbon


def summary(run: Run, *, power_watts: float | None = None) -> Summary:
    training = run.training
    rate, mfu = (series(training, key) for key in ("perf/tokens_per_s_per_device", "perf/mfu"))
    devices = run.devices_at([record["time"] for record in training if "perf/tokens_per_s_per_device" in record])
    memory = series(training, "perf/memory_gib").finite()
    bits = series(run.records, "eval/validation/bits_per_byte").finite()
    return Summary(
        state=_state(run),
        step=run.step,
        total_steps=run.total_steps,
        tokens=run.tokens,
        loss=tail_mean(series(training, LOSS)),
        validation=series(run.records, VALIDATION_LOSS).least(),
        bits_per_byte=bits.last if len(bits) else None,
        tokens_per_s=_median(Series(rate.tokens, rate.values * devices)),
        mfu=_median(mfu),
        memory_gib=float(memory.values.max()) if len(memory) else None,
        goodput=run.goodput,
        restarts=len(run.restarts),
        carbon=carbon_of(run, power_watts=power_watts),
    )


def _state(run: Run) -> str:
    """As the run has left it, which a run that was killed could not."""
    state, silent_s = run.status["state"], time.time() - run.status["heartbeat"]
    if state == RUNNING and silent_s > SILENT_S:
        return f"{state}, silent for {words.duration(silent_s)}"
    return str(state)


def _median(one: Series) -> float | None:
    known = one.finite()
    return float(np.median(known.values)) if len(known) else None


# -------------------------------------------------------------------------- differences


def differing(described: Sequence[dict[str, Any]], *, without: Iterable[str] = ()) -> dict[str, list[Any]]:
    """Keys whose values are not the same in all, with those values; `words.ABSENT` where one has no such key."""
    keys = dict.fromkeys(key for one in described for key in one)
    rows = {key: [one.get(key, words.ABSENT) for one in described] for key in keys if key not in set(without)}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Of the configurations, but for names and places."""
    return differing([run.settings for run in runs], without=NOT_COMPARED)


def differing_environments(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Of machines and versions, and how many devices."""
    return differing([{**flatten(run.environment), "devices": run.devices} for run in runs], without=("host",))


@dataclass(frozen=True)
class AtEqualTokens:
    """A metric of several runs where the shortest of them ends."""

    metric: str
    tokens: float
    values: list[float]
    same_texts: bool = True  # False: the runs were validated on texts that are not the same, so it says little


def at_equal_tokens(runs: Sequence[Run]) -> list[AtEqualTokens]:
    """Training loss, the mean of the last fiftieth before; and every evaluation that all runs have, on the line
    between two points."""
    losses = [series(run.training, LOSS) for run in runs]
    whole: list[tuple[str, list[Series], bool]] = [("training loss", losses, True)]
    for key in evaluated_in_all(runs):
        whole.append((told(key), [series(run.records, key) for run in runs], _on_the_same_texts(runs, key)))
    found = []
    for name, taken, same_texts in whole:
        tokens = equal_tokens(taken)
        if tokens is not None:
            window = tokens / 50 if taken is losses else 0.0
            values = [trailing_mean(one, tokens, window) for one in taken]
            found.append(AtEqualTokens(name, tokens, [v for v in values if v is not None], same_texts))
    return found


def _on_the_same_texts(runs: Sequence[Run], key: str) -> bool:
    """As far as the number of tokens and their distribution tell."""
    task = key.rpartition("/")[0]
    seen = [
        {record.get(f"{task}/tokens"): record.get(f"{task}/unigram_entropy") for record in run.records if key in record}
        for run in runs
    ]
    return all(one == seen[0] for one in seen)


def evaluated_in_all(runs: Sequence[Run]) -> list[str]:
    """The fields `eval/…` that every run has, but for counts and what belongs to the data."""
    fields = [dict.fromkeys(key for record in run.records for key in record) for run in runs]
    return [key for key in fields[0] if is_result(key) and all(key in other for other in fields[1:])]


def is_result(key: str) -> bool:
    """Whether a field of the records is a metric of an evaluation, on which a model can be better or worse."""
    parts = key.split("/", 2)
    return len(parts) == 3 and parts[0] == "eval" and parts[2] not in ("tokens", "questions", "unigram_entropy")


def told(key: str) -> str:
    """A field of the records in words: eval/validation.code/loss is `validation, code: loss`."""
    _, task, metric = key.split("/", 2)
    name, _, source = task.partition(".")
    where = f"validation, {source}" if name == "validation" and source else task
    return f"{where}: {metric.replace('_', ' ')}"
