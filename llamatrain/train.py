"""Train a LLaMA.

    python -m llamatrain.train model=15m data.sources.NAME.path=DIRECTORY train.steps=1000 optim.lr=6e-4

Every setting is key=value; a group's choice is group=choice (a file of conf/). The run lives in run_dir
(runs/NAME): the same command again resumes it, or says that it is done.

  model=7b|13b|33b|65b|15m|110m|300m|1b     shape of the model
  experiment=paper_7b|…|paper_65b|demo      a whole run: mixture, steps, schedule
  data.sources.NAME.path=DIR                a data set written by data_tools.tokenize_shards
  data.sources.NAME.weight=0.7              its share of the samples (normalised)
  data.seq_len=2048                         tokens per sample
  train.steps=N | train.tokens=N            length of the run
  train.global_batch_tokens=65536           tokens per optimizer step
  train.micro_batch=4                       sequences per device per forward
  train.precision=bf16|fp32                 compute precision (weights are fp32)
  train.stop_after_step=N                   save and leave there; the same command without it goes on
  train.dry_run=true                        one step, save, load: says how much memory it takes, and leaves
  train.resume_allow=[data.sources.NAME.weight]   resuming, change what may not else (docs/resume-policy.md)
  init.from=RUN_OR_IMPORT                   begin with those weights (docs/interchange.md)
  optim.lr=3e-4 optim.warmup_steps=2000     peak rate, warm-up; cosine to optim.min_lr_ratio
  checkpoint.every_steps=1000               saved also at the end, on SIGTERM and on Ctrl-C
  evaluation.every_steps=500                validation loss per source, bits per byte
  logging.every_steps=10 logging.wandb=off|offline|online
  name=NAME run_dir=runs/NAME               where it lives
  parallel.reshard_after_forward=always|never   on many GPUs: never takes memory and saves gathers

On several GPUs: torchrun --standalone --nproc_per_node 8 -m llamatrain.train … (docs/clusters.md for SLURM).

  --cfg job      print the composed configuration and leave      --multirun   a run per combination: optim.lr=1e-4,3e-4
  --info defaults  which files it is composed from               --help       this text
  Tab completion: eval "$(python -m llamatrain.train -sc install=bash)"

Exit status: 0 done, or stopped in order (status.json says which) - 2 bad configuration or data
- 3 unhealthy: somebody has to look - 1 a crash. LLAMATRAIN_TRACEBACK=1 shows where an error came from.
"""

import logging
import os
import sys

from llamatrain.cli import run_command
from llamatrain.config import RunConfig, validate
from llamatrain.errors import ConfigError
from llamatrain.process import this_process
from llamatrain.resilience.control import StopRequest
from llamatrain.run_directory import note_refusal, refuse_same_attempt


def train(config: RunConfig) -> None:
    """Check the configuration, then train; signals are caught before torch, which takes seconds to import."""
    process = this_process()
    stop = StopRequest(announce=process.leads)
    stop.install()
    try:
        validate(config, world_size=process.world_size)
    except ConfigError as error:
        if process.leads:
            note_refusal(config.run_dir, str(error))
        raise
    refuse_same_attempt(config.run_dir)
    if config.train.dry_run:
        from llamatrain.dry_run import run
    else:
        from llamatrain.session import run
    run(config, stop)
    if stop.reason is not None:
        sys.exit(0)  # the rest of a sweep is to stop too


def main() -> None:
    try:
        run_command(RunConfig, "config", train, help_text=__doc__)
    except SystemExit as ended:
        if ended.code and os.environ.get("WORLD_SIZE", "1") != "1":
            # Process groups whose other ends may be gone are not tidied up: gloo's threads would abort the process
            # and hide its status.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        raise


if __name__ == "__main__":
    main()
