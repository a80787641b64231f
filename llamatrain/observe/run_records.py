"""All that a run writes of its steps, in one place: metrics.jsonl, samples.jsonl, the console, Weights & Biases."""

import time
from collections.abc import Callable
from contextlib import ExitStack

from llamatrain.config import RunConfig
from llamatrain.distributed import World
from llamatrain.observe.records import MetricsLog, Record, SampleLog
from llamatrain.observe.sinks import open_sinks
from llamatrain.run_directory import RunDirectory


class RunRecords:
    """Written by rank 0; on the others the same calls write nothing.

    Records after `resumed_step` are cut: their steps are done again. Raises UnhealthyRun if a line is no record.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        world: World,
        *,
        resumed_step: int | None,
        resources: ExitStack,
    ) -> None:
        self._world = world
        self._metrics: MetricsLog | None = None
        if not world.leads:
            return
        self._metrics = MetricsLog(directory.metrics, resumed_step=resumed_step)
        self._samples = SampleLog(directory.samples, validated_step=self._metrics.validated_step)
        self._sinks = [self._metrics, *open_sinks(config, directory.path)]
        for sink in self._sinks:
            resources.callback(sink.close)

    def write(self, where: Record, fields: Record) -> None:
        """A record of the `step` and the `tokens` of `where`."""
        if self._metrics is not None:
            record = {**where, "time": time.time(), **fields}
            for sink in self._sinks:
                sink.write(record)

    def write_samples(self, where: Record, samples: list[dict[str, str]]) -> None:
        """What the model wrote. Comes before the validation's record, by which it is kept on resumption."""
        if self._metrics is not None:
            self._samples.write({**where, "time": time.time(), "samples": samples})

    def back_to(self, step: int) -> None:
        """Cut what lies after `step`. Raises OSError."""
        if self._metrics is not None:
            self._metrics.back_to(step)
            self._samples.back_to(self._metrics.validated_step)

    @property
    def sync(self) -> Callable[[], None] | None:
        """Puts every record on disk; None where there are none."""
        return self._metrics.sync if self._metrics is not None else None

    def last_evaluated(self) -> tuple[int | None, int | None]:
        """The last steps with validation, and with tasks. All ranks call it, and have the same."""
        kept = self._metrics
        return self._world.decide(lambda: (kept.validated_step, kept.tested_step) if kept else (None, None))
