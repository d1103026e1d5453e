"""Deliberately broken variants of luthier, for negative controls, and the stand-ins of honest trials.

Each function changes the process it is called in, which is always a forked one that does nothing else.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.store.checkpoints import LINKS, CheckpointStore
from luthier.store.disk import Disk, RealDisk
from luthier.store.lines import JsonLines
from luthier.store.manifest import write_manifest
from luthier.store.runs import RunDirectory, Status


def proof_in_this_process() -> None:
    """No defect: the proof at the end of a run is made here, instead of in a fresh process that imports all again."""
    if importlib.util.find_spec("luthier.recipes.proving.verify") is None:
        return
    from luthier.recipes.proving import verify

    apart, here = verify.verify_apart, verify.verify_run
    for module in [module for name, module in sys.modules.items() if name.startswith("luthier.")]:
        if vars(module).get("verify_apart") is apart:
            setattr(module, "verify_apart", here)  # noqa: B010


def fresh_cache() -> None:
    """No defect: nothing is taken from the cache, so that everything has to be rendered and compiled anew."""
    from luthier.kernels import native_build

    # A compiler that is there for seconds is there long enough.
    native_build.FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in native_build.FLAGS)
    os.environ["LUTHIER_CACHE"] = tempfile.mkdtemp(prefix="cache-", dir=Path("/proc/self/fd/1").readlink().parent)


def killed_at_a_call() -> None:
    """No defect: `kill -9` by our own hand right before the N-th call that changes a name or makes it durable.

    N stands in the file `kill-at` beside the output; when it is 0 the calls are written into `calls` instead. They are
    counted over all threads, which strace, counting each thread by itself, cannot.
    """
    place = Path("/proc/self/fd/1").readlink().parent
    last, lock, done = int((place / "kill-at").read_text("ascii")), threading.Lock(), [0]
    calls = os.open(place / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sync = os.fsync

    def count(call: str) -> None:
        with lock:
            done[0] += 1
            if last == 0:
                os.write(calls, f"{call}\n".encode())
            elif done[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)

    def audited(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink"):
            count(event.removeprefix("os."))
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT:
            count("open")

    def synced(handle: int) -> None:
        count("fsync")
        sync(handle)

    setattr(os, "fsync", synced)  # noqa: B010
    sys.addaudithook(audited)


def in_a_hurry() -> None:
    """No defect: what is tried again after a second on a full disk is tried again after a twentieth of it."""
    if importlib.util.find_spec("luthier.train.saving") is None:
        return
    from luthier.train.saving import Saver

    plain = Saver.__init__

    def begin(self: Saver, write: Any, *, first_pause: float = 0.0) -> None:
        plain(self, write, first_pause=0.05)

    setattr(Saver, "__init__", begin)  # noqa: B010


def checkpoints_in_place() -> None:
    """Checkpoints are written where they will be looked for, unhurriedly, and the newest is taken as it is."""
    _saved_in_place(links_first=False)


def links_before_checkpoints() -> None:
    """The same, and the links move first."""
    _saved_in_place(links_first=True)


def _saved_in_place(*, links_first: bool) -> None:
    def save(
        self: CheckpointStore, step: int, writer: Callable[[Path], None], facts: Mapping[str, Any], **_: object
    ) -> Path:
        place = self.folder / f"step-{step:06d}"
        place.mkdir(parents=True, exist_ok=True)
        if links_first:
            link(self, place)
        writer(place)
        time.sleep(0.1)
        (place / "manifest.json").unlink(missing_ok=True)
        write_manifest(place, {**facts, "run": self.run, "step": step})
        if not links_first:
            link(self, place)
        return place

    def link(self: CheckpointStore, place: Path) -> None:
        for name in LINKS:
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / name).symlink_to(place.name)

    def newest(self: CheckpointStore) -> Path | None:
        steps = self.steps()
        return self.folder / f"step-{steps[-1]:06d}" if steps else None

    setattr(CheckpointStore, "save", save)  # noqa: B010
    setattr(CheckpointStore, "recover", newest)  # noqa: B010


def log_never_cut_back() -> None:
    """A resumed run leaves in the log what it is about to do again."""

    def keep(self: JsonLines, cursor: int) -> int:
        return 0

    setattr(JsonLines, "truncate", keep)  # noqa: B010


def random_state_forgotten() -> None:
    """A resumed run draws other dropout masks."""
    import torch

    setattr(torch, "set_rng_state", lambda state: None)  # noqa: B010


def signals_ignored() -> None:
    """Nobody listens to signals: they do what they do to any process."""
    from contextlib import contextmanager

    from luthier.train import signals

    plain = signals.stop_on_signals

    @contextmanager
    def deaf() -> Any:
        # The command line has handlers of its own, for what comes before a run and after it.
        for name in signals.STOPS:
            signal.signal(signal.Signals[name], signal.SIG_DFL)
        yield signals.StopRequest()

    for module in [module for name, module in sys.modules.items() if name.startswith("luthier.")]:
        for name, value in list(vars(module).items()):
            if value is plain:
                setattr(module, name, deaf)


def finished_is_forgotten() -> None:
    """A finished run looks like one that was interrupted."""
    plain = RunDirectory.status

    def status(self: RunDirectory) -> Status:
        found = plain(self)
        return replace(found, state="interrupted") if found.state == "finished" else found

    setattr(RunDirectory, "status", status)  # noqa: B010


def child_outlives_us() -> None:
    """A helper process that is bound to nobody."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)


def lock_that_locks_nothing() -> None:
    """Every process gets the lock of a run."""
    import fcntl

    setattr(fcntl, "flock", lambda handle, operation: None)  # noqa: B010
    from luthier.store import lock

    setattr(lock, "holder", lambda path: None)  # noqa: B010


class LazyDisk(Disk):
    """A disk that never waits until anything is durable."""

    def __init__(self) -> None:
        self.real = RealDisk()

    def make_folder(self, path: Path) -> None:
        self.real.make_folder(path)

    def write_new(self, path: Path, data: bytes) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(handle, data)
        os.close(handle)

    def sync_file(self, path: Path) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass

    def rename(self, source: Path, target: Path) -> None:
        self.real.rename(source, target)

    def link(self, path: Path, target: str) -> None:
        self.real.link(path, target)

    def remove(self, path: Path) -> None:
        self.real.remove(path)

    def free_bytes(self, folder: Path) -> int:
        return self.real.free_bytes(folder)
