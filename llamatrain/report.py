"""A page about one or several runs, and their comparison in the terminal; from what they left in their directories.

python -m llamatrain.report run=RUN_DIRECTORY
python -m llamatrain.report run=[runs/a,runs/b] output=comparison
python -m llamatrain.report run=[runs/a,runs/b] format=terminal

The page is one file that needs no network; each of its plots lies beside it as a PNG. A run may be at work meanwhile.
"""

from pathlib import Path

from llamatrain.cli import run_command
from llamatrain.config.report import ReportConfig, check_report
from llamatrain.reporting.runs import read_runs
from llamatrain.reporting.terminal import compared

PAGE = "report"  # the folder in a run's directory


def run(settings: ReportConfig) -> None:
    """Write the page if it is asked for, and print the comparison, of which a reader may have seen enough."""
    check_report(settings)
    if settings.format == "html":
        from llamatrain.reporting.style import check_plots

        check_plots()
    runs = read_runs(settings.runs)
    told = [compared(runs, power_watts=settings.power_watts)]
    if settings.format == "html":
        from llamatrain.reporting.page import write_report

        directory = Path(settings.output) if settings.output else runs[0].path / PAGE
        written = write_report(runs, directory, title=settings.title, power_watts=settings.power_watts)
        told.append(str(written))
    print("\n\n".join(told), flush=True)


def main() -> None:
    run_command(ReportConfig, "commands/report", run, help_text=__doc__)


if __name__ == "__main__":
    main()
