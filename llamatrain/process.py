"""Which process of how many this one is, as its launcher says in the environment. No torch.

torchrun, and any launcher that exports the same variables, sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT; without them the process is alone.
"""

import json
import os
import signal
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from llamatrain.errors import ConfigError

PROCESS_ID = uuid.uuid4().hex[:12]
TURN_S = 10.0  # how long others of a node let the first speak: about what its imports may take longer than theirs


@dataclass(frozen=True)
class Process:
    """One process of a launch."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those of its node
    local_world_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone prints, logs and decides."""
        return self.rank == 0


def this_process() -> Process:
    """Raises ConfigError for variables that contradict one another."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: value for name in names if (value := os.environ.get(name))}
    world_size = given.get("WORLD_SIZE", "1")
    if world_size != "1":
        missing = [name for name in (*names[:3], "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE={world_size} is set and {', '.join(missing)} is not: start with torchrun, "
                "which sets them all, or unset WORLD_SIZE"
            )
    try:
        rank, size, local_rank, local_size = (
            int(given.get(name, default)) for name, default in zip(names, "0101", strict=True)
        )
    except ValueError:
        raise ConfigError(f"the launcher's variables are not numbers: {given}; start with torchrun") from None
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={size}: start with torchrun, or unset both")
    return Process(rank, size, local_rank, local_size)


def attempt_id() -> str:
    """What tells one launch from the next: the same for all restarts of workers within it.

    LLAMATRAIN_ATTEMPT, if a launcher sets it (train.sbatch: SLURM's job and restart count); or torchrun's own process;
    or, for ranks that SLURM started itself, its job and restart count; or an id of this process.
    """
    if attempt := os.environ.get("LLAMATRAIN_ATTEMPT"):
        return attempt
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        # torchrun's run id is the word "none" by default, so it tells nothing apart
        return f"torchrun-{socket.gethostname()}-{os.getppid()}-{_start_time(os.getppid())}"
    job = os.environ.get("SLURM_JOB_ID")
    if job and os.environ.get("WORLD_SIZE"):
        return f"slurm-{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return f"process-{PROCESS_ID}"


def _start_time(pid: int) -> str:
    """When a process of this machine began, in clock ticks since boot: pids are used again, pairs are not."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]  # the name may hold anything
    return after_name.split()[19]


def write_error_file(message: str) -> None:
    """Tell torchrun why this process fails; its summary shows the text."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": content}), encoding="utf-8")


def speaks_for_its_node() -> bool:
    """Whether this process, about to leave with an error, is the one of its node to tell it; the others wait for it.

    The processes of a node fail alike, often before they have met, and torchrun ends all the rest as soon as one has
    left, though rank 0 may still be importing. So the node's first has its turn, and if it does not come, whoever is
    quickest. Who speaks makes a file where torchrun keeps this attempt's error files; nobody leaves before it is there.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:  # no torchrun: nobody else to speak, or no place to agree on it
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here it takes moments, and who is to speak shall
    told, deadline = Path(path).parent.parent / "told", time.monotonic() + TURN_S
    while os.environ.get("LOCAL_RANK", "0") != "0" and not told.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        told.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # better twice than never
        return True
    return True
