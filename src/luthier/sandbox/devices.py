"""Device files that a program may have behind the walls, besides the four that every program has.

Idea: a GPU is reached through files of /dev and requests to its driver, which runs in the kernel. So it is let in only
where it is asked for, only these files, and of the requests only those that its driver knows: whoever is let at a GPU
has the driver between itself and the machine, and nothing else. Its library takes more than the files: it ends with the
error 304 where it finds no /sys, cannot name its threads in /proc, or may make no file without a name.
Source: NVIDIA/OpenShell issues 1486 and 1696, nolabs-ai/nono pull requests 651 and 673, truefoundry/trueforge issue 466
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from luthier.core.errors import RefusedError

ALWAYS: Final = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
SYSTEM: Final = "/sys"
"""What a GPU's library reads of the machine; seen whole, and read-only."""
SETTINGS: Final = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING")
"""Variables that say which GPU is ours: another one is somebody else's."""
_ABOUT: Final = ("devices", "modules", "cpuinfo", "meminfo", "sys/vm/mmap_min_addr")
_ABOUT_DRIVERS: Final = "driver/nvidia*"
_MOST_ABOUT: Final = 1 << 19
_OF_GPUS: Final = re.compile(r"nvidiactl|nvidia-uvm|nvidia-uvm-tools|nvidia\d+")
_OF_PARTS: Final = re.compile(r"nvidia-cap\d+")
"""Of parts of a GPU, as it is divided; those that not every user may read are for whoever divides it."""


def gpu_devices(folder: Path = Path("/dev")) -> tuple[str, ...]:
    """The files of NVIDIA's GPUs on this machine; empty where there is no GPU, no driver for it, or it is hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return ()
    found = [path for path in sorted(folder.glob("nvidia*")) if _OF_GPUS.fullmatch(path.name) and _is_device(path)]
    if not any(path.name[-1].isdigit() for path in found):
        return ()
    parts = [path for path in sorted(folder.glob("nvidia-caps/*")) if _OF_PARTS.fullmatch(path.name)]
    return tuple(map(str, [*found, *(path for path in parts if _is_device(path) and _for_all(path))]))


def about_devices(folder: Path = Path("/proc")) -> dict[str, str]:
    """Texts of /proc that the library of a GPU reads before it opens one, by name; guests get copies."""
    paths = [folder / name for name in _ABOUT]
    paths += [path for driver in sorted(folder.glob(_ABOUT_DRIVERS)) for path in sorted(driver.rglob("*"))]
    return dict(_texts(paths))


def require_devices(devices: Sequence[str]) -> None:
    """Raise RefusedError for a name that is no device file of /dev."""
    for name in devices:
        if not name.startswith("/dev/") or ".." in name or not _is_device(Path(name)):
            raise RefusedError(f"{name} is no device file", allowed="character devices of /dev", do="ls -l /dev")


def _texts(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        try:
            with path.open("rb") as file:
                text = file.read(_MOST_ABOUT).decode("latin-1")
        except OSError:
            continue  # a folder, what only root may read, or a kernel without it
        # Where modules lie in the kernel is told to root only.
        yield str(path), re.sub(r"0x[0-9a-f]{16}", f"0x{0:016}", text)


def _for_all(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IROTH)


def _is_device(path: Path) -> bool:
    try:
        return stat.S_ISCHR(path.lstat().st_mode)
    except OSError:
        return False
