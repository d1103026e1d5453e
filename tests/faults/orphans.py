"""Parents killed at random moments: no process that they had started lives on.

What: `luthier train` with nothing in its cache and with its result proved in a fresh process, as for users, so that it
has children of its own for most of its time; `kill -9` after a uniformly random part of an unbroken run's time. Its
children are found by their session and by a mark in their environment; five seconds later there must be none.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults import runs
from tests.faults.campaign import CLEAN, Campaign, Tally
from tests.faults.runs import LONGEST, Unbroken, begin
from tests.faults.zygote import Child, family, survivors

FAULT = "kill -9 of a parent"
PROMISE = "no process that it had started lives on"
CONTROL = "a child that is bound to nobody"
CHILDREN = ("luthier.core.guarded", "luthier.data.rendering.worker", "luthier.recipes.proving.verify")
"""What the command lines of a run's children hold: of its compilers, of its templates, of its proof."""
FRESH = "tests.faults.broken:fresh_cache"


def run(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` parents killed."""
    return _campaign(FAULT, count, seed=seed, folder=folder, prepare=(FRESH,))


def control(*, seed: int, folder: Path) -> Campaign:
    """Parents that start a child which is bound to nobody."""
    prepare = (FRESH, "tests.faults.broken:child_outlives_us")
    return _campaign(f"{FAULT} (broken)", 2, seed=seed, folder=folder, prepare=prepare)


def each_child(*, seed: int, folder: Path) -> Campaign:
    """A parent killed beside each kind of child that a run has, as soon as it is there: no moment is left to chance."""
    tally = Tally(FAULT, PROMISE, seed=seed, control=CONTROL)
    unbroken = runs.Bench(folder, seed, named="lora").next()
    for program in CHILDREN:
        child = _begun(unbroken, folder, () if program == CHILDREN[-1] else (FRESH,))
        until = time.monotonic() + LONGEST
        while not (had := _named(program, child)) and not child.wait(0.005) and time.monotonic() < until:
            pass
        child.signal(signal.SIGKILL)
        child.reap(LONGEST)
        left = survivors(child)
        tally.count("leak" if left else CLEAN if had else "no child", f"killed beside {program}, {had}: {left}")
    return tally.result()


def _named(program: str, child: Child) -> list[str]:
    return [command for command in family(child).values() if program in command]


def _campaign(fault: str, count: int, *, seed: int, folder: Path, prepare: Sequence[str]) -> Campaign:
    dice = random.Random(seed)
    tally = Tally(fault, PROMISE, seed=seed, control=CONTROL)
    unbroken = runs.Bench(folder, seed, named="lora").next()
    span = _span(unbroken, folder)
    had = 0
    for _ in range(count):
        child = _begun(unbroken, folder, prepare)
        delay = dice.uniform(0, span)
        child.wait(delay)
        had += bool(family(child))
        child.signal(signal.SIGKILL)
        child.reap(LONGEST)
        left = survivors(child)
        tally.count("leak" if left else CLEAN, f"killed after {delay:.3f} of {span:.3f} s: {left}")
    tally.notes.append(f"{had} of {count} had children at that moment")
    return tally.result()


def _span(unbroken: Unbroken, folder: Path) -> float:
    """Seconds of an unbroken run with nothing in its cache and its proof apart."""
    child = _begun(unbroken, folder, (FRESH,))
    code = child.reap(LONGEST)
    if code != 0:
        raise RuntimeError(f"exit {code}: {(folder / 'trial' / 'out').read_text('utf-8', 'replace')[-600:]}")
    return time.monotonic() - child.began


def _begun(unbroken: Unbroken, folder: Path, prepare: Sequence[str]) -> Child:
    """The same run in a place of its own."""
    shutil.rmtree(folder / "trial", ignore_errors=True)
    (folder / "trial").mkdir()
    return begin(unbroken.recipe, folder / "trial" / "run", out=folder / "trial" / "out", prepare=prepare)
