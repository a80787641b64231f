"""Validation and tasks during training."""

from dataclasses import dataclass, field

from llamatrain.errors import ConfigError


@dataclass
class EvaluationConfig:
    every_steps: int = 0  # 0: never; otherwise also before the first step and after the last
    max_tokens: int | None = None  # per source, from the front of its validation split; None: all of it
    micro_batch: int = 8  # sequences per forward
    samples: list[str] = field(default_factory=list)  # prompts to write on from at each validation
    sample_tokens: int = 64  # new ones of each, at most
    tasks: list[str] = field(default_factory=list)  # of conf/evaluation/tasks, or files: what the model is asked
    tasks_every_steps: int = 0  # also before the first step and after the last
    data: str | None = None  # directory of the tasks' files
    max_questions: int | None = None  # of each task the first so many; None: all


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """Raises ConfigError."""
    if evaluation.every_steps < 0:
        raise ConfigError(f"evaluation.every_steps={evaluation.every_steps}: must not be negative")
    if evaluation.max_tokens is not None and evaluation.max_tokens < 2:
        raise ConfigError(f"evaluation.max_tokens={evaluation.max_tokens}: must be at least 2")
    if evaluation.micro_batch < 1:
        raise ConfigError(f"evaluation.micro_batch={evaluation.micro_batch}: must be at least 1")
    if evaluation.sample_tokens < 1:
        raise ConfigError(f"evaluation.sample_tokens={evaluation.sample_tokens}: must be at least 1")
    if evaluation.samples and not evaluation.every_steps:
        raise ConfigError("evaluation.samples are written at validations: set evaluation.every_steps too")
    _check_tasks(evaluation)


def _check_tasks(evaluation: EvaluationConfig) -> None:
    every = evaluation.tasks_every_steps
    if every < 0:
        raise ConfigError(f"evaluation.tasks_every_steps={every}: must not be negative")
    if evaluation.max_questions is not None and evaluation.max_questions < 1:
        raise ConfigError(f"evaluation.max_questions={evaluation.max_questions}: must be at least 1")
    if every and not evaluation.tasks:
        raise ConfigError(f"evaluation.tasks_every_steps={every} without tasks: evaluation.tasks=[hellaswag,piqa]")
    if evaluation.tasks and not every:
        raise ConfigError("evaluation.tasks are never run: set evaluation.tasks_every_steps")
    if evaluation.tasks and not evaluation.data:
        raise ConfigError("evaluation.tasks need evaluation.data=DIRECTORY, where their files lie")
