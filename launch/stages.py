"""Commands run one after the other, as a user would type them; each can be run again, and what is done stays done."""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_stage(arguments: Sequence[str]) -> None:
    """Print and run `python -m ARGUMENTS`; a failure ends this program with its status."""
    print(f"\n$ python -m {shlex.join(arguments)}", flush=True)
    with subprocess.Popen([sys.executable, "-m", *arguments]) as child:
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())  # or the child would live on without us
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child by itself
        status = child.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if status != 0:
        sys.exit(status)


def leave_if_stopped(run_dir: Path, again: str) -> None:
    """End this program where training was stopped before its end; `again` is the command that goes on."""
    status = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    if status["state"] != "done":
        print(f"stopped at step {status['step']} ({status['reason']}); {again} goes on from there")
        sys.exit(130)
