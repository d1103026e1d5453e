"""One thread for numpy's products inside, as many as before outside; a BLAS that is not known is left alone."""

from __future__ import annotations

from contextlib import suppress

import pytest

from luthier.kernels import blas_threads
from luthier.kernels.blas_threads import one_blas_thread


def test_one_inside_and_as_many_as_before_outside() -> None:
    """Breaks when workers' products wait for each other, or all products of the process stay slow after an error."""
    count, set_ = blas_threads._functions()
    before = count()
    try:
        set_(2)
        if count() != 2:
            pytest.skip("numpy's BLAS is none whose threads can be counted here")
        with one_blas_thread():
            assert count() == 1
        assert count() == 2
        with suppress(ZeroDivisionError), one_blas_thread():
            raise ZeroDivisionError
        assert count() == 2
    finally:
        set_(before)


def test_another_blas_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a numpy that was built elsewhere cannot merge."""
    for linked in ("no such module", "json"):
        monkeypatch.setattr(blas_threads, "_LINKED", linked)
        with one_blas_thread():
            pass
