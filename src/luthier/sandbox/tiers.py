"""Which walls this machine allows: the tiers, and the steps to each.

Tier A is bubblewrap; tier B is Landlock with a filter of system calls, and namespaces where an ordinary user may have
them. Both start from a user of the host that owns nothing, and both end in the same lock (guest/zygote.py). There is no
tier C: where neither stands, nothing is run.
"""

from __future__ import annotations

import os
import platform
import pwd
import secrets
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from luthier.core.errors import SandboxUnavailableError
from luthier.sandbox.devices import SYSTEM
from luthier.sandbox.guest.filters import known
from luthier.sandbox.guest.kernel import landlock_version

FIX: Final = (
    "use Linux 5.13 or newer on x86_64 or aarch64, install bubblewrap (apt-get install bubblewrap), and let ordinary "
    "users have user namespaces or switch Landlock on"
)
_USERS: Final = range(64_200, 65_200)
"""Users that no distribution gives to anybody: one of them is what root becomes."""
_ADMIN: Final = 21
_LIBRARIES: Final = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_SETTINGS: Final = ("/etc/ld.so.cache", "/etc/alternatives")


class Tier(StrEnum):
    """How the walls are built."""

    A = "bubblewrap"
    B = "landlock"


@dataclass(frozen=True, slots=True)
class Steps:
    """The way to one tier on this machine."""

    tier: Tier
    bubblewrap: str = ""
    walls: str = ""
    """`user`: namespaces that an ordinary user makes; `root`: those that root makes before it steps down; or none."""

    @property
    def own_processes(self) -> bool:
        """Whether a candidate has processes, and a folder to write in, that vanish with it."""
        return bool(self.bubblewrap) or self.walls == "user"

    def __str__(self) -> str:
        how = {"user": " in namespaces", "root": " in root's namespaces", "": " without namespaces"}[self.walls]
        return self.tier.value + ("" if self.bubblewrap else how)


@dataclass(frozen=True, slots=True)
class View:
    """What a guest sees of the files of this machine, read-only: (where it is, where it is seen), and links."""

    folders: tuple[tuple[str, str], ...]
    links: dict[str, str]
    path: tuple[str, ...]
    interpreter: str


def ways(tier: Tier | None) -> Iterator[Steps]:
    """The steps to try, the strongest walls first. Raises SandboxUnavailableError where no tier can stand."""
    if sys.platform != "linux" or not known(platform.machine()):
        raise SandboxUnavailableError(f"{sys.platform} on {platform.machine()}", allowed=FIX)
    if tier in (None, Tier.A):
        found = shutil.which("bwrap")
        if found is not None:
            yield Steps(Tier.A, bubblewrap=found)
        elif tier is Tier.A:
            raise SandboxUnavailableError("bubblewrap is not installed", allowed=FIX)
    if tier in (None, Tier.B):
        if landlock_version():
            yield Steps(Tier.B, walls="user")
            if os.geteuid() == 0 and may_mount():
                yield Steps(Tier.B, walls="root")
            yield Steps(Tier.B)
        elif tier is Tier.B:
            raise SandboxUnavailableError("the kernel has no Landlock, or it is switched off", allowed=FIX)


def view(preload: Sequence[str], *, system: bool = False) -> View:
    """The interpreter, its libraries and, where modules are to be `preload`ed, the packages that we have.

    With `system`, for a device that is lent, what /sys tells of the machine, and the headers of Python too: Triton has
    a C compiler make the module with which it starts kernels.
    """
    prefix = os.path.realpath(sys.base_prefix)
    interpreter = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))] if preload else []
    # Of a prefix only what holds the interpreter and its libraries: it may be somebody's home.
    library = os.path.realpath(sysconfig.get_path("stdlib"))
    needed = ("/usr", f"{prefix}/lib", f"{prefix}/lib64", library, str(Path(interpreter).parent))
    devices = (SYSTEM, sysconfig.get_path("include"), sysconfig.get_path("platinclude")) if system else ()
    folders: list[str] = []
    links: dict[str, str] = {}
    for name in (*needed, *packages, *_SETTINGS, *devices):
        if Path(name).exists() and not any(Path(name).is_relative_to(other) for other in folders):
            folders.append(name)
    for name in _LIBRARIES:
        if Path(name).is_symlink():
            links[name] = str(Path(name).readlink())
        elif Path(name).is_dir():
            folders.append(name)
    path = (library, f"{library}/lib-dynload", *packages)
    return View(tuple((name, name) for name in folders), links, path, interpreter)


def lesser_user() -> int | None:
    """The user that root becomes, hardly ever the same one twice; None where we are an ordinary user already."""
    if os.geteuid() != 0:
        return None
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    free = [user for user in _USERS if user not in taken]
    return secrets.choice(free)


def may_mount() -> bool:
    """Whether we hold CAP_SYS_ADMIN, as root of a machine does and root of a container does not."""
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _ADMIN & 1)
    return False


class UnreachableError(Exception):
    """Walls that would stand, with an interpreter that an ordinary user cannot reach behind them."""


def must_be_reachable(seen: View) -> None:
    """Raises UnreachableError where an ordinary user could not read what a guest needs, and we may lend it nothing."""
    for folder, _ in seen.folders:
        for part in (Path(folder), *Path(folder).parents):
            if part.is_dir() and not part.stat().st_mode & 0o001:
                raise UnreachableError(
                    f"users other than root cannot read {folder}, because of {part}; install Python where all can "
                    "(/usr/local), or run luthier as an ordinary user"
                )
