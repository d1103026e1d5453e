"""`kill -9` at random moments of a run, again and again until it finishes: then it equals the run that nobody killed.

What: for each combination of trainable methods an unbroken run is made, then trials: the same command is started and
killed after a uniformly random part of the unbroken run's time, and started again, until it ends by itself. Result,
last checkpoint, log and answers must be the same bytes; nothing may have to be repaired by hand, nothing be left over,
no process live on, and no step be repeated that an announced checkpoint holds.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults import runs
from tests.faults.campaign import CLEAN, Campaign, Tally
from tests.faults.runs import LONGEST, NO_FRESH_PROOF, Unbroken, begin
from tests.faults.zygote import survivors

FAULT = "kill -9 while training"
PROMISE = "the same command finishes with the same bits; at most one checkpoint interval is repeated"
CONTROL = "checkpoints in place, a log never cut back, random state forgotten"
BROKEN = ("checkpoints_in_place", "log_never_cut_back", "random_state_forgotten")
FRESH_PROOF_EVERY = 25
MOST_ATTEMPTS = 12
"""Kills of one run: so that a thousand of them meet each combination of methods more than once."""


@dataclass
class Trial:
    """What happened to one run until its end."""

    kills: int = 0
    verdict: str = CLEAN
    detail: str = ""
    repeated: int = 0

    def fail(self, verdict: str, detail: str) -> None:
        """Remember the first failure."""
        if self.verdict == CLEAN:
            self.verdict, self.detail = verdict, detail


def run(count: int, *, seed: int, folder: Path) -> Campaign:
    """At least `count` kills over all combinations of methods, in turn."""
    dice = random.Random(seed)
    tally = Tally(FAULT, PROMISE, seed=seed, control=CONTROL)
    bench = runs.Bench(folder, seed)
    number = most = fresh = 0
    while tally.tried < count:
        unbroken = bench.next()
        # Few runs prove their result as users' runs do, in a fresh process: that takes longer than the run.
        apart = number % FRESH_PROOF_EVERY == FRESH_PROOF_EVERY - 1
        if apart:
            fresh += 1
            span = runs.seconds_with_fresh_proof(unbroken)
            trial = killed_until_done(unbroken, folder / "trial", dice, span=span, prepare=())
        else:
            trial = killed_until_done(unbroken, folder / "trial", dice, span=unbroken.seconds)
        number += 1
        most = max(most, trial.repeated)
        if trial.kills or trial.verdict != CLEAN:
            detail = f"{unbroken.combination}, trial {number}: {trial.detail}"
            tally.count(trial.verdict, detail, times=max(1, trial.kills))
    tally.notes += [
        f"{number} runs of {bench.made} combinations finished",
        f"{fresh} of them proved their result in a fresh process",
        f"at most {most} steps were repeated after one kill",
        *bench.refused,
    ]
    return tally.result()


def control(*, seed: int, folder: Path) -> Campaign:
    """Three broken variants, each killed until a failure shows; one that shows none in 12 runs counts as passed."""
    dice = random.Random(seed)
    tally = Tally(f"{FAULT} (broken)", PROMISE, seed=seed, control=CONTROL)
    unbroken = runs.Bench(folder, seed, named="lora").next()
    for name in BROKEN:
        trial = Trial()
        for _ in range(12):
            prepare = (NO_FRESH_PROOF, f"tests.faults.broken:{name}")
            trial = killed_until_done(unbroken, folder / "trial", dice, span=unbroken.seconds, prepare=prepare)
            if trial.verdict != CLEAN:
                break
        tally.count(trial.verdict, f"{name}: {trial.detail}")
    return tally.result()


def killed_until_done(
    unbroken: Unbroken, folder: Path, dice: random.Random, *, span: float, prepare: Sequence[str] = (NO_FRESH_PROOF,)
) -> Trial:
    """One run, killed at random moments of `span` seconds until it ends by itself."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run, out, trial = folder / "run", folder / "out", Trial()
    # Delays in the words of a failure: with them it can be looked for again, though no moment comes back exactly.
    delays: list[float] = []
    while trial.verdict == CLEAN:
        announced, reached, at = runs.announced(run), runs.last_step(run), time.time()
        # Most kills come before the first new step; after some of them the run has to come to its end.
        delays.append(dice.uniform(0, span) if len(delays) < MOST_ATTEMPTS else LONGEST)
        child = begin(unbroken.recipe, run, out=out, prepare=prepare)
        if not child.wait(delays[-1]):
            child.signal(signal.SIGKILL)
        code = child.reap(LONGEST)
        _look(run, trial, announced=announced, reached=reached, at=at, interval=unbroken.interval)
        if left := survivors(child):
            trial.fail("leak", f"processes live on: {left}")
        said = out.read_text("utf-8", "replace")
        if code == -signal.SIGKILL:
            trial.kills += 1
        elif runs.has_ended(code, said):
            break
        elif code is None:
            trial.fail("hang", f"no end after {LONGEST:.0f} s")
        else:
            wrong = code in (1, -signal.SIGSEGV, -signal.SIGABRT) or "Traceback" in said
            trial.fail("wrong-error" if wrong else "manual-repair", f"exit {code}: {said[-600:]}")
    if trial.verdict == CLEAN:
        if "Traceback" in said:
            trial.fail("wrong-error", said[-600:])
        if found := runs.differences(run, unbroken.folder):
            trial.fail("silent-different", "; ".join(found))
        if found := runs.leftovers(run):
            trial.fail("leak", f"left in a finished run: {found}")
    trial.detail += f" (killed after {', '.join(f'{delay:.3f}' for delay in delays)} s of {span:.3f} s)"
    return trial


def _look(run: Path, trial: Trial, *, announced: int, reached: int, at: float, interval: int) -> None:
    """Whether this start went on from where it had to, and how much lies about."""
    began = [event for event in runs.events(run) if event["kind"] == "start" and event["time"] >= at - 0.001]
    if began:
        resumed = began[-1]["resumed_at"]
        trial.repeated = max(trial.repeated, reached - resumed)
        if resumed < announced:
            trial.fail("lost-work", f"went on after step {resumed}, though step {announced} was announced")
        # One more interval may be in flight: a save is begun, and its checkpoint not yet announced.
        if reached - resumed > 2 * interval:
            trial.fail("lost-work", f"went on after step {resumed} of {reached}; checkpoints every {interval}")
    found = [name for name in runs.leftovers(run) if name.rpartition("/")[2].startswith((".tmp-", ".del-"))]
    if len(found) > 1:
        trial.fail("leak", f"more than one folder is left: {found}")
