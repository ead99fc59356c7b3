"""Take away from this process everything a computation does not need, for good.

The order matters: resource limits, own namespaces, no capabilities, Landlock (which files may be read), and last the
seccomp filter, an allow-list of system calls. Resource limits and the filter must succeed; namespaces and Landlock are
further layers, used where the kernel grants them.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct

from .syscalls import AUDIT_ARCH, GUARDED, NUMBERS, PLAIN, UNKNOWN

TYPE_CHECKING = False  # as typing has it; importing typing would cost more than the rest
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x0800_0000, 0x1000_0000, 0x4000_0000
NAMESPACES = (("user", CLONE_NEWUSER), ("net", CLONE_NEWNET), ("ipc", CLONE_NEWIPC))
SIGKILL = 9
ALLOW, KILL, REFUSE, NO_SUCH_CALL = 0x7FFF_0000, 0x8000_0000, 0x0005_0000 | 1, 0x0005_0000 | 38  # EPERM, ENOSYS
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
Instruction = tuple[int, int, int, int]  # code, steps to skip if true, if false, constant


class Refused(Exception):
    """The kernel did not grant a layer that the sandbox cannot do without."""


def confine(limits: dict[str, int], readable: Sequence[str], parent: int) -> list[str]:
    """Confine this process; the names of the layers that hold. Raises Refused if the filter does not."""
    machine = os.uname().machine
    if machine not in AUDIT_ARCH:
        raise Refused(f"no table of system calls for {machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    libc.syscall.restype = ctypes.c_long
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    limit_resources(limits)
    layers = [name for name, flag in NAMESPACES if libc.unshare(flag) == 0]
    drop_capabilities(libc, machine)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise Refused("the kernel refused no_new_privs")
    if landlock(libc, readable):
        layers.append("landlock")
    install(libc, filter_program(machine, os.getpid()))
    return [*layers, "seccomp"]


def limit_resources(limits: dict[str, int]) -> None:
    """Address space and CPU time as given; no core file, no written file, no process, few descriptors."""
    fixed = {"CORE": 0, "FSIZE": 0, "NOFILE": 64, "NPROC": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
    for name, value in {**fixed, "AS": limits["memory"], "CPU": limits["cpu"]}.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
        most = bounded + 1 if name == "CPU" and bounded == value else bounded
        resource.setrlimit(which, (bounded, most if hard == resource.RLIM_INFINITY else min(most, hard)))


def drop_capabilities(libc: ctypes.CDLL, machine: str) -> None:
    """Give up every capability: root without them reads and kills no more than any owner of the same files."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x2008_0522, 0))
    nothing = ctypes.create_string_buffer(24)
    if libc.syscall(ctypes.c_long(NUMBERS["capset"][machine]), header, nothing) != 0:
        raise Refused("the kernel refused to drop capabilities")


def landlock(libc: ctypes.CDLL, readable: Sequence[str]) -> bool:
    """Let files be read below ``readable`` alone, and nothing be written, connected or signalled; False if absent."""

    def call(number: int, *args: object) -> int:
        wide = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
        return int(libc.syscall(ctypes.c_long(number), *wide))

    version = call(444, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    attributes = struct.pack("=QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    attributes = attributes[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = call(444, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes), 0)
    if ruleset < 0:
        return False
    for path in readable:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        read = (1 << 2) | (1 << 3) if os.path.isdir(path) else 1 << 2  # read files and list folders
        call(445, ruleset, 1, ctypes.create_string_buffer(struct.pack("=Qi", read, place)), 0)
        os.close(place)
    held = call(446, ruleset, 0) == 0
    os.close(ruleset)
    return held


def filter_program(machine: str, pid: int) -> list[Instruction]:
    """The seccomp filter: the calls a computation needs are allowed, some by their arguments; the rest is refused."""
    program: list[Instruction] = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL)]
    program.append((LOAD, 0, 0, 0))
    program += answer(numbers(PLAIN, machine), ALLOW)
    program += answer(numbers(UNKNOWN, machine), NO_SUCH_CALL)
    for name, (argument, forbidden_bits, allowed) in GUARDED.items():
        own = [pid] if allowed == ("own pid",) else [value for value in allowed if isinstance(value, int)]
        for number in numbers([name], machine):
            program += guard(number, argument, forbidden_bits, own)
    program += unset_pointer(NUMBERS["prlimit64"][machine], argument=2)
    return [*program, (RETURN, 0, 0, REFUSE)]


def numbers(names: Iterable[str], machine: str) -> list[int]:
    """The numbers of the calls that this machine has."""
    return [NUMBERS[name][machine] for name in names if machine in NUMBERS[name]]


def answer(calls: Iterable[int], verdict: int) -> list[Instruction]:
    """The same verdict for each of these calls."""
    return [step for number in calls for step in ((EQUAL, 0, 1, number), (RETURN, 0, 0, verdict))]


def guard(number: int, argument: int, forbidden_bits: int, allowed: Sequence[int]) -> list[Instruction]:
    """Allow a call if its argument has none of the bits, or (no bits given) is one of the allowed values."""
    if forbidden_bits:
        tests: list[Instruction] = [(ANY_BIT, 1, 0, forbidden_bits), (RETURN, 0, 0, ALLOW)]
    else:
        tests = answer(allowed, ALLOW)
    body = [(LOAD, 0, 0, 16 + 8 * argument), *tests, (RETURN, 0, 0, REFUSE)]
    return [(EQUAL, 0, len(body), number), *body]


def unset_pointer(number: int, argument: int) -> list[Instruction]:
    """Allow a call if its 64-bit argument is zero (here: limits may be read, not set)."""
    place = 16 + 8 * argument
    body = [(LOAD, 0, 0, place), (EQUAL, 0, 3, 0), (LOAD, 0, 0, place + 4), (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW)]
    return [(EQUAL, 0, len(body) + 1, number), *body, (RETURN, 0, 0, REFUSE)]


def install(libc: ctypes.CDLL, program: Sequence[Instruction]) -> None:
    """Load the filter; it holds for the rest of this process's life."""
    code = b"".join(struct.pack("=HBBI", *step) for step in program)
    steps = ctypes.create_string_buffer(code, len(code))
    whole = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(steps)))
    if libc.prctl(PR_SET_SECCOMP, 2, ctypes.addressof(whole), 0, 0) != 0:
        raise Refused(f"the kernel refused the seccomp filter (errno {ctypes.get_errno()})")
