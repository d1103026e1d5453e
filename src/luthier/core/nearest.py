"""Nearest names: what somebody who typed an unknown name probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, count: int = 3, cutoff: float = 0.5) -> list[str]:
    """The known names closest to `name`, best first; empty when nothing is close.

    `cutoff` is the share of letters that are the same, in order, from which on a name is close.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=cutoff)
    return [by_lower[lower] for lower in close]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A half sentence for an error: the nearest names, or all of them when none is near."""
    names = list(known)
    close = nearest(name, names)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(sorted(names))}" if names else "none is known"


def choice(name: str, known: Iterable[str]) -> str:
    """The same for one of a few: the nearest, and all there are."""
    names = list(known)
    close = did_you_mean(name, names)
    return f"{close} known: {', '.join(sorted(names))}" if close.endswith("?") else close
