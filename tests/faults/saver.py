"""What the process does whose system calls are broken: clean up, save one checkpoint more, rotate. No torch.

It runs in a light fork server (`tests/faults/zygote.py`); the campaigns look at what it leaves.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save as serialized

from luthier.core.errors import LuthierError, StorageError
from luthier.store import large_file
from luthier.store.checkpoints import CheckpointStore
from luthier.store.disk import REAL, Disk
from luthier.store.folder import Writer
from luthier.store.manifest import Entry
from luthier.store.runs import RunDirectory
from tests.faults.broken import LazyDisk

RUN = "r"
OLD = (10, 20)
NEW = 30
TENSORS = "state.safetensors"
READY = "ready"
"""A file beside the gate: the process waits there, and has done what does not count."""

STALE = (".tmp-7-1", ".del-step-000005-1")
_SET_PTRACER = 0x59616D61
_ANYBODY = -1


def content(step: int) -> bytes:
    """The tensor of a step: the same bytes whoever asks."""
    return random.Random(step).randbytes(6000)


def writer(step: int) -> Writer:
    """Writes a checkpoint as runs do: tensors past the page cache, in smaller pieces here; numbers as JSON."""

    def write(folder: Path) -> dict[str, Entry]:
        large_file.PIECE = large_file.BLOCK
        data = serialized({"master/a": np.frombuffer(content(step), dtype=np.uint8)})
        file = large_file.LargeFile(folder / TENSORS, len(data))
        try:
            file.write(memoryview(data), 0)
            told = file.finish()
        finally:
            file.close()
        (folder / "state.json").write_text(f'{{"step": {step}}}', encoding="utf-8")
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_bytes(content(-step)[:500])
        return {TENSORS: told}

    return write


def template(folder: Path) -> None:
    """Two good checkpoints, and what two processes that died have left."""
    store = CheckpointStore(folder, run=RUN)
    for step in OLD:
        store.save(step, writer(step), {})
    for name in STALE:
        (folder / name).mkdir()
        (folder / name / TENSORS).write_bytes(b"half")


def traceable() -> None:
    """Let a tracer that is not our ancestor attach, also where the kernel asks for permission."""
    ctypes.CDLL(None).prctl(_SET_PTRACER, _ANYBODY, 0, 0, 0)


def save(folder: str, gate: str) -> int:
    """Once the lock `gate` is free: recover, save, rotate. 74 for a StorageError, 1 for any other."""
    _rehearse(Path(folder))
    _wait_for(gate)
    return _reported(lambda: _work(CheckpointStore(Path(folder), run=RUN)))


def save_after_removing(folder: str, gate: str) -> int:
    """Broken: makes room first."""
    _wait_for(gate)
    store = CheckpointStore(Path(folder), run=RUN)

    def work() -> None:
        for step in OLD:
            shutil.rmtree(store.folder / f"step-{step:06d}")
        store.save(NEW, writer(NEW), {}, best=True)

    return _reported(work)


def save_hiding_errors(folder: str, gate: str) -> int:
    """Broken: what fails is not told."""
    _rehearse(Path(folder))
    _wait_for(gate)
    with contextlib.suppress(LuthierError, OSError):
        _work(CheckpointStore(Path(folder), run=RUN))
    return 0


def _wait_for(gate: str) -> None:
    with Path(gate).open("rb") as file:
        Path(gate).with_name(READY).touch()
        fcntl.flock(file, fcntl.LOCK_SH)


def _work(store: CheckpointStore) -> None:
    store.recover()
    store.save(NEW, writer(NEW), {}, best=True)
    store.rotate(0)


def _rehearse(folder: Path) -> None:
    """Everything once elsewhere, so that what is only imported or cached at first use is not counted as saving."""
    elsewhere = folder.with_name(f"{folder.name}-rehearsal")
    template(elsewhere)
    _work(CheckpointStore(elsewhere, run=RUN))
    shutil.rmtree(elsewhere)


def _reported(work: Callable[[], None]) -> int:
    try:
        work()
    except LuthierError as error:
        # Where writing fails, so does writing this.
        with contextlib.suppress(OSError):
            os.write(1, f"{type(error).__name__}: {error}\n".encode())
        return 74 if isinstance(error, StorageError) else 1
    return 0


# ------------------------------------------------------------------------------------------------------------ locks


def hold(folder: str, how: str, done: str) -> int:
    """Begin a run in `folder` (or open the one that is there), and keep its lock until the lock `done` is free."""
    began = time.monotonic()
    place = Path(folder)
    try:
        held = RunDirectory.open(place).lock() if how == "again" else RunDirectory.begin(place)
        with held, Path(done).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
    except LuthierError as error:
        print(f"{error.code}: {error} | {time.monotonic() - began}")
        return error.exit_code
    return 0


# ------------------------------------------------------------------------------------------------------ power cuts


def save_on(folder: str, pipe: str, lazy: str) -> int:
    """Begin a run in `folder`, save checkpoint after checkpoint, tell each durable one through `pipe`; never end."""
    disk: Disk = LazyDisk() if lazy == "lazy" else REAL
    dice = random.Random(folder)
    out = os.open(pipe, os.O_WRONLY)
    with RunDirectory.begin(Path(folder), disk=disk) as run:
        run.write_recipe({"recipe": "finetune"})
        os.write(out, b"0\n")
        for step in range(1, sys.maxsize):
            run.events.append({"kind": "step", "step": step, "filler": "x" * dice.randrange(2000)})
            if lazy != "lazy":
                run.events.sync()
            facts = {"events_bytes": run.events.length}
            run.checkpoints.save(step, writer(step), facts, best=step % 3 == 0)
            run.checkpoints.rotate(1)
            os.write(out, f"{step}\n".encode())
    return 0
