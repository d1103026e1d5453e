"""Fixtures that all tests share. The tiny models themselves are plain functions in `tests/tiny.py`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from luthier.recipes import verify
from luthier.store.runs import RunDirectory
from tests.tiny import KINDS, tiny_folder

# Read once, when the hub's client is imported, which may be before any fixture runs.
os.environ["HF_HUB_OFFLINE"] = "1"

# Under nohup hang-ups are ignored, and luthier leaves that as it is; what is tested of signals begins with the default.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples on every machine and every day; a search with new ones is started by hand.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_path("llama")`: the folder of a tiny model, made once for all workers of the session. Read only."""
    own = tmp_path_factory.getbasetemp()
    # Each xdist worker has its own folder inside that of the session.
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def path(kind: str) -> Path:
        return tiny_folder(kind, shared / "tiny-models")

    return path


@pytest.fixture(scope="session", params=KINDS)
def every_tiny_path(request: pytest.FixtureRequest, tiny_path: Callable[[str], Path]) -> Path:
    """The folder of each tiny model in turn."""
    return tiny_path(request.param)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees or fills the user's folders, settings or the network."""
    for name in [name for name in os.environ if name.startswith("LUTHIER_")]:
        monkeypatch.delenv(name)
    own = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("LUTHIER_CACHE", str(own / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session", autouse=True)
def _proved_in_this_process() -> Iterator[Callable[[RunDirectory], dict[str, Any]]]:
    """Runs are proved by the same checks in this process, as each process of its own costs seconds; the real proof.

    For the session, because runs that many tests share are trained before any test begins.
    """
    apart = verify.verify_apart

    def here(run: RunDirectory) -> dict[str, Any]:
        return verify.verify_run(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "verify_apart", here)
        yield apart


@pytest.fixture(autouse=True)
def _proved_apart_where_marked(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    _proved_in_this_process: Callable[[RunDirectory], dict[str, Any]],
) -> None:
    """A test that is marked `fresh_process` gets the proof that users get."""
    if request.node.get_closest_marker("fresh_process") is not None:
        monkeypatch.setattr(verify, "verify_apart", _proved_in_this_process)
