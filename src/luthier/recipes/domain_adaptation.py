"""Domain adaptation: continued pre-training, SFT, preferences, and a SLERP with the instruct model, one after another.

Read top to bottom: each stage is a fine-tune of its own, in a run of its own, on the weights that the stage before has
left; the last model is merged with the partner, and all of them are measured on the same rows. Told are the score of
every stage and of both parents, and what was to be expected of the merge. The same command again goes on where it was.

Source: Lu, Luu and Buehler, arXiv 2409.03444: CPT, SFT, DPO or ORPO, then SLERP; best at 7 to 8 billion parameters, and
harmful at 1.7, so that the merge is only kept where it is better than both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from luthier.core.chosen import Chosen, choose
from luthier.core.errors import RecipeError
from luthier.core.events import Recorder
from luthier.core.knobs import Knobs, validate
from luthier.core.recipe_file import read_layers, validated
from luthier.mergers import Merger
from luthier.recipes.finetune import start
from luthier.recipes.merging.gate import LIKELIHOOD, Bench, metric_of
from luthier.recipes.merging.merge import Gate, merge_models
from luthier.recipes.merging.recipe import MergeRecipe
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.store.files import write_json
from luthier.store.runs import MODEL, RunDirectory, is_run

FOUND: Final = "adaptation.json"
MERGED: Final = "merged"


class StageKnobs(Knobs):
    """A fine-tune on what the stage before has left."""

    name: str = Field(pattern=r"[a-z0-9-]{1,40}", description="what the stage is called, such as cpt, sft or orpo")
    recipe: dict[str, Any] = Field(description="keys of a fine-tune (data, objective, adapter, ...), but model and run")


class AdaptationRecipe(Knobs):
    """A model adapted to a domain in stages, and merged with a general one."""

    recipe: Literal["domain_adaptation"] = Field("domain_adaptation", description="which story this file tells")
    model: str = Field(description="the model that is adapted: hub id, folder or seedling")
    instruct: str | None = Field(None, description="the model it is merged with at the end; empty is `model`")
    stages: Annotated[tuple[StageKnobs, ...], Field(strict=False, min_length=1)] = Field(
        description="fine-tunes, in their order"
    )
    merge: Annotated[Merger, Chosen("mergers")] = Field(
        default_factory=lambda: choose("mergers", Merger, "slerp"), description="how the last model is merged"
    )
    judge: str = Field(description="rows on which stages, parents and result are measured")
    metric: str = Field(LIKELIHOOD, description="what they are measured by: likelihood, or a metric of their answers")
    allow_worse: bool = Field(False, description="whether a merge that is worse than its best parent is kept")
    run: str = Field(description="folder for all stages and the result")


def load_adaptation(path: Path, *, overrides: list[str], run: Path | None) -> AdaptationRecipe:
    """The recipe of a file, with `--set` and `--run` over it."""
    layered = read_layers(path, sets=overrides, known=tuple(AdaptationRecipe.model_fields))
    values = layered.values | ({"run": str(run)} if run is not None else {})
    return validated(AdaptationRecipe, replace(layered, values=values))


def stage_recipes(recipe: AdaptationRecipe) -> list[FinetuneRecipe]:
    """Every stage as the fine-tune it is. Raises RecipeError for keys that a stage must leave to the story.

    Raises as `metric_of` does for what nothing can be measured by: after the training is too late to hear of it.
    """
    metric_of(recipe.metric)
    found, model = [], recipe.model
    for number, stage in enumerate(recipe.stages, 1):
        if odd := sorted({"model", "run", "recipe"} & set(stage.recipe)):
            raise RecipeError(f"stage {stage.name} names its own {odd[0]}", allowed="keys of a fine-tune but these",
                              do="leave it out: a stage goes on with the weights of the one before")  # fmt: skip
        place = Path(recipe.run) / f"{number}-{stage.name}"
        found.append(validate(FinetuneRecipe, {**stage.recipe, "model": model, "run": str(place)}))
        model = str(_weights_of(place, found[-1]))
    return found


def adapt(recipe: AdaptationRecipe, *, recorder: Recorder) -> dict[str, Any]:
    """Run all stages and the merge; what each was worth. Raises GateError where the merge is not worth keeping."""
    bench = Bench(Path(recipe.judge), metric_of(recipe.metric), allow_worse=recipe.allow_worse)
    partner = recipe.instruct or recipe.model
    scores = {"before": bench.score(recipe.model, None)}
    stages = stage_recipes(recipe)
    for stage, told in zip(recipe.stages, stages, strict=True):
        place = Path(str(told.run))
        if not (is_run(place) and RunDirectory.open(place).status().state == "finished"):
            start(told, recorder=recorder)
        whole = _weights_of(place, told)
        if not whole.exists():
            # What an adapter has learned becomes the weights that the next stage begins with.
            own = {"models": [str(place)], "method": {"method": "passthrough"}}
            merge_models(validate(MergeRecipe, {**own, "dtype": "float32"}), whole)
        scores[stage.name] = bench.score(str(whole), None)
    last, out = str(_weights_of(Path(str(stages[-1].run)), stages[-1])), Path(recipe.run) / MERGED
    found: dict[str, Any] = {"run": recipe.run, "scores": scores, "judge": recipe.judge,
                             "measure": bench.measure, "merged": None}  # fmt: skip
    write_json(Path(recipe.run) / FOUND, found)
    merge = validate(MergeRecipe, {"models": [last, partner], "method": recipe.merge.as_recipe(), "dtype": "float32"})
    done: Mapping[str, Any] = merge_models(merge, out, gate=Gate(bench.parents, bench.judge))
    found["merged"] = {"folder": str(out), **done["evaluation"], "lerp_tensors": done.get("lerp_tensors", 0)}
    write_json(Path(recipe.run) / FOUND, found)
    return found


def _weights_of(place: Path, recipe: FinetuneRecipe) -> Path:
    """The folder of whole weights that a stage leaves: its own where it trains all of them."""
    own = "trains-base" in recipe.adapter.provides
    return place / MODEL if own else place.with_name(f"{place.name}-whole")
