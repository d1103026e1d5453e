"""Imports without the cycle collector: the large libraries in three quarters of the time.

Idea: importing makes some hundred thousand objects that stay, and Python looks through all of them for cycles again
and again while they grow. Nothing of it is ever found to be garbage.
Use when: a process of our own (a command, the proof of a result) is about to import torch and transformers. Not in a
process of somebody else, such as a notebook: what is frozen there would be theirs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection inside the `with`; what is there at its end is left out of later ones, too."""
    working = gc.isenabled()
    gc.disable()
    try:
        yield
        # Not after an error: what it leaves behind may have to be collected before the process can end.
        gc.freeze()
    finally:
        if working:
            gc.enable()
