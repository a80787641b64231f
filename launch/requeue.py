"""Whether a job whose processes have all ended is to be started again. No torch; train.sbatch asks when srun is over.

    python -m launch.requeue RUN_DIR [--signalled]

Prints one line: the decision and its reason. Exit status 0: start again; 1: do not; 2: RUN_DIR cannot be read.
`--signalled` says that the job itself was told to stop, by SLURM or by scancel --signal.

What counts is status.json as this very attempt left it. A job that dies before it writes one is not started again:
it would die again, for ever. How often a run may crash without progress is limited by the trainer, which then calls
the run unhealthy.
"""

import argparse
import sys
from typing import Any

from llamatrain.errors import UnhealthyRun
from llamatrain.process import attempt_id
from llamatrain.resilience.control import FILE_REASON, STOP_SIGNALS
from llamatrain.run_directory import PREEMPTED, RUNNING, read_status

REQUEUE, DO_NOT, UNREADABLE = 0, 1, 2
SIGNALS = {number.name for number in STOP_SIGNALS}  # reasons of a run that a signal reached directly


def decision(status: dict[str, Any] | None, attempt: str, *, signalled: bool = False) -> tuple[bool, str]:
    """Whether to start again, and why, from the status that `attempt` left behind; all its processes have ended.

    `signalled`: the launcher was told to stop and has asked the trainer to. Without it, a run that stopped in order
    although no signal came was stopped by a person (control/stop) or by train.stop_after_step: it stays stopped, or
    a job that stops after step N would be started for ever.
    """
    if status is None:
        return False, "it ended before it wrote a status"
    state, reason = status["state"], status["reason"]
    told = f"{state} at step {status['step']}" + (f" ({reason})" if reason else "")
    if status["attempt"] != attempt:
        return False, f"this attempt ended before it wrote a status; the one before, {status['attempt']}, was {told}"
    if state == PREEMPTED and (reason in SIGNALS or (signalled and reason == FILE_REASON)):
        return True, told
    if state == PREEMPTED:
        return False, f"{told}: asked for by a person, not by SLURM"
    if state == RUNNING:
        return True, f"crashed at step {status['step']}" + (f" ({reason})" if reason else ", without a last word")
    return False, told


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.requeue", description=__doc__.split("\n", 1)[0])
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--signalled", action="store_true", help="the job was told to stop")
    arguments = parser.parse_args()
    try:
        again, reason = decision(read_status(arguments.run_dir), attempt_id(), signalled=arguments.signalled)
    except UnhealthyRun as error:
        print(f"not requeued: {error}")
        sys.exit(UNREADABLE)
    print(f"{'requeue' if again else 'not requeued'}: {reason}", flush=True)
    sys.exit(REQUEUE if again else DO_NOT)


if __name__ == "__main__":
    main()
