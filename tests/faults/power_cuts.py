"""Power cuts: an ext4 image is copied while a run saves on it, and the copy mounted: what was announced must be there.

What: a process saves checkpoint after checkpoint on a file system in a loop image and announces each one when the store
says it is durable. At a random moment it is stopped, the image is copied as it is (what was not flushed is not in it),
and the copy is mounted, which replays its journal, as after a power cut. The newest announced checkpoint must verify
with the bytes that were saved, nothing newer may verify with others, the log must be as long as the checkpoint says,
and the next start must go on. The negative control saves through a disk that never flushes.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import final

from safetensors import safe_open

from luthier.core.errors import LuthierError
from luthier.store.manifest import read_manifest, verify
from luthier.store.runs import RunDirectory
from tests.faults.campaign import CLEAN, Campaign, Tally, UnavailableError
from tests.faults.mounts import call, mounted
from tests.faults.saver import content, writer
from tests.faults.zygote import Child, zygote

FAULT = "power cut while saving (ext4)"
PROMISE = "every announced checkpoint verifies, none is torn, the next start goes on"
CONTROL = "a disk that never flushes"
MEGABYTES = 24
SETTLE = 20.0
"""Seconds a writer has to save its first checkpoint on a busy machine."""


def run(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` power cuts, of one writer each eight."""
    return _campaign(FAULT, count, seed=seed, folder=folder, lazy=False)


def control(*, seed: int, folder: Path) -> Campaign:
    """The same with a disk that never flushes."""
    return _campaign(f"{FAULT} (broken)", 8, seed=seed, folder=folder, lazy=True)


def _campaign(fault: str, count: int, *, seed: int, folder: Path, lazy: bool) -> Campaign:
    require_loop(folder)
    dice = random.Random(seed)
    tally = Tally(fault, PROMISE, seed=seed, control=CONTROL)
    with contextlib.ExitStack() as stack:
        images = stack.enter_context(_in_memory(folder))
        while tally.tried < count:
            with _Writer(images, lazy=lazy) as writing:
                for _ in range(min(8, count - tally.tried)):
                    delay = dice.uniform(0, 0.4)
                    verdict, detail = _cut(writing, images, delay)
                    tally.count(verdict, f"{detail} (cut {delay:.3f} s after the last)")
    return tally.result()


def require_loop(folder: Path) -> None:
    """Raise UnavailableError unless this process may make and mount an ext4 image."""
    missing = [name for name in ("mkfs.ext4", "mount", "umount", "losetup") if shutil.which(name) is None]
    if missing:
        raise UnavailableError(f"{', '.join(missing)} not found")
    if os.geteuid() != 0:
        raise UnavailableError("only root may mount a loop image")
    folder.mkdir(parents=True, exist_ok=True)
    image, place = folder / "probe.img", folder / "probe"
    try:
        _make_image(image)
        with mounted(image, place):
            pass
    except subprocess.CalledProcessError as failure:
        raise UnavailableError(f"no loop mount here: {failure.stderr.strip()[-200:]}") from None
    finally:
        image.unlink(missing_ok=True)


@contextlib.contextmanager
def _in_memory(folder: Path) -> Iterator[Path]:
    """A folder for images on a tmpfs: copying one takes a moment, in which the writer's kernel may write on."""
    place = folder / f"images-{os.getpid()}"
    place.mkdir(parents=True, exist_ok=True)
    with mounted("luthier-faults", place, "-t", "tmpfs", "-o", f"size={4 * MEGABYTES}m"):
        yield place


def _make_image(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(MEGABYTES << 20)
    call("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-J", "size=4", image)


@final
class _Writer:
    """A process that saves on an image of its own, and what it has announced."""

    def __init__(self, images: Path, *, lazy: bool) -> None:
        self.images = images
        self.lazy = lazy
        self.announced = 0
        self._torn = b""
        self._stack = contextlib.ExitStack()
        self._pipe = -1
        self._child: Child | None = None

    def __enter__(self) -> _Writer:
        try:
            self._begin()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _begin(self) -> None:
        image, place, pipe = self.images / "live.img", self.images / "live", self.images / "announced"
        _make_image(image)
        self._stack.enter_context(mounted(image, place))
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        self._pipe = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._stack.callback(os.close, self._pipe)
        lazy = "lazy" if self.lazy else "real"
        child = zygote(heavy=False).start(
            "tests.faults.saver:save_on", place / "run", pipe, lazy, out=self.images / "out"
        )
        self._child = child
        self._stack.callback(self._end, child)
        until = time.monotonic() + SETTLE
        while self.announced < 1:
            if child.wait(0) or time.monotonic() > until:
                raise RuntimeError(f"the writer saves nothing: {(self.images / 'out').read_text('utf-8')[-600:]}")
            self.listen(0.05)

    def _end(self, child: Child) -> None:
        child.signal(signal.SIGCONT)
        child.signal(signal.SIGKILL)
        child.reap(30)

    def listen(self, seconds: float) -> None:
        """Take note of announcements for `seconds`."""
        until = time.monotonic() + seconds
        while True:
            ready, _, _ = select.select([self._pipe], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return
            data = os.read(self._pipe, 1 << 16)
            if not data:
                return
            *lines, self._torn = (self._torn + data).split(b"\n")
            self.announced = max([self.announced, *map(int, lines)])

    def copy(self, to: Path) -> int:
        """Stop the writer, copy its image, let it go on; the newest step that was announced before the copy."""
        if self._child is None or self._child.wait(0):
            raise RuntimeError(f"the writer has ended: {(self.images / 'out').read_text('utf-8')[-600:]}")
        self._child.signal(signal.SIGSTOP)
        self.listen(0)
        announced = self.announced
        try:
            shutil.copyfile(self.images / "live.img", to)
        finally:
            self._child.signal(signal.SIGCONT)
        return announced

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _cut(writing: _Writer, images: Path, delay: float) -> tuple[str, str]:
    """One power cut, and what is found when the power is back."""
    writing.listen(delay)
    image, place = images / "cut.img", images / "cut"
    announced = writing.copy(image)
    try:
        with mounted(image, place):
            return _look(place / "run", announced)
    except subprocess.CalledProcessError as failure:
        return "manual-repair", f"the file system cannot be mounted: {failure.stderr}"
    finally:
        image.unlink(missing_ok=True)


def _look(folder: Path, announced: int) -> tuple[str, str]:
    """Whether the run in `folder` has all that was announced, and can go on."""
    try:
        run = RunDirectory.open(folder)
        run.read_recipe()
        newest = run.checkpoints.latest_valid()
    except LuthierError as error:
        return "lost-work", f"step {announced} was announced: {error}"
    reached = _step(newest)
    if newest is None or reached < announced:
        return "lost-work", f"step {announced} was announced, {reached} is the newest that verifies"
    for name in sorted(path.name for path in run.checkpoints.folder.glob("step-*")):
        place = run.checkpoints.folder / name
        if _step(place) <= announced and place != newest:
            # Between its announcement and its removal an older one is whole as well.
            try:
                verify(place)
            except LuthierError as error:
                return "lost-work", f"the announced {name} is damaged: {error}"
    with safe_open(newest / "state.safetensors", framework="np") as file:
        if file.get_tensor("master/a").tobytes() != content(reached):
            return "silent-different", f"{newest.name} verifies with other bytes than were saved"
    cursor = int(read_manifest(newest).facts["events_bytes"])
    if run.events.length < cursor:
        return "lost-work", f"the log has {run.events.length} of {cursor} bytes"
    run.events.truncate(cursor)
    steps = [record["step"] for record in run.events.read()]
    if steps != list(range(1, reached + 1)):
        return "silent-different", f"the log has steps {steps[-5:]}, the checkpoint is of step {reached}"
    return _goes_on(run, reached)


def _goes_on(run: RunDirectory, reached: int) -> tuple[str, str]:
    try:
        with run.lock():
            again = run.checkpoints.recover()
            if _step(again) != reached:
                return "lost-work", f"{reached} verified, but the next start goes on from {again}"
            run.checkpoints.save(reached + 1, writer(reached + 1), {})
            run.checkpoints.rotate(1)
    except LuthierError as error:
        return "manual-repair", str(error)
    left = [path.name for path in run.checkpoints.folder.iterdir() if re.match(r"\.(?:tmp|del|link)-", path.name)]
    return ("leak", f"left: {left}") if left else (CLEAN, "")


def _step(place: Path | None) -> int:
    return int(place.name.removeprefix("step-")) if place is not None else 0
