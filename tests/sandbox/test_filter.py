"""The seccomp filter as a program: interpreted here for both machines, whichever this one is."""

from __future__ import annotations

import errno
import os

import pytest

from consilience.sandbox.child.confine import ALLOW, KILL, NO_SUCH_CALL, REFUSE, Instruction, filter_program
from consilience.sandbox.child.syscalls import AUDIT_ARCH, GUARDED, NUMBERS, PLAIN, UNKNOWN

PID = 4321
MACHINES = tuple(AUDIT_ARCH)


def verdict(program: list[Instruction], arch: int, number: int, *args: int) -> int:
    """The classic BPF machine over struct seccomp_data, little-endian."""
    data = {0: number, 4: arch}
    for place in range(6):
        value = args[place] if place < len(args) else 0
        data[16 + 8 * place], data[20 + 8 * place] = value & 0xFFFF_FFFF, value >> 32 & 0xFFFF_FFFF
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, constant = program[at]
        at += 1
        if code == 0x20:
            accumulator = data[constant]
        elif code == 0x15:
            at += if_true if accumulator == constant else if_false
        elif code == 0x45:
            at += if_true if accumulator & constant else if_false
        else:
            assert code == 0x06
            return constant


@pytest.mark.parametrize("machine", MACHINES)
def test_every_call_number_has_the_verdict_of_its_list(machine: str) -> None:
    program, arch = filter_program(machine, PID), AUDIT_ARCH[machine]
    assert len(program) < 4096  # the kernel's bound
    assert all(0 <= step <= 255 for _, a, b, _ in program for step in (a, b))
    plain = {NUMBERS[name][machine] for name in PLAIN if machine in NUMBERS[name]}
    unknown = {NUMBERS[name][machine] for name in UNKNOWN}
    judged = {NUMBERS[name][machine] for name in (*GUARDED, "prlimit64") if machine in NUMBERS[name]}
    for number in [*range(700), *range(0x4000_0000, 0x4000_0000 + 700), 2**32 - 1]:
        if number not in judged:
            expected = ALLOW if number in plain else NO_SUCH_CALL if number in unknown else REFUSE
            assert verdict(program, arch, number, PID, 0, 0) == expected


@pytest.mark.parametrize("machine", MACHINES)
def test_another_architecture_is_killed(machine: str) -> None:
    for arch in {*AUDIT_ARCH.values(), 0x4000_0003, 0} - {AUDIT_ARCH[machine]}:  # i386 among them
        assert verdict(filter_program(machine, PID), arch, NUMBERS["read"][machine]) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_arguments_decide(machine: str) -> None:
    program, arch = filter_program(machine, PID), AUDIT_ARCH[machine]

    def asked(name: str, *args: int) -> bool:
        result = verdict(program, arch, NUMBERS[name][machine], *args)
        assert result in (ALLOW, REFUSE)
        return result == ALLOW

    reading = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    writing = (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_WRONLY | os.O_APPEND, 3, os.O_TMPFILE | os.O_RDWR)
    assert asked("openat", 0, 0, reading)
    assert not any(asked("openat", 0, 0, reading | flag) for flag in writing)
    for name in ("kill", "tgkill"):
        assert asked(name, PID, PID, 9)
        assert not any(asked(name, pid, PID, 9) for pid in (0, 1, PID + 1, 2**32 - 1, 2**32 - PID))
    assert asked("prlimit64", 0, 7, 0, 1)
    assert not any(asked("prlimit64", 0, 7, pointer, 0) for pointer in (1, 1 << 32, 0x7FFF_0000_0000))
    assert asked("fcntl", 1, 1)  # F_GETFD
    assert not any(asked("fcntl", 1, command) for command in (8, 10, 15, 1024, 1031))  # owners, signals, leases, pipes
    assert asked("ioctl", 1, 0x5401)  # is it a terminal?
    assert not any(asked("ioctl", 1, command) for command in (0x5412, 0x541C, 0x5452))  # typing into one among them
    assert not any(asked("prctl", option) for option in (1, 4, 22, 38))


def test_refusals_are_the_errors_they_say() -> None:
    assert REFUSE & 0xFFFF == errno.EPERM
    assert NO_SUCH_CALL & 0xFFFF == errno.ENOSYS


@pytest.mark.skipif(not os.path.exists("/usr/include/asm-generic/unistd.h"), reason="needs the kernel's headers")
@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_the_kernels(machine: str) -> None:
    import re

    names = ["/usr/include/asm-generic/unistd.h"]
    if machine == "x86_64":
        names = ["/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"]
    path = next((name for name in names if os.path.exists(name)), None)
    if path is None:
        pytest.skip("no header for this machine")
    with open(path, encoding="utf-8") as file:
        listed = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", file.read())
    header: dict[str, set[int]] = {}
    for name, number in listed:
        header.setdefault(name, set()).add(int(number))
    alias = {"newfstatat": "fstatat"} if machine == "aarch64" else {}
    for name, numbers in NUMBERS.items():
        if machine in numbers:
            assert numbers[machine] in header.get(name, header.get(alias.get(name, ""), set())), name
