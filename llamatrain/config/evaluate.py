"""What to evaluate, on what, and how the results are shown."""

from dataclasses import dataclass, field
from typing import Any

from llamatrain.config.train import DEVICES, PRECISIONS
from llamatrain.errors import ConfigError

FORMATS = ("markdown", "json")


@dataclass
class EvaluateConfig:
    checkpoint: str | None = None  # a run's directory (its newest checkpoint) or one step-… directory
    data: str | None = None  # the directory of the question files
    suite: str | None = None  # a name of conf/evaluation/suites, or a file; its tasks, and its tables are printed
    tasks: list[str] = field(default_factory=list)  # names of conf/evaluation/tasks, or files; with a suite: only those
    max_questions: int | None = None  # of each task the first so many; of a set in parts, of each part
    shots: int | list[int] | None = None  # examples before a question, where a task can have so many; None: its own
    seed: int = 0  # of drawn examples and samples
    task_settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task: settings of its kind
    task_files: dict[str, dict[str, str]] = field(default_factory=dict)  # by task: role and path
    allow_code_execution: bool = False  # run what the model writes for HumanEval and MBPP, in a sandbox
    resume: bool = False  # keep what results of this name on disk already have, asked the same
    overwrite: bool = False  # results of this name that were asked otherwise may be lost
    strict: bool = False  # a task that cannot be run is an error
    output: str | None = None  # directory of the results; None: RUN/evaluations/step-…
    name: str | None = None  # of the results' files; None: the suite's, or the tasks'
    label: str | None = None  # the model's name in tables; None: the run's with its step
    format: str = "markdown"  # markdown | json: what is printed
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # bf16 | fp32; auto: bf16 on CUDA, fp32 on CPU
    tp: int = 1  # ranks that share each layer
    dp_shard: int | None = None  # ranks that share one copy of the weights; None: all that tp leaves
    max_batch_tokens: int | None = None  # in one forward; None: by device
    harness: list[str] = field(default_factory=list)  # tasks of lm-evaluation-harness, scored by it
    harness_tasks: str | None = None  # a directory of own task files of the harness


def check_evaluate(config: EvaluateConfig) -> None:
    """Raises ConfigError."""
    if not config.checkpoint:
        raise ConfigError("no checkpoint to evaluate: give checkpoint=RUN_OR_STEP_DIRECTORY")
    if not config.tasks and not config.suite and not config.harness:
        raise ConfigError("nothing to evaluate on: give suite=llama_paper, or tasks like tasks=[boolq,piqa]")
    if (config.tasks or config.suite) and not config.data:
        raise ConfigError("give data=DIRECTORY, where the question files lie")
    if config.max_questions is not None and config.max_questions < 1:
        raise ConfigError(f"max_questions={config.max_questions}: must be at least 1")
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed={config.seed}: must lie in [0, 2^63)")
    for option, value, choices in (
        ("format", config.format, FORMATS),
        ("device", config.device, DEVICES),
        ("precision", config.precision, PRECISIONS),
    ):
        if value not in choices:
            raise ConfigError(f"{option}={value}: choose one of {', '.join(choices)}")
    for option, number in (
        ("tp", config.tp),
        ("dp_shard", config.dp_shard),
        ("max_batch_tokens", config.max_batch_tokens),
    ):
        if number is not None and number < 1:
            raise ConfigError(f"{option}={number}: must be at least 1")
    if config.name is not None and (not config.name or "/" in config.name or config.name.startswith(".")):
        raise ConfigError(f"name={config.name}: must be a file's name without its ending")
