"""The plan of a recipe: what `train` would say, and what would fit instead.

Read top to bottom: everything a run needs is laid out, as for `--dry-run`; what fits is asked of the same model without
memory, as long as that agrees with the run's own plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from luthier.core.errors import RecipeError
from luthier.data.hub import ModelFiles
from luthier.model.load import resolve_source
from luthier.model.tasks import CAUSAL
from luthier.recipes.bench import Bench, lay_out
from luthier.recipes.planning.fits import advice, largest
from luthier.recipes.planning.plan import MOST_ROWS, MOST_TOKENS, Laid, PlanKnobs, lay
from luthier.recipes.schemas.ai_feedback import AiFeedbackRecipe
from luthier.recipes.schemas.files import load_recipe, place_of
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.kinds import names_adaptation
from luthier.recipes.schemas.several import names_several
from luthier.store.runs import RunDirectory

AGREED: Final = 0.1
"""How far the plan by config may be from the run's own, for what it says to be worth saying."""
_OF_RECIPES: Final = MappingProxyType({"recompute": "batch.recompute", "offload": "batch.offload"})
_LEAST: Final = 16
"""The fewest tokens that a recipe lets go through the model at once, and the shortest limit of a row."""


def plan_file(file: Path, sets: Sequence[str] = ()) -> dict[str, Any]:
    """What a run of the recipe in a file would take, with values set over it."""
    several, stages = names_several(file, sets), names_adaptation(file)
    if several or stages:
        what = "trains several adapters" if several else "trains in stages"
        raise _not_one_run(file, what)
    loaded = load_recipe(file, overrides=sets)
    if isinstance(loaded.recipe, AiFeedbackRecipe):
        raise _not_one_run(file, "trains on answers that are judged first")
    found = plan_recipe(loaded.recipe)
    return {**found, "notices": [*loaded.notices, *found["notices"]]}


def _not_one_run(file: Path, what: str) -> RecipeError:
    return RecipeError(
        f"{file} {what}", allowed="recipes of one run with one adapter", do=f"use luthier train {file} --dry-run"
    )


def plan_recipe(recipe: FinetuneRecipe) -> dict[str, Any]:
    """What a run of a recipe would take; nothing is trained and no run directory is made."""
    RunDirectory.require_folder(place_of(recipe))
    bench = lay_out(recipe)
    plan = bench.plan
    memory, speed = plan["memory"], plan["speed"]
    return {
        "parameters": {"total": plan["parameters"], "trained": plan["trainable_parameters"]},
        "memory": memory,
        "flops_per_token": speed["flops_per_token"],
        "seconds_per_1k_tokens": 1000 / speed["tokens_per_second"],
        "fits": memory["total"] <= memory["available"],
        "speed": {**speed, "efficiency": 1.0, "devices": 1},
        **_instead(bench),
        "notices": plan["notices"],
        "plan": plan,
    }


def _instead(bench: Bench) -> dict[str, Any]:
    """What would fit, where a plan by config is that of this run."""
    nothing: dict[str, Any] = {"largest": None, "advice": []}
    recipe, memory = bench.recipe, bench.plan["memory"]
    path = ModelFiles.of(resolve_source(recipe.model)).find("config.json")
    if bench.model.task != CAUSAL or path is None or memory["longest"] < 2:
        return nothing
    length = memory["longest"]
    rows = max(1, round(memory["tokens"] / length))
    if length > MOST_TOKENS or rows > MOST_ROWS:
        return nothing
    knobs = PlanKnobs(
        adapter=recipe.adapter, quantizer=recipe.quantizer, optimizer=recipe.optimizer, sequence=length,
        batch=rows, recompute=recipe.batch.recompute,
        trained_share=max(1e-9, bench.plan["tokens"]["trained"] / max(1, bench.plan["tokens"]["total"])),
        precision="bfloat16" if bench.plan["speed"]["dtype"] == "bfloat16" else "float32",
        device="cpu" if bench.model.device.type == "cpu" else "cuda", memory_bytes=float(memory["available"]),
        offload=recipe.batch.offload,
    )  # fmt: skip
    try:
        laid = lay(path, knobs, saves_meanwhile=bench.plan["disk"]["kept"] > 1)
    except RecipeError:
        # A family whose blocks are not known by config can be trained all the same.
        return nothing
    if not _agree(laid, memory["total"]):
        return nothing
    return {"largest": largest(laid), "advice": in_keys_of_recipes(advice(path, laid), length)}


def in_keys_of_recipes(changes: Sequence[Mapping[str, Any]], length: int) -> list[dict[str, Any]]:
    """The changes that a recipe can make, in its keys, for rows of that length at once; a run is on one device."""
    found = []
    for change in changes:
        keys = {key: value for key, _, value in (one.partition("=") for one in change["set"])}
        if "devices" in keys:
            continue
        rows, tokens = keys.pop("batch", None), keys.pop("sequence", None)
        if tokens is not None:
            keys |= {"data.max_tokens": str(max(_LEAST, int(tokens))), "data.over_length": "truncate"}
        if rows is not None:
            keys["batch.micro_tokens"] = str(max(_LEAST, int(rows) * int(tokens or length)))
        sets = [f"{_OF_RECIPES.get(key, key)}={value}" for key, value in keys.items()]
        found.append({**change, "set": sets})
    return found


def _agree(laid: Laid, total: int) -> bool:
    """Whether the plan by config is near that of the run, in all."""
    knobs = laid.knobs
    told = laid.needed(knobs.batch, knobs.sequence, knobs.memory_bytes)["total"]
    return abs(told - total) <= AGREED * total
