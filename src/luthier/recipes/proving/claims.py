"""What a run records of its result in the manifest, so that the result can be doubted later (see `proof.py`).

The run and its recipe, the rows that were held out, the files the data came from, and what it was computed with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core.events import plain
from luthier.data.forest import Forest, Tree
from luthier.data.prepare import Prepared
from luthier.data.rendering.renderer import RENDERER_VERSION
from luthier.recipes.bench import Bench
from luthier.recipes.sizing.accounts import held_out_trees
from luthier.store.runs import RunDirectory
from luthier.train.result import Claims
from luthier.train.state import LoopState


def claims_of(
    bench: Bench,
    run: RunDirectory,
    state: LoopState,
    *,
    eval_loss: float | None,
    start_digest: str,
    made_with: Mapping[str, Any],
) -> Claims:
    """What a run records of its result. `made_with` are the facts that its checkpoints depend on."""
    facts = {
        "run": run.run_id,
        "name": run.folder.name,
        "recipe": recipe_digest(run),
        "held_out": fingerprint(held_out_trees(bench.recipe, bench.data)),
        "data": data_facts(bench.data),
        "precision": str(bench.model.dtype).removeprefix("torch."),
        "micro_tokens": bench.stepper.micro_tokens,
        "made_with": {key: value for key, value in made_with.items() if key != "recipe"},
    }
    return Claims(
        start_digest=start_digest,
        trained_tokens=state.trained_tokens,
        steps=state.step,
        last_loss=state.last_loss,
        eval_loss=eval_loss,
        facts=plain(facts),
    )


def recipe_digest(run: RunDirectory) -> str:
    """sha256 of what `recipe.yaml` says, wherever the run lies; keys that a later version adds change nothing."""
    values = {key: value for key, value in run.read_recipe().items() if key != "run"}
    return hashlib.sha256(json.dumps(plain(values), sort_keys=True).encode()).hexdigest()


def fingerprint(trees: Sequence[Tree]) -> dict[str, Any]:
    """How many rows and trained tokens the trees have, and the digest of all tokens, weights and parents in order."""
    total = hashlib.sha256()
    for tree in trees:
        total.update(f"tree {len(tree.segments)}\n".encode())
        for segment in tree.segments:
            total.update(f"{segment.parent} {len(segment.tokens)}\n".encode())
            total.update(np.ascontiguousarray(segment.tokens, np.int32).tobytes())
            total.update(np.ascontiguousarray(segment.weights, np.float32).tobytes())
    tokens = sum(Forest((tree,)).trained_count for tree in trees)
    return {"rows": len({tree.row for tree in trees}), "tokens": tokens, "digest": total.hexdigest()}


def data_facts(data: Prepared) -> dict[str, Any]:
    """What the rows of a run came from: one digest of everything, and what helps to say in what another one differs."""
    files: dict[str, dict[str, int]] = {}
    for file in data.report.files:
        path = Path(file.source.path)
        files[path.name] = {"rows": file.kept, "bytes": path.stat().st_size}
    return {
        "digest": data.store.folder.name,
        "files": files,
        "template": data.renderer.template.digest,
        "renderer": RENDERER_VERSION,
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what the data of a run differ from what they were, in sentences; none when nothing does."""
    if before["digest"] == now["digest"]:
        return []
    said = []
    for name in sorted({*before["files"], *now["files"]}):
        old, new = before["files"].get(name), now["files"].get(name)
        if old is None or new is None:
            said.append(f"{name} is {'new' if old is None else 'gone'}")
        elif old != new:
            was, has = (f"{each['rows']:,} rows in {each['bytes']:,} bytes" for each in (old, new))
            said.append(f"{name} had {was} and has {has}")
    if before["template"] != now["template"]:
        said.append("the chat template is another")
    if before["renderer"] != now["renderer"]:
        said.append("luthier makes tokens of rows in another way")
    return said or [f"{' or '.join(sorted(now['files']))} has other rows of the same number and size"]
