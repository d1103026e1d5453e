"""The ways to walls that stand on this machine, and what lies outside of them."""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import SandboxUnavailableError
from luthier.sandbox import sandbox as machine
from luthier.sandbox.program import Limits
from luthier.sandbox.sandbox import Sandbox
from luthier.sandbox.tiers import Steps, Tier, UnreachableError, ways
from luthier.sandbox.zygotes import LostError
from tests.architecture.source import REPOSITORY

LENT = "/dev/full"
"""In the place of a GPU: a device that every machine has, no guest may open, and any may be lent."""
WAYS = {
    "bubblewrap": Tier.A,
    "lent": Tier.A,
    "namespaces": Tier.B,
    "root": Tier.B,
    "bare": Tier.B,
}
SMALL = Limits(seconds=20.0, cpu_seconds=20.0)
"""Enough for anything short, on a machine that is very busy."""


def steps_of(way: str) -> Steps:
    """The steps of a way. Skips where this machine does not have it."""
    try:
        for steps in ways(WAYS[way]):
            if (way in ("bubblewrap", "lent")) == bool(steps.bubblewrap) and steps.walls == _WALLS[way]:
                return steps
    except SandboxUnavailableError as failure:
        pytest.skip(str(failure))
    pytest.skip("only root that may mount has this way")


_WALLS = {"bubblewrap": "", "lent": "", "namespaces": "user", "root": "root", "bare": ""}


def opened(way: str, limits: Limits = SMALL, **more: Any) -> Sandbox:
    """A sandbox by this way. Skips, with the kernel's reason, where its walls cannot be built here."""
    steps = steps_of(way)
    devices = [LENT] if way == "lent" else []
    if devices and not Path(LENT).exists():
        pytest.skip(f"there is no {LENT}")
    try:
        return Sandbox(limits, steps, more.pop("workers", 1), more.pop("preload", ()), more, devices).proved()
    except (LostError, UnreachableError) as failure:
        pytest.skip(f"{steps}: {failure}")


def strongest(limits: Limits = SMALL, **more: Any) -> Sandbox:
    """The sandbox that users get. Skips where there is none."""
    try:
        return machine.open_sandbox(limits, **{"workers": 1, **more})
    except SandboxUnavailableError as failure:
        pytest.skip(str(failure))


@pytest.fixture(
    scope="module",
    params=[way if way != "lent" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS],
)
def walled(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox of each way in turn."""
    with opened(request.param) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """The strongest that stands here."""
    with strongest() as found:
        yield found


class Outside:
    """Things that every user of this machine may reach: a file, a port, sockets. They notice whoever does."""

    def __init__(self, folder: Path) -> None:
        self.secret = secrets.token_hex(16)
        folder.chmod(0o755)
        self.file = folder / "file"
        self.file.write_text(self.secret)
        self.file.chmod(0o666)
        name = f"luthier-test-{secrets.token_hex(6)}"
        self.port = socket.create_server(("127.0.0.1", 0))
        self.stream = _bound(str(folder / "stream"), socket.SOCK_STREAM)
        self.datagrams = _bound(str(folder / "datagrams"), socket.SOCK_DGRAM)
        self.abstract = _bound("\0" + name, socket.SOCK_STREAM)
        self.abstract_datagrams = _bound(f"\0{name}-datagrams", socket.SOCK_DGRAM)
        for path in folder.iterdir():
            path.chmod(0o777)
        self._sockets = (self.port, self.stream, self.datagrams, self.abstract, self.abstract_datagrams)
        for one in self._sockets:
            one.setblocking(False)
        self.folder = folder
        self.facts = {
            "file": str(self.file), "folder": str(folder), "port": self.port.getsockname()[1], "abstract": name,
            "socket": str(folder / "stream"), "datagrams": str(folder / "datagrams"), "home": str(Path.home()),
            "process": os.getpid(), "group": os.getpgid(0), "checkout": str(REPOSITORY),
        }  # fmt: skip
        self._kernel = _switches()
        self._before = self._state()

    def reached(self) -> str:
        """What somebody got at since the last question; empty when nothing."""
        found = [name for name, one in zip(_NAMES, self._sockets, strict=True) if _touched(one)]
        if self._state() != self._before:
            found.append("the folder")
            self._before = self._state()
        return ", ".join(found)

    def switched(self) -> bool:
        """Whether the kernel's switches are others than at the start."""
        return _switches() != self._kernel

    def _state(self) -> object:
        about = self.file.stat() if self.file.exists() else None
        kept = (about.st_mode, about.st_uid, about.st_size, about.st_mtime_ns, about.st_nlink) if about else None
        return kept, sorted(path.name for path in self.folder.iterdir()), self.file.read_text() if about else ""

    def close(self) -> None:
        for one in self._sockets:
            one.close()


_NAMES = ("the port", "the socket", "the datagram socket", "the abstract socket", "the abstract datagram socket")


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    """In a folder that others may enter, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp(prefix="luthier-outside-"))
    found = Outside(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_OF_THE_TESTS", found.secret)
        yield found
    found.close()
    shutil.rmtree(folder)


def unwalled(source: str, outside: Outside) -> str:
    """What a program prints that is run with no walls at all, as the user that guests are: the negative control."""
    drop = {"user": 65_534, "group": 65_534, "extra_groups": ()} if os.geteuid() == 0 else {}
    real = str(Path(sys.executable).resolve())
    interpreter = real if _readable(real) or not drop else "/usr/bin/python3"
    if not Path(interpreter).exists():
        pytest.skip("no interpreter that another user can run")
    done = subprocess.run(
        [interpreter, "-c", source], capture_output=True, text=True, timeout=60, cwd="/", check=False, **drop
    )
    return done.stdout + done.stderr


@functools.cache
def _readable(path: str) -> bool:
    return all(part.stat().st_mode & 0o001 for part in (Path(path), *Path(path).parents))


def as_json(facts: dict[str, Any]) -> str:
    """Facts as they stand in a prelude."""
    return json.dumps(facts)


def _bound(address: str, kind: int) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, kind)
    one.bind(address)
    if kind == socket.SOCK_STREAM:
        one.listen()
    return one


def _touched(one: socket.socket) -> bool:
    try:
        if one.type == socket.SOCK_DGRAM:
            return bool(one.recv(99))
        one.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def _switches() -> dict[str, str]:
    return {name: Path("/proc/sys/kernel", name).read_text() for name in ("core_pattern", "modprobe", "hostname")
            if Path("/proc/sys/kernel", name).exists()}  # fmt: skip
