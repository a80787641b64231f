"""Functions run on several real processes at once, for tests of what ranks do together.

    def add_up(world: World, base: int) -> list[int]:
        return world.gather(base + world.rank)

    assert on_ranks(2, add_up, 10) == [[10, 11], [10, 11]]

The processes are forked from a server that has torch loaded but has not used it, so a launch takes a fraction of a
second. They find each other through a key-value store in the test's own process, as under torchrun through the
agent's: a port that is taken from the start cannot be lost to another test, and the store outlives every rank.
"""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llamatrain.config.parallel import ParallelConfig
from llamatrain.distributed import World
from llamatrain.process import this_process

PATIENCE_S = 60  # for all ranks together, from the launch
ECHO_S = 1.0  # a rank may hear of a failure, and say so, before the one that failed does

# The first operation on a DTensor imports torch._dynamo, a second's worth in each child.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "torch._dynamo", "tests.ranks", "tests.small_run"])


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(world, *args)` on each of `world_size` processes; what they return, in the order of ranks.

    The function must be one of a module (it travels by its name), arguments and results picklable; tensors come
    back as copies. What a rank raises is raised here, the earliest if several do, with its traceback as a note;
    the others are then killed. Raises TimeoutError, with each rank's stack, if they are not done in PATIENCE_S.
    """
    task = pickle.dumps((function, args))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE_S))
    deadline = time.monotonic() + PATIENCE_S
    children: list[BaseProcess] = []
    answers: list[Connection] = []
    with tempfile.TemporaryDirectory() as stacks:
        try:
            for rank in range(world_size):
                receiver, sender = processes.Pipe(duplex=False)
                answers.append(receiver)
                child: BaseProcess = processes.Process(
                    target=_be_rank, args=(rank, world_size, store.port, task, sender, stacks), daemon=True
                )
                child.start()
                children.append(child)
                sender.close()  # so that the end of the child is the end of the pipe
            return _collect(answers, children, deadline, Path(stacks))
        finally:
            for child in children:
                child.kill()
                child.join()
            for answer in answers:
                answer.close()


def _collect(answers: list[Connection], children: list[BaseProcess], deadline: float, stacks: Path) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, BaseException]] = []
    while len(results) < len(answers):
        waiting = [answer for rank, answer in enumerate(answers) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready and failures:
            break
        if not ready:
            where = "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(stacks.iterdir()))
            silent = [rank for rank in range(len(answers)) if rank not in results]
            raise TimeoutError(f"ranks {silent} are not done after {PATIENCE_S} s\n{where}")
        for rank, answer in enumerate(answers):
            if answer not in ready:
                continue
            try:
                moment, error, results[rank] = pickle.loads(answer.recv_bytes())
            except EOFError:
                children[rank].join()
                error = RuntimeError(f"rank {rank} died with exit status {children[rank].exitcode}")
                moment, results[rank] = 0.0, None  # what the others say of it came after
            if error is not None:
                failures.append((moment, rank, error))
                deadline = min(deadline, time.monotonic() + ECHO_S)
    if failures:
        raise min(failures, key=lambda failure: failure[:2])[2]
    return [results[rank] for rank in range(len(answers))]


def _be_rank(rank: int, world_size: int, port: int, task: bytes, sender: Connection, stacks: str) -> None:
    with open(Path(stacks) / f"rank {rank}", "w") as stack:
        faulthandler.dump_traceback_later(0.7 * PATIENCE_S, file=stack)
        try:
            answer = pickle.dumps((0.0, None, _call(rank, world_size, port, task)))
        except BaseException as error:
            answer = pickle.dumps((time.monotonic(), _portable(error, rank), None))
        sender.send_bytes(answer)
        faulthandler.cancel_dump_traceback_later()
    sender.close()
    sys.stdout.flush()
    os._exit(0)  # no tidying of process groups whose other ends may be gone


def _call(rank: int, world_size: int, port: int, task: bytes) -> Any:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the host's name resolves to
    torch.set_num_threads(1)
    world = World(this_process())
    world.join(ParallelConfig())
    function, args = pickle.loads(task)
    result = function(world, *args)
    world.leave()
    return result


def _portable(error: BaseException, rank: int) -> BaseException:
    """The error with its traceback as a note; one that cannot travel becomes a RuntimeError."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"on rank {rank}:\n{trace}")
    return error
