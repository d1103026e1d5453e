"""The zygote: a warm interpreter, behind the walls already, that forks one locked-up process for each candidate.

Idea: starting an interpreter costs a hundred times what forking a warm one does. The zygote never reads what a
candidate is given: the new process reads it from its own channel, so nothing of one candidate is in the memory of the
next. It is trusted; what it forks gives up everything before the first line of a candidate is read.
Protocol (a packet each): `R` with three descriptors (channel, output, error output) and perhaps a fourth (input) runs
one; the answer is `S`, and at its end `E` with a JSON object of how it ended. `K` kills it. The end of the control
socket ends everything.
"""

from __future__ import annotations

import _sitebuiltins
import array
import builtins
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
from typing import Any, Final

from luthier.sandbox.guest import candidate, examiner
from luthier.sandbox.guest import kernel as k
from luthier.sandbox.guest.filters import install, program
from luthier.sandbox.guest.frames import send

CHANNEL: Final = 3
WARM: Final = (
    "abc", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools",
    "heapq", "io", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "textwrap",
    "typing", "unittest",
)  # fmt: skip
"""Modules that programs like to import: read once, shared by all."""
_LOOK_MILLISECONDS: Final = 50
"""How often the memory of a candidate that has many processes is added up."""
_HIGH: Final = 32
_DESCRIPTORS, _DESCRIPTORS_OF_GPUS = 256, 512


def serve(control: socket.socket, settings: dict[str, Any]) -> None:
    """Warm up, say so, and serve until the other end of `control` is closed."""
    sys.path[:] = settings["path"]
    for name in (*WARM, *settings["preload"]):
        importlib.import_module(name)
    # What Python's `site` gives to every program; the rest of it reads files that are not there.
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    zygote = _Zygote(control, settings)
    gc.collect()
    gc.freeze()
    control.send(b"W")
    while True:
        said, descriptors = _packet(control)
        if not said:
            os._exit(0)
        if said[:1] == b"R":
            zygote.run(descriptors)


class _Zygote:
    def __init__(self, control: socket.socket, settings: dict[str, Any]) -> None:
        self._control = control
        self._settings = settings
        self._own = settings["own_processes"]
        self._self = os.pidfd_open(os.getpid())
        self._nothing = os.open("/dev/null", os.O_RDWR)
        self._places = [(_raised(os.open(path, os.O_PATH), 2 * _HIGH), rights) for path, rights in settings["places"]]
        self._size = _address_space(settings["statm"])

    def run(self, descriptors: list[int]) -> None:
        """Fork one candidate, watch over it, say how it ended."""
        if self._own:
            # From the namespace of our own processes into a new one: its first process is the candidate.
            k.enter(self._self, k.NEW_PIDS)
            k.unshare(k.NEW_PIDS)
        process = os.fork()
        if process == 0:
            self._become(descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self._control.send(b"S")
        self._watch(process)

    def _watch(self, process: int) -> None:
        handle = os.pidfd_open(process)
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        waiting.register(self._control, select.POLLIN)
        over = False
        while True:
            ready = {descriptor for descriptor, _ in waiting.poll(_LOOK_MILLISECONDS if self._own else None)}
            if handle in ready:
                break
            if not ready:
                over = over or self._held_by_others() > self._settings["limits"]["memory_bytes"]
                if over:
                    os.kill(process, signal.SIGKILL)
                continue
            said, _ = _packet(self._control)
            if not said or said[:1] == b"K":
                os.kill(process, signal.SIGKILL)
                waiting.unregister(self._control)
                if not said:
                    os._exit(0)
        os.close(handle)
        _, status, used = os.wait4(process, 0)
        ended = {"status": os.waitstatus_to_exitcode(status), "cpu": used.ru_utime + used.ru_stime, "over": over}
        self._control.send(b"E" + json.dumps(ended).encode())

    def _held_by_others(self) -> int:
        """Bytes of memory that all processes of the candidate hold together, beyond what each got from us."""
        own = _own_pages("self")
        pages = 0
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) not in (1, os.getpid()):
                pages += max(_own_pages(name) - own, 0)
        return pages * resource.getpagesize()

    def _become(self, descriptors: list[int]) -> None:
        """In the new process: give up everything, then serve. Never returns."""
        channel = descriptors[0]
        try:
            self._lock(descriptors)
            channel = CHANNEL
            send(CHANNEL, {"is": "locked"})
        except BaseException as failure:
            send(channel, {"is": "broken", "why": f"{type(failure).__name__}: {failure}"})
            os._exit(70)
        try:
            (examiner if self._settings["examiner"] else candidate).serve(CHANNEL)
        except BaseException:
            os._exit(71)
        os._exit(0)

    def _lock(self, descriptors: list[int]) -> None:
        settings = self._settings
        k.end_with_parent(self._self)
        os.setsid()
        if settings["work"]:
            k.unshare(k.NEW_MOUNTS)
            k.mount_memory(settings["work"], settings["limits"]["file_bytes"], entries=settings["limits"]["files"])
            _hide_processes(settings["about"])
            os.chdir(settings["work"])
        self._arrange(descriptors)
        own = [(os.open(settings["work"], os.O_PATH), k.OWN)] if settings["work"] else []
        if settings["lent"]:
            own += [(os.open("/proc", os.O_PATH), k.READ | k.LIST)]
            own += [(os.open("/proc/self/task", os.O_PATH), k.READ | k.LIST | k.WRITE)]
        _limit(settings["limits"], self._size, counted=settings["counted"], lent=settings["lent"])
        k.drop_capabilities()
        k.no_new_privileges()
        if settings["landlock"]:
            k.landlock(settings["landlock"], [*self._places, *own])
        os.closerange(CHANNEL + 1, 4 * _HIGH)
        own_files, lent = bool(settings["work"]), settings["lent"]
        machine = os.uname().machine
        install(program(machine, own_files=own_files, own_processes=self._own, process=os.getpid(), lent=lent))

    def _arrange(self, descriptors: list[int]) -> None:
        """Standard input, output, error output and the channel where they belong."""
        channel, out, error, *stdin = [_raised(descriptor, _HIGH) for descriptor in descriptors]
        for number, descriptor in enumerate((stdin[0] if stdin else self._nothing, out, error, channel)):
            os.dup2(descriptor, number)


def _raised(descriptor: int, least: int) -> int:
    """The same under a higher number, where nothing that has its place below is in the way."""
    higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, least)
    os.close(descriptor)
    return higher


def _hide_processes(about: dict[str, str] | None) -> None:
    """Cover /proc: not even where the kernel has no Landlock shall it look at those who watch over it.

    Where a device is lent, texts `about` it stay in its place, and so does what is told there of this process itself:
    the library of a GPU gives its threads their names there, and ends where it cannot.
    """
    texts = about or {}
    itself = _itself() if about is not None else None
    pages = sum(1 + (len(text) >> 11) for text in texts.values())
    k.mount_memory("/proc", 4096 * (8 + pages), entries=8 + 8 * len(texts))
    for name, text in texts.items():
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "w", encoding="latin-1") as file:
            file.write(text)
    if itself is not None:
        os.makedirs("/proc/1")
        os.symlink("1", "/proc/self")
    k.restrict_mount("/proc", k.READ_ONLY)
    if itself is not None:
        k.put_at(itself, "/proc/1")


def _itself() -> int:
    """What /proc tells of this process, which is the first one of its namespace."""
    try:
        k.mount_processes("/proc")
    except OSError as failure:
        raise OSError(
            failure.errno, "no /proc of its own, which a device needs; a container gives it that is started with "
            "--security-opt systempaths=unconfined",
        ) from None  # fmt: skip
    return k.taken_along("/proc/1")


def _limit(limits: dict[str, Any], size: int, *, counted: bool, lent: bool) -> None:
    most = {
        resource.RLIMIT_AS: size + limits["memory_bytes"],
        resource.RLIMIT_CPU: max(1, -int(-limits["cpu_seconds"] // 1)),
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: _DESCRIPTORS,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if lent:
        # A GPU's library reserves addresses by the terabyte; what is really held is added up while it runs. It holds
        # on to pages, and opens each GPU many times.
        del most[resource.RLIMIT_AS], most[resource.RLIMIT_MEMLOCK]
        most[resource.RLIMIT_NOFILE] = _DESCRIPTORS_OF_GPUS
    if counted:
        most[resource.RLIMIT_NPROC] = limits["processes"] + limits["others"]
    for kind, value in most.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _own_pages(process: str) -> int:
    """Pages of a process that are no file's; 0 when it is gone, or there is no /proc to look into."""
    try:
        with open(f"/proc/{process}/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:
        return 0
    return resident - shared


def _address_space(statm: int | None) -> int:
    """Bytes of address space that this process has before any candidate; `statm` is /proc/self/statm, opened by us."""
    if statm is None:
        statm = os.open("/proc/self/statm", os.O_RDONLY)
    pages = int(os.pread(statm, 200, 0).split()[0])
    os.close(statm)
    return pages * resource.getpagesize()


def _packet(control: socket.socket) -> tuple[bytes, list[int]]:
    said, extra, _, _ = control.recvmsg(4096, socket.CMSG_SPACE(8 * 4))
    descriptors: list[int] = []
    for level, kind, data in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors += array.array("i", data[: len(data) - len(data) % 4])
    return said, descriptors
