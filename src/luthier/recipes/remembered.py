"""What a run asks its reference before the first step, and keeps: told in the plan, found once, noted on rows."""

from __future__ import annotations

from typing import Any, Final

from luthier.core.events import Event, Recorder
from luthier.recipes.bench import Bench
from luthier.store.files import read_json, write_json
from luthier.store.runs import RunDirectory
from luthier.train.reference_cache import remembered
from luthier.train.source import DataSource
from luthier.train.state import LoopState

FOLDER: Final = "reference"
"""Where in a run directory it lies."""


def remember(bench: Bench, run: RunDirectory, state: LoopState, recorder: Recorder) -> None:
    """Let the source of a run note what the reference says, as the recipe wants it; what is missing is found now."""
    source, recipe = bench.source, bench.recipe
    if not recipe.reference.cache or not isinstance(source, DataSource):
        return
    facts: dict[str, Any] = {
        "base": bench.model.digest, "dtype": str(bench.model.dtype), "data": bench.data.store.folder.name,
        "objective": recipe.objective.as_recipe(), "micro_tokens": recipe.batch.micro_tokens,
        "kernels": bench.model.kernels, "seed": recipe.seed,
    }  # fmt: skip
    cache = remembered(
        run.folder / FOLDER, bench.stepper, source.views, facts=facts, micro_tokens=recipe.batch.micro_tokens,
        write=write_json, read=read_json,
    )  # fmt: skip
    source.note = lambda index, trees: cache.on(index, trees, recipe.objective)
    values = {"rows": len(source.views), "found": cache.found, "bytes": 4 * int(cache.offsets[-1])}
    recorder.record(Event("reference_cache", {**values, "seconds": cache.seconds}, step=state.step))

