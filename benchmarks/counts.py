"""Numbers of a command line that count something. argparse tells of any other, before anything is prepared or run.

    parser.add_argument("--repetitions", type=count, default=5)
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError


def count(text: str) -> int:
    """A whole number of things of which there has to be one."""
    return _whole(text, 1)


def count_from_zero(text: str) -> int:
    """A whole number of things of which there may be none."""
    return _whole(text, 0)


def above_zero(text: str) -> float:
    """A length or a size that is more than nothing, and has an end."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"it is {text}; a number above 0 is allowed")
    return number


def not_below_zero(text: str) -> float:
    """The same where nothing is enough."""
    number = _number(text)
    if not 0 <= number < math.inf:
        raise ArgumentTypeError(f"it is {text}; a number of 0 or more is allowed")
    return number


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ArgumentTypeError(f"it is {text}; a whole number of {least} or more is allowed")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
