"""A checkpoint save broken at each of its system calls: killed there, or told that the call has failed.

What: strace attaches to a process that cleans up, saves one checkpoint more and rotates, and kills it at the N-th call
of a kind, or lets the N-th call (or all from the N-th on) fail with EIO or ENOSPC, for every N there is. Afterwards at
least one checkpoint must verify, the next start must clean up by itself and save well, and a failed call must have been
reported as a StorageError with every older checkpoint unharmed. `run_whole` kills a whole run right before the calls
that change names or make them durable, without strace, and lets the same command finish it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from luthier.core.errors import CorruptError, LuthierError
from luthier.store.checkpoints import CheckpointStore
from luthier.store.manifest import verify
from tests.faults import runs
from tests.faults.campaign import CLEAN, Campaign, Tally, UnavailableError
from tests.faults.saver import NEW, OLD, READY, RUN, STALE, template, writer
from tests.faults.zygote import Child, zygote

WHOLE = "kill -9 of a run at each call that changes a name in its directory"
FINISHES = "the same command finishes with the same bits"
FAULT = "kill -9 at each system call of a save"
ERRORS = "EIO or ENOSPC from each system call of a save, once or from then on"
PROMISE = "a verified checkpoint, a clean next start, a good next save"
TYPED = "a StorageError that names the reason; older checkpoints untouched; a clean next start"
EARLY_LINKS = "links that move before their checkpoint is written"
CONTROL = "older checkpoints are removed before the new one is written"
KILLED = (
    "openat", "write", "pwrite64", "writev", "fallocate", "fsync", "fdatasync", "rename", "renameat", "renameat2",
    "mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "ftruncate", "symlink", "symlinkat", "read", "getdents64",
)  # fmt: skip
ASKED = ("statfs", "fstatfs", "newfstatat", "read", "getdents64")
"""Calls that only ask: they know no full disk."""

CODES = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
LONGEST = 60.0
_ATTACHED = "attached"
_CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Point:
    """One place to break: the N-th call of a name, and how."""

    call: str
    number: int
    how: str = "KILL"
    forever: bool = False

    @property
    def injection(self) -> str:
        """The point in strace's words."""
        what = "signal=KILL" if self.how == "KILL" else f"error={self.how}"
        return f"inject={self.call}:{what}:when={self.number}{'+' if self.forever else ''}"


def run(count: int, *, seed: int, folder: Path) -> Campaign:
    """Kill at `count` of the calls, chosen at random; at each of them when there are no more."""
    return campaign(FAULT, PROMISE, kill_points, count, seed=seed, folder=folder)


def run_errors(count: int, *, seed: int, folder: Path) -> Campaign:
    """Let `count` of the calls fail, chosen at random; each of them when there are no more."""
    return campaign(ERRORS, TYPED, error_points, count, seed=seed, folder=folder)


def control_errors(*, seed: int, folder: Path) -> Campaign:
    """Let calls fail in a process that does not tell."""
    work = "save_hiding_errors"
    return campaign(f"{ERRORS} (broken)", TYPED, error_points, 40, seed=seed, folder=folder, work=work)


def run_whole(count: int, *, seed: int, folder: Path) -> Campaign:
    """Kill a whole run at `count` of the calls that change names; the same command must then finish it bit for bit."""
    return _whole(WHOLE, count, "", seed=seed, folder=folder, prepare=(runs.NO_FRESH_PROOF,))


def control_whole(*, seed: int, folder: Path) -> Campaign:
    """Kill runs whose links move first, where they move them."""
    prepare = (runs.NO_FRESH_PROOF, "tests.faults.broken:links_before_checkpoints")
    return _whole(f"{WHOLE} (broken)", 4, "symlink", seed=seed, folder=folder, prepare=prepare)


def _whole(fault: str, count: int, only: str, *, seed: int, folder: Path, prepare: Sequence[str]) -> Campaign:
    tally = Tally(fault, FINISHES, seed=seed, control=EARLY_LINKS)
    unbroken = runs.Bench(folder, seed, named="lora").next()
    trial = folder / "trial"
    if _run_killed(unbroken, trial, prepare, 0) != 0:
        raise RuntimeError(f"a watched run does not finish: {(trial / 'out').read_text('utf-8', 'replace')[-600:]}")
    calls = (trial / "calls").read_text("ascii").split()
    every = [number for number, call in enumerate(calls, 1) if only in call]
    points = every if count >= len(every) else random.Random(seed).sample(every, count)
    missed = 0
    for point in points:
        code = _run_killed(unbroken, trial, prepare, point)
        told = f"before call {point}, {calls[point - 1]}"
        if code == 0:
            # Two threads make calls, so that a run may make a few more or less.
            missed += 1
            continue
        if code != -signal.SIGKILL:
            tally.count("wrong-error", f"{told}: exit {code}")
            continue
        again = runs.begin(unbroken.recipe, trial / "run", out=trial / "out", prepare=prepare)
        code = again.reap(LONGEST)
        said = (trial / "out").read_text("utf-8", "replace")
        if not runs.has_ended(code, said):
            tally.count("manual-repair", f"{told}: the same command then gives {code}: {said[-400:]}")
        elif found := runs.differences(trial / "run", unbroken.folder):
            tally.count("silent-different", f"{told}: {found}")
        elif found := runs.leftovers(trial / "run"):
            tally.count("leak", f"{told}: {found}")
        else:
            tally.count(CLEAN)
    if 4 * missed > len(points):
        tally.count("wrong-error", f"{missed} of {len(points)} calls were not reached")
    kinds = ", ".join(f"{number} {call}" for call, number in Counter(calls).items())
    tally.notes.append(f"{len(points) - missed} of {len(every)} places: {kinds}")
    return tally.result()


def _run_killed(unbroken: runs.Unbroken, folder: Path, prepare: Sequence[str], number: int) -> int | None:
    """`luthier train`, killed right before its N-th call that changes a name, or with all of them listed; its exit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "kill-at").write_text(str(number), encoding="ascii")
    prepare = (*prepare, "tests.faults.broken:killed_at_a_call")
    return runs.begin(unbroken.recipe, folder / "run", out=folder / "out", prepare=prepare).reap(runs.LONGEST)


def control(*, seed: int, folder: Path) -> Campaign:
    """Kill a process that makes room before it saves."""
    work = "save_after_removing"
    return campaign(f"{FAULT} (broken)", PROMISE, kill_points, 1000, seed=seed, folder=folder, work=work)


def kill_points(calls: Counter[str]) -> list[Point]:
    """Every call at which a process may be killed."""
    return [Point(call, number) for call in KILLED for number in range(1, calls[call] + 1)]


def error_points(calls: Counter[str]) -> list[Point]:
    """Every call that may fail, with each reason, once and from then on."""
    return [
        Point(call, number, how, forever)
        for call in dict.fromkeys((*KILLED, *ASKED))
        for number in range(1, calls[call] + 1)
        for how in (("EIO",) if call in ASKED else CODES)
        for forever in (False, True)
    ]


def campaign(
    fault: str,
    promise: str,
    points_of: Callable[[Counter[str]], list[Point]],
    count: int,
    *,
    seed: int,
    folder: Path,
    work: str = "save",
) -> Campaign:
    """`work` of `tests/faults/saver.py` broken at `count` of its points, at each when there are no more."""
    require_strace()
    folder.mkdir(parents=True, exist_ok=True)
    tally = Tally(fault, promise, seed=seed, control=CONTROL)
    template(folder / "template")
    calls = traced(folder, work)
    points = points_of(calls)
    every = len(points)
    if count < every:
        points = random.Random(seed).sample(points, count)
    for point in points:
        verdict, detail = _broken_at(point, folder, work)
        tally.count(verdict, f"{point.injection}: {detail}")
    tally.notes.append(f"{len(points)} of {every} places: {', '.join(f'{n} {call}' for call, n in calls.items())}")
    return tally.result()


def require_strace() -> None:
    """Raise UnavailableError when strace is missing or may not trace."""
    program = shutil.which("strace")
    if program is None:
        raise UnavailableError("strace is not installed")
    tried = subprocess.run([program, "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise UnavailableError(f"strace may not trace here: {tried.stderr.strip()[-200:]}")


def traced(folder: Path, work: str) -> Counter[str]:
    """How often an undisturbed save makes each of the calls that can be broken."""
    log = folder / "calls"
    kinds = f"trace={','.join((*KILLED, *ASKED))}"
    with _started(folder, work) as (child, gate), _strace(child, "-o", str(log), "-e", kinds):
        gate()
        code = child.reap(LONGEST)
    if code != 0:
        raise RuntimeError(f"an undisturbed save gives {code}: {(folder / 'out').read_text('utf-8')}")
    return Counter(name for name in _CALL.findall(log.read_text("utf-8", "replace")) if name in (*KILLED, *ASKED))


def _broken_at(point: Point, folder: Path, work: str) -> tuple[str, str]:
    """Break one save at one place, and look at what it leaves: a verdict, and what is to be said of it."""
    trace = ("-o", os.devnull, "-e", f"trace={point.call}", "-e", point.injection)
    with _started(folder, work) as (child, gate), _strace(child, *trace):
        gate()
        code = child.reap(LONGEST)
    said = (folder / "out").read_text("utf-8", "replace")
    place = folder / "checkpoints"
    if code is None:
        return "hang", f"no end after {LONGEST:.0f} s"
    if point.how == "KILL" and code != -signal.SIGKILL:
        return "wrong-error", f"the call was not reached, exit {code}: {said[-400:]}"
    if point.how != "KILL":
        if code not in (0, 74):
            return "wrong-error", f"exit {code}: {_shortened(said)}"
        if code == 74 and said and os.strerror(CODES[point.how]) not in said:
            return "wrong-error", f"the reason is not told: {said[-400:]}"
        if code == 0 and NEW not in CheckpointStore(place, run=RUN).steps():
            return "silent-different", "a save that succeeded is not there"
    return _look(place)


def _look(place: Path) -> tuple[str, str]:
    """Whether what lies in `place` is a state that a run can go on from, and goes on from well."""
    store = CheckpointStore(place, run=RUN)
    try:
        for step in (NEW,) if NEW in store.steps() else OLD:
            verify(place / f"step-{step:06d}")
        newest = store.latest_valid()
    except (CorruptError, OSError) as error:
        return "silent-different", f"damaged: {error}"
    if newest is None or int(newest.name[5:]) not in (OLD[-1], NEW):
        return "lost-work", f"the newest that verifies is {newest}"
    left = [path.name for path in place.glob(".*") if path.name not in STALE]
    if len(left) > 1:
        return "leak", f"left: {left}"
    try:
        again = CheckpointStore(place, run=RUN)
        again.recover()
        again.save(NEW + 10, writer(NEW + 10), {})
        again.rotate(1)
    except LuthierError as error:
        return "manual-repair", str(error)
    if CheckpointStore(place, run=RUN).latest_valid() != place / f"step-{NEW + 10:06d}":
        return "silent-different", "the next save is not the newest"
    left = [path.name for path in place.glob(".*")]
    return ("leak", f"left after the next start: {left}") if left else (CLEAN, "")


def _shortened(traceback: str) -> str:
    """Where in luthier a traceback ends, and with what."""
    frames = re.findall(r'File ".*?(luthier/[^"]+)", line (\d+), in (\w+)', traceback)
    last = (traceback.strip().splitlines() or [""])[-1]
    return f"{' > '.join(':'.join(frame) for frame in frames[-2:])}: {last}"


@contextmanager
def _started(folder: Path, work: str) -> Iterator[tuple[Child, Callable[[], None]]]:
    """A process that is about to save into a copy of the template, and what lets it begin."""
    for name in ("checkpoints", "checkpoints-rehearsal"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / READY).unlink(missing_ok=True)
    shutil.copytree(folder / "template", folder / "checkpoints", symlinks=True)
    gate = folder / "gate"
    gate.touch()
    with gate.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = zygote(heavy=False).start(
            f"tests.faults.saver:{work}", folder / "checkpoints", gate,
            out=folder / "out", prepare=("tests.faults.saver:traceable",),
        )  # fmt: skip
        until = time.monotonic() + LONGEST
        while not (folder / READY).exists() and not child.wait(0.002) and time.monotonic() < until:
            pass
        yield child, lambda: fcntl.flock(lock, fcntl.LOCK_UN)


@contextmanager
def _strace(child: Child, *arguments: str) -> Iterator[None]:
    """strace, attached to a child, until the child has ended."""
    command = ["strace", "-f", *arguments, "-p", str(child.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        if process.stderr is None:
            raise RuntimeError("no output")
        line = process.stderr.readline()
        if _ATTACHED not in line:
            process.kill()
            raise UnavailableError(f"strace could not attach: {line.strip()}")
        try:
            yield
            process.communicate(timeout=LONGEST)
        finally:
            process.kill()
