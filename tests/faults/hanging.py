"""llamatrain.train on ranks of which one comes to a standstill: `-m tests.faults.hanging KIND RANK STEP OVERRIDE …`."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llamatrain import train
from llamatrain.data.loader import Loader
from llamatrain.trainer import Trainer

FOR_EVER_S = 3600


def be_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_lock() -> None:
    """Sleep in C without giving Python's lock away, as a library without care would."""
    ctypes.PyDLL(None).sleep(FOR_EVER_S)


def be_gone() -> None:
    """As if the node was: the rank's watchman does not report either."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"watchman" in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
    (run_dir,) = (argument.partition("=")[2] for argument in sys.argv if "run_dir=" in argument)
    while not list(Path(run_dir).glob("hang-*/conclusion.json")):
        time.sleep(0.1)
    os._exit(1)  # or torchrun would wait for half a minute


def sleep() -> None:
    time.sleep(FOR_EVER_S)


def call_another_collective() -> None:
    dist.broadcast(torch.zeros(7), src=0)


BEFORE_A_STEP = {
    "stopped": be_stopped,
    "lock": hold_the_lock,
    "collective": call_another_collective,
    "gone": be_gone,
}


def plant(kind: str, rank: int, step: int) -> None:
    """Have that rank stand still where it would begin the step after `step`."""
    if os.environ["RANK"] != str(rank):
        return
    if kind in BEFORE_A_STEP:
        act = BEFORE_A_STEP[kind]
        before(Trainer, "train_step", lambda trainer: act() if trainer.step == step else None)
    elif kind == "loader":
        assembled = []
        before(Loader, "_assemble", lambda loader: sleep() if len(assembled) == step else assembled.append(1))
    elif kind == "validation":
        before(Trainer, "_keep_validating", lambda trainer: sleep() if trainer.step == step else None)
    else:
        raise ValueError(kind)


def before(owner: type, method: str, act: Callable[[Any], None]) -> None:
    """Have `act(self)` called before every call of a method."""
    original = getattr(owner, method)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        act(self)
        return original(self, *args, **kwargs)

    setattr(owner, method, wrapped)


def main() -> None:
    kind, rank, step = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
    plant(kind, rank, step)
    train.main()


if __name__ == "__main__":
    main()
