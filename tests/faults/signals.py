"""Signals at random moments of a run: it saves the step it is in, says how to go on, and goes on with the same bits.

What: a run is begun and sent SIGTERM after a uniformly random part of an unbroken run's time, or while a checkpoint is
being written. It must leave with 75 (0 when it was finished already), after at most one more step, with that step in a
verified checkpoint, the next command on stderr, and no process left behind; and the same command must then finish with
the bytes of the unbroken run. `run_others` does the same with SIGINT, SIGHUP and a second SIGINT, which must leave at
once, and with the two ways to have a state saved without stopping: SIGUSR1 and a file called `save`.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier.core.errors import LuthierError
from luthier.store.runs import RunDirectory, is_run
from tests.faults import runs
from tests.faults.campaign import CLEAN, Campaign, Tally
from tests.faults.runs import LONGEST, NO_FRESH_PROOF, STEPS, Unbroken, begin
from tests.faults.zygote import Child, survivors

Kind = Literal["SIGTERM", "SIGTERM in a save", "SIGINT", "SIGHUP", "SIGINT twice", "SIGUSR1", "save file"]
FAULT = "SIGTERM at a random moment"
OTHERS = "SIGINT, SIGHUP, a second SIGINT, SIGUSR1, a file `save`"
PROMISE = "saved within one step, exit 75 with the next command, nothing left behind, and the same bits in the end"
CONTROL = "nobody listens to signals"
OTHER_KINDS: tuple[Kind, ...] = ("SIGINT", "SIGHUP", "SIGINT twice", "SIGUSR1", "save file")
EARLY = "clean: nothing begun"
LEAVES_AT_ONCE = 10.0
"""Seconds a second SIGINT may take on a busy machine; how long it took at most is in the notes."""
NEXT_COMMAND = re.compile(r"luthier (?:resume|train) \S+|same command")


@dataclass
class Trial:
    """One run and what a signal did to it."""

    kind: Kind
    run: Path
    verdict: str = CLEAN
    detail: str = ""
    sent: float = 0.0
    """Wall-clock time right after the signal."""
    seconds: float = 0.0
    """From the last signal to the end."""
    asked: bool = True
    """Whether it was sent at all: a file cannot be put into a directory that is not there yet."""
    reached: int = 0
    """The newest step in the log when the signal had been sent."""
    delays: list[float] = field(default_factory=list)

    def fail(self, verdict: str, detail: str) -> None:
        """Remember the first failure."""
        if self.verdict in (CLEAN, EARLY):
            self.verdict, self.detail = verdict, detail


def run(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` times SIGTERM, every fourth while a checkpoint is being written."""
    return _campaign(FAULT, ("SIGTERM", "SIGTERM", "SIGTERM", "SIGTERM in a save"), count, seed=seed, folder=folder)


def run_others(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` trials of the other signals, in turn."""
    return _campaign(OTHERS, OTHER_KINDS, count, seed=seed, folder=folder)


def control(*, seed: int, folder: Path) -> Campaign:
    """SIGTERM to runs in which nobody listens to it: while they begin and end that loses nothing, in a save it does."""
    deaf = (NO_FRESH_PROOF, "tests.faults.broken:signals_ignored")
    return _campaign(f"{FAULT} (broken)", ("SIGTERM", "SIGTERM in a save"), 12, seed=seed, folder=folder, prepare=deaf)


def control_others(*, seed: int, folder: Path) -> Campaign:
    """SIGINT, SIGHUP and SIGUSR1 to runs in which nobody listens to them."""
    deaf = (NO_FRESH_PROOF, "tests.faults.broken:signals_ignored")
    return _campaign(f"{OTHERS} (broken)", ("SIGINT", "SIGHUP", "SIGUSR1"), 18, seed=seed, folder=folder, prepare=deaf)


def _campaign(
    fault: str,
    kinds: Sequence[Kind],
    count: int,
    *,
    seed: int,
    folder: Path,
    prepare: Sequence[str] = (NO_FRESH_PROOF,),
) -> Campaign:
    dice = random.Random(seed)
    tally = Tally(fault, PROMISE, seed=seed, control=CONTROL, passes=(CLEAN, EARLY))
    bench = runs.Bench(folder, seed)
    slowest: dict[Kind, float] = {}
    for number in range(count):
        unbroken = bench.next()
        trial = disturbed(unbroken, folder / "trial", kinds[number % len(kinds)], dice, prepare=prepare)
        slowest[trial.kind] = max(slowest.get(trial.kind, 0.0), trial.seconds)
        tally.count(trial.verdict, f"{trial.kind}, {unbroken.combination}: {trial.detail} ({trial.delays})")
    tally.notes += [
        f"{kind}: at most {seconds:.2f} s from signal to end"
        for kind, seconds in slowest.items()
        if kind not in ("SIGUSR1", "save file")
    ]
    return tally.result()


def disturbed(
    unbroken: Unbroken, folder: Path, kind: Kind, dice: random.Random, *, prepare: Sequence[str] = (NO_FRESH_PROOF,)
) -> Trial:
    """One run that is sent a signal, and that the same command then finishes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trial = Trial(kind, folder / "run", delays=[dice.uniform(0, unbroken.seconds), dice.uniform(0, 0.02)])
    child = begin(unbroken.recipe, trial.run, out=folder / "out", prepare=prepare)
    _disturb(child, trial)
    began = time.monotonic()
    code = child.reap(LONGEST)
    trial.seconds = time.monotonic() - began
    if left := survivors(child):
        trial.fail("leak", f"processes live on: {left}")
    _judge(trial, code, (folder / "out").read_text("utf-8", "replace"))
    if trial.verdict not in (CLEAN, EARLY):
        return trial
    said = ""
    if code != 0:
        code = begin(unbroken.recipe, trial.run, out=folder / "out").reap(LONGEST)
        said = (folder / "out").read_text("utf-8", "replace")
    if not runs.has_ended(code, said):
        trial.fail("manual-repair", f"the same command then gives {code}: {said[-600:]}")
    elif found := runs.differences(trial.run, unbroken.folder):
        trial.fail("silent-different", "; ".join(found))
    elif found := runs.leftovers(trial.run):
        trial.fail("leak", f"left in a finished run: {found}")
    return trial


def _disturb(child: Child, trial: Trial) -> None:
    """Wait for the moment and send the signal, or what takes its place."""
    if trial.kind == "SIGTERM in a save":
        until = time.monotonic() + LONGEST
        while not _is_saving(trial.run) and not child.wait(0.0002) and time.monotonic() < until:
            pass
    else:
        child.wait(trial.delays[0])
    if trial.kind == "save file":
        trial.asked = is_run(trial.run)
        if trial.asked:
            (trial.run / "save").touch()
    else:
        child.signal(signal.Signals[trial.kind.split()[0]])
    # Only now: what the run logs from here on it has done with the signal pending, however busy the machine is.
    trial.sent = time.time()
    trial.reached = runs.last_step(trial.run)
    if trial.kind == "SIGINT twice":
        child.wait(trial.delays[1])
        child.signal(signal.SIGINT)


def _is_saving(run: Path) -> bool:
    try:
        return any(path.name.startswith(".tmp-") for path in (run / "checkpoints").iterdir())
    except OSError:
        return False


def _judge(trial: Trial, code: int | None, said: str) -> None:
    """What the process said and left behind when it ended."""
    numbers = {-signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")}
    if code is None:
        trial.fail("hang", f"no end after {LONGEST:.0f} s")
    elif _has_traceback(trial.kind, said):
        trial.fail("wrong-error", f"exit {code}: {said[-900:]}")
    elif trial.kind == "SIGINT twice" and code in (75, 130, -signal.SIGINT, 0):
        if trial.seconds > LEAVES_AT_ONCE:
            trial.fail("hang", f"a second SIGINT took {trial.seconds:.1f} s")
        trial.verdict = trial.verdict if code == 75 or is_run(trial.run) else EARLY
    elif code in numbers or code == 130:
        # The signal came before the command had begun to listen. It must have left nothing.
        if trial.run.exists() and any(trial.run.iterdir()):
            trial.fail("wrong-error", f"exit {code}, though the run had begun: {said[-600:]}")
        elif trial.verdict == CLEAN:
            trial.verdict = EARLY
    elif code == 0:
        if trial.kind in ("SIGUSR1", "save file"):
            _judge_save(trial)
    elif code != 75:
        trial.fail("wrong-error", f"exit {code}: {said[-600:]}")
    elif trial.kind in ("SIGUSR1", "save file"):
        trial.fail("wrong-error", f"stopped, though it was only asked to save: {said[-600:]}")
    else:
        _judge_stop(trial, said)


def _has_traceback(kind: Kind, said: str) -> bool:
    """Whether a traceback was shown that luthier could have kept back."""
    if kind == "SIGINT twice":
        # What the second one interrupts may be a finalizer on the way out, which Python mentions and passes over.
        said = re.sub(r"^Exception ignored in.*?^KeyboardInterrupt:?\s*$", "", said, flags=re.DOTALL | re.MULTILINE)
    if said.startswith("Traceback") and "/luthier/" not in said:
        # It came before the first line of luthier.
        return False
    return "Traceback" in said or "error[unexpected]" in said


def _judge_stop(trial: Trial, said: str) -> None:
    if not NEXT_COMMAND.search(said):
        trial.fail("wrong-error", f"no next command: {said[-600:]}")
    steps = _after(trial, "step")
    if len(steps) > 1:
        trial.fail("lost-work", f"steps {steps} after the signal")
    if not is_run(trial.run):
        return
    reached = runs.last_step(trial.run)
    try:
        newest = RunDirectory.open(trial.run).checkpoints.latest_valid()
    except LuthierError as error:
        trial.fail("wrong-error", f"afterwards: {error}")
        return
    saved = int(newest.name.removeprefix("step-")) if newest is not None else 0
    if saved < reached:
        trial.fail("lost-work", f"step {reached} was done, step {saved} is saved: {said[-300:]}")


def _judge_save(trial: Trial) -> None:
    """A state that was asked for is saved after the step at hand, unless the run was not there yet, or at its end."""
    saved = {event["step"] for event in runs.events(trial.run) if event["kind"] == "checkpoint"}
    wanted = {trial.reached, trial.reached + 1, trial.reached + 2}
    # Whoever asks at an end that is near gets the last state, which is saved in any case.
    if trial.asked and trial.reached < STEPS - 2 and not wanted & saved:
        trial.fail("lost-work", f"asked to save after step {trial.reached}; saved were {sorted(saved)}")
    if (trial.run / "save").exists() and trial.reached < STEPS - 1:
        trial.fail("leak", "the file `save` is still there")


def _after(trial: Trial, kind: str) -> list[Any]:
    """The steps of events of a kind that were logged after the signal."""
    # The log has milliseconds.
    since = trial.sent + 0.001
    return [event["step"] for event in runs.events(trial.run) if event["kind"] == kind and event["time"] > since]
