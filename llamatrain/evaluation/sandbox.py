"""Programs that a model has written, run where they can do no harm. No torch.

Each program gets a sandbox of its own, made by `evaluation.sandbox_process`: new user, mount, pid, network and IPC
namespaces, an ordinary user's rights or fewer, a system call filter, limits, a clock. It sees the interpreter, its
standard library and the system's libraries, all read-only, and an empty /tmp that vanishes with it; no other file, no
network, no environment, no other process. What it leaves running dies with its sandbox.

A program has passed if it ran to its end, which it cannot claim by an exit code. Code that means to deceive can still
do so by examining its own interpreter, as it could by objects that equal everything.

There is no weaker mode: where the kernel refuses, so does `Sandboxes`, with the reason.
"""

import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from llamatrain.errors import ConfigError
from llamatrain.evaluation import system_calls

PROCESS = Path(__file__).with_name("sandbox_process.py")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/nix/store")
HIDDEN = ("/usr/lib/python3/dist-packages",)
GRACE_S = 20.0  # beyond the program's clock, for making and clearing the sandbox on a busy machine
NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts")

# Which limit it was, by the last line of a traceback
SIGNS = {
    "MemoryError": "memory",
    "can't start new thread": "processes",
    "[Errno 11]": "processes",
    "[Errno 12]": "memory",
    "[Errno 24]": "open files",
    "[Errno 27]": "file size",
    "[Errno 28]": "disk space",
}

PROBE = """
import ctypes, collections, hashlib, heapq, itertools, json, math, os, random, re, socket, string, threading, typing
facts = {name: os.readlink(f"/proc/self/ns/{name}") for name in %r}
facts.update(uid=os.getuid(), pids=[int(n) for n in os.listdir("/proc") if n.isdigit()], sees=os.path.exists(%r))
facts.update(networks=[line.split(":")[0].strip() for line in open("/proc/self/net/dev") if ":" in line])
print(json.dumps(facts))
"""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_s: float = 10.0
    cpu_s: int = 3  # of one process
    memory_mib: int = 1024  # addresses of one process; memory of all of them
    processes: int = 32  # and threads
    open_files: int = 64  # of one process
    file_mib: int = 16  # a file
    disk_mib: int = 32  # /tmp, which is memory
    output_kib: int = 64  # stdout and stderr


PATIENT = Limits(wall_s=60.0, cpu_s=30)  # for looking about, on a machine however busy


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: str  # "passed", "over the limit of CPU time", or the last line it wrote
    limit: str | None  # the limit that ended it
    output: str
    seconds: float


class Sandboxes:
    """`with Sandboxes() as sandboxes: sandboxes.run_all(programs)`. Raises ConfigError where there can be none."""

    def __init__(self, limits: Limits | None = None, *, workers: int | None = None) -> None:
        self._limits = limits or Limits()
        self._workers = workers or max(1, len(os.sched_getaffinity(0)))
        self._root = ""

    def __enter__(self) -> "Sandboxes":
        if sys.platform != "linux":
            raise ConfigError(f"generated code is run on Linux only, and this is {sys.platform}")
        self._root = tempfile.mkdtemp(prefix="sandbox-")
        try:
            os.chmod(self._root, 0o755)
            self._ask()
        except BaseException:
            os.rmdir(self._root)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.rmdir(self._root)

    def run_all(self, programs: Sequence[str], *, description: str = "programs") -> list[Verdict]:
        """A verdict on each; several run at once."""
        with (
            ThreadPoolExecutor(self._workers) as pool,
            tqdm(total=len(programs), desc=description, unit="program", leave=False, disable=None) as bar,
        ):

            def run(program: str) -> Verdict:
                verdict = self.run(program)
                bar.update()
                return verdict

            try:
                return list(pool.map(run, programs))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def run(self, program: str, *, marks: Sequence[str] = (), limits: Limits | None = None) -> Verdict:
        """`marks` are further words of the program's command line, by which it is found among processes."""
        limits = limits or self._limits
        task = {
            **asdict(limits),
            **_view(),
            "root": self._root,
            "program": program,
            "marks": list(marks),
            "output_bytes": limits.output_kib << 10,
            "calls": system_calls.numbers(system_calls.machine()),
            "filter": system_calls.filter_instructions(system_calls.machine()),
        }
        lines, complaint = _converse(task, deadline_s=limits.wall_s + GRACE_S)
        answers = [json.loads(line) for line in lines.splitlines(keepends=True) if line.endswith(b"\n")]
        refused = next((answer["refused"] for answer in answers if "refused" in answer), None)
        if refused is not None:
            raise ConfigError(
                f"generated code cannot be run here, since the kernel or its rules refuse a sandbox: {refused}. On the "
                "host, see user.max_user_namespaces, kernel.unprivileged_userns_clone and "
                "kernel.apparmor_restrict_unprivileged_userns; in a container, its seccomp profile and masked /proc. "
                "Else leave out the tasks that run code"
            )
        if not answers:
            last = complaint.strip().rpartition("\n")[2]
            return Verdict(False, f"its sandbox was killed{last and f': {last}'}", "sandbox", "", 0.0)
        return _judge(answers[-1], limits)

    def _ask(self) -> None:
        """Run a program that looks about, and believe only what it saw."""
        with tempfile.NamedTemporaryFile(prefix="outside-") as outside:
            verdict = self.run(PROBE % (NAMESPACES, outside.name), limits=PATIENT)
        if not verdict.passed:
            raise ConfigError(
                f"generated code cannot be run here: the interpreter fails in a sandbox ({verdict.reason})"
            )
        facts = json.loads(verdict.output.splitlines()[-1])
        holes = [
            f"the host's {name} namespace" for name in NAMESPACES if facts[name] == os.readlink(f"/proc/self/ns/{name}")
        ]
        holes += ["the superuser's rights"] * (facts["uid"] == 0) + ["the host's files"] * facts["sees"]
        holes += [f"the network {name}" for name in facts["networks"] if name != "lo"] + ["other processes"] * (
            max(facts["pids"]) > 9
        )
        if holes:
            raise ConfigError(f"generated code cannot be run here: a sandbox would leave it {', '.join(holes)}")


def refusal() -> str | None:
    """Why generated code cannot be run on this machine; None if it can."""
    try:
        with Sandboxes():
            return None
    except ConfigError as error:
        return str(error)


def _view() -> dict[str, Any]:
    """What of the host a program sees, at the same paths: files and directories, links, and what is hidden in them."""
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    own = {os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)}
    wanted = [path for path in LIBRARIES if os.path.exists(path)]
    wanted += [f"{prefix}/{name}" for prefix in own for name in ("lib", "lib64") if os.path.isdir(f"{prefix}/{name}")]
    links = {path: os.readlink(path) for path in wanted if os.path.islink(path)}
    shown: list[str] = []
    for path in sorted({python, *wanted} - set(links)):
        if not any(path.startswith(f"{other}/") for other in shown):
            shown.append(path)
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    packages = {os.path.realpath(sysconfig.get_path(name, vars=base)) for name in ("purelib", "platlib")}
    return {"python": python, "shown": shown, "links": links, "hidden": sorted({*packages, *HIDDEN})}


def _converse(task: dict[str, Any], *, deadline_s: float) -> tuple[bytes, str]:
    """What a sandbox says on its pipe, and on stderr. When this returns, it and all in it are gone."""
    answer, its_end = os.pipe()
    deadline = time.monotonic() + deadline_s
    received = bytearray()
    try:
        process = subprocess.Popen(
            [task["python"], "-I", "-S", "-B", str(PROCESS), str(its_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(its_end,),
            start_new_session=True,
            env={},
        )
    except BaseException:
        os.close(answer)
        raise
    finally:
        os.close(its_end)
    try:
        assert process.stdin is not None and process.stderr is not None
        try:
            process.stdin.write(json.dumps(task).encode())
            process.stdin.close()
        except BrokenPipeError:
            pass
        while (left := deadline - time.monotonic()) > 0 and select.select([answer], [], [], left)[0]:
            data = os.read(answer, 65536)
            if not data:
                break
            received += data
        else:
            process.kill()
    except BaseException:
        process.kill()
        raise
    finally:
        os.close(answer)
        with process:  # waits for it, as it waits for all in the sandbox
            complaint = process.stderr.read().decode("utf-8", "replace") if process.stderr else ""
    return bytes(received), complaint


def _judge(answer: dict[str, Any], limits: Limits) -> Verdict:
    """From what the warden has seen."""
    output, seconds, limit, reason = answer["output"], answer["seconds"], answer["limit"], ""
    if answer["status"] is not None and limit is None and not answer["completed"]:
        code = os.waitstatus_to_exitcode(answer["status"])
        lines = output.strip().splitlines()
        # the kernel counts for this limit in ticks, which on a busy machine are not what cpu_s says
        if -code == signal.SIGXCPU or (-code == signal.SIGKILL and answer["cpu_s"] >= limits.cpu_s / 2):
            limit = "CPU time"
        elif code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
        elif code == 0:
            reason = "left before its end with exit code 0"
        else:
            reason = lines[-1][:500] if lines else f"exit code {code}"
            limit = next((limit for sign, limit in SIGNS.items() if sign in reason), None)
    if limit is not None:
        reason = f"over the limit of {limit}" + (f": {reason}" if reason else "")
    passed = bool(answer["completed"]) and limit is None
    return Verdict(passed, "passed" if passed else reason, limit, output, seconds)
