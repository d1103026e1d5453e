"""Run directories for tests."""

from __future__ import annotations

from pathlib import Path

from luthier.store.runs import RunDirectory


def created(folder: Path, *, overwrite: bool = False) -> RunDirectory:
    """A run that has begun, as far as its recipe, and nobody holds."""
    with RunDirectory.begin(folder, overwrite=overwrite) as run:
        run.write_recipe({"model": "seedling"})
    return run
