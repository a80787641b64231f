"""Tasks put to a model while it is trained: their scores as metrics, against tokens.

As validation it reads the weights and changes nothing: nothing is drawn from training's generators, what a task draws
is a function of data.seed. Sets and descriptions are looked for at the run's start, not hours into it.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from llamatrain.config import RunConfig
from llamatrain.config.parallel import Layout
from llamatrain.distributed import World
from llamatrain.errors import ConfigError, DataError
from llamatrain.evaluation.catalogue import load_tasks
from llamatrain.evaluation.lockstep import Interrupted
from llamatrain.evaluation.model_scorer import ModelScorer
from llamatrain.evaluation.prefixes import KEPT_TOKENS
from llamatrain.evaluation.runner import available, metrics_record, run_tasks
from llamatrain.evaluation.task import Conditions
from llamatrain.evaluation.tasks import code
from llamatrain.model.llama import Llama
from llamatrain.observe.records import Record
from llamatrain.tokenizer import Tokenizer

log = logging.getLogger("llamatrain")


def training_scorer(
    config: RunConfig, tokenizer: Tokenizer, device: torch.device, world: World, layout: Layout
) -> Callable[..., ModelScorer]:
    """Makes scorers, (model, keep_going=…), that take no more memory than training has left.

    Their batches have fewer tokens than validation has room for, since keys and values are kept besides.
    """
    tokens = max(config.data.seq_len, config.evaluation.micro_batch * config.data.seq_len // KEPT_TOKENS)
    return partial(ModelScorer, tokenizer=tokenizer, device=device, world=world, layout=layout, max_batch_tokens=tokens)


class TrainingTasks:
    """The tasks of a run's evaluation.tasks. Raises ConfigError or DataError for one that could not be run."""

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, device: torch.device, world: World, layout: Layout
    ) -> None:
        settings = config.evaluation
        self._scorer = training_scorer(config, tokenizer, device, world, layout)
        self._told = False
        self._conditions = Conditions(max_questions=settings.max_questions, seed=config.data.seed, leads=world.leads)
        self._tasks = load_tasks(settings.tasks)
        self._data = Path(settings.data or ".")
        _, refused = available(self._tasks, self._data, self._conditions)
        for task, reason in refused.items():
            if any(one.kind is code.KIND for one in self._tasks if one.name == task):
                raise ConfigError(
                    f"evaluation.tasks: {task} runs programs that the model has written, which training does not; "
                    "ask the checkpoints by llamatrain.evaluate with allow_code_execution=true"
                )
            if reason.startswith("no file"):
                raise DataError(f"evaluation.tasks: {task}: {reason}; evaluation.data={self._data}")
            raise ConfigError(f"evaluation.tasks: {task} cannot be run during training: {reason}")

    def scores(self, model: Llama, *, keep_going: Callable[[], bool] = lambda: True) -> Record | None:
        """`eval/<task>/<metric>` of every task, the same on all ranks, which all call this.

        The model is as `parallel.answering` makes it. None if `keep_going`, asked every few forwards, says no; it must
        say the same on all ranks.
        """
        scorer = self._scorer(model, keep_going=keep_going)
        try:
            results = run_tasks(
                self._tasks, scorer, data=self._data, conditions=self._conditions, unscored=self._not_scored
            )
        except Interrupted:
            return None
        return dict(metrics_record(results))

    def _not_scored(self, told: str) -> None:
        """Training's own guards judge the run; what cannot be scored is left out of the record."""
        if self._conditions.leads and not self._told:
            self._told = True
            log.warning("evaluation.tasks: %s; such scores are left out of metrics.jsonl", told)
