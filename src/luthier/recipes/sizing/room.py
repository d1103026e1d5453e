"""The room there is: memory that this process may still take, and space where a run will be written."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
_FILES = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
"""The limit of a control group and what it uses, in version 2 and in version 1."""


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: on the GPU, or on the host within the limits of container and process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min([psutil.virtual_memory().available, *_group_rooms(CGROUPS), *_process_room()]))


def free_disk(folder: Path) -> int:
    """Bytes that can still be written below `folder`, which need not exist yet."""
    place = folder.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def _group_rooms(root: Path, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each control group of this process leaves, up to the root: in a container its memory ends there."""
    for line in membership.read_text("utf-8").splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        place = top / path.strip("/")
        for group in (place, *place.parents):
            yield from _group_room(group)
            if group == top:
                break


def _group_room(group: Path) -> Iterator[int]:
    for limit_name, used_name in _FILES.items():
        limit, used = _number(group / limit_name), _number(group / used_name)
        if limit is not None and used is not None:
            # Cached files count as used, but are given back when memory is short.
            yield limit - used + _cached(group / "memory.stat")


def _cached(stat: Path) -> int:
    lines = stat.read_text("ascii").splitlines() if stat.is_file() else []
    pairs = dict(line.split(" ", 1) for line in lines)
    return int(pairs.get("inactive_file", pairs.get("total_inactive_file", 0)))


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or it says "max"."""
    text = path.read_text("ascii").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _process_room() -> Iterator[int]:
    """What the limit on this process's address space leaves, where there is one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - psutil.Process().memory_info().vms
