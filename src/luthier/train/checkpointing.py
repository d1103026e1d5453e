"""Keeping checkpoints of a run: what is in them, when one is announced, and how a run comes back from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from luthier.core.errors import DriftError
from luthier.store.manifest import read_manifest
from luthier.store.runs import RunDirectory
from luthier.train.state import LoopState, load_parameters, load_state, save_state
from luthier.train.stepper import Stepper


@final
class CheckpointKeeper:
    """Saves and restores the state of one run. `facts` is what a checkpoint depends on (versions, data, recipe)."""

    def __init__(self, run: RunDirectory, stepper: Stepper, *, keep: int, facts: Mapping[str, Any]) -> None:
        self.run = run
        self.stepper = stepper
        self.keep = keep
        self.facts = dict(facts)
        self.row_excess: dict[int, float] = {}

    def save(self, state: LoopState, *, best: bool) -> None:
        """Save; return once the checkpoint is durable, verified and linked."""
        # The log is cut back to these lengths on resume, so that no line is there twice.
        state.events_bytes, state.samples_bytes = self.run.cursors()
        self.run.checkpoints.save(
            state.step,
            lambda folder: save_state(folder, state, self.stepper, self.row_excess),
            {"facts": self.facts},
            best=best,
        )
        self.run.checkpoints.rotate(self.keep)
        progress = {"step": state.step, "steps": state.total_steps, "loss": state.last_loss}
        self.run.write_status("running", values=progress)

    def recover(self, *, accept_drift: bool = False) -> LoopState:
        """The state to go on from: the newest checkpoint that verifies, or a fresh one when none was ever made.

        Raises DriftError, with what differs, when the run would not continue as the same run.
        """
        place = self.run.checkpoints.recover()
        if place is None:
            self.run.rewind(0, 0)
            return LoopState()
        saved = read_manifest(place).facts.get("facts")
        self._check_drift(place.name, saved if isinstance(saved, dict) else {}, accept_drift=accept_drift)
        state, self.row_excess = load_state(place, self.stepper)
        self.run.checkpoints.notices.extend(self.run.rewind(state.events_bytes, state.samples_bytes))
        return state

    def restore_best(self, state: LoopState) -> float | None:
        """Load the parameters of the best checkpoint, if there is one; the held-out loss of what is loaded now."""
        if state.best_step is None:
            return state.eval_loss
        if state.best_step != state.step:
            place = self.run.checkpoints.folder / f"step-{state.best_step:06d}"
            load_parameters(place, self.stepper)
        return state.best_eval_loss

    def _check_drift(self, name: str, saved: Mapping[str, Any], *, accept_drift: bool) -> None:
        changed = [
            f"{key}: {saved.get(key)!r} -> {self.facts.get(key)!r}"
            for key in sorted({*saved, *self.facts})
            if saved.get(key) != self.facts.get(key)
        ]
        if changed and not accept_drift:
            raise DriftError(
                f"cannot go on from {name} exactly: {', '.join(changed)}",
                do="restore these, or add --accept-drift to go on with another run than the one that began",
            )
        if changed:
            self.run.checkpoints.notices.append(f"went on from {name} although these changed: {', '.join(changed)}")
