"""The way to the zygote: from whatever started us to a process that may do nothing to this machine.

Idea: root comes first down to a user that owns nothing, and takes along only views of what the guest may read: an
interpreter in root's home is seen by nobody else. Then bubblewrap builds the walls (tier A), or this file does (tier
B): with namespaces where the kernel lets an ordinary user have them, bare where it does not.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from typing import Any, Final

from luthier.sandbox.guest import kernel as k
from luthier.sandbox.guest import zygote

CONTROL: Final = 0
INSIDE: Final = "inside"
"""The word by which this file, started again by bubblewrap, knows that the walls are there."""
_LENDERS: Final = ("/tmp", "/mnt", "/var", "/srv", "/opt")
"""Folders of which one is there to be covered, in our own view of the files only."""


def start(settings: dict[str, Any]) -> None:
    """Go through the steps that `settings` name; the last one serves and does not return."""
    view = settings["view"]
    if INSIDE in sys.argv:
        settings.update(user=None, bubblewrap="")
    if settings["walls"] == "root":
        k.unshare(k.NEW_MOUNTS | k.NEW_NETWORK | k.NEW_IPC | k.NEW_NAMES)
        settings["statm"] = os.open("/proc/self/statm", os.O_RDONLY)
        _make_root(settings, view)
    if settings["user"] is not None:
        if settings["lend"]:
            _lend(view)
        k.become(settings["user"])
        k.set_dumpable(True)  # our own maps of users have to be written; it is taken back before anything runs
    if settings["bubblewrap"]:
        _bubblewrap(settings, view)
    if settings["walls"] == "user":
        _enter_namespaces()
        settings["statm"] = os.open("/proc/self/statm", os.O_RDONLY)
        _make_root(settings, view)
    os.chdir("/")
    k.set_dumpable(False)
    # The sources were read from it. Its number is the host's, and a guest would find it.
    os.close(int(sys.argv[1]))
    control = socket.socket(fileno=os.dup(CONTROL))
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, CONTROL)
    os.close(nothing)
    zygote.serve(control, settings)


def _lend(view: list[list[str]]) -> None:
    """As root: let an ordinary user reach `view` at its place, in this process and its children only.

    What lies in a folder that is closed to others, as root's home is, is seen there alone, with the rest of it hidden.
    """
    k.unshare(k.NEW_MOUNTS)
    k.keep_mounts_to_ourselves()
    closed = [(source, where) for source, _ in view if (where := _closed(source))]
    held = [(os.open(source, os.O_PATH), source) for source, _ in closed]
    for where in sorted({where for _, where in closed}):
        k.mount_memory(where, 1 << 20)
    for descriptor, source in held:
        _seen_through(descriptor, source, k.READ_ONLY | k.NO_SETUID | k.NO_DEVICES)


def _closed(path: str) -> str:
    """The outermost folder on the way to `path` that other users may not enter; empty where they may."""
    parts = path.split("/")
    for count in range(2, len(parts) + 1):
        folder = "/".join(parts[:count])
        if os.path.isdir(folder) and not os.stat(folder).st_mode & 0o001:
            return folder
    return ""


def _bubblewrap(settings: dict[str, Any], view: list[list[str]]) -> None:
    """Become bubblewrap, which starts this file again inside."""
    words = [
        settings["bubblewrap"], "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv",
        "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP", "--hostname", "guest",
    ]  # fmt: skip
    for name, value in settings["environment"].items():
        words += ["--setenv", name, value]
    for source, target in view:
        words += ["--ro-bind", source, target]
    for name, target in settings["links"].items():
        words += ["--symlink", target, name]
    words += ["--proc", "/proc", "--dir", settings["work"]]
    if not settings["lent"]:
        # Where a device is lent, a candidate gets a new /proc, which the kernel refuses beside one with covers.
        words += ["--ro-bind", "/proc/sys", "/proc/sys"]
    for name in settings["devices"]:
        words += ["--dev-bind", name, name]
    words += ["--remount-ro", "/", "--chdir", "/", "--", *settings["again"], INSIDE]
    os.execv(words[0], words)


def _enter_namespaces() -> None:
    """As an ordinary user: namespaces of every kind, owning nothing but ourselves. Goes on in a new process."""
    user, group = os.getuid(), os.getgid()
    k.unshare(k.NEW_USER | k.NEW_MOUNTS | k.NEW_PIDS | k.NEW_NETWORK | k.NEW_IPC | k.NEW_NAMES | k.NEW_CGROUP)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    parent = os.pidfd_open(os.getpid())
    process = os.fork()
    if process:
        os.close(CONTROL)
        _, status = os.waitpid(process, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    k.end_with_parent(parent)
    os.close(parent)


def _make_root(settings: dict[str, Any], view: list[list[str]]) -> None:
    """A root that holds nothing but `view` and a few devices, all of it read-only."""
    k.keep_mounts_to_ourselves()
    held = [(os.open(source, os.O_PATH), target) for source, target in view]
    devices = [(os.open(name, os.O_PATH), name) for name in settings["devices"]]
    root = _covered()
    for descriptor, target in held:
        _seen_through(descriptor, root + target, k.READ_ONLY | k.NO_SETUID | k.NO_DEVICES)
    for descriptor, target in devices:
        _seen_through(descriptor, root + target, k.NO_SETUID)
    for name, target in settings["links"].items():
        os.makedirs(os.path.dirname(root + name), exist_ok=True)
        os.symlink(target, root + name)
    for name in ("/proc", settings["work"]):
        os.makedirs(root + name, exist_ok=True)
    if settings["walls"] == "user":
        # A container hides parts of /proc, and then gives no other. Only the sum of memory needs it.
        with contextlib.suppress(OSError):
            k.mount_processes(root + "/proc")
    k.make_root(root)
    k.restrict_mount("/", k.READ_ONLY)


def _covered() -> str:
    """A folder that every machine has, with an empty one over it, in our own view of the files only."""
    folder = next(folder for folder in _LENDERS if os.path.isdir(folder))
    k.mount_memory(folder, 1 << 20)
    return folder


def _seen_through(descriptor: int, place: str, attributes: int) -> None:
    """Let what `descriptor` stands for be seen at `place` as well, and close the descriptor."""
    if os.stat(descriptor).st_mode & 0o170000 == 0o040000:
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "x"):
            pass
    k.bind(descriptor, place)
    k.restrict_mount(place, attributes)
    os.close(descriptor)


def main(settings: dict[str, Any]) -> None:
    """As `start`, with the reason on standard error where it fails."""
    try:
        start(settings)
    except BaseException as failure:
        where = failure.__traceback__
        steps = []
        while where is not None:
            steps.append(where.tb_frame.f_code.co_name.strip("_"))
            where = where.tb_next
        sys.stderr.write(f"{type(failure).__name__}: {failure} (in {', '.join(steps[2:])})\n")
        sys.stderr.flush()
        os._exit(70)
