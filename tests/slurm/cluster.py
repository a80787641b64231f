"""A real SLURM on this one machine: a controller and two nodes, without systemd, cgroups or a database.

Debian builds slurmd so that several can run on one host (`slurmd -N NAME`, one port each). The processes of a node
are this machine's, so a job really runs, is signalled, requeued and killed by SLURM itself. Everything it writes
lies under one temporary directory; `stop` ends every process that has to do with that directory.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

NODES = ("n0", "n1")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
START_PATIENCE_S = 30.0
STOP_PATIENCE_S = 5.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")

SLURM_CONF = """\
ClusterName=llamatrain-test
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/run/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/run/slurmctld.pid
SlurmdPidFile={directory}/run/slurmd.%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
SlurmdParameters=config_overrides
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a SLURM of one's own needs root"
    absent = [program for program in PROGRAMS if _which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian's slurm-wlm and munge)"
    return None


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


class Cluster:
    """Started by `start`, or as a context manager; commands of SLURM run in `environment`."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-test-"))
        self.directory.chmod(0o755)  # munged refuses a socket in a directory that others cannot enter
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
            "SLURM_CONF": str(self.directory / "slurm.conf"),
        }

    def __enter__(self) -> "Cluster":
        with ExitStack() as on_failure:
            on_failure.callback(self.stop)
            self.start()
            on_failure.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------------ start and stop

    def start(self) -> None:
        """Returns when both nodes are idle. Raises RuntimeError with the logs' last lines if they do not come."""
        for name in ("state", "log", "run", *(f"spool/{node}" for node in NODES)):
            (self.directory / name).mkdir(parents=True)
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        run, log = self.directory / "run", self.directory / "log"
        self._spawn(
            "munged",
            f"--key-file={key}",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--log-file={log}/munged.log",
            f"--seed-file={run}/munged.seed",
        )
        controller_port, *node_ports = _free_ports(1 + len(NODES))
        (self.directory / "slurm.conf").write_text(
            SLURM_CONF.format(
                directory=self.directory,
                host=socket.gethostname().split(".")[0],
                controller_port=controller_port,
                node_ports=",".join(map(str, node_ports)),
            )
        )
        self._spawn("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        try:
            wait_until(lambda: self._idle_nodes() == set(NODES), "both nodes are idle", START_PATIENCE_S)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{self.logs()}") from None

    def start_node(self, node: str) -> None:
        self._spawn("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """End all that runs on a node at once and without a word, as a loss of power would."""
        own = f"{self.directory}/run/slurmd.{node}.pid"
        daemon = int(Path(own).read_text())
        marks = (f"SLURMD_NODENAME={node}\0".encode(), f"{self.directory}/spool/{node}/", f"slurmd.{node}.log")
        for pid in [daemon, *(pid for pid in self.processes() if _has(pid, *marks))]:
            _kill(pid, signal.SIGKILL)

    def _spawn(self, program: str, *arguments: str) -> None:
        path = _which(program)
        assert path is not None
        done = subprocess.run(
            [path, *arguments], env=self.environment, cwd=self.directory, capture_output=True, text=True, timeout=30
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} did not start: {done.stderr}{done.stdout}")

    def _idle_nodes(self) -> set[str]:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %T"], env=self.environment, capture_output=True, text=True, timeout=30
        )
        return {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" idle")}

    def stop(self) -> None:
        """End all of it, jobs included, whatever state it is in, and remove the directory."""
        for command in (["scancel", "--signal=KILL", "--full", "-u", "root"], ["scontrol", "shutdown"]):
            with suppress(subprocess.TimeoutExpired):  # what is left is killed below
                subprocess.run(command, env=self.environment, capture_output=True, timeout=10)
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + STOP_PATIENCE_S
            while (left := self.processes()) and time.monotonic() < deadline:
                for pid in left:
                    _kill(pid, number)
                time.sleep(0.2)
        shutil.rmtree(self.directory, ignore_errors=True)

    def processes(self) -> list[int]:
        """Every process that was started with this cluster's directory in its environment, arguments or files."""
        own = {os.getpid(), os.getppid()}
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in pids if pid not in own and self._belongs_here(pid)]

    def _belongs_here(self, pid: int) -> bool:
        mark = str(self.directory)
        process = Path(f"/proc/{pid}")
        try:
            if (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
            texts = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            if mark.encode() in texts:
                return True
            # slurmstepd writes its title over its environment
            return any(os.readlink(link).startswith(mark) for link in [process / "cwd", *(process / "fd").iterdir()])
        except OSError:  # it has ended meanwhile
            return False

    def logs(self, lines: int = 20) -> str:
        """The last lines of every daemon's log."""
        tails = {path.name: path.read_text().splitlines()[-lines:] for path in (self.directory / "log").iterdir()}
        return "\n".join(f"--- {name}\n" + "\n".join(tail) for name, tail in tails.items())

    # ------------------------------------------------------------------ jobs

    def command(self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """The output of one of SLURM's commands. Raises RuntimeError with what it said if it fails."""
        done = subprocess.run(
            [str(argument) for argument in arguments],
            env={**self.environment, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{arguments[0]}: {done.stderr}{done.stdout}")
        return done.stdout

    def submit(self, *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> "Job":
        number = self.command("sbatch", "--parsable", *arguments, cwd=cwd, env=env).strip()
        return Job(self, int(number))


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.number = cluster, number

    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, Reason ..."""
        line = self.cluster.command("scontrol", "show", "job", "--oneliner", str(self.number))
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    @property
    def state(self) -> str:
        return self.fields()["JobState"]

    @property
    def output(self) -> str:
        path = Path(self.fields()["StdOut"])
        return path.read_text() if path.exists() else ""

    def signal_batch_shell(self, name: str) -> None:
        self.cluster.command("scancel", f"--signal={name}", "--batch", str(self.number))

    def cancel(self) -> None:
        self.cluster.command("scancel", str(self.number))

    def wait_for_requeue(self, restarts: int, patience_s: float) -> None:
        """Until SLURM has put the job back into the queue for the nth time; then start it without the usual hold."""
        wait_until(
            lambda: (found := self.fields())["Restarts"] == str(restarts) and found["JobState"] == "PENDING",
            f"job {self.number} is requeued",
            patience_s,
            self.explain,
        )
        # slurmd counts in whole seconds: it takes a start in the second of the requeue for the one that was revoked
        time.sleep(2)
        self.cluster.command("scontrol", "update", f"jobid={self.number}", "StartTime=now")

    def wait(self, patience_s: float) -> str:
        """Until the job has ended for good; returns its state."""
        wait_until(lambda: self.state in ENDED, f"job {self.number} has ended", patience_s, self.explain)
        return self.state

    def explain(self) -> str:
        fields = {key: self.fields().get(key) for key in ("JobState", "Reason", "Restarts", "ExitCode", "StartTime")}
        return f"{fields}\n{self.output[-4000:]}\n{self.cluster.logs()}"


def wait_until(
    condition: Callable[[], bool], what: str, patience_s: float, explain: Callable[[], str] = lambda: ""
) -> None:
    """Raises TimeoutError, with what `explain` says, if the condition does not come true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience_s:.0f} s in vain until {what}\n{explain()}")
        time.sleep(0.1)


def _has(pid: int, variable: bytes, *paths: str) -> bool:
    """Whether a process has this in its environment, or one of these in the name of a file that it has open."""
    process = Path(f"/proc/{pid}")
    try:
        if variable in (process / "environ").read_bytes():
            return True
        opened = [os.readlink(link) for link in (process / "fd").iterdir()]
    except OSError:  # it has ended meanwhile
        return False
    return any(path in name for name in opened for path in paths)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for listener in opened:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in opened]


def _kill(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
