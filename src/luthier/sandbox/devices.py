"""Device files that a program may have behind the walls, besides the four that every program has.

Idea: a GPU is reached through files of /dev and requests to its driver, which runs in the kernel. So it is let in only
where it is asked for, only these files, and of the requests only those that its driver knows: whoever is let at a GPU
has the driver between itself and the machine, and nothing else.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from luthier.core.errors import RefusedError

ALWAYS: Final = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ABOUT: Final = ("/proc/devices", "/proc/driver/nvidia/params", "/proc/driver/nvidia/version")
"""Texts that the library of a GPU reads before it opens one; they are copied."""
_OF_GPUS: Final = ("nvidiactl", "nvidia-uvm", "nvidia[0-9]", "nvidia[0-9][0-9]")


def gpu_devices(folder: Path = Path("/dev")) -> tuple[str, ...]:
    """The files of NVIDIA's GPUs on this machine; empty where there is no GPU, or no driver for it."""
    found = [str(path) for pattern in _OF_GPUS for path in sorted(folder.glob(pattern)) if _is_device(path)]
    whole = any(name.startswith(f"{folder}/nvidia") and name[-1].isdigit() for name in found)
    return tuple(found) if whole else ()


def require_devices(devices: Sequence[str]) -> None:
    """Raise RefusedError for a name that is no device file of /dev."""
    for name in devices:
        if not name.startswith("/dev/") or ".." in name or not _is_device(Path(name)):
            raise RefusedError(f"{name} is no device file", allowed="character devices of /dev", do="ls -l /dev")


def _is_device(path: Path) -> bool:
    try:
        return stat.S_ISCHR(path.lstat().st_mode)
    except OSError:
        return False
