"""What the operating system knows: CPU seconds of this process and of all others, peak memory, the machine.

Everything is read from /proc; where that does not exist (macOS) the values are None and a run cannot be called quiet.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CONTENDED_SHARE = 0.10
"""A run during which others took more CPU seconds than this share of its wall time is marked contended."""


@dataclass(frozen=True)
class Moment:
    """A reading of all clocks at once."""

    wall: float
    own_cpu: float
    all_cpu: float | None
    steal: float | None


def now() -> Moment:
    """The clocks, now."""
    busy, steal = parse_stat(_read("stat"))
    return Moment(time.perf_counter(), time.process_time(), busy, steal)


def parse_stat(text: str) -> tuple[float | None, float | None]:
    """Busy and stolen seconds of all processors since boot, from the text of /proc/stat."""
    fields = text.partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None, None
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, _idle, _waiting, irq, softirq, steal = (int(field) / ticks for field in fields[1:9])
    return user + nice + system + irq + softirq, steal


def between(first: Moment, last: Moment) -> dict[str, float | bool | None]:
    """Wall and CPU seconds from `first` to `last`, those of other processes, and whether that is contended."""
    wall = last.wall - first.wall
    own = last.own_cpu - first.own_cpu
    foreign = steal = None
    if first.all_cpu is not None and last.all_cpu is not None:
        foreign = max(0.0, last.all_cpu - first.all_cpu - own)
    if first.steal is not None and last.steal is not None:
        steal = last.steal - first.steal
    return {
        "wall_s": round(wall, 3),
        "cpu_s": round(own, 3),
        "foreign_cpu_s": None if foreign is None else round(foreign, 3),
        "steal_s": None if steal is None else round(steal, 3),
        "contended": None if foreign is None or steal is None else foreign + steal > CONTENDED_SHARE * wall,
    }


def peak_memory_bytes() -> int | None:
    """The largest resident size this process has had (VmHWM), since its start or the last `forget_peak`."""
    for line in _read("self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def forget_peak() -> bool:
    """Start the peak anew at the present size, so that probes do not count; False where that is not allowed."""
    try:
        (PROC / "self" / "clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return True


def load_average() -> float:
    return os.getloadavg()[0]


def machine() -> dict[str, str | int | None]:
    """Processor, cores that this process may use, memory."""
    models = [line.partition(":")[2].strip() for line in _read("cpuinfo").splitlines() if "model name" in line]
    totals = [int(line.split()[1]) * 1024 for line in _read("meminfo").splitlines() if "MemTotal" in line]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": available_cores(),
        "memory_bytes": totals[0] if totals else None,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def available_cores() -> int:
    if platform.system() == "Linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read(name: str) -> str:
    try:
        return (PROC / name).read_text("utf-8", "replace")
    except OSError:
        return ""
