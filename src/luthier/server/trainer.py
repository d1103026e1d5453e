"""The child process of a fine-tune: `python -m luthier.server.trainer RECIPE`, which says in one line how it ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from luthier.core.child import bound_to_parent
from luthier.core.errors import LuthierError
from luthier.recipes.finetune import start
from luthier.recipes.progress import Silent
from luthier.recipes.schemas.files import load_recipe
from luthier.store.runs import RunDirectory, is_run


def main() -> int:
    """Train as a recipe says; a run that was broken off is gone on with."""
    # Without a buffer: Python takes a buffer's lock when it ends, and the thread that watches holds it.
    with open(0, "rb", buffering=0, closefd=False) as parent:
        bound_to_parent(watch=parent)
        return _train()


def _train() -> int:
    try:
        recipe = load_recipe(Path(sys.argv[1]), overrides=[], run=None).recipe
        if recipe.run is not None and is_run(Path(recipe.run)):
            status = RunDirectory.open(Path(recipe.run)).status()
            if status.state == "finished":
                # It ended while nobody was there to hear it.
                sys.stdout.write(json.dumps({"tokens": (status.values or {}).get("tokens")}) + "\n")
                return 0
        result = start(recipe, recorder=Silent())
    except LuthierError as error:
        sys.stdout.write(json.dumps({"error": error.as_dict()}) + "\n")
        return error.exit_code
    sys.stdout.write(json.dumps(result.line()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
