"""One process of a job array: its share of a stage, once the stages before are complete.

    python -m data_tools.engine.worker OUTPUT STAGE PART PARTS WORKERS

All it needs to know lies in OUTPUT. It may be killed at any time and started again, on another node as well.
"""

import sys
import time
from pathlib import Path

from data_tools.engine.executors import StageIncomplete, at_work, check_complete, run_stages
from data_tools.engine.plan import read_plan
from llamatrain.errors import LlamatrainError


def work(output: Path, stage_name: str, part: tuple[int, int], *, workers: int) -> None:
    """Wait a little for the stages before, then make the part's units. Raises LlamatrainError."""
    plan = read_plan(output)
    stage = plan.stage(stage_name)
    deadline = time.monotonic() + plan.settings.slurm.patience_s
    while True:
        try:
            check_complete(plan, plan.before(stage_name))
            break
        except StageIncomplete:
            if time.monotonic() > deadline:
                raise
            time.sleep(2)
    with at_work(output, shared=True):
        run_stages(plan, [stage], workers=workers, part=part)


def main() -> None:
    output, stage, *numbers = sys.argv[1:]
    part, parts, workers = map(int, numbers)
    try:
        work(Path(output), stage, (part, parts), workers=workers)
    except LlamatrainError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
