"""The errors a user can meet. Each carries one message that names the thing and the fix.

Commands print the message without a traceback and exit with `exit_code`; anything else that is raised is a
defect of the program and is shown with its traceback.
"""


class LlamatrainError(Exception):
    """An error whose message is meant for the user."""

    exit_code = 1


class ConfigError(LlamatrainError):
    """A configuration that cannot work. The message names the override to type."""

    exit_code = 2


class DataError(LlamatrainError):
    """A data set, corpus or tokenizer that is missing, damaged or does not fit the run."""

    exit_code = 2


class CheckpointError(LlamatrainError):
    """A checkpoint that is incomplete, damaged or of another model."""

    exit_code = 3


class UnhealthyRun(LlamatrainError):
    """A run that must not go on by itself: somebody has to look."""

    exit_code = 3


class DistributedError(LlamatrainError):
    """Processes that did not meet, or lost one another: a node or the network, so a launcher may try again."""
