"""The system calls that lock a process up, by ctypes: capabilities, limits, Landlock, mounts.

Idea: Python has none of these calls, and a compiled helper would have to be built for every machine. Each function is
one call of the kernel and raises OSError where that fails; what is locked when is decided in `zygote.py`.
Source: capabilities(7), landlock(7) and its ABI versions 1 to 7, mount_setattr(2), open_tree(2), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
from typing import Final

NEW_USER: Final = 0x10000000
NEW_MOUNTS: Final = 0x00020000
NEW_PIDS: Final = 0x20000000
NEW_NETWORK: Final = 0x40000000
NEW_IPC: Final = 0x08000000
NEW_NAMES: Final = 0x04000000
NEW_CGROUP: Final = 0x02000000

READ_ONLY: Final = 0x1
NO_SETUID: Final = 0x2
NO_DEVICES: Final = 0x4
NO_PROGRAMS: Final = 0x8
_BIND, _RECURSIVE, _PRIVATE, _DETACH = 0x1000, 0x4000, 0x40000, 2
_AT_RECURSIVE, _AT_FDCWD, _AT_EMPTY_PATH = 0x8000, -100, 0x1000

_SYSCALLS: Final = {
    "x86_64": {"pivot_root": 155, "capset": 126, "setns": 308, "unshare": 272},
    "aarch64": {"pivot_root": 41, "capset": 91, "setns": 268, "unshare": 97},
}
"""Only those that differ between machines; the newer ones have one number everywhere."""
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_OPEN_TREE, _MOVE_MOUNT, _OPEN_TREE_CLONE, _MOVE_FROM_DESCRIPTOR = 428, 429, 1, 4

_PDEATHSIG, _DUMPABLE, _NO_NEW_PRIVS, _BOUNDING_DROP, _AMBIENT, _AMBIENT_CLEAR = 1, 4, 38, 24, 47, 4
_LAST_CAPABILITY: Final = 63

# ---------------------------------------------------------------------------------------------- rights of Landlock
EXECUTE, WRITE, READ, LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_FOLDER, REMOVE_FILE, MAKE_FOLDER, MAKE_FILE, MAKE_LINK = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
REFER, TRUNCATE, DEVICE_CONTROL = 1 << 13, 1 << 14, 1 << 15
LOOK: Final = EXECUTE | READ | LIST
OWN: Final = (
    EXECUTE | WRITE | READ | LIST | REMOVE_FOLDER | REMOVE_FILE | MAKE_FOLDER | MAKE_FILE | MAKE_LINK | REFER | TRUNCATE
)
_OF_FILES: Final = EXECUTE | WRITE | READ | TRUNCATE | DEVICE_CONTROL


def called(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """The system call of this number; OSError with the kernel's words where it fails."""
    # Bare integers would be cut to 32 bits.
    whole = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    return _checked(_libc().syscall(ctypes.c_long(number), *whole))


def control(option: int, *arguments: int) -> int:
    """prctl(2)."""
    whole = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    return _checked(_libc().prctl(ctypes.c_int(option), *whole))


def end_with_parent(parent: int) -> None:
    """The kernel kills this process when the one that made it ends, whose pidfd is `parent`.

    One that has ended before it was asked for kills nobody any more. Its number would not tell: in a namespace of its
    own a process sees none of its parent.
    """
    control(_PDEATHSIG, 9)
    waiting = select.poll()
    waiting.register(parent, select.POLLIN)
    if waiting.poll(0):
        os._exit(69)


def set_dumpable(allowed: bool) -> None:
    """Whether processes of the same user may look into this one (its memory, its descriptors in /proc)."""
    control(_DUMPABLE, int(allowed))


def no_new_privileges() -> None:
    """No program that is started from here on gets more rights than we have: setuid bits are void."""
    control(_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Give up every capability for good: bounding, ambient, inheritable, permitted, effective."""
    for capability in range(_LAST_CAPABILITY + 1):
        try:
            control(_BOUNDING_DROP, capability)
        except OSError:
            break  # past the last one that this kernel knows, or not ours to drop
    control(_AMBIENT, _AMBIENT_CLEAR)
    called(_SYSCALLS[os.uname().machine]["capset"], struct.pack("=Ii", 0x20080522, 0), bytes(24))


def unshare(kinds: int) -> None:
    """Leave the namespaces of these kinds for new ones."""
    called(_SYSCALLS[os.uname().machine]["unshare"], kinds)


def enter(descriptor: int, kinds: int) -> None:
    """Enter the namespaces of a process (by its pidfd)."""
    called(_SYSCALLS[os.uname().machine]["setns"], descriptor, kinds)


def become(user: int) -> None:
    """Change from root to this user and the group of the same number, for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


# -------------------------------------------------------------------------------------------------------- mounting
def keep_mounts_to_ourselves() -> None:
    """What is mounted from here on is seen in this namespace only."""
    _mount(None, "/", None, _RECURSIVE | _PRIVATE, None)


def mount_memory(folder: str, size: int, *, entries: int = 0) -> None:
    """An empty file system in memory, of at most this many bytes (and files)."""
    most = f",nr_inodes={entries}" if entries else ""
    _mount("tmpfs", folder, "tmpfs", NO_SETUID | NO_DEVICES, f"size={size},mode=0755{most}")


def mount_processes(folder: str) -> None:
    """The /proc of our own process namespace."""
    _mount("proc", folder, "proc", NO_SETUID | NO_DEVICES | NO_PROGRAMS, None)


def bind(source: int, target: str) -> None:
    """What the descriptor `source` (O_PATH, opened in this namespace) stands for, to be seen at `target` too."""
    _mount(f"/proc/self/fd/{source}", target, None, _BIND | _RECURSIVE, None)


def taken_along(folder: str) -> int:
    """What is seen at `folder`, held by a descriptor, to be put in its place again once that was covered."""
    return called(_OPEN_TREE, _AT_FDCWD, folder.encode(), _OPEN_TREE_CLONE | os.O_CLOEXEC)


def put_at(held: int, folder: str) -> None:
    """Let what `taken_along` holds be seen at `folder`, and close it."""
    called(_MOVE_MOUNT, held, b"", _AT_FDCWD, folder.encode(), _MOVE_FROM_DESCRIPTOR)
    os.close(held)


def restrict_mount(target: str, attributes: int) -> None:
    """Make a mount, and those below it, read-only, without setuid and without devices, as `attributes` say."""
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)
    called(_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, wanted, len(wanted))


def make_root(folder: str) -> None:
    """Let a mounted folder be the root, and forget the old one."""
    os.chdir(folder)
    called(_SYSCALLS[os.uname().machine]["pivot_root"], b".", b".")
    _checked(_libc().umount2(b".", _DETACH))
    os.chdir("/")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    said = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    _checked(_libc().mount(said[0], said[1], said[2], ctypes.c_ulong(flags), said[3]), target)


# -------------------------------------------------------------------------------------------------------- Landlock
def landlock_version() -> int:
    """The version of Landlock that the kernel offers; 0 where it has none or it is switched off."""
    try:
        return called(_LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return 0


def landlock(version: int, places: list[tuple[int, int]]) -> None:
    """Allow these places only (O_PATH descriptors, rights); no TCP, no signals to others, none of their sockets."""
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    asked = struct.pack("=QQQ", handled, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = called(_LANDLOCK_CREATE, asked, len(asked), 0)
    try:
        for descriptor, rights in places:
            folder = os.stat(descriptor).st_mode & 0o170000 == 0o040000
            allowed = rights & handled & (handled if folder else _OF_FILES)
            called(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, descriptor), 0)
        called(_LANDLOCK_RESTRICT, rules, 0)
    finally:
        os.close(rules)


def _checked(result: int, about: str = "") -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), about or None)
    return int(result)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
