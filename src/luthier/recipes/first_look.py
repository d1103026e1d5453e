"""The first look of a run: what an adapter chooses by the gradient of the data, before the first step."""

from __future__ import annotations

import time

from luthier.core.events import Event, Recorder
from luthier.recipes.bench import Bench
from luthier.train.first_look import look
from luthier.train.state import LoopState


def settle(bench: Bench, state: LoopState, recorder: Recorder) -> None:
    """Let the adapter look at the first rows if it has to; a run that goes on finds in its checkpoint what it saw."""
    adapter = bench.recipe.adapter
    if not adapter.first_look or state.step:
        return
    began = time.perf_counter()
    rows = min(adapter.first_look, len(bench.data.train))
    adapter.settle(bench.attachment.edits, lambda: look(bench.stepper, bench.planned.first_rows(rows)))
    recorder.record(Event("first_look", {"rows": rows, "seconds": time.perf_counter() - began}, step=state.step))
