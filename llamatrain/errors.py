"""The errors a user can meet. Each carries one message that names the thing and the fix.

Commands print the message without a traceback and exit with `exit_code`; anything else that is raised is a
defect of the program and is shown with its traceback.

Messages quote what others wrote, a manifest say. What does not print is escaped, as it could not be written to a log
or would command a terminal, and the middle of what is very long is left out.
"""

LONGEST = 4000  # characters of a message


class LlamatrainError(Exception):
    """An error whose message is meant for the user."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(_printable(str(message)))


def _printable(text: str) -> str:
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 + 3 :]}"
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


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
