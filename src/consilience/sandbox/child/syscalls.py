"""System calls by name: their numbers on each machine, and what the sandbox's filter does with them.

Numbers are those of the kernel's tables (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
A call that stands in no list below is refused with EPERM: sockets, processes and threads, execve, signals to others,
every way to write, rename or remove a file, mounts, namespaces, io_uring, bpf, keys, ptrace, shared memory.
"""

from __future__ import annotations

AUDIT_ARCH = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}

_X86_64 = """
read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12
rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 ioctl 16 pread64 17 readv 19 writev 20 access 21 pipe 22 select 23
sched_yield 24 mremap 25 mincore 27 madvise 28 dup 32 dup2 33 pause 34 nanosleep 35 getitimer 36 alarm 37 setitimer 38
getpid 39 exit 60 kill 62 uname 63 fcntl 72 getcwd 79 readlink 89 umask 95 gettimeofday 96 getrlimit 97 getrusage 98
sysinfo 99 times 100 getuid 102 getgid 104 geteuid 107 getegid 108 getppid 110 getpgrp 111 getgroups 115 getpgid 121
getsid 124 capset 126 rt_sigpending 127 rt_sigtimedwait 128 rt_sigsuspend 130 sigaltstack 131 sched_getparam 143
sched_getscheduler 145 prctl 157 arch_prctl 158 gettid 186 tkill 200 time 201 futex 202 sched_getaffinity 204
getdents64 217 set_tid_address 218 restart_syscall 219 fadvise64 221 clock_gettime 228 clock_getres 229
clock_nanosleep 230 exit_group 231 tgkill 234 openat 257 newfstatat 262 readlinkat 267 faccessat 269 pselect6 270
ppoll 271 set_robust_list 273 dup3 292 pipe2 293 prlimit64 302 getcpu 309 getrandom 318 membarrier 324 statx 332
rseq 334 clone3 435 close_range 436 openat2 437 faccessat2 439
"""
_AARCH64 = """
getcwd 17 dup 23 dup3 24 fcntl 25 ioctl 29 faccessat 48 openat 56 close 57 pipe2 59 getdents64 61 lseek 62 read 63
write 64 readv 65 writev 66 pread64 67 pselect6 72 ppoll 73 readlinkat 78 newfstatat 79 fstat 80 capset 91 exit 93
exit_group 94 set_tid_address 96 futex 98 set_robust_list 99 nanosleep 101 getitimer 102 setitimer 103
clock_gettime 113 clock_getres 114 clock_nanosleep 115 sched_getscheduler 120 sched_getparam 121 sched_getaffinity 123
sched_yield 124 restart_syscall 128 kill 129 tkill 130 tgkill 131 sigaltstack 132 rt_sigsuspend 133 rt_sigaction 134
rt_sigprocmask 135 rt_sigpending 136 rt_sigtimedwait 137 rt_sigreturn 139 times 153 getpgid 155 getsid 156
getgroups 158 uname 160 getrlimit 163 getrusage 165 umask 166 prctl 167 getcpu 168 gettimeofday 169 getpid 172
getppid 173 getuid 174 geteuid 175 getgid 176 getegid 177 gettid 178 sysinfo 179 brk 214 munmap 215 mremap 216
mmap 222 fadvise64 223 mprotect 226 mincore 232 madvise 233 prlimit64 261 getrandom 278 membarrier 283 statx 291
rseq 293 clone3 435 close_range 436 openat2 437 faccessat2 439
"""


def _table() -> dict[str, dict[str, int]]:
    numbers: dict[str, dict[str, int]] = {}
    for machine, text in (("x86_64", _X86_64), ("aarch64", _AARCH64)):
        words = text.split()
        for name, number in zip(words[::2], words[1::2], strict=True):
            numbers.setdefault(name, {})[machine] = int(number)
    return numbers


NUMBERS = _table()
"""Call name to machine to number; a machine without the call is left out."""

UNKNOWN = ("clone3", "openat2")
"""Answered with ENOSYS, so that the C library falls back to the calls whose arguments a filter can see."""

GUARDED: dict[str, tuple[int, int, tuple[int | str, ...]]] = {
    "open": (1, 0o1103, ()),  # not for writing, creating or truncating
    "openat": (2, 0o1103, ()),
    "kill": (0, 0, ("own pid",)),
    "tgkill": (0, 0, ("own pid",)),
    "tkill": (0, 0, ("own pid",)),  # one thread: its id is the process's
    "fcntl": (1, 0, (0, 1, 2, 3, 4, 5, 6, 1030)),  # descriptors, their flags and locks; no owner, no pipe size
    "ioctl": (1, 0, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # terminal and descriptor questions
    "prctl": (0, 0, (15, 16, 0x5356_4D41)),  # name of this thread or of its memory
}
"""Calls allowed by one argument: its position, the bits it must not have, or else the values it may have."""

PLAIN = tuple(name for name in NUMBERS if name not in GUARDED and name not in (*UNKNOWN, "capset", "prlimit64"))
"""Calls allowed whatever their arguments."""
