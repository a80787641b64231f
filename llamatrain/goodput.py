"""Where the time of a run went: steps that count, and what was lost, waited for, saved, or spent on starting.

python -m llamatrain.goodput run_dir=RUN_DIRECTORY
"""

from pathlib import Path

from llamatrain.cli import run_command
from llamatrain.config.goodput import GoodputConfig, check_goodput
from llamatrain.observe.goodput import table
from llamatrain.reporting.runs import read_clock


def run(settings: GoodputConfig) -> None:
    """Print the parts of the run's wall clock; of one that is at work, up to its last heartbeat."""
    check_goodput(settings)
    assert settings.run_dir is not None  # checked above
    _, _, ledger = read_clock(Path(settings.run_dir))
    print(table(ledger))


def main() -> None:
    run_command(GoodputConfig, "commands/goodput", run, help_text=__doc__)


if __name__ == "__main__":
    main()
