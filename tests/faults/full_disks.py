"""Full disks: a whole run on disks of every size from nothing to enough; then there is space, and it is the same run.

What: a tmpfs of a given size (or with a given number of inodes) holds the run directory. `luthier train` must end with
0 or 74, never with a traceback, never losing an announced checkpoint, and go on training while only saving fails. Then
the disk becomes large enough, for every third size while the run is still at work, and the same command finishes the
run with the bytes of one that always had space.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from luthier.core.errors import LuthierError
from luthier.store.runs import RunDirectory, is_run
from tests.faults import runs
from tests.faults.campaign import CLEAN, Campaign, Tally
from tests.faults.mounts import call, mounted, require_tmpfs
from tests.faults.runs import LONGEST, NO_FRESH_PROOF, STEPS, Unbroken, begin
from tests.faults.zygote import survivors

FAULT = "disk full, in every size from nothing to enough"
INODES = "no inodes left, from none to enough"
PROMISE = "exit 0 or 74; training goes on meanwhile; with space freed the same command finishes with the same bits"
CONTROL = "checkpoints in place"
HURRY = "tests.faults.broken:in_a_hurry"
PAGE = 4096
_STEP = re.compile(r"step (\d+)/(\d+)")

Limit = Literal["size", "nr_inodes"]


def run(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` sizes in equal steps."""
    return _campaign(FAULT, "size", count, seed=seed, folder=folder)


def run_inodes(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` numbers of inodes in equal steps."""
    return _campaign(INODES, "nr_inodes", count, seed=seed, folder=folder)


def control(*, seed: int, folder: Path) -> Campaign:
    """A few sizes for a run that writes its checkpoints in place."""
    prepare = (NO_FRESH_PROOF, HURRY, "tests.faults.broken:checkpoints_in_place")
    return _campaign(f"{FAULT} (broken)", "size", 8, seed=seed, folder=folder, prepare=prepare)


def control_inodes(*, seed: int, folder: Path) -> Campaign:
    """The same with few inodes."""
    prepare = (NO_FRESH_PROOF, HURRY, "tests.faults.broken:checkpoints_in_place")
    return _campaign(f"{INODES} (broken)", "nr_inodes", 12, seed=seed, folder=folder, prepare=prepare)


def _campaign(
    fault: str,
    limit: Limit,
    count: int,
    *,
    seed: int,
    folder: Path,
    prepare: Sequence[str] = (NO_FRESH_PROOF, HURRY),
) -> Campaign:
    require_tmpfs(folder)
    dice = random.Random(seed)
    tally = Tally(fault, PROMISE, seed=seed, control=CONTROL)
    bench = runs.Bench(folder, seed)
    ended: dict[int | None, int] = {}
    for number in range(count):
        unbroken = bench.next()
        enough = _needed(unbroken, limit)
        amount = enough * (number + 1) // count
        freed = dice.uniform(0, 2 * unbroken.seconds) if number % 3 == 2 else None
        code, verdict, detail = _tried(unbroken, folder, limit, amount, enough, freed=freed, prepare=prepare)
        ended[code] = ended.get(code, 0) + 1
        when = "afterwards" if freed is None else f"after {freed:.3f} s"
        tally.count(verdict, f"{unbroken.combination}, {limit}={amount} of {enough}, freed {when}: {detail}")
    tally.notes.append(f"first exit codes: {', '.join(f'{code} ({times} times)' for code, times in ended.items())}")
    return tally.result()


def _needed(unbroken: Unbroken, limit: Limit) -> int:
    """What is enough for a run: what it has in the end, with as many checkpoints again for those that come and go."""
    paths = [path for path in unbroken.folder.rglob("*") if not path.is_symlink()]
    if limit == "nr_inodes":
        return 2 * len(paths) + 20
    pages = sum(-(-path.stat().st_size // PAGE) for path in paths if path.is_file())
    return 2 * PAGE * (pages + 20)


def _tried(
    unbroken: Unbroken,
    folder: Path,
    limit: Limit,
    amount: int,
    enough: int,
    *,
    freed: float | None,
    prepare: Sequence[str],
) -> tuple[int | None, str, str]:
    """One run on one disk: its first exit code, a verdict, and what is to be said of it."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    out, place = folder / "out", folder / "disk"
    with mounted("luthier-faults", place, "-t", "tmpfs", "-o", f"size=64m,{limit}={amount}"):
        run = place / "run"
        child = begin(unbroken.recipe, run, out=out, prepare=prepare)
        if freed is not None and not child.wait(freed):
            call("mount", "-o", f"remount,{limit}={2 * enough}", place)
        code = child.reap(LONGEST)
        said = out.read_text("utf-8", "replace")
        verdict, detail = _judged(run, code, said)
        if left := survivors(child):
            return code, "leak", f"processes live on: {left}"
        if verdict != CLEAN:
            return code, verdict, detail
        if code != 0:
            call("mount", "-o", f"remount,{limit}={2 * enough}", place)
            again = begin(unbroken.recipe, run, out=out, prepare=prepare).reap(LONGEST)
            said = out.read_text("utf-8", "replace")
            if not runs.has_ended(again, said):
                return code, "manual-repair", f"with space freed the same command gives {again}: {said[-400:]}"
        if found := runs.differences(run, unbroken.folder):
            return code, "silent-different", "; ".join(found)
        if found := runs.leftovers(run):
            return code, "leak", f"left in a finished run: {found}"
        return code, CLEAN, ""


def _judged(run: Path, code: int | None, said: str) -> tuple[str, str]:
    """What the run said on its small disk, and what it left there."""
    if code is None:
        return "hang", f"no end after {LONGEST:.0f} s"
    if code not in (0, 74) or "Traceback" in said or "error[unexpected]" in said:
        return "wrong-error", f"exit {code}: {said[-600:]}"
    steps = [int(number) for number, _ in _STEP.findall(said)]
    if steps and max(steps) < STEPS:
        return "lost-work", f"training ended after step {max(steps)} because of the disk: {said[-400:]}"
    if code == 74 and not re.search(r"No space left|bytes needed|free", said):
        return "wrong-error", f"the reason is not told: {said[-400:]}"
    announced = runs.announced(run)
    if announced and is_run(run):
        try:
            newest = RunDirectory.open(run).checkpoints.latest_valid()
        except LuthierError as error:
            return "lost-work", str(error)
        if newest is None or int(newest.name.removeprefix("step-")) < announced:
            return "lost-work", f"step {announced} was announced, {newest} is the newest that verifies"
    return CLEAN, ""
