"""What is looked at before a run begins: machines, links, disk, clocks, packages; in seconds, and the odd one named.

Every rank looks at what it has, rank 0 judges (`llamatrain.preflight.findings`). First what can be seen without a
collective, for where ranks have other packages or folders the first collective may hang; then speeds. What cannot go
well is refused. A speed never is: it is measured in moments, on machines that others may use too, and a slow run may be
better than none.

A node or GPU that limps shows in the matrix product, beside the others' and the data sheet's; a link, in exchanges of
neighbours two by two. Error counts and throttle reasons are not read: torch does not tell them.
"""

import logging
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llamatrain.arithmetic import SAVED_BYTES, parameter_count, peak_flops
from llamatrain.checkpoint import commit
from llamatrain.config import RunConfig
from llamatrain.device import (
    PRECISIONS,
    be_deterministic,
    current_device,
    describe_environment,
    device_name,
    finish,
    memory_total_gib,
)
from llamatrain.distributed import World
from llamatrain.parallel.overlap import REPETITIONS, all_reduce_rate, seconds_of
from llamatrain.preflight.findings import Facts, Need, Speeds, judge_facts, judge_speeds, numbers, told
from llamatrain.run_directory import RunDirectory

log = logging.getLogger("llamatrain")

FILES_PER_RANK = 3
TOKEN = ".preflight"  # files of this name, and more, are written and removed
TOKEN_PATIENCE_S = 20.0  # for a file of rank 0 to be seen elsewhere
POLL_S = 0.02
CLOCK_ROUNDS = 3
WRITTEN = 4 << 20  # bytes, or a checkpoint's if that is less
# by device: rows and columns; products in a row, timed as one; bytes
PRODUCT_SIZE = {"cpu": 512, "cuda": 8192}
PRODUCTS = {"cpu": 1, "cuda": 16}
ALL_REDUCED = {"cpu": 2**20, "cuda": 2**27}
EXCHANGED = {"cpu": 2**20, "cuda": 2**26}


def preflight(config: RunConfig, directory: RunDirectory, world: World) -> None:
    """Look at everything, log it in a line, and what is odd, and put the numbers into the journal; all ranks call it.

    `config` is settled. Raises ConfigError, on all ranks, for what cannot go well.
    """
    began = time.monotonic()
    device = current_device(config.train.device)
    if config.train.deterministic:
        be_deterministic()  # before the first product: cuBLAS reads it once
    need = world.decide(lambda: room_needed(config, directory.checkpoints, world.size))
    facts = world.gather_to_leader(look(directory.path, device, world, written=min(WRITTEN, need.size)))
    odd = world.decide(lambda: judge_facts(facts or [], need, config.run_dir))
    speeds = world.gather_to_leader(measure(config.train.precision, device, world))
    if device.type == "cuda":  # what the run tells of its memory is to be its own
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if facts is None or speeds is None:
        return
    odd += judge_speeds(speeds, facts, device.type)
    found = numbers(speeds, facts, need)
    seconds = time.monotonic() - began
    if world.size > 1:  # alone there is nobody to compare with, and the journal has it
        log.info("preflight: %s; it took %.1f s", told(found), seconds)
    for warning in odd:
        log.warning("preflight: %s", warning)
    directory.record("preflight", seconds=seconds, warnings=odd, **found)


def room_needed(config: RunConfig, checkpoints: Path, ranks: int) -> Need:
    """How many checkpoints are to be there at most, at one time, beyond those that are; removes unfinished ones."""
    commit.clean(checkpoints)
    settings, there = config.checkpoint, commit.list_checkpoints(checkpoints)
    for_ever = config.total_steps // settings.keep_every_steps if settings.keep_every_steps else 0
    at_most = settings.keep_last + 1 + for_ever  # the oldest goes when the newest is whole
    ended = bool(there) and commit.step_of(there[0]) >= config.total_steps
    return Need(
        size=SAVED_BYTES * parameter_count(config.model),
        files=FILES_PER_RANK * ranks + 1,
        more=0 if ended else max(1, at_most - len(there)),
    )


# ---------------------------------------------------------------------- what can be seen


def look(run_dir: Path, device: torch.device, world: World, *, written: int) -> Facts:
    """What this rank sees of itself; all ranks call it."""
    environment = describe_environment(device)
    packages = {
        **{name: environment[name] for name in ("llamatrain", "python", "cuda")},
        **environment["packages"],
    }
    machine = {"the device": environment["device"], "its memory in GiB": round(memory_total_gib(device))}
    machine["the number of threads"] = environment["threads"]
    gpu, gpus_left, used_gib = None, 0, 0.0
    if device.type == "cuda":
        packages["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        gpus_left = max(0, torch.cuda.device_count() - world.process.local_world_size)
        free, total = torch.cuda.mem_get_info(device)
        used_gib = (total - free) / 2**30
    else:
        machine["its instructions"] = environment["cpu_capability"]
    rate, error = try_run_dir(run_dir, written, world)
    disk = os.statvfs(run_dir) if error is None else None
    return Facts(
        node=socket.gethostname(),
        packages=packages,
        machine=machine,
        gpu=gpu,
        gpus_left=gpus_left,
        used_gib=used_gib,
        written=rate,
        run_dir_error=error,
        free=disk.f_bavail * disk.f_frsize if disk else 0,
        free_files=disk.f_favail if disk and disk.f_files else None,
        clock_s=clock(world),
    )


def try_run_dir(run_dir: Path, size: int, world: World) -> tuple[float | None, str | None]:
    """Write into the run's folder, and look for what rank 0 wrote there. Returns bytes a second, and what is wrong.

    The first rank of each node writes and syncs `size` bytes.
    """
    name = world.decide(lambda: _fresh_name(run_dir))
    own = run_dir / (name if world.leads else f"{name}.{world.rank}")
    writes = world.leads or world.process.local_rank == 0
    rate = error = None
    try:
        if writes:
            content = os.urandom(size)
            began = time.perf_counter()
            with open(own, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            rate = size / (time.perf_counter() - began)
        deadline = time.monotonic() + TOKEN_PATIENCE_S
        while not (run_dir / name).exists():  # of a name never asked for before, no cache says that it is not there
            if time.monotonic() > deadline:
                error = f"does not see within {TOKEN_PATIENCE_S:.0f} s what rank 0 wrote there"
                break
            time.sleep(POLL_S)
    except OSError as refusal:
        error = f"cannot write there ({refusal.strerror})"
    if world.control is not None:
        dist.barrier(world.control)  # all have looked
    if writes:
        with suppress(OSError):
            own.unlink(missing_ok=True)
    return rate, error


def _fresh_name(run_dir: Path) -> str:
    with suppress(OSError):
        for left in run_dir.glob(f"{TOKEN}-*"):  # by a start that was killed
            left.unlink(missing_ok=True)
    return f"{TOKEN}-{uuid.uuid4().hex}"


def clock(world: World) -> tuple[float, ...]:
    """The time of day when all ranks have come to a barrier, a few times."""
    moments = []
    for _ in range(CLOCK_ROUNDS if world.control is not None else 0):
        dist.barrier(world.control)
        moments.append(time.time())
    return tuple(moments)


# ---------------------------------------------------------------------- what must be measured


def measure(precision: str, device: torch.device, world: World) -> Speeds:
    """What this rank's device and links do in a second; all ranks call it. A CPU alone has no equal."""
    alone, on_gpu = world.size == 1, device.type == "cuda"
    return Speeds(
        product=product_rate(precision, device) if on_gpu or not alone else None,
        peak=peak_flops(device_name(device)) if on_gpu and precision == "bf16" else None,
        all_reduce=all_reduce_rate(None, ALL_REDUCED[device.type], device) if not alone else None,
        link=link_rate(EXCHANGED[device.type], device, world) if not alone else None,
    )


def product_rate(precision: str, device: torch.device) -> float:
    """FLOP/s of large matrix products: the best of a few times, for what else runs here only takes away."""
    size, products = PRODUCT_SIZE[device.type], PRODUCTS[device.type]
    x, w, y = (torch.ones(size, size, dtype=PRECISIONS[precision], device=device) for _ in range(3))
    seconds = min(seconds_of(lambda: [torch.mm(x, w, out=y) for _ in range(products)], device))
    return 2 * size**3 * products / seconds


def link_rate(message: int, device: torch.device, world: World) -> float | None:
    """Bytes a second each way between this rank and the next, while each rank talks to one other; None for the last.

    Ranks 0 and 1, 2 and 3, … in one round, 1 and 2, 3 and 4, … in the other: a slow link slows its two ends alone.
    """
    sent, received = torch.zeros(message // 4, device=device), torch.zeros(message // 4, device=device)
    rate = None
    for first in (0, 1):
        to_the_next = (world.rank - first) % 2 == 0
        partner = world.rank + 1 if to_the_next else world.rank - 1
        there = world.rank >= first and partner < world.size
        seconds = []
        for _ in range(1 + REPETITIONS):
            dist.barrier(world.control)
            if there:
                began = time.perf_counter()
                _exchange(sent, received, partner)
                finish(device)
                seconds.append(time.perf_counter() - began)
        if there and to_the_next:
            rate = sent.nbytes / min(seconds[1:])
    return rate


def _exchange(sent: Tensor, received: Tensor, partner: int) -> None:
    operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
