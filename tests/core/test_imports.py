"""Imports without the collector: it works again afterwards, whatever happens, and what came is out of its way."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from luthier.core.imports import uncollected


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_nothing_is_collected_inside_and_what_came_is_left_out_afterwards() -> None:
    frozen = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled() and gc.get_freeze_count() >= frozen + len(kept)


def test_after_an_error_what_it_leaves_behind_can_be_collected() -> None:
    frozen = gc.get_freeze_count()
    with pytest.raises(KeyboardInterrupt), uncollected():
        raise KeyboardInterrupt
    assert gc.isenabled() and gc.get_freeze_count() == frozen


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()
