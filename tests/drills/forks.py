"""Runs that start in no time and fail where they are told to: forked with torch loaded, behind the fault injector.

    with Forks(build_injector(directory)) as forks:
        (end,) = forks.run([config], [Fault("kill", first=17)], log)

A fork's parent is a process of its own (this module as a command), started with `faults.c` preloaded; it has torch
loaded and has not used it. `Fault` says what that library does, in which rank.
"""

import base64
import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

REPOSITORY = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("faults.c")
ACTIONS = ("count", "kill", "torn", "fail", "short")  # in the order of faults.c
FOR_EVER = 10**9
PATIENCE_S = 60.0
PATIENCE_WITH_SURVIVORS_S = 10.0  # after one of several ranks was killed


@dataclass(frozen=True)
class Fault:
    """What happens at calls [first, first + span) on the run directory, in rank `rank`; or when it is killed."""

    action: str = "count"
    first: int = 0
    span: int = 1
    error: str = ""  # ENOSPC, EIO, EDQUOT
    rank: int = 0
    kill_after_s: float | None = None  # kill -9, whatever the rank is doing

    def __str__(self) -> str:
        if self.kill_after_s is not None:
            return f"kill -9 of rank {self.rank} after {self.kill_after_s:.3f} s"
        long = "" if self.span == 1 else " and all after" if self.span == FOR_EVER else f" and {self.span - 1} more"
        return f"{self.action} {self.error} at call {self.first}{long} of rank {self.rank}"


@dataclass(frozen=True)
class End:
    """How a rank ended: its exit status as a shell counts it, negative for a signal; None if it had to be killed."""

    status: int | None
    calls: list[str]  # "kind path" of each counted call
    said: str  # stdout and stderr


def build_injector(directory: Path) -> Path:
    """faults.c as a library; raises CalledProcessError or FileNotFoundError where there is no compiler."""
    library = directory / "faults.so"
    subprocess.run(["gcc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


class Forks:
    """One server; for each thread that wants runs at the same time, another."""

    def __init__(self, injector: Path) -> None:
        environment = {**os.environ, "LD_PRELOAD": str(injector), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.drills.forks"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait()

    def run(self, config: Any, fault: Fault, log: Path, *, ranks: int = 1) -> list[End]:
        """Train `config` on so many processes, with a fault; the ends of all ranks. `log`: a prefix for files."""
        from torch.distributed import TCPStore

        # in this process, so that it outlives every rank, as under torchrun the agent's does
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        order = (config, fault, str(log), ranks, store.port if store is not None else 0)
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(base64.b64encode(pickle.dumps(order)) + b"\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server of forks is gone"
        statuses = pickle.loads(base64.b64decode(answer))
        return [
            End(status, [line.split(" ", 1)[1] for line in _lines(f"{log}.{rank}.calls")], _text(f"{log}.{rank}.said"))
            for rank, status in enumerate(statuses)
        ]


def _text(path: str) -> str:
    return Path(path).read_text(errors="replace") if Path(path).exists() else ""


def _lines(path: str) -> list[str]:
    return [line for line in _text(path).splitlines() if " " in line]


# ---------------------------------------------------------------------- in the server


def serve() -> None:
    import torch._dynamo  # noqa: F401 - the first operation on a DTensor would import it, in each child

    import tests.small_run  # noqa: F401

    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    for line in sys.stdin.buffer:
        config, fault, log, ranks, port = pickle.loads(base64.b64decode(line))
        shutil.rmtree(f"{log}.attempt", ignore_errors=True)
        children = [_fork(config, fault, log, rank, ranks, port) for rank in range(ranks)]
        replies.write(base64.b64encode(pickle.dumps(_await(children, fault))) + b"\n")


def _fork(config: Any, fault: Fault, log: str, rank: int, ranks: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for ending in ("calls", "said"):
            Path(f"{log}.{rank}.{ending}").unlink(missing_ok=True)
        said = os.open(f"{log}.{rank}.said", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        status = _train(config, fault if fault.rank == rank else Fault(), log, rank, ranks, port)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _train(config: Any, fault: Fault, log: str, rank: int, ranks: int, port: int) -> int:
    """Be a rank as `python -m llamatrain.train` is one; the exit status."""
    import ctypes

    import torch

    from llamatrain.checkpoint import background
    from llamatrain.errors import LlamatrainError
    from llamatrain.process import speaks_for_its_node
    from llamatrain.resilience.control import StopRequest
    from llamatrain.session import run

    torch.set_num_threads(1)
    background.RETRY_AFTER_S = 0.0  # the pauses are not what is tried here
    if ranks > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_ERROR_FILE=f"{log}.attempt/{rank}/error.json",
        )
        Path(f"{log}.attempt/{rank}").mkdir(parents=True)
    number = getattr(errno, fault.error) if fault.error else 0
    arm = ctypes.CDLL(None).faults_arm
    arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    below = os.path.abspath(config.run_dir).encode()
    assert arm(below, f"{log}.{rank}.calls".encode(), ACTIONS.index(fault.action), number, fault.first, fault.span) == 0
    try:
        run(config, StopRequest(announce=False))
    except LlamatrainError as error:
        if speaks_for_its_node():
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


def _await(children: Sequence[int], fault: Fault) -> list[int | None]:
    """The statuses of all children; those who are not done in time are killed, and theirs is None."""
    began = time.monotonic()
    kill_at = None if fault.kill_after_s is None else began + fault.kill_after_s
    deadline = began + PATIENCE_S
    statuses: dict[int, int | None] = {}
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
                if statuses[child]:
                    deadline = min(deadline, time.monotonic() + PATIENCE_WITH_SURVIVORS_S)
        now = time.monotonic()
        if kill_at is not None and now >= kill_at and children[fault.rank] not in statuses:
            kill_at = None
            os.kill(children[fault.rank], signal.SIGKILL)
        if now >= deadline:
            for child in set(children) - statuses.keys():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                statuses[child] = None
        time.sleep(0.002)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    serve()
