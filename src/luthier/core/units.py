"""Units: bytes, counts, durations and shares as short text for people.

Decimal prefixes throughout (1 GB is 10^9 bytes), as disks and file managers count.
"""

from __future__ import annotations

import math
import re
from typing import Final

from luthier.core.errors import RecipeError

_BYTES: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_FLOPS: Final = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")
_COUNTS: Final = ("", "k", "M", "B", "T")
_BARE: Final = 10**6
"""The fewest bytes that are written as a number without a unit."""


def bytes_text(count: float) -> str:
    """`1.6 GB`, `312 B`."""
    number, unit = _scaled(count, _BYTES)
    return f"{number} {unit}"


def bytes_from(text: str) -> float:
    """Bytes that a text such as `24GB`, `1.5 GiB`, `512M` or `24000000000` says. Raises RecipeError for any other text.

    A small number without a unit is none of them: who writes 24 does not mean 24 bytes.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)(b?)\s*", text, re.IGNORECASE | re.ASCII)
    size = 0.0
    if found is not None and (found[2] or not found[3]):
        size = float(found[1]) * float(1024 if found[3] else 1000) ** " KMGTP".index(found[2].upper() or " ")
    if not 1 <= size < math.inf:
        raise RecipeError(
            f"a size of {text!r:.40}", allowed="a number above 0 with a unit", do="write it as 24GB or 16GiB"
        )
    if found is not None and not found[2] and not found[4] and size < _BARE:
        raise RecipeError(
            f"a size of {text!r:.40}, which has no unit",
            allowed=f"a number with a unit, or {_BARE:,} bytes and more without one",
            do=f"write {found[1]}GB, or {found[1]}B if so few bytes are meant",
        )
    return size


def count_text(count: float) -> str:
    """`12.4k`, `7.6B`, `950`."""
    number, unit = _scaled(count, _COUNTS)
    return f"{number}{unit}"


def rate_text(flops: float) -> str:
    """`125 GFLOP/s`, from FLOPs a second."""
    number, unit = _scaled(flops, _FLOPS)
    return f"{number} {unit}/s"


def duration_text(seconds: float) -> str:
    """`0.4 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`: the two largest units, no more."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 0:
        return f"-{duration_text(-seconds)}"
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    # Each line rounds before it compares: 3599.7 s are one hour, not 59 min 60 s.
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    if round(seconds) < 3600:
        return _two(round(seconds), 60, "min", "s")
    if round(seconds / 60) < 24 * 60:
        return _two(round(seconds / 60), 60, "h", "min")
    return _two(round(seconds / 3600), 24, "d", "h")


def percent_text(share: float) -> str:
    """`3.1 %`, `0.004 %`: one digit after the point, or as many as the first that is not zero needs."""
    percent = 100 * share
    if percent == 0 or abs(percent) >= 0.1:
        return f"{percent:.1f} %"
    digits = 1 - math.floor(math.log10(abs(percent)))
    return f"{percent:.{digits}f}".rstrip("0") + " %"


def signed_text(value: float, digits: int = 4) -> str:
    """`-0.2500`, `0.0000`: with so many digits after the point, and no minus before what is shown as a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _scaled(value: float, units: tuple[str, ...]) -> tuple[str, str]:
    number, index = abs(value), 0
    # What would round to 1000 of one unit is 1 of the next.
    while index + 1 < len(units) and round(number, 1 if index else 0) >= 1000:
        number, index = number / 1000, index + 1
    text = f"{number:.{1 if index and number < 100 else 0}f}".removesuffix(".0")
    return ("-" if value < 0 else "") + text, units[index]


def _two(total: int, size: int, large: str, small: str) -> str:
    whole, rest = divmod(total, size)
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"
