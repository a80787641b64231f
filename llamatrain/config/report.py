"""What `python -m llamatrain.report` is asked for."""

from dataclasses import dataclass, field

from llamatrain.errors import ConfigError

FORMATS = ("html", "terminal")


@dataclass
class ReportConfig:
    run: str | list[str] = field(default_factory=list)  # directories of runs; the first is what others compare with
    format: str = "html"  # html: a page and pictures, and the comparison | terminal: the comparison alone
    output: str | None = None  # where the page goes; null: report/ in the first run's directory
    title: str | None = None  # of the page; null: the runs' names
    power_watts: float | None = None  # of one device; null: what is known of it by its name

    @property
    def runs(self) -> list[str]:
        return self.run if isinstance(self.run, list) else [self.run]


def check_report(settings: ReportConfig) -> None:
    """Raises ConfigError."""
    if not settings.runs or not all(settings.runs):
        raise ConfigError("no run to report on: give run=RUN_DIRECTORY, or several as run=[ONE,OTHER]")
    if settings.format not in FORMATS:
        raise ConfigError(f"format={settings.format}: choose one of {', '.join(FORMATS)}")
    if settings.power_watts is not None and settings.power_watts <= 0:
        raise ConfigError(f"power_watts={settings.power_watts}: must be above 0")
    if settings.output is not None and not settings.output:
        raise ConfigError("output is empty: output=DIRECTORY")
