"""Fixtures that all tests share. The tiny models themselves are plain functions in `tests/tiny.py`."""

from __future__ import annotations

import fcntl
import gc
import math
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from luthier.core.imports import uncollected
from luthier.data.rendering import process
from luthier.kernels import native_build, vectors
from luthier.recipes.proving import verify
from luthier.store.runs import RunDirectory
from tests import renderers, shape_checks
from tests.tiny import KINDS, tiny_folder

# Read once, when the hub's client is imported, which may be before any fixture runs.
os.environ["HF_HUB_OFFLINE"] = "1"

# Under nohup hang-ups are ignored, and luthier leaves that as it is; what is tested of signals begins with the default.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples on every machine and every day; a search with new ones is started by hand.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


OWN_SHAPES = ("kernels", "model", "infer")
"""Tests of the packages whose functions are checked for shapes at each call (pyproject.toml)."""
FEW_SHAPES = 8
"""In the first case of each of these tests shapes are checked, and in one of so many of all other cases and tests: that
takes more than half of their time, and finds the same in each."""
MOST_CALLS = 2000
"""So many calls of such a case are checked, the first ones: a case may make a hundred thousand."""
CALLS = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the C++ be built for another processor than this one, as GCC names it: one that this one can stand in for."""
    parser.addoption("--march", default="native", help="build the C++ kernels for this processor (native)")


def pytest_configure(config: pytest.Config) -> None:
    """Build for the processor that was asked for, in this process; those that tests start build for their own."""
    for module, name in ((native_build, "FLAGS"), (vectors, "_FLAGS")):
        flags = [each.replace("=native", f"={config.getoption('--march')}") for each in getattr(module, name)]
        setattr(module, name, tuple(flags))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Choose the tests in which shapes are checked; `SHAPES=all` is for all."""
    seen = set[str]()
    for item in items:
        test = item.nodeid.partition("[")[0]
        own = any(folder in item.path.parts for folder in OWN_SHAPES)
        few = zlib.crc32(item.nodeid.encode()) % FEW_SHAPES == 0
        checked = few or (own and test not in seen)
        item.stash[CALLS] = math.inf if os.environ.get("SHAPES") == "all" else MOST_CALLS * checked
        seen.add(test)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Import all tests as a command imports its libraries: what stays is not looked through for cycles, now or later.

    Half of the time of a collection went into that, and each collection of cycles by a test took a second and more.
    """
    gc.collect()
    with uncollected():
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have the shapes of tensors checked or not, in this test and in what is made for it."""
    shape_checks.check(item.stash[CALLS])


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_path("llama")`: the folder of a tiny model, made once for all workers of the session. Read only."""
    shared = _of_all_workers(tmp_path_factory.getbasetemp())

    def path(kind: str) -> Path:
        return tiny_folder(kind, shared / "tiny-models")

    return path


def _of_all_workers(own: Path) -> Path:
    """The folder of the session; each xdist worker has its own inside it."""
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", params=KINDS)
def every_tiny_path(request: pytest.FixtureRequest, tiny_path: Callable[[str], Path]) -> Path:
    """The folder of each tiny model in turn."""
    return tiny_path(request.param)


@pytest.fixture(scope="session", autouse=True)
def _compiled_by_one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All workers have one folder of compiled kernels, and whoever needs them while they are compiled waits."""
    own = tmp_path_factory.getbasetemp()
    shared = _of_all_workers(own) / "native"
    shared.mkdir(exist_ok=True)
    (own / "cache").mkdir(exist_ok=True)
    (own / "cache" / "native").symlink_to(shared)
    compiled = native_build._compile

    def alone(compiler: str, sources: list[Path], place: Path, flags: tuple[str, ...]) -> None:
        with (shared.parent / "native.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not native_build.is_whole(place):
                compiled(compiler, sources, place, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_build, "_compile", alone)
        # Also for what is made before any test begins, as runs that many tests share are.
        patch.setenv("LUTHIER_CACHE", str(own / "cache"))
        yield


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees or fills the user's folders, settings or the network."""
    for name in [name for name in os.environ if name.startswith("LUTHIER_")]:
        monkeypatch.delenv(name)
    own = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("LUTHIER_CACHE", str(own / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


OWN_RENDERERS = ("data", "faults")
"""Tests of the process that chat templates run in."""


@pytest.fixture(scope="session", autouse=True)
def _renderers_are_handed_on() -> Iterator[renderers.Idle]:
    """A run starts such a process for each of its templates, and there are thousands of runs."""
    with renderers.handed_on() as idle:
        yield idle


@pytest.fixture(autouse=True)
def _renderers_of_their_own(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _renderers_are_handed_on: renderers.Idle
) -> None:
    """What tests of that process look at is started for them and ends with them."""
    if any(folder in request.node.path.parts for folder in OWN_RENDERERS):
        monkeypatch.setattr(process, "_Worker", _renderers_are_handed_on.start)


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
