"""The process that becomes a sandbox and runs one program in it. Standard library only: it is started by its path.

`evaluation.sandbox` starts it with a bare interpreter and hands it the program on stdin. Three processes follow one
another. The *builder* leaves the host's namespaces (mount, pid, network, IPC, host name, cgroup; as an ordinary user
first into a user namespace, which lends it the rights). Its child, process 1 of the new pid namespace, makes a root
out of an empty tmpfs, read-only views of the interpreter and the system's libraries, and a /proc of its own; turns to
it, so that no other file of the host has a name any more; becomes nobody and drops every capability. As the *warden*
it then watches the clock, the memory, the processes and the output. Its child enters a user namespace of its own (so
nothing that was mounted belongs to it), takes limits and a system call filter on itself, and becomes the *program*.
When the warden leaves, the kernel kills whatever is left in its pid namespace.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import struct
import sys
import time

TYPE_CHECKING = False  # typing takes as long to import as all the rest, and this starts once for each program
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

POLL_S = 0.02
NOBODY = 65534
INSIDE_UID = 1000
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)  # by the warden

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 1024, 2048, 4096, 16384, 1 << 18, 1 << 21
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
SECCOMP_MODE_FILTER = 2

# What the interpreter runs. Its stdin is a secret and the program; the secret goes back only if the program has run to
# its end, so a program that leaves early, by any door and with any exit code, has not passed.
PROGRAM_RUNNER = """
def run():
    import os, sys
    secret, source = sys.stdin.buffer.read(32), sys.stdin.buffer.read()
    write, done = os.write, os.dup(3)
    os.set_inheritable(done, False)
    os.close(3)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdin = open(0)
    sys.argv = ["program.py"]
    module = sys.modules["program"] = type(sys)("program")
    exec(compile(source, "program.py", "exec"), module.__dict__)
    sys.stdout.flush()
    write(done, secret)
run()
"""

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The kernel does not give what the sandbox needs."""


def _call(name: str, *arguments: Any, said: str = "") -> int:
    """A function of the C library. Raises Refused."""
    result: int = getattr(libc, name)(*arguments)
    if result == -1:
        raise Refused(f"{said or name}: {os.strerror(ctypes.get_errno())}")
    return result


def _long(number: int) -> ctypes.c_ulong:
    return ctypes.c_ulong(number)


# --- the builder -----------------------------------------------------------------------------------------------------


def _leave_namespaces() -> None:
    """Into new namespaces; mounts belong to root if root started this, else to a user namespace of the caller's."""
    if os.geteuid() == 0:
        try:
            _call("unshare", NAMESPACES)
            return
        except Refused:  # root without the right to it, in a container: as nobody it may still be given
            _become_nobody()
    _enter_user_namespace()
    _call("unshare", NAMESPACES, said="new mount, pid, network, IPC, UTS and cgroup namespaces")


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", CLONE_NEWUSER, said="a new user namespace")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INSIDE_UID} {uid} 1"),
        ("gid_map", f"{INSIDE_UID} {gid} 1"),
    ):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            raise Refused(f"/proc/self/{name} of a new user namespace: {error.strerror}") from None


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("prctl", PR_SET_DUMPABLE, _long(1), _long(0), _long(0), _long(0))  # else /proc/self stays root's


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _call(
        "mount",
        encoded[0],
        encoded[1],
        encoded[2],
        _long(flags),
        encoded[3],
        said=f"mounting {target} ({kind or source})",
    )


def _show(path: str, root: str, *, device: bool = False) -> None:
    """A read-only view of a file or directory of the host, at the same place in the new root."""
    target = root + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    _mount(path, target, None, MS_BIND | MS_REC)
    for place in _mounts_under(target):  # what is mounted below comes along, writable as it is, hence each of them
        now = os.statvfs(place).f_flag
        kept = now & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME) | (
            MS_RELATIME if now & 4096 else 0
        )
        _mount(None, place, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | (0 if device else MS_NODEV) | kept)


def _mounts_under(target: str) -> list[str]:
    with open("/proc/self/mountinfo", "rb") as file:
        escaped = [line.split()[4] for line in file]
    places = [os.fsdecode(place.decode("unicode_escape").encode("latin-1")) for place in escaped]
    return [place for place in places if place == target or place.startswith(target + "/")]


def _build_root(root: str, task: dict[str, Any]) -> None:
    """A new root at the empty directory `root`, and turn to it."""
    _call("sethostname", b"sandbox", 7)
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir(root + "/tmp")
    _mount("none", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={task['disk_mib']}m,nr_inodes=4096,mode=1777")
    for path in task["links"]:
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(task["links"][path], root + path)
    for path in task["shown"]:
        _show(path, root)
    for path in task["hidden"]:
        if os.path.isdir(root + path):
            _mount("none", root + path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,mode=755")
    for path in ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"):
        _show(path, root, device=True)
    os.mkdir(root + "/proc")
    try:
        _mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid")
    except Refused:  # before Linux 5.8
        _mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    _call("syscall", ctypes.c_long(task["calls"]["pivot_root"]), b".", b".", said="pivot_root")
    _call("umount2", b".", MNT_DETACH, said="parting from the old root")
    _mount(None, "/", None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/tmp")


def _drop_capabilities(task: dict[str, Any]) -> None:
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, _long(capability), _long(0), _long(0), _long(0))  # who has none cannot, need not
    header = struct.pack("=Ii", 0x20080522, 0)
    _call("syscall", ctypes.c_long(task["calls"]["capset"]), header, bytes(24), said="dropping capabilities")
    _call("prctl", PR_SET_NO_NEW_PRIVS, _long(1), _long(0), _long(0), _long(0))


# --- the program -----------------------------------------------------------------------------------------------------


def _install_filter(code: list[list[int]]) -> None:
    raw = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(raw))
    _call(
        "prctl",
        PR_SET_SECCOMP,
        _long(SECCOMP_MODE_FILTER),
        program,
        _long(0),
        _long(0),
        said="a system call filter (seccomp)",
    )


def _become_program(task: dict[str, Any], source: int, output: int, done: int, report: int) -> NoReturn:
    """`source` becomes stdin, `output` stdout and stderr, `done` 3; `report` takes what goes wrong before."""
    try:
        os.setsid()
        away = [fcntl.fcntl(file, fcntl.F_DUPFD, 64) for file in (source, output, output, done, report)]
        for wanted, file in enumerate(away):
            os.dup2(file, wanted)
        report = 4
        os.set_inheritable(report, False)
        os.closerange(5, 4096)
        _enter_user_namespace()
        mib = 1 << 20
        limits = {
            resource.RLIMIT_CPU: (task["cpu_s"], task["cpu_s"] + 1),
            resource.RLIMIT_AS: task["memory_mib"] * mib,
            resource.RLIMIT_FSIZE: task["file_mib"] * mib,
            resource.RLIMIT_NPROC: task["processes"],
            resource.RLIMIT_NOFILE: task["open_files"],
            resource.RLIMIT_CORE: 1,  # byte; 0 would still wake a program of the host's that collects core dumps
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
            resource.RLIMIT_STACK: (8 * mib, 64 * mib),
        }
        _drop_capabilities(task)
        for limit, value in limits.items():
            resource.setrlimit(limit, value if isinstance(value, tuple) else (value, value))
        for number in IGNORED:
            signal.signal(number, signal.SIG_DFL)
        _install_filter(task["filter"])
        environment = {"HOME": "/tmp", "LANG": "C.UTF-8", "PATH": "/nowhere", "PYTHONHASHSEED": "0"}
        environment["MALLOC_ARENA_MAX"] = "1"  # else each thread reserves addresses, of which there is a limit
        python = task["python"]
        flags = ["-s", "-S", "-P", "-B", "-X", "utf8", "-c", PROGRAM_RUNNER, *task["marks"]]
        os.execve(python, [python, *flags], environment)
    except BaseException as error:
        _tell(report, {"refused": f"{error}"})
        os._exit(111)


# --- the warden ------------------------------------------------------------------------------------------------------


def _crowd() -> tuple[int, int]:
    """Threads of all processes of this pid namespace but the warden, and bytes of memory that they hold."""
    threads = pages = 0
    for name in os.listdir("/proc"):
        if name.isdecimal() and name != "1":
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:  # it has left meanwhile
                continue
            threads += int(fields[17])
            pages += int(fields[21])
    return threads, pages * os.sysconf("SC_PAGE_SIZE")


def _tell(file: int, verdict: dict[str, Any]) -> None:
    text = json.dumps(verdict).encode() + b"\n"
    while text:
        text = text[os.write(file, text) :]


def _watch(task: dict[str, Any], program: int, output: int, host: int) -> dict[str, Any]:
    """Until the program has ended or passed a limit. `host` is the pipe to the host: if nobody listens, all ends."""
    started, text, limit, ended = time.monotonic(), bytearray(), None, None
    poll = select.poll()
    poll.register(output, select.POLLIN)
    poll.register(host, 0)
    poll.register(os.pidfd_open(program), select.POLLIN)
    os.set_blocking(output, False)
    while ended is None and limit is None:
        ready = {file for file, _ in poll.poll(POLL_S * 1000)}
        if host in ready:
            os._exit(1)
        if output in ready:
            data = _some(output)
            text += data
            if not data:
                poll.unregister(output)
        limit = _limit_passed(task, len(text), time.monotonic() - started)
        ended = _reap(program)
    while ended and len(text) <= task["output_bytes"] and (data := _some(output)):  # what it wrote last
        text += data
    return {
        "limit": "output" if len(text) > task["output_bytes"] else limit,
        "status": ended[0] if ended else None,
        "cpu_s": ended[1].ru_utime + ended[1].ru_stime if ended else None,
        "seconds": time.monotonic() - started,
        "output": bytes(text[: task["output_bytes"]]).decode("utf-8", "replace"),
    }


def _limit_passed(task: dict[str, Any], written: int, seconds: float) -> str | None:
    threads, memory = _crowd()
    if written > task["output_bytes"]:
        return "output"
    if memory > task["memory_mib"] << 20:
        return "memory"
    if threads >= task["processes"]:
        return "processes"
    return "wall clock" if seconds > task["wall_s"] else None


def _reap(program: int) -> tuple[int, resource.struct_rusage] | None:
    """How the program ended, if it has, and what it used. Orphans, which come to process 1, are reaped as well."""
    found = None
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == program:
            found = status, usage
        if pid == 0:
            return found


def _some(file: int) -> bytes:
    try:
        return os.read(file, 65536)
    except BlockingIOError:
        return b""


def _warden(task: dict[str, Any], host: int) -> None:
    """Process 1 of the new pid namespace."""
    _call("prctl", PR_SET_PDEATHSIG, _long(signal.SIGKILL), _long(0), _long(0), _long(0))
    if os.getpid() != 1:
        raise Refused("a new pid namespace: the first process in it is not process 1")
    _build_root(task["root"], task)
    if os.geteuid() == 0:
        _become_nobody()
        _call("prctl", PR_SET_PDEATHSIG, _long(signal.SIGKILL), _long(0), _long(0), _long(0))  # another uid clears it
    _drop_capabilities(task)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    secret = os.urandom(16).hex().encode()
    source = os.open("/tmp", os.O_TMPFILE | os.O_RDWR, 0o600)
    with open(os.dup(source), "wb") as file:
        file.write(secret + task.pop("program").encode("utf-8", "replace"))
    os.lseek(source, 0, os.SEEK_SET)
    output, its_output = os.pipe()
    done, its_done = os.pipe()
    program = os.fork()
    if program == 0:
        _become_program(task, source, its_output, its_done, host)
    for end in (source, its_output, its_done):
        os.close(end)
    try:
        verdict = _watch(task, program, output, host)
        os.set_blocking(done, False)
        _tell(host, {**verdict, "completed": _some(done) == secret})
    except OSError:  # the program's doing, not the kernel's refusal: no answer, so it has not passed
        os._exit(1)


def main() -> None:
    host = int(sys.argv[1])
    task = json.loads(sys.stdin.buffer.read())
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out all the same, the sandbox goes first
        _leave_namespaces()
        _as_child(lambda: _warden(task, host), host)
    except (Refused, OSError) as error:
        _tell(host, {"refused": str(error)})


def _as_child(run: Callable[[], None], host: int) -> None:
    """`run` in a child; it has ended, and so have all it started, when this returns."""
    child = os.fork()
    if child:
        os.close(host)
        os.waitpid(child, 0)
        return
    try:
        run()
    except (Refused, OSError) as error:
        _tell(host, {"refused": str(error)})
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
