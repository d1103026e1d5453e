"""Keeping checkpoints of a run: what is in them, when one is announced, and how a run comes back from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch

from luthier.core.errors import CorruptError, DriftError
from luthier.core.events import Event
from luthier.store.manifest import read_manifest
from luthier.store.runs import RunDirectory
from luthier.train.saving import FIRST_PAUSE, Saver
from luthier.train.source import Source
from luthier.train.state import LoopState, Snapshot, load_parameters, load_state, take_snapshot
from luthier.train.stepper import Stepper

_LONGEST_SHOWN, _DIGEST = 40, 12
_FEW_SECONDS = 30.0
"""How long a save that is being written may still take when a run ends with an error."""


@final
class CheckpointKeeper:
    """Saves and restores the state of one run. `facts` is what a checkpoint depends on (versions, data, recipe)."""

    def __init__(
        self,
        run: RunDirectory,
        stepper: Stepper,
        *,
        keep: int,
        facts: Mapping[str, Any],
        source: Source | None = None,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        self.run = run
        self.stepper = stepper
        self.keep = keep
        self.source = source
        self.facts = dict(facts)
        self.row_excess: dict[int, float] = {}
        self._saver = Saver(self._write, first_pause=first_pause)

    def save(self, state: LoopState, *, best: bool) -> bool:
        """Begin to save the state as it is now; `poll` says when it is durable and verified.

        False when it is not taken because an earlier, better state still waits for space.
        """
        # The log is cut back to these lengths on resume, so that no line is there twice.
        state.events_bytes, state.samples_bytes = self.run.events.length, self.run.samples.length
        held = {} if self.source is None else self.source.held()
        try:
            snapshot = take_snapshot(state, self.stepper, self.row_excess, held=held)
        except (MemoryError, torch.OutOfMemoryError):
            # No memory for a copy: the live tensors are written, and training waits.
            live = take_snapshot(state, self.stepper, self.row_excess, held=held, copied=False)
            return self._saver.write_now(live, best=best)
        return self._saver.start(snapshot, best=best)

    def poll(self) -> list[Event]:
        """What has become of saves since the last call. Raises what one has failed with for good."""
        return self._saver.poll()

    def finish(self) -> list[Event]:
        """Wait until everything that was begun is durable. Raises StorageError when it cannot be saved."""
        return self._saver.finish()

    def abandon(self, *, at_once: bool) -> None:
        """Let go of what is in flight, because the run ends with an error, or is told to leave at once."""
        self._saver.abandon(seconds=0.0 if at_once else _FEW_SECONDS)

    def pin(self) -> str:
        """Pin the newest checkpoint, which is finite since no other is ever saved; its name, or nothing."""
        self.abandon(at_once=False)
        place = self.run.checkpoints.latest_valid()
        if place is None:
            return ""
        self.run.checkpoints.point("finite", int(place.name.removeprefix("step-")))
        return place.name

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
        state, self.row_excess = load_state(place, self.stepper, self.source)
        if state.micro_tokens:
            # Cut smaller once, for want of memory, and from then on: other cuts would round differently.
            self.stepper.micro_tokens = state.micro_tokens
        self.run.checkpoints.notices.extend(self.run.rewind(state.events_bytes, state.samples_bytes))
        return state

    def restore_best(self, state: LoopState) -> float | None:
        """Load the parameters of the best checkpoint, if there is one; the held-out loss of what is loaded now."""
        if state.best_step is None:
            return state.eval_loss
        if state.best_step != state.step:
            try:
                load_parameters(self.run.checkpoints.require(state.best_step), self.stepper)
            except CorruptError as error:
                said = f"the best checkpoint is lost ({error}); the result is the last state, after step {state.step}"
                self.run.checkpoints.notices.append(said)
                return state.eval_loss
        return state.best_eval_loss

    def _write(self, snapshot: Snapshot, best: bool) -> None:
        """The saving itself, in the thread that saves: nobody else touches the checkpoints meanwhile."""
        snapshot.require_finite()
        self.run.sync_logs()
        self.run.checkpoints.save(
            snapshot.step, snapshot.write, {"facts": self.facts}, best=best, needed_bytes=snapshot.bytes
        )
        self.run.checkpoints.rotate(self.keep)
        loop = snapshot.numbers["loop"]
        progress = {"step": loop["step"], "steps": loop["total_steps"], "loss": loop["last_loss"]}
        self.run.write_progress(progress)

    def _check_drift(self, name: str, saved: Mapping[str, Any], *, accept_drift: bool) -> None:
        before, now = _flat(saved), _flat(self.facts)
        changed = [
            f"{key}: {_shown(before.get(key))} -> {_shown(now.get(key))}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if changed and not accept_drift:
            raise DriftError(
                f"cannot go on from {name} exactly: {', '.join(changed)}",
                do="restore these, or add --accept-drift to go on with another run than the one that began",
            )
        if changed:
            self.run.checkpoints.notices.append(f"went on from {name} although these changed: {', '.join(changed)}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names: what has changed is named by its own key, not by its section."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _shown(value: Any) -> str:
    """A value in a sentence: digests are cut, for nobody compares them by eye."""
    text = "nothing" if value is None else str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_DIGEST]}..."
