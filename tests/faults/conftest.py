"""One folder in which the fault campaigns of a worker share their model, their data and their unbroken runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign, UnavailableError


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the campaigns of this worker use, one after the other."""
    return tmp_path_factory.mktemp("faults")


def available(campaign: Callable[[], Campaign]) -> Campaign:
    """What came of a campaign, or a visible skip where this machine cannot run it."""
    try:
        return campaign()
    except UnavailableError as reason:
        pytest.skip(str(reason))
