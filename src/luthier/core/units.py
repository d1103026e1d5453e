"""Units: bytes, counts and durations as short text for people.

Decimal prefixes throughout (1 GB is 10^9 bytes), as disks and file managers count.
"""

from __future__ import annotations

import math
from typing import Final

_BYTES: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNTS: Final = ("", "k", "M", "B", "T")
_MINUTE: Final = 60
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR


def bytes_text(count: float) -> str:
    """`1.6 GB`, `312 B`."""
    number, unit = _scaled(count, _BYTES)
    return f"{number} {unit}"


def count_text(count: float) -> str:
    """`12.4k`, `7.6B`, `950`."""
    number, unit = _scaled(count, _COUNTS)
    return f"{number}{unit}"


def duration_text(seconds: float) -> str:
    """`0.4 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`: the two largest units, no more."""
    if seconds < 0:
        return f"-{duration_text(-seconds)}"
    if not math.isfinite(seconds):
        return "unknown"
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < _MINUTE:
        return f"{round(seconds)} s"
    for size, name, below, small in ((_MINUTE, "min", 1, "s"), (_HOUR, "h", _MINUTE, "min"), (_DAY, "d", _HOUR, "h")):
        # Rounding first: 3599.7 s are one hour, not "59 min 60 s".
        total = round(seconds / below)
        whole, rest = divmod(total, size // below)
        if name == "d" or total * below < {"min": _HOUR, "h": _DAY}[name]:
            return f"{whole} {name} {rest} {small}" if rest else f"{whole} {name}"
    raise ValueError(f"{seconds} seconds are no duration")


def percent_text(share: float) -> str:
    """`3.1 %`, `0.004 %`: at least one digit that is not zero."""
    percent = 100 * share
    if percent == 0 or abs(percent) >= 0.1:
        return f"{percent:.1f} %"
    return f"{percent:.1g} %" if abs(percent) >= 1e-4 else f"{percent:.0e} %"


def _scaled(value: float, units: tuple[str, ...]) -> tuple[str, str]:
    sign = "-" if value < 0 else ""
    number, index = abs(value), 0
    # What would round to 1000 of one unit is 1 of the next.
    while index + 1 < len(units) and round(number, 1 if index else 0) >= 1000:
        number, index = number / 1000, index + 1
    digits = 0 if index == 0 or number >= 100 else 1
    text = f"{number:.{digits}f}".removesuffix(".0")
    return sign + text, units[index]
