"""The training loop, in the order in which it happens.

evaluate the untrained model -> step -> record -> evaluate -> save -> stop? -> step -> ...

The loop knows contracts only: a source of trees, a stepper, a schedule, a recorder, a keeper of checkpoints and, when
samples are wanted, a speaker. What it carries from step to step is `LoopState`, and nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

from luthier.core.errors import NumericError
from luthier.core.events import Event, Recorder
from luthier.data.forest import Tree
from luthier.schedules import Schedule
from luthier.train.signals import StopRequest
from luthier.train.source import Source
from luthier.train.state import LoopState
from luthier.train.stepper import PassReport, Stepper

Status = Literal["finished", "stopped", "early-stopped", "out-of-time"]


class Keeper(Protocol):
    """Keeps checkpoints, and for each training row by how much its loss was above its step's mean, which is in them."""

    row_excess: dict[int, float]

    def save(self, state: LoopState, *, best: bool) -> None:
        """Save everything a resumed run needs; return once it is durable and verified."""


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
        stop: StopRequest,
        eval_trees: Sequence[Tree] = (),
        sample: Callable[[int], None] | None = None,
    ) -> None:
        self.source = source
        self.stepper = stepper
        self.schedule = schedule
        self.cadence = cadence
        self.recorder = recorder
        self.keeper = keeper
        self.stop = stop
        self.eval_trees = eval_trees
        self.sample = sample
        self.saved_step = -1

    def run(self, state: LoopState) -> Status:
        """Go on from `state` until the last step, or until something asks to stop; the state is saved in any case."""
        self.source.seek(state.cursor)
        if state.step == 0:
            self._evaluate(state)
            self._sample(state)
        # A run that was killed after its patience had run out has nothing left to do but to end.
        over = self._impatient(state)
        status: Status = "early-stopped" if over else "finished"
        while not over and state.step < state.total_steps:
            # ---------------------------------------------------------------------------------------- one step
            began = time.perf_counter()
            trees = self.source.next_step()
            passed = self.stepper.forward_backward(trees)
            factor = self.schedule.factor(state.step, state.total_steps)
            norm = self._apply(state, passed, factor)
            seconds = time.perf_counter() - began
            self._count(state, passed, seconds)
            # ---------------------------------------------------------------------------------------------------
            self._record_step(state, passed, norm, factor, seconds)
            last = state.step >= state.total_steps
            late = bool(self.cadence.minutes) and state.train_seconds >= 60 * self.cadence.minutes
            better = False
            if last or late or _due(state.step, self.cadence.evaluate_every):
                better = self._evaluate(state)
            if last or _due(state.step, self.cadence.sample_every):
                self._sample(state)
            if better or last or _due(state.step, self.cadence.save_every):
                self._save(state, best=better)
            if self._impatient(state):
                status = "early-stopped"
                break
            if self.stop and not last:
                status = "stopped"
                break
            if late and not last:
                status = "out-of-time"
                break
        if self.saved_step != state.step:
            self._save(state, best=False)
        return status

    def _impatient(self, state: LoopState) -> bool:
        return 0 < self.cadence.patience <= state.evaluations_without_gain

    def _apply(self, state: LoopState, passed: PassReport, factor: float) -> float:
        """Step, unless a number is not finite: then nothing is applied, and the rows are named."""
        if math.isfinite(passed.loss_sum):
            step = self.stepper.optim_step(factor=factor)
            if step.applied:
                state.bad_steps = 0
                return step.grad_norm
            norm = step.grad_norm
        else:
            norm = math.nan
            self.stepper.zero_grad()
        state.bad_steps += 1
        rows = [row for row, (loss, _) in passed.row_losses.items() if not math.isfinite(loss)]
        suspects = sorted(rows or passed.row_losses)
        what = "loss" if not math.isfinite(passed.loss_sum) else "gradient norm"
        self.recorder.record(
            Event("bad_step", {"what": what, "value": str(norm), "rows": suspects[:20]}, step=state.step + 1)
        )
        if state.bad_steps >= self.cadence.max_bad_steps:
            raise NumericError(
                f"step {state.step + 1}: the {what} is not finite (rows {', '.join(map(str, suspects[:8]))}); "
                f"{state.bad_steps} bad steps in a row, none was applied",
                do="look at these rows with `luthier data show`, lower optimizer.learning_rate, or use float32",
            )
        return norm

    def _count(self, state: LoopState, passed: PassReport, seconds: float) -> None:
        cursor = self.source.cursor
        state.step += 1
        state.epoch, state.used = cursor.epoch, cursor.used
        state.tokens += passed.tokens
        state.trained_tokens += passed.trained_tokens
        state.train_seconds += seconds
        state.last_loss = passed.loss
        if state.first_loss is None:
            state.first_loss = passed.loss
        for row, (loss, weight) in passed.row_losses.items():
            # Beside its neighbours, not by itself: early rows all have a high loss, whatever is wrong with them.
            self.keeper.row_excess[row] = loss / weight - passed.loss

    def _record_step(
        self, state: LoopState, passed: PassReport, norm: float, factor: float, seconds: float
    ) -> None:
        values = {
            "loss": passed.loss,
            "grad_norm": norm,
            "learning_rate": self.stepper.method.peak_learning_rate * factor,
            "epoch": state.epoch,
            "tokens": passed.tokens,
            "trained_tokens": passed.trained_tokens,
            "seconds": seconds,
        }
        self.recorder.record(Event("step", values, step=state.step))

    def _evaluate(self, state: LoopState) -> bool:
        """The loss on held-out rows; whether it is the best so far."""
        if not self.eval_trees:
            return False
        report = self.stepper.evaluate(self.eval_trees)
        state.eval_loss = report.loss
        if state.first_eval_loss is None:
            state.first_eval_loss = report.loss
        better = state.step > 0 and (state.best_eval_loss is None or report.loss < state.best_eval_loss)
        if better:
            state.best_eval_loss, state.best_step = report.loss, state.step
        state.evaluations_without_gain = 0 if better or state.step == 0 else state.evaluations_without_gain + 1
        worst = sorted(report.row_losses.items(), key=lambda item: -item[1][0] / item[1][1])[:20]
        self.recorder.record(
            Event(
                "evaluation",
                {
                    "loss": report.loss,
                    "rows": len(report.row_losses),
                    "trained_tokens": report.trained_tokens,
                    "worst_rows": [{"row": row, "loss": loss / weight} for row, (loss, weight) in worst],
                },
                step=state.step,
            )
        )
        return better

    def _sample(self, state: LoopState) -> None:
        if self.sample is not None:
            self.sample(state.step)

    def _save(self, state: LoopState, *, best: bool) -> None:
        self.keeper.save(state, best=best)
        self.saved_step = state.step
        self.recorder.record(Event("checkpoint", {"best": best}, step=state.step))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
