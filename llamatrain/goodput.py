"""Where the time of a run went: steps that count, and what was lost, waited for, saved, or spent on starting.

python -m llamatrain.goodput run_dir=RUN_DIRECTORY
"""

import json
from pathlib import Path

from llamatrain.cli import run_command
from llamatrain.config.goodput import GoodputConfig, check_goodput
from llamatrain.errors import ConfigError
from llamatrain.observe.goodput import Ledger, table
from llamatrain.run_directory import RUNNING, read_status


def run(settings: GoodputConfig) -> None:
    """Print the parts of the run's wall clock; of one that is at work, up to its last heartbeat."""
    check_goodput(settings)
    assert settings.run_dir is not None  # checked above
    journal, status = Path(settings.run_dir) / "journal.jsonl", read_status(settings.run_dir)
    if status is None or not journal.exists():
        raise ConfigError(f"run_dir={settings.run_dir}: nothing ever ran there")
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    ledger = Ledger(json.loads(line) for line in lines if line.endswith("\n"))  # the last may be half written
    if status["state"] == RUNNING:
        ledger.feed({"event": "account", "time": status["heartbeat"], "step": status["step"]})
    print(table(ledger))


def main() -> None:
    run_command(GoodputConfig, "commands/goodput", run, help_text=__doc__)


if __name__ == "__main__":
    main()
