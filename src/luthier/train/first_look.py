"""The first look: some rows of the data, forward and backward, before the first step.

Idea: some edits choose by the data's gradient what they train. They watch while rows go through the model one by one;
gradients are then thrown away and random generators put back, so nothing of it remains but what the edits have seen.
Dropout is off: what is chosen depends on the base and the rows alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from luthier.data.forest import Tree
from luthier.train.random_state import RandomState
from luthier.train.shortage import exhausted, shortage
from luthier.train.stepper import Stepper


def look(stepper: Stepper, rows: Iterable[Sequence[Tree]]) -> Iterator[None]:
    """Run the trees of one row after another, and yield after each; whoever iterates sees the gradient of that row.

    Raises MemoryExhaustedError when a row does not fit.
    """
    random, training = RandomState.now(stepper.model.device), stepper.model.module.training
    try:
        stepper.model.train(False)
        for trees in rows:
            _run(stepper, trees)
            stepper.zero_grad()
            yield
    finally:
        stepper.zero_grad()
        stepper.model.train(training)
        random.restore()


def _run(stepper: Stepper, trees: Sequence[Tree]) -> None:
    try:
        for forest in stepper.micro_batches(trees):
            for _ in stepper.passes(forest):
                pass
    except (MemoryError, RuntimeError) as failure:
        reason = shortage(failure)
        if reason is None:
            raise
        raise exhausted(trees[0], f"in the first look at the data: {reason}", stepper.planned_bytes) from failure
