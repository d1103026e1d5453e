"""The watch over a run's numbers: what is not finite is an event, what learns nothing a warning that names the cause.

A step whose loss or gradient is not finite has not been applied; it is told with its tensor and its rows, and after
`max_bad_steps` in a row the run stops with its last checkpoint pinned. Warnings are given once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, final

from luthier.core.errors import NumericError
from luthier.core.events import Event, Recorder
from luthier.core.units import percent_text
from luthier.data.forest import Tree
from luthier.train.diagnosis import BadNumber
from luthier.train.pass_report import PassReport
from luthier.train.state import LoopState
from luthier.train.stepper import StepReport

Diagnose = Callable[[Sequence[Tree]], BadNumber]

MOST_ROWS: Final = 20
"""Rows that an event names."""

ROUNDED_AWAY: Final = 0.999
ROUNDED_STEPS: Final = 10
"""A warning is due when more than this share of the updates rounds to nothing for so many steps in a row."""

_ARTICLES: Final = {"activation": "an activation", "weight": "a weight"}


@final
class Watch:
    """Looks at every step. `pin` pins the newest checkpoint and names it; `diagnose` takes a closer look at trees."""

    def __init__(
        self, recorder: Recorder, pin: Callable[[], str], *, max_bad_steps: int, diagnose: Diagnose | None
    ) -> None:
        self.recorder = recorder
        self.pin = pin
        self.max_bad_steps = max_bad_steps
        self.diagnose = diagnose
        self._warned: set[str] = set()
        self._rounded_steps = 0

    def applied(self, state: LoopState, step: StepReport, trees: Sequence[Tree]) -> None:
        """After a step from `trees` that was applied. Raises NumericError when the update has broken weights."""
        if step.broken:
            raise NumericError(
                f"step {state.step + 1}: the update made {', '.join(step.bad_tensors)} not finite; {self._pinned()}",
                do="lower optimizer.learning_rate in the recipe and begin a new run with it",
            )
        state.bad_steps = 0
        if step.grad_norm == 0.0 and _alike(trees):
            self.warn(
                state, "alike", "the gradient is exactly zero: in each group of this step all answers were worth the "
                "same, so that there is nothing to learn from comparing them; raise objective.temperature or "
                "rollouts.answers, set rollouts.redraws, or give partial credit",
            )  # fmt: skip
        elif step.grad_norm == 0.0:
            self.warn(
                state, "no-gradient", "the gradient is exactly zero, so nothing is learned; look at the rows with "
                "luthier data show, and at what the adapter trains",
            )  # fmt: skip
        rounded = step.rounded_away is not None and step.rounded_away > ROUNDED_AWAY
        self._rounded_steps = self._rounded_steps + 1 if rounded else 0
        if self._rounded_steps == ROUNDED_STEPS:
            self.warn(
                state, "rounded-away", f"for {ROUNDED_STEPS} steps more than {percent_text(ROUNDED_AWAY)} of the "
                "updates have rounded to zero in the weights' low precision, so the model does not move yet; raise "
                "optimizer.learning_rate or set precision to float32",
            )  # fmt: skip

    def bad_loss(self, state: LoopState, passed: PassReport, trees: Sequence[Tree]) -> None:
        """After a pass whose loss is not finite. Raises NumericError when it was one too many."""
        self._bad(state, passed, trees, BadNumber("loss", "", (), passed.loss_sum))

    def bad_gradient(self, state: LoopState, passed: PassReport, trees: Sequence[Tree], step: StepReport) -> None:
        """After a step that was not applied because its gradient is not finite. Raises NumericError likewise."""
        self._bad(state, passed, trees, BadNumber("gradient", ", ".join(step.bad_tensors), (), step.grad_norm),
                  stepped=step.stepped_before)  # fmt: skip

    def warn(self, state: LoopState, cause: str, message: str) -> None:
        """Say something once in a run."""
        if cause not in self._warned:
            self._warned.add(cause)
            self.recorder.record(Event("warning", {"cause": cause, "message": message}, step=state.step + 1))

    def _bad(
        self, state: LoopState, passed: PassReport, trees: Sequence[Tree], known: BadNumber, *, stepped: int = 0
    ) -> None:
        found = known if self.diagnose is None else self.diagnose(trees)
        # A number that does not come again when the step is repeated: what is known of the first time stands.
        bad = known if found.what == "unknown" else found
        state.bad_steps += 1
        state.skipped_steps += 1
        losses = [row for row, (loss, _) in passed.row_losses.items() if not math.isfinite(loss)]
        rows = sorted(bad.rows or losses or passed.row_losses)
        values = {"what": bad.what, "tensor": bad.tensor, "value": bad.value, "rows": rows[:MOST_ROWS]}
        if stepped:
            # What steps in the backward pass cannot be taken back there.
            values["stepped_before"] = stepped
        self.recorder.record(Event("bad_step", values, step=state.step + 1))
        if state.bad_steps < self.max_bad_steps:
            return
        place = f" in {bad.tensor}" if bad.tensor else ""
        named = ", ".join(map(str, rows[:8]))
        raise NumericError(
            f"step {state.step + 1}: {_ARTICLES.get(bad.what, f'the {bad.what}')} is {bad.value}{place} "
            f"(rows {named}); the update was not applied{_but(stepped)}; {state.bad_steps} of {self.max_bad_steps} bad "
            f"steps in a row; {self._pinned()}",
            do="look at these rows with `luthier data show`, lower optimizer.learning_rate, or use precision float32",
        )

    def _pinned(self) -> str:
        name = self.pin()
        return f"{name} is finite and kept" if name else "there is no checkpoint yet, nothing was saved"


def _alike(trees: Sequence[Tree]) -> bool:
    """Whether these are answers that were sampled, and none of them was better or worse than expected."""
    leaves = [leaf for tree in trees for leaf in tree.segments if leaf.weights.any()]
    noted = [leaf.notes["advantage"] for leaf in leaves if leaf.notes is not None and "advantage" in leaf.notes]
    return 0 < len(noted) == len(leaves) and not any(each.any() for each in noted)


def _but(stepped: int) -> str:
    return f" to the tensors below it ({stepped} above it had been stepped)" if stepped else ""
