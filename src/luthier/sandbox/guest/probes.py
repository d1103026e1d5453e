"""What nobody may be able to do in here: tried, one after the other, each time walls have been built.

Each probe is a small program that reaches for something outside. It succeeds when the kernel lets it; nothing is
written or changed by one that does. This file is run as a candidate is, by the same way.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

_NUMBERS = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "chroot": (161, 51), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "memfd_create": (319, 279), "io_uring_setup": (425, 425), "shmget": (29, 194),
    "pidfd_open": (434, 434), "mknodat": (259, 33),
}  # fmt: skip


def succeeded(facts: dict[str, Any]) -> list[str]:
    """The names of all probes that got what they reached for."""
    return [name for name, probe in _probes(facts).items() if _got(probe)]


def _got(probe: Callable[[], object]) -> bool:
    try:
        return bool(probe())
    except Exception:
        return False


def _probes(facts: dict[str, Any]) -> dict[str, Callable[[], object]]:
    probes = {**_files(facts), **_network(facts), **_kernel(), **_others(facts)}
    # The library of a GPU cannot do without.
    return {name: probe for name, probe in probes.items() if not facts["lent"] or name != "make a nameless file"}


def _files(facts: dict[str, Any]) -> dict[str, Callable[[], object]]:
    return {
        "read a file of the host": lambda: _opens(facts["file"], os.O_RDONLY),
        "write a file of the host": lambda: _opens(facts["file"], os.O_WRONLY),
        "list a folder of the host": lambda: os.listdir(facts["folder"]) or True,
        "make a file beside it": lambda: _opens(facts["folder"] + "/made", os.O_WRONLY | os.O_CREAT),
        "read /etc/shadow": lambda: _opens("/etc/shadow", os.O_RDONLY),
        "list the home": lambda: bool(set(os.listdir(facts["home"])) & set(facts["names"])),
        "write the standard library": lambda: _opens(json.__file__, os.O_RDWR),
        "write the interpreter": lambda: _opens(sys.executable, os.O_RDWR),
        "write core_pattern": lambda: _opens("/proc/sys/kernel/core_pattern", os.O_WRONLY),
        "write modprobe": lambda: _opens("/proc/sys/kernel/modprobe", os.O_WRONLY),
        "trigger sysrq": lambda: _opens("/proc/sysrq-trigger", os.O_WRONLY),
        "look through /proc/1/root": lambda: os.listdir("/proc/1/root"),
        "read the memory of process 1": lambda: os.getpid() != 1 and _opens("/proc/1/mem", os.O_RDONLY),
        "read the memory of the host": lambda: _opens("/dev/mem", os.O_RDONLY),
        "read a disk": lambda: _opens("/dev/vda" if os.path.exists("/dev/vda") else "/dev/sda", os.O_RDONLY),
        "share memory in /dev/shm": lambda: _opens("/dev/shm/probe", os.O_RDWR | os.O_CREAT),
        "open a container socket": lambda: _opens("/var/run/docker.sock", os.O_RDONLY),
    }


def _network(facts: dict[str, Any]) -> dict[str, Callable[[], object]]:
    return {
        "connect to a port": lambda: socket.create_connection(("127.0.0.1", facts["port"]), 0.5),
        "connect to a socket by name": lambda: _reaches("\0" + facts["abstract"]),
        "connect to a socket by path": lambda: _reaches(facts["socket"]),
        "open an IPv4 socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "open an IPv6 socket": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
        "open a raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
        "open a netlink socket": lambda: socket.socket(16, socket.SOCK_RAW, 0),
        "open a vsock": lambda: socket.socket(40, socket.SOCK_STREAM),
    }


def _kernel() -> dict[str, Callable[[], object]]:
    return {
        "trace": lambda: _call("ptrace", 0, 0, 0, 0) == 0,
        "make a user namespace": lambda: _call("unshare", 0x10000000) == 0,
        "make a mount namespace": lambda: _call("unshare", 0x00020000) == 0,
        "mount": lambda: _call("mount", b"tmpfs", b".", b"tmpfs", 0, None) == 0,
        "change the root": lambda: _call("chroot", b"/usr") == 0,
        "load a bpf program": lambda: _call("bpf", 0, b"\0" * 64, 64) != -1,
        "watch performance": lambda: _call("perf_event_open", b"\0" * 112, 0, -1, -1, 0) != -1,
        "handle page faults": lambda: _call("userfaultfd", 1) != -1,
        "keep a key": lambda: _call("add_key", b"user", b"probe", b"x", 1, -3) != -1,
        "make a nameless file": lambda: _call("memfd_create", b"probe", 0) != -1,
        "make an io_uring": lambda: _call("io_uring_setup", 1, b"\0" * 120) != -1,
        "share memory": lambda: _call("shmget", 0, 4096, 0o1600) != -1,
        "make a device": lambda: _call("mknodat", -100, b"null2", 0o20666, 0x103) == 0,
        "type into a terminal": lambda: fcntl.ioctl(0, 0x5412, b"x") is not None,
        "live on without the parent": lambda: ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0,
    }


def _others(facts: dict[str, Any]) -> dict[str, Callable[[], object]]:
    return {
        "be root": lambda: 0 in (os.getuid(), os.geteuid(), os.getgid()),
        "become root": lambda: _does(os.setuid, 0),
        "have capabilities": _capable,
        "see the environment of the host": lambda: set(os.environ) - set(facts["environment"]) - {"LC_CTYPE", "PWD"},
        "find a descriptor of the host": lambda: any(_open(number) for number in range(4, 1024)),
        "signal the host": lambda: _does(os.kill, facts["process"], 0),
        "signal the parent": lambda: os.getppid() > 1 and _does(os.kill, os.getppid(), 0),
        "read the memory of the parent": lambda: os.getppid() > 1 and _opens(f"/proc/{os.getppid()}/mem", os.O_RDONLY),
        "hold on to the host": lambda: _call("pidfd_open", facts["process"], 0) != -1,
    }


def _opens(path: str, flags: int) -> bool:
    os.close(os.open(path, flags, 0o600))
    return True


def _open(descriptor: int) -> bool:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETFD) >= 0
    except OSError:
        return False


def _does(call: Callable[..., object], *arguments: int) -> bool:
    call(*arguments)
    return True


def _reaches(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(address)
    return True


def _call(name: str, *arguments: int | bytes | None) -> int:
    number = _NUMBERS[name][os.uname().machine == "aarch64"]
    whole = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *whole))


def _capable() -> bool:
    held = ctypes.create_string_buffer(24)
    head = struct.pack("=Ii", 0x20080522, 0)
    number = 90 if os.uname().machine == "aarch64" else 125
    done = ctypes.CDLL(None).syscall(ctypes.c_long(number), head, held)
    return done == 0 and any(struct.unpack("=6I", held.raw))
