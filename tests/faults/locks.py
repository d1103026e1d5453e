"""Races for one run directory: one process gets it, the others learn at once who has it, and nothing is changed.

What: `run` lets processes that were all held back at one gate call `luthier train` on the same directory: exactly one
trains, with the result of a run that was alone; the others leave with 77 and name the process that has it, in less than
a second. `run_store` does the same with the directory and its lock alone, which takes milliseconds, so many more
processes race. `run_finished` starts commands on a finished run, which must stay as it is, byte for byte.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from luthier.store.runs import RunDirectory, is_run
from tests.cli.commands import environ, tree
from tests.faults import runs
from tests.faults.campaign import CLEAN, Campaign, Tally
from tests.faults.runs import LONGEST, NO_FRESH_PROOF, begin
from tests.faults.zygote import zygote

FAULT = "several starts of one run at once"
STORE = "many processes at one lock at once"
FINISHED = "commands on a finished run"
PROMISE = "one of them trains; the others exit 77 in under a second naming it; nothing is changed"
KEPT = "it stays as it is, byte for byte"
CONTROL = "a lock that locks nothing"
FORGOTTEN = "a finished run that looks interrupted"
RACERS = 5
CROWD = 50
AT_ONCE = 1.0
FRESH_STARTS = 3
_HELD = re.compile(r"is used by pid (\d+)")
LOST, WON = 77, 0


def run(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` starts of `luthier train`, five at a time on one directory."""
    return _campaign(FAULT, count, seed=seed, folder=folder, prepare=(NO_FRESH_PROOF,))


def control(*, seed: int, folder: Path) -> Campaign:
    """The same where the lock locks nothing."""
    deaf = (NO_FRESH_PROOF, "tests.faults.broken:lock_that_locks_nothing")
    return _campaign(f"{FAULT} (broken)", 6 * RACERS, seed=seed, folder=folder, prepare=deaf)


def _campaign(fault: str, count: int, *, seed: int, folder: Path, prepare: Sequence[str]) -> Campaign:
    tally = Tally(fault, PROMISE, seed=seed, control=CONTROL)
    unbroken = runs.Bench(folder, seed, named="lora").next()
    slowest = 0.0
    while tally.tried < count:
        place = folder / "race"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        racers, seconds = _race(unbroken.recipe, place, prepare=prepare)
        for _, said, code in racers:
            verdict, detail = _judged(said, code, [pid for pid, _, other in racers if other == WON], racers)
            tally.count(verdict, detail)
        if all(code in (WON, LOST) for _, _, code in racers) and (
            found := runs.differences(place / "run", unbroken.folder)
        ):
            tally.count("silent-different", "; ".join(found))
        slowest = max([slowest, *seconds])
    tally.notes.append(f"a refused start took at most {slowest:.3f} s, imports excluded, {RACERS} at once")
    alone = sorted(_alone(unbroken.recipe, folder) for _ in range(FRESH_STARTS))
    # The fastest of a few: the promise is about what has to be done, not about how busy disk and cores are meanwhile.
    tally.count(CLEAN if alone[0] < AT_ONCE else "slow", f"a refused start takes {alone[0]:.2f} s, imports included")
    tally.notes.append(
        f"a start beside a run at work was refused after {alone[0]:.2f} to {alone[-1]:.2f} s, imports included"
    )
    return tally.result()


Racer = tuple[int, str, int | None]


def _race(recipe: Path, place: Path, *, prepare: Sequence[str]) -> tuple[list[Racer], list[float]]:
    """Start all at once; each one's number, words and exit code, and how long those took that were refused."""
    gate = place / "gate"
    gate.touch()
    with gate.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        children = [
            begin(recipe, place / "run", out=place / f"out-{number}", prepare=prepare, gate=gate)
            for number in range(RACERS)
        ]
        time.sleep(0.1)
        fcntl.flock(lock, fcntl.LOCK_UN)
    released = time.monotonic()
    ended: dict[int, float] = {}
    while len(ended) < RACERS and time.monotonic() < released + LONGEST:
        for child in children:
            if child.pid not in ended and child.wait(0.001):
                ended[child.pid] = time.monotonic() - released
    racers = [
        (child.pid, (place / f"out-{number}").read_text("utf-8", "replace"), child.reap(0))
        for number, child in enumerate(children)
    ]
    return racers, [ended[pid] for pid, _, code in racers if code == LOST]


def _judged(said: str, code: int | None, winners: Sequence[int], racers: Sequence[Racer]) -> tuple[str, str]:
    if code is None:
        return "hang", f"no end after {LONGEST:.0f} s"
    if code == WON:
        return (CLEAN, "") if len(winners) == 1 else ("silent-different", f"{len(winners)} of {len(racers)} trained")
    if code != LOST or "Traceback" in said:
        return "wrong-error", f"exit {code}: {said[-400:]}"
    held = _HELD.search(said)
    if held is None or int(held[1]) not in winners or "nothing was changed" not in said:
        return "wrong-error", f"does not name the holder: {said[-400:]}"
    return CLEAN, ""


def _alone(recipe: Path, folder: Path) -> float:
    """Seconds that a fresh `luthier train` takes to be refused, from the start of its process, but for other work."""
    place = folder / "held"
    shutil.rmtree(place, ignore_errors=True)
    with RunDirectory.begin(place) as run:
        run.write_status("running")
        program = "from luthier.cli.main import main; main()"
        command = [sys.executable, "-c", program, "train", str(recipe), "--run", str(place)]
        out = place.with_name("refused")
        began = time.monotonic()
        with out.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environ()) as process:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.monotonic() - began - _waited(process.pid)
    if process.returncode != LOST:
        raise RuntimeError(f"a start on a held directory gives {process.returncode}: {out.read_text('utf-8')[-400:]}")
    return seconds


def _waited(pid: int) -> float:
    """Seconds that a process could have run and had no core: a busy machine is no fault of ours."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text("ascii").split()[1]) / 1e9
    except OSError:
        # A kernel that does not count them.
        return 0.0


# --------------------------------------------------------------------------------------- the directory and its lock


def run_store(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` processes, fifty at a time, that make and lock one run directory."""
    return _store(STORE, count, seed=seed, folder=folder, prepare=())


def control_store(*, seed: int, folder: Path) -> Campaign:
    """The same where the lock locks nothing."""
    prepare = ("tests.faults.broken:lock_that_locks_nothing",)
    return _store(f"{STORE} (broken)", CROWD, seed=seed, folder=folder, prepare=prepare)


def _store(fault: str, count: int, *, seed: int, folder: Path, prepare: Sequence[str]) -> Campaign:
    tally = Tally(fault, PROMISE, seed=seed, control=CONTROL)
    slowest = 0.0
    while tally.tried < count:
        place = folder / "crowd"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        verdicts, seconds = _crowd(place, random.Random(seed + tally.tried), prepare)
        slowest = max(slowest, seconds)
        for verdict, detail in verdicts:
            tally.count(verdict, detail)
    tally.notes.append(f"a refused process took at most {slowest:.3f} s, {CROWD} at once")
    return tally.result()


def _crowd(place: Path, dice: random.Random, prepare: Sequence[str]) -> tuple[list[tuple[str, str]], float]:
    gate, done = place / "gate", place / "done"
    gate.touch()
    done.touch()
    # Some races are for a directory that is there already, as after an interruption.
    if again := dice.random() < 0.5:
        with RunDirectory.begin(place / "run") as run:
            run.write_recipe({"recipe": "finetune"})
    before = tree(place / "run")
    with gate.open("rb") as lock, done.open("rb") as until:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(until, fcntl.LOCK_EX)
        children = [
            zygote(heavy=False).start(
                "tests.faults.saver:hold", place / "run", "again" if again else "new", done,
                out=place / f"out-{number}", gate=gate, prepare=prepare,
            )
            for number in range(CROWD)
        ]  # fmt: skip
        time.sleep(0.05)
        fcntl.flock(lock, fcntl.LOCK_UN)
        # All but one are refused; the one that has it waits for us.
        late = time.monotonic() + LONGEST
        waiting = list(children)
        while len(waiting) > 1 and time.monotonic() < late:
            waiting = [child for child in waiting if not child.wait(0.0005)]
    codes = [child.reap(LONGEST) for child in children]
    said = [(place / f"out-{number}").read_text("utf-8", "replace") for number in range(CROWD)]
    winners = [child.pid for child, code in zip(children, codes, strict=True) if code == WON]
    found = []
    for text, code in zip(said, codes, strict=True):
        if code == WON:
            found.append((CLEAN, "") if len(winners) == 1 else ("silent-different", f"{len(winners)} have the lock"))
        elif code != LOST or (held := _HELD.search(text)) is None or int(held[1]) not in winners:
            found.append(("wrong-error", f"exit {code}: {text[-400:]}"))
        else:
            found.append((CLEAN, ""))
    if again and {name: data for name, data in tree(place / "run").items() if name != "run.lock"} != {
        name: data for name, data in before.items() if name != "run.lock"
    }:
        found.append(("silent-different", "the directory was changed"))
    seconds = [float(text.split()[-1]) for text, code in zip(said, codes, strict=True) if code == LOST]
    return found, max(seconds, default=0.0)


# ------------------------------------------------------------------------------------------------- finished runs


def run_finished(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` commands on finished runs: the same again, another recipe, resume."""
    return _finished(FINISHED, count, seed=seed, folder=folder, prepare=(NO_FRESH_PROOF,))


def control_finished(*, seed: int, folder: Path) -> Campaign:
    """The same where a finished run looks like one that was interrupted."""
    prepare = (NO_FRESH_PROOF, "tests.faults.broken:finished_is_forgotten")
    return _finished(f"{FINISHED} (broken)", 3, seed=seed, folder=folder, prepare=prepare)


def _finished(fault: str, count: int, *, seed: int, folder: Path, prepare: Sequence[str]) -> Campaign:
    tally = Tally(fault, KEPT, seed=seed, control=FORGOTTEN)
    bench = runs.Bench(folder, seed)
    first = bench.next()
    for number in range(count):
        unbroken = bench.next() if number % 3 == 0 else bench.ready[-1]
        other = first if first.recipe != unbroken.recipe else bench.next()
        # A copy of its own name, for what a broken variant may do to it.
        finished = folder / "finished" / "run"
        shutil.rmtree(finished.parent, ignore_errors=True)
        shutil.copytree(unbroken.folder, finished, symlinks=True)
        commands = (
            ("train", unbroken.recipe, "--run", finished),
            ("train", other.recipe, "--run", finished),
            ("resume", finished),
        )
        command = commands[number % 3]
        before = _content(finished)
        child = zygote().start(runs.LUTHIER, *command, out=folder / "out", prepare=prepare)
        code = child.reap(LONGEST)
        said = (folder / "out").read_text("utf-8", "replace")
        if _content(finished) != before or not is_run(finished):
            tally.count("silent-different", f"{command} changed the run: {said[-300:]}")
        elif code not in (WON, LOST) or "Traceback" in said or (code == WON and command[1] == other.recipe):
            tally.count("wrong-error", f"{command}: exit {code}: {said[-400:]}")
        else:
            tally.count(CLEAN)
    return tally.result()


def _content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != "run.lock"}
