"""Which system calls a program in a sandbox may make: a filter for the kernel (seccomp). No torch.

It is a second wall. Forbidden is what a namespace does not count (memory files, System V memory, keys), what is
not cut by the network namespace (sockets of other families, a virtual machine's vsock), and the parts of the kernel
that no solution of a puzzle needs (mounts, tracing, bpf, io_uring, further namespaces).
"""

import errno
import platform

from llamatrain.errors import ConfigError

CLONE_NEW = 0x7E020000  # the flags of clone that make namespaces

# System calls by machine: audit architecture, then numbers (x86_64: asm/unistd_64.h; aarch64: the generic table).
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CALLS = {  # name: (x86_64, aarch64)
    "pivot_root": (155, 41),
    "capset": (126, 91),
    "clone": (56, 220),
    "clone3": (435, 435),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "prlimit64": (302, 261),
}
FORBIDDEN = {
    # memory that outlives its mappings, so that neither rlimits nor the warden see it
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "kcmp": (312, 272), "process_madvise": (440, 440), "move_pages": (279, 239), "migrate_pages": (256, 238),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41), "mount": (165, 40),
    "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "fanotify_init": (300, 262),
    # the kernel itself
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "syslog": (103, 116), "acct": (163, 89), "quotactl": (179, 60), "swapon": (167, 224), "swapoff": (168, 225),
    "reboot": (169, 142), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162), "personality": (135, 92),
    "lookup_dcookie": (212, 18), "vhangup": (153, 58),
}  # fmt: skip


def filter_instructions(machine: str) -> list[tuple[int, int, int, int]]:
    """The system call filter as classic BPF: (code, jump if true, jump if false, operand).

    It reads struct seccomp_data: the call's number at 0, the architecture at 4, argument n at 16 + 8n.
    """
    column = list(MACHINES).index(machine)
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # ld abs; jeq, jge, jset; ret
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050000
    calls = {name: numbers[column] for name, numbers in CALLS.items()}
    code = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":  # the numbers of its 32-bit pointer variant would pass for others
        code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]
    for numbers in FORBIDDEN.values():
        code += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse | errno.EPERM)]
    # clone3's flags lie in memory, which a filter cannot read: without it, libraries take clone
    code += [(equal, 0, 1, calls["clone3"]), (give, 0, 0, refuse | errno.ENOSYS)]
    code += [
        (equal, 0, 4, calls["clone"]),
        (load, 0, 0, 16),
        (any_bit, 0, 1, CLONE_NEW),
        (give, 0, 0, refuse | errno.EPERM),
    ]
    code += [(give, 0, 0, allow)]
    families = [1, 2, 10]  # unix, IPv4, IPv6
    for name in ("socket", "socketpair"):
        block = [(load, 0, 0, 16)]
        block += [(equal, len(families) - place, 0, family) for place, family in enumerate(families)]
        block += [(give, 0, 0, refuse | errno.EAFNOSUPPORT), (give, 0, 0, allow)]
        code += [(equal, 0, len(block), calls[name]), *block]
    # limits of its own only, not of the warden, whose user id may be the same
    code += [(equal, 0, 4, calls["prlimit64"]), (load, 0, 0, 16), (equal, 0, 1, 0), (give, 0, 0, allow)]
    code += [(give, 0, 0, refuse | errno.EPERM)]
    return [*code, (give, 0, 0, allow)]


def machine() -> str:
    """This machine, if there is a filter for it. Raises ConfigError."""
    if platform.machine() not in MACHINES:
        raise ConfigError(
            f"generated code cannot be run here: system calls are filtered on {' and '.join(MACHINES)} only, and this "
            f"is a {platform.machine()}"
        )
    return platform.machine()


def numbers(machine: str) -> dict[str, int]:
    """The system calls that a sandbox makes by number."""
    column = list(MACHINES).index(machine)
    return {name: CALLS[name][column] for name in ("pivot_root", "capset")}
