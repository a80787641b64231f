"""What is asked of a model while it is trained: validation with samples, and tasks, each at the steps due for it."""

from collections.abc import Callable

import torch

from llamatrain.config import RunConfig
from llamatrain.config.parallel import Layout
from llamatrain.data.sources import Source
from llamatrain.distributed import World
from llamatrain.evaluation.during_training import TrainingTasks
from llamatrain.evaluation.samples import Samples
from llamatrain.evaluation.validation import Forward, Validation
from llamatrain.model.llama import Llama
from llamatrain.observe.records import Record
from llamatrain.observe.run_records import RunRecords
from llamatrain.parallel import fsdp
from llamatrain.parallel.answering import answering
from llamatrain.tokenizer import Tokenizer


class Evaluator:
    """Raises ConfigError or DataError for what could not be asked hours into the run."""

    def __init__(
        self,
        config: RunConfig,
        sources: list[Source],
        tokenizer: Tokenizer,
        device: torch.device,
        world: World,
        layout: Layout,
    ) -> None:
        self._settings = config.evaluation
        self._last_step = config.total_steps
        self.validation = Validation(config, sources, tokenizer, device, world, layout)
        self.samples = Samples(config, tokenizer, device, world, layout)
        self.tasks = TrainingTasks(config, tokenizer, device, world, layout)
        self._validated_step: int | None = None
        self._tested_step: int | None = None

    def begin(self, records: RunRecords) -> None:
        """Take up from the records that the run has kept: a stop may have come before a step's evaluation."""
        self._validated_step, self._tested_step = records.last_evaluated()

    def due(self, step: int) -> bool:
        """Whether there is something to ask at this step, and it has not been."""
        return self._validation_due(step) or self._tasks_due(step)

    def _validation_due(self, step: int) -> bool:
        return self._on_schedule(step, self._settings.every_steps) and self._validated_step != step

    def _tasks_due(self, step: int) -> bool:
        return self._on_schedule(step, self._settings.tasks_every_steps) and self._tested_step != step

    def _on_schedule(self, step: int, every: int) -> bool:
        return bool(every) and (step >= self._last_step or step % every == 0)

    def evaluate(
        self,
        model: Llama,
        loss: Forward,
        where: Record,
        records: RunRecords,
        *,
        keep_going: Callable[[], bool],
    ) -> None:
        """Do what is due at `where["step"]` and record it; all ranks call it.

        If `keep_going`, asked again and again, says no, which it must on all ranks, what was not finished stays due.
        """
        step: int = where["step"]
        if self._validation_due(step):
            if not self._validate(model, loss, where, records, keep_going):
                return
            self._validated_step = step
        if self._tasks_due(step):
            with answering(model):
                scores = self.tasks.scores(model, keep_going=keep_going)
            if scores is None:
                return
            if scores:
                records.write(where, scores)
            self._tested_step = step

    def _validate(
        self, model: Llama, loss: Forward, where: Record, records: RunRecords, keep_going: Callable[[], bool]
    ) -> bool:
        """Whether it came to its end."""
        scores = self.validation.evaluate(model, loss, keep_going=keep_going)
        fsdp.free_gathered(model)
        if scores is None:
            return False
        if self._settings.samples:
            with answering(model):
                samples = self.samples.write(model, keep_going=keep_going)
            if samples is None:
                return False
            if samples:
                records.write_samples(where, samples)
        records.write(where, scores)
        return True
