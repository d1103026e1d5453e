"""Programs that enter a race."""

from __future__ import annotations

DOUBLES = "secret = 1\n\ndef f(x, by):\n    return x * by\n"
WRITES = "def f(x, by):\n    return x.mul_(by)\n"
LOOKS_FOR_THE_OTHER = """
import sys

def f(x, by):
    return sys.modules["entrant"].secret
"""
