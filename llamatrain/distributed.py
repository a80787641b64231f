"""The processes of a run, seen from one of them: how they meet, agree, and tell who failed first.

Two process groups: torch's default one, on which steps communicate (NCCL or gloo), and `control`, always gloo, on
which the hosts agree. One process alone has neither, and every method here is then the identity.

A launcher that restarts workers hands them the key-value store of the attempt before, in which keys of dead
processes still stand; torch would read addresses there at which nobody listens any more (docs/design.md). So the
ranks first agree, in a way that stale keys cannot disturb, on a name that nobody used before, and put everything
under it.
"""

import json
import logging
import os
import resource
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llamatrain.config.parallel import ParallelConfig
from llamatrain.errors import ConfigError, DistributedError, LlamatrainError
from llamatrain.files import sha256_of_json
from llamatrain.process import Process

log = logging.getLogger("llamatrain")

T = TypeVar("T")

# by the names of torch 2.13, which warns of the earlier ones
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# gloo's words for a peer that is gone
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Read error")
LAST_WORDS_S = 10
COLLECTIVES_RECORDED = 2000  # by torch's flight recorder, for the watchdog
POLL_S = 0.02  # between two looks at the store while the ranks meet


class World:
    """All processes of the run; alone until `join`."""

    def __init__(self, process: Process | None = None) -> None:
        self.process = process or Process()
        self.control: dist.ProcessGroup | None = None  # gloo, for agreements between the hosts
        self._store: dist.Store | None = None

    @property
    def rank(self) -> int:
        return self.process.rank

    @property
    def size(self) -> int:
        return self.process.world_size

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.process.leads

    def join(self, settings: ParallelConfig) -> None:
        """Meet the other ranks and make the process groups. Raises DistributedError if some do not come."""
        if self.size == 1:
            return
        _allow_open_files()
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(COLLECTIVES_RECORDED))
        host_timeout = timedelta(seconds=settings.host_timeout_s)
        self._store = meet(self.process, timeout=host_timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=self._store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=settings.timeout_s),
        )
        self.control = dist.new_group(backend="gloo", timeout=host_timeout)

    def aside(self, settings: ParallelConfig) -> "World":
        """The same processes with agreements of their own, for a thread beside training; all ranks call it."""
        world = World(self.process)
        if self.control is not None:
            world.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=settings.host_timeout_s))
        return world

    def leave(self) -> None:
        """Part in order, at the end of a run; after a failure processes just end, and whose it was has told it."""
        if self.control is not None:
            control, self.control = self.control, None
            try:
                dist.barrier(control)
            except RuntimeError as error:
                log.warning("another rank did not come to the end of the run (%s)", str(error).splitlines()[0])
                return
            dist.destroy_process_group()

    # ------------------------------------------------------------------ agreements between the hosts

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_to_leader(self, value: T) -> list[T] | None:
        """Every rank's value, in the order of ranks, on rank 0; None elsewhere. For what is long."""
        if self.control is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def decide(self, choose: Callable[[], T]) -> T:
        """What `choose` returns on rank 0, the only one to call it; the LlamatrainError it raises, all raise."""
        if self.control is None:
            return choose()
        answer: list[Any] = [None, None]
        if self.leads:
            try:
                answer[0] = choose()
            except LlamatrainError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, group=self.control)
        if answer[1] is not None:
            raise answer[1]
        choice: T = answer[0]
        return choice

    @contextmanager
    def together(self) -> Iterator[None]:
        """What every rank does at the same time: if some raise a LlamatrainError, all raise the lowest rank's."""
        own: LlamatrainError | None = None
        try:
            yield
        except LlamatrainError as error:
            own = error
        for rank, raised in enumerate(self.gather(own)):
            if raised is not None:
                raise own if own is not None and rank == self.rank else raised

    def sum(self, value: Tensor) -> Tensor:
        """Add up a device tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Raises ConfigError naming the first rank, and the keys, whose values differ from rank 0's."""
        if len(set(self.gather(sha256_of_json(values)))) == 1:
            return
        host = socket.gethostname()
        (_, first), *others = self.gather((host, dict(values)))
        rank, (host, other) = next((r, o) for r, o in enumerate(others, start=1) if o[1] != first)
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        told = "; ".join(f"{key} is {other.get(key)} there, {first.get(key)} on rank 0" for key in keys)
        raise ConfigError(f"rank {rank} on {host} has another {what}: {told}; start all ranks with the same command")

    # ------------------------------------------------------------------ failure

    def first_failure(self, error: BaseException) -> "Failure":
        """The failure that came first in the run: this one, unless another rank has told of its own before."""
        mine = Failure.of(error, rank=self.rank)
        if self._store is None:
            return mine
        try:
            first = self._store.compare_set("failure", "", json.dumps(asdict(mine)))
            return Failure(**json.loads(first))
        except Exception:  # the store went with its process: whoever was first, this one knows only itself
            return mine

    def failure_is_told(self) -> None:
        """Say that the first failure stands where people look, so that the other ranks may go."""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set("failure told", "")

    def wait_until_told(self) -> None:
        """Stay until then: a launcher ends all ranks when one exits, and the first may still be writing."""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.wait(["failure told"], timedelta(seconds=LAST_WORDS_S))


@dataclass(frozen=True)
class Failure:
    """What went wrong on a rank, as all ranks report it."""

    rank: int
    host: str
    message: str
    exit_code: int
    trace: str
    another_is_gone: bool = False  # this rank only noticed

    @classmethod
    def of(cls, error: BaseException, *, rank: int) -> "Failure":
        exit_code = error.exit_code if isinstance(error, LlamatrainError) else 1
        message = str(error) if isinstance(error, LlamatrainError) else f"{type(error).__name__}: {error}"
        another_is_gone = isinstance(error, RuntimeError) and any(words in message for words in PEER_LOST)
        if another_is_gone:
            message = f"another rank is gone without a word; what rank {rank} noticed: {message.partition('. ')[0]}"
        trace = "".join(traceback.format_exception(error))
        return cls(rank, socket.gethostname(), message, exit_code, trace, another_is_gone)


def meet(process: Process, *, timeout: timedelta) -> dist.Store:
    """A store under a name that these very processes agreed on. Raises DistributedError naming the ranks missing.

    Each rank announces a word of its own, and rank 0 answers each word with the name; an answer to a word of a
    dead process helps nobody and is repeated for the new one, and who has read the name says so under it.
    """
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    hosts_store = process.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            host, int(port), is_master=hosts_store, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
        name = _call_roll(store, process, timeout) if process.leads else _answer(store, process, timeout)
    except (RuntimeError, ValueError) as error:  # what torch's store raises when nobody answers
        raise DistributedError(
            f"rank {process.rank} on {socket.gethostname()} cannot meet the others at {host}:{port} within "
            f"{timeout.total_seconds():.0f} s ({str(error).splitlines()[0]}); are all nodes started, and can they "
            "reach that address?"
        ) from None
    return dist.PrefixStore(name, store)


def _call_roll(store: dist.Store, process: Process, timeout: timedelta) -> str:
    name = f"llamatrain/{uuid.uuid4().hex}"
    answered: dict[int, bytes] = {}
    missing = set(range(1, process.world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"llamatrain/word/{rank}"]):
                word = store.get(f"llamatrain/word/{rank}")
                if answered.get(rank) != word:
                    store.set(f"llamatrain/answer/{word.decode()}", name)
                    answered[rank] = word
            if store.check([f"{name}/here/{rank}"]):
                missing.discard(rank)
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)[:8])) + (" and others" if len(missing) > 8 else "")
            raise DistributedError(
                f"{len(missing)} of {process.world_size} processes did not come within "
                f"{timeout.total_seconds():.0f} s: rank {ranks}; look at their nodes, or raise parallel.host_timeout_s"
            )
        time.sleep(POLL_S)
    return name


def _answer(store: dist.Store, process: Process, timeout: timedelta) -> str:
    word = uuid.uuid4().hex
    store.set(f"llamatrain/word/{process.rank}", word)
    store.wait([f"llamatrain/answer/{word}"], timeout)
    name = store.get(f"llamatrain/answer/{word}").decode()
    store.set(f"{name}/here/{process.rank}", "")
    return name


def _allow_open_files() -> None:
    """Raise the limit as far as it goes: gloo takes two sockets for every other rank, and 1,024 is a usual limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_a_copy(tensor: Tensor) -> bool:
    """Whether another rank has the same values and comes first: of copies, one is written and counted.

    Raises ValueError for a sum that is not reduced yet.
    """
    if not isinstance(tensor, DTensor):
        return False
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"a sum that is not reduced yet ({tensor.placements})")
    coordinate = tensor.device_mesh.get_coordinate()
    return coordinate is None or any(
        place and placement.is_replicate() for place, placement in zip(coordinate, tensor.placements, strict=True)
    )


def local_part(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """The memory of a tensor on this rank, and where that box begins in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, [0] * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), list(offset)
