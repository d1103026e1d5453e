"""The training loop, in the order in which it happens.

evaluate the untrained model -> step -> record -> evaluate -> save -> stop? -> step -> ...

The loop knows contracts only: a source of trees, a stepper, a schedule, a recorder, a keeper of checkpoints and, when
samples are wanted, a speaker. What it carries from step to step is `LoopState`, and nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Literal, Protocol, final

from luthier.core.errors import LuthierError
from luthier.core.events import Event, Recorder
from luthier.data.forest import Tree
from luthier.schedules import Schedule
from luthier.train.best import is_better, take_best
from luthier.train.pass_report import PassReport
from luthier.train.shortage import shortage
from luthier.train.source import Source
from luthier.train.state import LoopState
from luthier.train.stepper import Stepper
from luthier.train.watch import Diagnose, Watch

Status = Literal["finished", "stopped", "early-stopped", "out-of-time"]


Steps = Generator[Sequence[Tree], PassReport, Status]
"""A run that asks for passes: it yields the trees of each step, and goes on with what their pass has found."""


class Stop(Protocol):
    """Whether somebody has asked a run to stop."""

    def __bool__(self) -> bool:
        """Whether it has been asked."""


class Keeper(Protocol):
    """Keeps checkpoints, and for each training row by how much its loss was above its step's mean, which is in them."""

    row_excess: dict[int, float]

    def save(self, state: LoopState, *, best: bool) -> bool:
        """Begin to save everything a resumed run needs; False when it is not taken."""

    def poll(self) -> list[Event]:
        """What has become of saves since the last call: durable and verified, or failed and to be tried again."""

    def finish(self) -> list[Event]:
        """Wait until all that was begun is durable and verified."""

    def abandon(self, *, at_once: bool) -> None:
        """Let go of what is in flight: the run ends with an error."""

    def pin(self) -> str:
        """Pin the newest checkpoint and give back its name; empty when there is none."""


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """When the loop does what. Intervals are in optimizer steps; 0 switches a thing off."""

    evaluate_every: int = 0
    save_every: int = 0
    sample_every: int = 0
    patience: int = 0
    minutes: float = 0.0
    max_bad_steps: int = 3


@final
class Loop:
    """One run of optimizer steps."""

    def __init__(
        self,
        *,
        source: Source,
        stepper: Stepper,
        schedule: Schedule,
        cadence: Cadence,
        recorder: Recorder,
        keeper: Keeper,
        stop: Stop,
        eval_trees: Sequence[Tree] = (),
        evaluate: Callable[[], PassReport] | None = None,
        sample: Callable[[int], None] | None = None,
        wants_save: Callable[[], bool] | None = None,
        diagnose: Diagnose | None = None,
    ) -> None:
        self.source = source
        self.stepper = stepper
        self.schedule = schedule
        self.cadence = cadence
        self.recorder = recorder
        self.keeper = keeper
        self.stop = stop
        self.eval_trees = eval_trees
        self.evaluate = evaluate
        self.sample = sample
        self.wants_save = wants_save
        self.watch = Watch(recorder, keeper.pin, max_bad_steps=cadence.max_bad_steps, diagnose=diagnose)
        self.saved_step = -1

    def run(self, state: LoopState) -> Status:
        """Go on from `state` until the last step, or until something asks to stop; the state is saved in any case."""
        return drive({"": self.steps(state)}, lambda trees: {"": self.stepper.forward_backward(trees[""])})[""]

    def steps(self, state: LoopState) -> Steps:
        """The same, for somebody who makes the passes of several runs at once: see `drive`."""
        try:
            status = yield from self._steps(state)
            self._tell(self.keeper.finish())
            if self.saved_step != state.step:
                self._save(state, best=False)
                self._tell(self.keeper.finish())
        except BaseException as error:
            self.keeper.abandon(at_once=isinstance(error, KeyboardInterrupt))
            raise
        return status

    def _steps(self, state: LoopState) -> Steps:
        self.source.seek(state.cursor)
        self.source.expect(state.total_steps)
        if state.step == 0:
            self._evaluate(state)
            self._sample(state)
        # A run that was killed after its patience had run out has nothing left to do but to end.
        over = self._impatient(state) and state.step < state.total_steps
        status: Status = "early-stopped" if over else "finished"
        if state.unseen and (ended := self._look(state)):
            return ended
        while not over and state.step < state.total_steps:
            # ---------------------------------------------------------------------------------------- one step
            self._tell(self.keeper.poll())
            began = time.perf_counter()
            trees = self._next_step(state)
            source_seconds = time.perf_counter() - began
            factor = self.schedule.factor(state.step, state.total_steps)
            self.stepper.set_rate(factor)
            passed = yield trees
            norm = self._apply(state, passed, trees, factor)
            seconds = time.perf_counter() - began
            self._count(state, passed, seconds)
            self._tell_splits(state, passed)
            # ---------------------------------------------------------------------------------------------------
            times = {"seconds": seconds, "source_seconds": source_seconds}
            self._record_step(state, passed, norm, factor, times)
            ended = self._look(state)
            if ended:
                status = ended
                break
        return status

    def _look(self, state: LoopState) -> Status | None:
        """What follows a step: evaluation, samples, a save; how the run ends with it, if it does before its last."""
        last = state.step >= state.total_steps
        late = bool(self.cadence.minutes) and state.train_seconds >= 60 * self.cadence.minutes
        better = False
        if last or late or _due(state.step, self.cadence.evaluate_every):
            with self._kept(state):
                better = self._evaluate(state)
        if last or _due(state.step, self.cadence.sample_every):
            self._sample(state)
        state.unseen = False
        asked = self.wants_save is not None and self.wants_save()
        if better or last or asked or _due(state.step, self.cadence.save_every):
            self._save(state, best=better)
        if last:
            return None
        if self._impatient(state):
            return "early-stopped"
        if self.stop:
            return "stopped"
        return "out-of-time" if late else None

    @contextmanager
    def _kept(self, state: LoopState) -> Iterator[None]:
        """Where somebody who is asked is away, nothing that was learned is lost."""
        try:
            yield
        except LuthierError:
            if state.step and self.saved_step != state.step:
                state.unseen = True
                self._save(state, best=False)
                self._tell(self.keeper.finish())
            raise

    def _next_step(self, state: LoopState) -> Sequence[Tree]:
        """What the next step learns from. Where there is none to be had, nothing that was learned is lost."""
        try:
            return self.source.next_step()
        except LuthierError:
            if state.step and self.saved_step != state.step:
                self._save(state, best=False)
                self._tell(self.keeper.finish())
            raise

    def _impatient(self, state: LoopState) -> bool:
        return 0 < self.cadence.patience <= state.evaluations_without_gain

    def _apply(self, state: LoopState, passed: PassReport, trees: Sequence[Tree], factor: float) -> float:
        """Step, unless a number is not finite: then nothing is applied, and what it was is looked for and told."""
        if not math.isfinite(passed.loss_sum):
            self.stepper.zero_grad()
            self.watch.bad_loss(state, passed, trees)
            return math.nan
        step = self.stepper.optim_step(factor=factor)
        if step.applied:
            self.watch.applied(state, step, trees)
        else:
            self.watch.bad_gradient(state, passed, trees, step)
        return step.grad_norm

    def _count(self, state: LoopState, passed: PassReport, seconds: float) -> None:
        cursor = self.source.cursor
        state.step += 1
        state.epoch, state.used = cursor.epoch, cursor.used
        state.tokens += passed.tokens
        state.trained_tokens += passed.trained_tokens
        state.train_seconds += seconds
        if math.isfinite(passed.loss):
            # A step that was not applied is an event; the result is what the steps before it have made.
            state.last_loss = passed.loss
        if state.first_loss is None:
            state.first_loss = passed.loss
        for row, (loss, weight) in passed.row_losses.items():
            # Beside its neighbours, not by itself: early rows all have a high loss, whatever is wrong with them.
            excess = loss / weight - passed.loss
            self.keeper.row_excess[row] = excess if math.isfinite(excess) else math.inf

    def _tell_splits(self, state: LoopState, passed: PassReport) -> None:
        for split in passed.splits:
            values = {"from_tokens": split.from_tokens, "to_tokens": split.to_tokens, "reason": split.reason}
            self.recorder.record(Event("micro_batch_split", values, step=state.step))
            state.micro_tokens = split.to_tokens

    def _record_step(
        self, state: LoopState, passed: PassReport, norm: float, factor: float, times: Mapping[str, float]
    ) -> None:
        values = {
            "loss": passed.loss,
            "grad_norm": norm,
            "learning_rate": self.stepper.method.peak_learning_rate * factor,
            "epoch": state.epoch,
            "tokens": passed.tokens,
            "trained_tokens": passed.trained_tokens,
            **times,
            **passed.figures,
        }
        # What was answered comes before what was learned from it.
        self._tell([replace(event, step=state.step) for event in self.source.told(passed)])
        self.recorder.record(Event("step", values, step=state.step))

    def _evaluate(self, state: LoopState) -> bool:
        """The loss on held-out rows; whether it is the best so far (best.py)."""
        if self.evaluate is not None:
            report = self.evaluate()
        elif self.eval_trees:
            report = self.stepper.evaluate(self.eval_trees)
        else:
            return False
        self._tell_splits(state, report)
        state.eval_loss = report.loss
        if state.first_eval_loss is None:
            state.first_eval_loss = report.loss
        metrics = report.figures
        state.metrics.setdefault("first", metrics)
        better = is_better(state, report) if state.step else False
        lost = {"not_scored": sum(report.unscored.values()), "failures": report.unscored} if report.unscored else {}
        apart = {"not_compared_with": state.best_step} if better is None else {}
        if better:
            take_best(state, report)
        if better is not None:
            state.evaluations_without_gain = 0 if better or state.step == 0 else state.evaluations_without_gain + 1
        worst = sorted(report.row_losses.items(), key=lambda item: -item[1][0] / item[1][1])[:20]
        self.recorder.record(
            Event(
                "evaluation",
                {
                    "loss": report.loss,
                    **metrics,
                    "rows": len(report.row_losses),
                    **lost,
                    **apart,
                    "trained_tokens": report.trained_tokens,
                    "worst_rows": [{"row": row, "loss": loss / weight} for row, (loss, weight) in worst],
                },
                step=state.step,
            )
        )
        return bool(better)

    def _sample(self, state: LoopState) -> None:
        if self.sample is None:
            return
        try:
            self.sample(state.step)
        except (MemoryError, RuntimeError) as failure:
            reason = shortage(failure)
            if reason is None:
                raise
            # Answers are there to be looked at; the work does not end for want of them.
            self.watch.warn(state, "samples", f"out of memory while the model was asked for samples ({reason})")

    def _save(self, state: LoopState, *, best: bool) -> None:
        if self.keeper.save(state, best=best):
            self.saved_step = state.step

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            self.recorder.record(event)


def drive(
    runs: Mapping[str, Steps],
    forward_backward: Callable[[Mapping[str, Sequence[Tree]]], Mapping[str, PassReport]],
    *,
    before: Callable[[], None] = lambda: None,
    ended: Callable[[str, Status], None] = lambda name, status: None,
) -> dict[str, Status]:
    """Run several loops side by side, each step of all of them by one pass; how each has ended.

    `before` is called before each step of all, `ended` when one is over. An error of one ends all of them.
    """
    found: dict[str, Status] = {}
    wanted: dict[str, Sequence[Tree]] = {}

    def advance(name: str, passed: PassReport | None) -> None:
        try:
            wanted[name] = next(runs[name]) if passed is None else runs[name].send(passed)
        except StopIteration as over:
            wanted.pop(name, None)
            found[name] = over.value
            ended(name, over.value)

    try:
        before()
        for name in runs:
            advance(name, None)
        while wanted:
            before()
            passes = forward_backward(dict(wanted))
            for name in list(wanted):
                advance(name, passes[name])
    except BaseException as error:
        for name in runs:
            # Each lets go of what it holds, and raises the error again; one that is over only does the latter.
            with suppress(BaseException):
                runs[name].throw(error)
        raise
    return found


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
