"""The data card of a prepared source: what went in, what was dropped and why, and samples to look at.

    python -m data_tools.data_card output=DIRECTORY

Reads the ledger that `python -m data_tools.prepare` writes (of a preparation under way, what there is of it) and
writes data_card.md and data_card.html beside it. The page stands alone: no script, nothing is loaded.
"""

from dataclasses import dataclass
from pathlib import Path

from data_tools.card import markdown, page
from data_tools.card.content import read_card
from llamatrain.cli import run_command
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import write_bytes_atomically

MARKDOWN_FILE, PAGE_FILE = "data_card.md", "data_card.html"


@dataclass
class DataCardSettings:
    output: str = "???"  # directory of a prepared source: the output of data_tools.prepare


def data_card(settings: DataCardSettings) -> None:
    """Write both files. Raises ConfigError and DataError."""
    if settings.output in ("", "???"):
        raise ConfigError("output is not set: output=DIRECTORY, that of data_tools.prepare")
    directory = Path(settings.output)
    card = read_card(directory)
    try:
        for name, content in ((MARKDOWN_FILE, markdown.render(card)), (PAGE_FILE, page.render(card))):
            write_bytes_atomically(directory / name, content.encode("utf-8", "backslashreplace"))
            print(f"wrote {directory / name}")
    except OSError as error:
        raise DataError(f"{directory}: cannot be written ({error.strerror})") from None
    for problem in card.problems:
        print(f"does not add up: {problem}")


def main() -> None:
    run_command(DataCardSettings, "data_tools/data_card", data_card, help_text=__doc__)


if __name__ == "__main__":
    main()
