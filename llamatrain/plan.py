"""What a run will take, before anything is spent: memory, time, cost, energy, failures, and better layouts.

    python -m llamatrain.plan model=65b cluster=a100_80gb nodes=256 train.tokens=1.4e12 [group=choice …] [key=value …]

Takes the settings of llamatrain.train and tells what they would mean on so many nodes; needs neither GPU nor torch nor
data. What was set stays as it is in the layouts it proposes, what was left alone is searched. Its own settings:

  cluster=a100_80gb|h100|h200         a file of conf/cluster; cluster.hardware.… changes what is reckoned with
  nodes=256                           how many
  layouts=5                           how many to propose, as settings ready to paste
  format=text|json
  restart_minutes=15                  what a failure costs beside lost steps
  save_gb_s=10 storage_gb_s=50        from each GPU to its host's memory, from all hosts to files
  pue=1.1 kg_per_kwh=0.385            the paper's method of reckoning carbon
  serve.tokens=2e12                   given these, served over the model's life: which size, trained on how many tokens,
                                      costs least in all at the loss of this run (or serve.loss=…)
  serve.utilisation=0.2 serve.fit=hoffmann|besiroglu serve.plot=FILE.svg|FILE.png

Exit status: 0 it fits - 2 it does not, and the nearest that does is told; or what was typed is wrong.
docs/planning.md tells how it reckons, and how well that has foretold published runs.
"""

import json
import sys

import yaml

from llamatrain.cli import config_directory, run_command
from llamatrain.config import ModelConfig
from llamatrain.config.build import build
from llamatrain.config.plan import PlanConfig, check_plan
from llamatrain.errors import ConfigError
from llamatrain.planning.plan import as_values, plan
from llamatrain.planning.telling import draw, refusal, told


def run(config: PlanConfig) -> None:
    """Print the plan. Raises ConfigError if the run does not fit."""
    check_plan(config, clusters=sorted(path.stem for path in (config_directory() / "cluster").glob("*.yaml")))
    found = plan(config, presets())
    print(json.dumps(as_values(found), indent=1) if config.format == "json" else told(found), flush=True)
    if found.life is not None and config.serve.plot is not None:
        draw(found.life, config.serve.plot)
        print(f"\ndrawn: {config.serve.plot}", file=sys.stdout if config.format == "text" else sys.stderr, flush=True)
    if not found.fits:
        raise ConfigError(refusal(found))


def presets() -> dict[str, ModelConfig]:
    """The files of conf/model."""
    files = sorted((config_directory() / "model").glob("*.yaml"))
    return {path.stem: build(ModelConfig, yaml.safe_load(path.read_text(encoding="utf-8"))) for path in files}


def main() -> None:
    run_command(PlanConfig, "plan", run, help_text=__doc__)


if __name__ == "__main__":
    main()
