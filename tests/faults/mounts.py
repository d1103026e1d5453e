"""File systems of our own, mounted for the length of a block; only root may."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.campaign import UnavailableError


def require_tmpfs(folder: Path) -> None:
    """Raise UnavailableError unless this process may mount a tmpfs."""
    if os.geteuid() != 0:
        raise UnavailableError("only root may mount a tmpfs")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with mounted("luthier-faults", folder / "probe", "-t", "tmpfs", "-o", "size=64k"):
            pass
    except (subprocess.CalledProcessError, FileNotFoundError) as failure:
        raise UnavailableError(f"no tmpfs can be mounted here: {failure}") from None


@contextlib.contextmanager
def mounted(what: object, place: Path, *options: str) -> Iterator[None]:
    """Mount a loop image, or what `options` say, on the folder `place` during the block."""
    place.mkdir(exist_ok=True)
    call("mount", *(options or ("-o", "loop")), what, place)
    try:
        yield
    finally:
        for _ in range(100):
            # Busy for a moment while the kernel still lets a process go that was killed here.
            gone = subprocess.run(["umount", str(place)], capture_output=True, check=False).returncode == 0
            if gone:
                break
            time.sleep(0.05)
        else:
            call("umount", "-l", place)
        place.rmdir()


def call(*command: object) -> None:
    """Run a program that says nothing unless it fails."""
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
