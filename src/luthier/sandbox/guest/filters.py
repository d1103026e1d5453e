"""Which system calls a candidate may make: a list of what is allowed, all else is refused by the kernel.

Idea: calls that nobody thought of, and those that future kernels bring, are refused too. What remains are files,
memory, time, threads, waiting, and pipes between its own processes: no sockets but pairs, no tracing, no keys, no
namespaces, no mounting, no signals to others.
Source: seccomp(2); numbers of x86_64 from asm/unistd_64.h, of aarch64 from asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import Final

from luthier.sandbox.guest.kernel import control

_MACHINES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""The column of the tables below, and how the kernel calls the machine."""

# Name, number on x86_64, number on aarch64 (- where there is none). The name is for the reader.
_ALLOWED: Final = """
read 0 63; write 1 64; readv 19 65; writev 20 66; pread64 17 67; pwrite64 18 68; preadv 295 69; pwritev 296 70;
preadv2 327 286; pwritev2 328 287; lseek 8 62; open 2 -; openat 257 56; openat2 437 437; close 3 57;
close_range 436 436; creat 85 -; stat 4 -; fstat 5 80; lstat 6 -; newfstatat 262 79; statx 332 291; access 21 -;
faccessat 269 48; faccessat2 439 439; readlink 89 -; readlinkat 267 78; getdents 78 -; getdents64 217 61;
getcwd 79 17; chdir 80 49; fchdir 81 50; rename 82 -; renameat 264 38; renameat2 316 276; mkdir 83 -; mkdirat 258 34;
rmdir 84 -; unlink 87 -; unlinkat 263 35; link 86 -; linkat 265 37; symlink 88 -; symlinkat 266 36; dup 32 23;
dup2 33 -; dup3 292 24; flock 73 32; fsync 74 82; fdatasync 75 83; ftruncate 77 46; fallocate 285 47; umask 95 166;
statfs 137 43; fstatfs 138 44; pipe 22 -; pipe2 293 59; copy_file_range 326 285; sendfile 40 71; fadvise64 221 223;
poll 7 -; ppoll 271 73; select 23 -; pselect6 270 72; epoll_create 213 -; epoll_create1 291 20; epoll_ctl 233 21;
epoll_wait 232 -; epoll_pwait 281 22; epoll_pwait2 441 441; eventfd 284 -; eventfd2 290 19; timerfd_create 283 85;
timerfd_settime 286 86; timerfd_gettime 287 87; signalfd 282 -; signalfd4 289 74;
mmap 9 222; mprotect 10 226; munmap 11 215; mremap 25 216; madvise 28 233; brk 12 214; msync 26 227; mincore 27 232;
membarrier 324 283; getpid 39 172; getppid 110 173; gettid 186 178; getuid 102 174; geteuid 107 175; getgid 104 176;
getegid 108 177; getresuid 118 148; getresgid 120 150; getgroups 115 158; getpgid 121 155; getpgrp 111 -;
getsid 124 156; wait4 61 260; waitid 247 95; exit 60 93; exit_group 231 94; rt_sigaction 13 134;
rt_sigprocmask 14 135; rt_sigreturn 15 139; rt_sigpending 127 136; rt_sigsuspend 130 133; rt_sigtimedwait 128 137;
sigaltstack 131 132; pause 34 -; set_tid_address 218 96; set_robust_list 273 99; rseq 334 293; futex 202 98;
futex_waitv 449 449; arch_prctl 158 -; getrlimit 97 163; setrlimit 160 164; getrusage 98 165; times 100 153;
sysinfo 99 179; uname 63 160; getcpu 309 168; sched_yield 24 124; sched_getaffinity 204 123; sched_getparam 143 121;
sched_getscheduler 145 120; sched_get_priority_max 146 125; sched_get_priority_min 147 126; getpriority 140 141;
capget 125 90; clock_gettime 228 113; clock_getres 229 114; clock_nanosleep 230 115; nanosleep 35 101;
gettimeofday 96 169; time 201 -; alarm 37 -; setitimer 38 103; getitimer 36 102; timer_create 222 107;
timer_settime 223 110; timer_gettime 224 108; timer_delete 226 111; timer_getoverrun 225 109; getrandom 318 278;
restart_syscall 219 128; recvfrom 45 207; recvmsg 47 212; shutdown 48 210; getsockname 51 204; getpeername 52 205;
getsockopt 55 209; setsockopt 54 208
"""
# Their paths are not under Landlock: only where the candidate has a file system of its own.
_WITH_OWN_FILES: Final = "chmod 90 -; fchmod 91 52; fchmodat 268 53; utimensat 280 88; utime 132 -; utimes 235 -"
_WITH_OWN_PROCESSES: Final = "fork 57 -; vfork 58 -; execve 59 221; setsid 112 157; setpgid 109 154"
# What the library of a GPU asks for before it opens one: files without a name, where its memory is to lie, threads that
# are bound to cores, and the socket of a service of its maker. That is not there: a socket leads to nothing.
_WITH_LENT: Final = """
memfd_create 319 279; get_mempolicy 239 236; set_mempolicy 238 237; mbind 237 235; sched_setaffinity 203 122;
connect 42 203
"""
_SOCKET: Final = (41, 198)
_CLONE, _CLONE3, _KILL, _TGKILL, _TKILL = (56, 220), (435, 435), (62, 129), (234, 131), (200, 130)
_FCNTL, _IOCTL, _PRCTL, _PRLIMIT = (72, 25), (16, 29), (157, 167), (302, 261)
_SOCKETPAIR, _SENDTO = (53, 199), (44, 206)

_NEW_NAMESPACES: Final = 0x7E020080
_THREAD: Final = 0x00010000
_FCNTL_COMMANDS: Final = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032, 1033, 1034)
"""Not among them: F_SETOWN and F_SETSIG, which send signals to others, leases and notices."""
_IOCTL_REQUESTS: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Terminal or not, its size, bytes waiting, non-blocking, close on exec. Not TIOCSTI, which types for others."""
_PRCTL_OPTIONS: Final = (3, 15, 16, 21, 23, 30, 39, 41, 42, 0x53564D41)
"""Names of threads and of memory, and questions. Not PR_SET_PDEATHSIG, which binds us to our parent."""

_GPU_KIND, _UVM_NUMBERS, _UVM_BEGIN, _UVM_END = ord("F") << 8, 256, 0x30000001, 0x30000002

_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_PASS, _KILL_PROCESS, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_SECCOMP, _FILTER = 22, 2

Instruction = tuple[int, int, int, int]


def known(machine: str) -> bool:
    """Whether the numbers of this machine's system calls are known here."""
    return machine in _MACHINES


def program(machine: str, *, own_files: bool, own_processes: bool, process: int, lent: bool) -> bytes:
    """The filter for the process of this number, which may signal itself, and where `own_processes` any of its own.

    Where a GPU is `lent` to it, it may send the requests that the GPU's driver knows, and do what its library does.
    """
    column, name = _MACHINES[machine]
    made: list[Instruction] = [
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, name), (_RETURN, 0, 0, _KILL_PROCESS), (_LOAD, 0, 0, 0),
        # Numbers of the x32 interface reach the same calls by another name.
        (_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _REFUSE),
    ]  # fmt: skip
    plain = [_ALLOWED, _WITH_OWN_FILES if own_files else "", _WITH_OWN_PROCESSES if own_processes else "",
             _WITH_LENT if lent else ""]
    for line in "; ".join(filter(None, plain)).split(";"):
        number = line.split()[1 + column]
        if number != "-":
            made += [(_EQUAL, 0, 1, int(number)), (_RETURN, 0, 0, _PASS)]
    judged = {
        # The flags of clone3 lie in memory, where no filter sees them; libc then takes clone.
        _CLONE3: [(_RETURN, 0, 0, _UNKNOWN)],
        _CLONE: _cloning(own_processes),
        _KILL: [(_RETURN, 0, 0, _PASS)] if own_processes else _signalling(process, 1),
        _TKILL: [(_RETURN, 0, 0, _PASS)] if own_processes else _signalling(process, 1),
        _TGKILL: [(_RETURN, 0, 0, _PASS)] if own_processes else _signalling(process, 2),
        _FCNTL: _one_of(1, _FCNTL_COMMANDS),
        _IOCTL: [*(_of_gpu() if lent else ()), *_one_of(1, _IOCTL_REQUESTS)],
        _PRCTL: _one_of(0, _PRCTL_OPTIONS),
        _PRLIMIT: _one_of(0, (0,)),
        _SOCKETPAIR: _one_of(0, (1,)),
        _SOCKET: _one_of(0, (1,) if lent else ()),
        # An address would reach a socket of the host; between the two of a pair there is none.
        _SENDTO: [(_LOAD, 0, 0, 48), (_EQUAL, 0, 3, 0), (_LOAD, 0, 0, 52), (_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _PASS),
                  (_RETURN, 0, 0, _REFUSE)],
    }  # fmt: skip
    for numbers, block in judged.items():
        made += [(_EQUAL, 0, len(block), numbers[column]), *block]
    made.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in made)


def install(filters: bytes) -> None:
    """From here on, and for good, for this process and all it starts."""
    text = ctypes.create_string_buffer(filters, len(filters))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(filters) // 8, ctypes.addressof(text)))
    control(_SECCOMP, _FILTER, ctypes.addressof(head))


def _one_of(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allowed where the lower half of an argument is one of `values`; the kernel reads no more of these."""
    block: list[Instruction] = [(_LOAD, 0, 0, 16 + 8 * argument)]
    for value in values:
        block += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _PASS)]
    return [*block, (_RETURN, 0, 0, _REFUSE)]


def _of_gpu() -> list[Instruction]:
    """Requests of NVIDIA's driver: those of kind F, whatever their number and size, and the bare numbers of UVM."""
    return [
        (_LOAD, 0, 0, 24), (_AND, 0, 0, 0xFF00), (_EQUAL, 0, 1, _GPU_KIND), (_RETURN, 0, 0, _PASS),
        (_LOAD, 0, 0, 24), (_AT_LEAST, 1, 0, _UVM_NUMBERS), (_RETURN, 0, 0, _PASS),
        (_EQUAL, 1, 0, _UVM_BEGIN), (_EQUAL, 0, 1, _UVM_END), (_RETURN, 0, 0, _PASS),
    ]  # fmt: skip


def _signalling(process: int, argument: int) -> list[Instruction]:
    """To oneself, and not the one signal that ends a process from outside: so that who is ended by it was."""
    return [(_LOAD, 0, 0, 16), (_EQUAL, 1, 0, process), (_RETURN, 0, 0, _REFUSE), (_LOAD, 0, 0, 16 + 8 * argument),
            (_EQUAL, 0, 1, 9), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _PASS)]  # fmt: skip


def _cloning(own_processes: bool) -> list[Instruction]:
    """New threads, and new processes where they end with the candidate; never a new namespace."""
    rest: list[Instruction] = (
        [(_RETURN, 0, 0, _PASS)]
        if own_processes
        else [(_ANY_BIT, 0, 1, _THREAD), (_RETURN, 0, 0, _PASS), (_RETURN, 0, 0, _REFUSE)]
    )
    return [(_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), (_RETURN, 0, 0, _REFUSE), *rest]
