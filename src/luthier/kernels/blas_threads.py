"""One thread for numpy's products of matrices, where blocks are shared out to threads already.

Idea: inside a worker more threads would only wait for each other. OpenBLAS, which numpy's packages bring, takes another
number while it runs; it is found among what numpy's own library was linked with. Another BLAS is left as it is: it does
the same, with threads that wait. The number holds for the whole process.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

_LINKED: Final = "numpy._core._multiarray_umath"
_NAMES: Final = (("scipy_openblas_", "64_"), ("openblas_", "64_"), ("scipy_openblas_", ""), ("openblas_", ""))
"""What builds of OpenBLAS put before and behind the names of its functions."""


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One thread inside the `with`, as many as before at its end."""
    get, set_ = _functions()
    before = get()
    set_(1)
    try:
        yield
    finally:
        set_(before)


def _functions() -> tuple[Callable[[], int], Callable[[int], Any]]:
    """What tells and sets the number of threads; without OpenBLAS, what does nothing."""
    path = getattr(sys.modules.get(_LINKED), "__file__", None)
    try:
        linked = ctypes.CDLL(path) if path else None
    except OSError:
        linked = None
    for before, behind in _NAMES:
        get = getattr(linked, f"{before}get_num_threads{behind}", None)
        set_ = getattr(linked, f"{before}set_num_threads{behind}", None)
        if get is not None and set_ is not None:
            return get, set_
    return (lambda: 1), (lambda _count: None)
