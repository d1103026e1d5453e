"""A fair rate for each method: several learning rates are tried on a small budget, and the best is taken.

Idea: methods want rates that differ by a factor of a thousand, and a comparison at rates somebody guessed compares
guesses. Every method gets the same number of tries, a factor of five apart around its preset, each for the same share
of the budget. Where the best of them is the last on its side, the next rate on that side is tried, too, until the best
lies between two others or as many tries again have been made: a preset may be far off.
They are judged by the loss on rows that are held out of the training rows for this alone: those that the result is
reported on are on neither side (`evaluation.reserve`), so that nobody profits from having been looked at. A try is
short, and short runs like higher rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from luthier.core.events import Event, Recorder
from luthier.recipes.bench import lay_out
from luthier.recipes.schemas.files import dated
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.sizing.accounts import DEFAULT_EPOCHS, held_out_trees
from luthier.train.loop import Cadence, Loop
from luthier.train.signals import stop_on_signals
from luthier.train.state import LoopState

SPACING: Final = 5.0
"""The factor between neighbours on the grid, so that three tries span a factor of 25."""
VALIDATION: Final = 0.05
"""Share of the training rows that tries are judged by, where the recipe holds nothing out itself."""


def grid(preset: float, count: int) -> list[float]:
    """So many rates around a preset, each `SPACING` times the one before, to three digits."""
    return [float(f"{preset * SPACING ** (index - (count - 1) / 2):.3g}") for index in range(count)]


def beyond(rates: Sequence[float], found: Sequence[Mapping[str, Any]]) -> float | None:
    """The rate to try next: past the end at which the best lies; None when it lies between others, or none works."""
    losses = [_loss(one) for one in found]
    best = min(range(len(rates)), key=lambda index: losses[index])
    if not math.isfinite(losses[best]):
        return None
    if rates[best] == max(rates):
        return float(f"{rates[best] * SPACING:.3g}")
    return float(f"{rates[best] / SPACING:.3g}") if rates[best] == min(rates) else None


def settings_of_try(recipe: FinetuneRecipe, rate: float, share: float) -> tuple[str, ...]:
    """What a try sets beside the recipe: its rate, its share of the budget, and other rows to be judged by."""
    budget, held = recipe.budget, recipe.evaluation.fraction
    epochs = budget.epochs if budget.epochs or budget.steps else DEFAULT_EPOCHS
    steps = "null" if budget.steps is None else max(1, round(share * budget.steps))
    return (
        f"optimizer.learning_rate={rate}",
        f"budget.epochs={'null' if epochs is None else share * epochs}",
        f"budget.steps={steps}",
        f"budget.minutes={'null' if budget.minutes is None else share * budget.minutes}",
        "data.evaluation=null",
        f"evaluation.reserve={held if recipe.data.evaluation is None else 0.0}",
        f"evaluation.fraction={held or VALIDATION}",
    )


def tried(recipe: FinetuneRecipe, *, recorder: Recorder) -> dict[str, Any]:
    """Train by a recipe without keeping anything: the held-out loss at its end, and what that took."""
    with stop_on_signals() as stop:
        bench = lay_out(dated(recipe))
        loop = Loop(
            source=bench.source,
            stepper=bench.stepper,
            schedule=recipe.schedule,
            cadence=Cadence(minutes=recipe.budget.minutes or 0.0, max_bad_steps=recipe.max_bad_steps),
            recorder=recorder,
            keeper=KeepsNothing(),
            stop=stop,
            eval_trees=held_out_trees(recipe, bench.data),
        )
        state = LoopState()
        state.total_steps = bench.plan["steps"]
        recorder.record(Event("start", bench.plan, step=0))
        with stop.patient():
            loop.run(state)
    if stop:
        raise stop.error()
    return {
        "loss": state.eval_loss,
        "steps": state.step,
        "seconds": state.train_seconds,
        "flops": bench.plan["speed"]["flops_per_token"] * state.tokens,
    }


def chosen(rates: Sequence[float], found: Sequence[Mapping[str, Any]], *, share: float) -> dict[str, Any]:
    """What the tries say: the rate with the least loss, and what all of them took. No rate when every one failed."""
    losses = [_loss(one) for one in found]
    best = min(range(len(rates)), key=lambda index: losses[index])
    worked = math.isfinite(losses[best])
    return {
        "rates": list(rates),
        "losses": losses,
        "errors": [one["error"] for one in found if "error" in one],
        "taken": rates[best] if worked else None,
        "at_edge": worked and rates[best] in (min(rates), max(rates)),
        "budget_share": share,
        "seconds": sum(one.get("seconds", 0.0) for one in found),
        "flops": sum(one.get("flops", 0.0) for one in found),
    }


@final
@dataclass
class KeepsNothing:
    """A keeper for a run of which only the loss is wanted: no checkpoint is written."""

    row_excess: dict[int, float] = field(default_factory=dict)

    def save(self, state: LoopState, *, best: bool) -> bool:
        """Nothing is kept, and that is as it should be."""
        return True

    def poll(self) -> list[Event]:
        """Nothing was begun."""
        return []

    def finish(self) -> list[Event]:
        """Nothing was begun."""
        return []

    def abandon(self, *, at_once: bool) -> None:
        """There is nothing to let go of."""

    def pin(self) -> str:
        """There is no checkpoint."""
        return ""


def _loss(one: Mapping[str, Any]) -> float:
    """The loss of a try; one that failed or is not finite is the worst there is."""
    loss = one.get("loss")
    return float(loss) if isinstance(loss, (int, float)) and math.isfinite(loss) else math.inf
