"""Merge: several models of one shape become one folder, streamed, proved, and held against its parents.

Read top to bottom: open the parents (a run is its tuned model), put their vocabularies together, plan every tensor,
measure the parents where there is data, stream the rows into a folder that does not exist yet, compute some of them
anew, hold the logits of the files against those of the parents merged once more, measure the result, write the card,
and only then give the folder its name. What is another model, or worse than its best parent, gets none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from luthier.core.errors import RecipeError
from luthier.kernels.floats import REAL
from luthier.merge.folder import write_beside
from luthier.merge.measures import TensorReport, by_role
from luthier.merge.parents import Parent, require_alike
from luthier.merge.plan import Plan, Slice, Wanted, plan
from luthier.merge.proof import prove
from luthier.merge.settings import Setting
from luthier.merge.stream import Room, stream
from luthier.merge.vocabulary import United, united
from luthier.model.files.adapter_config import read_config
from luthier.model.files.json_files import write_object
from luthier.model.files.shards import ShardWriter
from luthier.model.files.sources import resolve_source
from luthier.recipes.exporting.card_parts import CARD, PARITY
from luthier.recipes.merging.card import CardFacts, ParentFacts, merge_card
from luthier.recipes.merging.recipe import MergeRecipe
from luthier.recipes.opening.results import model_from, result_of, started_in
from luthier.store.folder import require_new, write_folder
from luthier.store.manifest import Entry
from luthier.store.runs import MODEL, RunDirectory, is_run

REPORT: Final = "merge.json"
GIGA: Final = 10**9


@final
@dataclass(frozen=True)
class Opening:
    """What a merge works with: its parents (the base last), its plan, and what to tell."""

    recipe: MergeRecipe
    parents: tuple[Parent, ...]
    wanted: Wanted
    united: United
    plan: Plan
    notices: tuple[str, ...]

    @property
    def room(self) -> Room:
        return Room(int(self.recipe.memory_gb * GIGA), self.recipe.threads)

    @property
    def out_bytes(self) -> int:
        return sum(slot.bytes for slot in self.plan.slots.values())

    def as_dict(self) -> dict[str, Any]:
        """What would be read, written and held, as plain values."""
        recipe, looks = self.recipe, max((job.method.passes for job in self.plan.jobs), default=0)
        return {
            "method": recipe.method.as_recipe(),
            "parents": [{"model": each.name, "bytes": each.shards.bytes} for each in self.parents],
            "tensors": len(self.plan.jobs),
            "layers": self.plan.layers,
            "reads_bytes": sum(each.shards.bytes for each in self.parents),
            "looks": looks,
            "writes_bytes": self.out_bytes,
            "memory_bytes": int(recipe.memory_gb * GIGA),
            "dtype": recipe.dtype,
            "notices": list(self.notices),
        }


@final
@dataclass(frozen=True)
class Gate:
    """What a result is held against: scores of the parents, by whoever can measure a model; higher is better.

    `judge` measures a folder and refuses it where it is worse than the best of `parents`.
    """

    parents: Callable[[Sequence[tuple[str, str, str | None]]], Mapping[str, float]]
    judge: Callable[[Path, Mapping[str, float]], dict[str, Any]]


@contextmanager
def opened(recipe: MergeRecipe) -> Iterator[Opening]:
    """The parents of a recipe, open, and the plan; nothing is written. Raises RecipeError for what cannot be merged."""
    with ExitStack() as files:
        parents = []
        for each in [*recipe.models, *([] if recipe.base is None else [None])]:
            name = each.model if each is not None else str(recipe.base)
            folder, adapter = place_of(name, None if each is None else each.adapter)
            parents.append(Parent.open(name, folder, adapter))
            files.callback(parents[-1].shards.close)
        notices = require_alike(parents)
        joined = united(parents, recipe.tokenizer)
        wanted = _wanted(recipe, joined)
        yield Opening(recipe, tuple(parents), wanted, joined, plan(parents, wanted), (*notices, *joined.notices))


def place_of(name: str, adapter: str | None = None) -> tuple[str, Path | None]:
    """The model folder that a name stands for, and the adapter on top of it. A run stands for its tuned model."""
    if not is_run(Path(name)):
        return resolve_source(name), None if adapter is None else Path(adapter)
    if adapter is not None:
        raise RecipeError(f"{name} is a run and has its own result", do="name the base model to put an adapter on it")
    run = RunDirectory.open(Path(name))
    folder, _ = result_of(run)
    if folder.name == MODEL:
        return str(folder), None
    return resolve_source(model_from(str(read_config(folder)["base_model_name_or_path"]), started_in(run))), folder


def merge_models(
    recipe: MergeRecipe,
    out: Path,
    *,
    gate: Gate | None = None,
    told: Callable[[int], None] = lambda _bytes: None,
) -> dict[str, Any]:
    """Merge into the new folder `out`; what was done, tensor by tensor.

    Raises GateError, with nothing left there, where the files hold something else than was computed, or where `gate`
    finds the result worse than its best parent.
    """
    require_new(out)
    scores: Mapping[str, float] = {}
    if gate is not None:
        scores = gate.parents([(each.model, *_named(each.model, each.adapter)) for each in recipe.models])
    with opened(recipe) as opening:
        found: dict[str, Any] = {**opening.as_dict(), "folder": str(out)}

        def write(place: Path) -> Mapping[str, Entry]:
            writer = ShardWriter(place, opening.plan.slots, shard_bytes=int(recipe.shard_gb * GIGA))
            with ThreadPoolExecutor(recipe.threads, "digest") as beside, writer:
                reports = stream(opening.parents, opening.plan, writer, opening.room, told=told)
                # While the disk catches up with what was written.
                writer.settle()
                # Who asks for no gate asks for no second read of the parents either: it takes as long as their merge.
                digests = [beside.submit(parent.digests) for parent in opening.parents if recipe.parity != "none"]
                found["proved_tensors"] = prove(place, opening.parents, opening.plan, int(recipe.memory_gb * GIGA))
            found["notices"] += write_beside(
                place, opening.parents, REAL[recipe.dtype], layers=opening.plan.layers,
                slices=opening.wanted.slices, united=opening.united,
            )  # fmt: skip
            found["parity"] = _parity(opening, place, found["notices"].append)
            found["evaluation"] = None if gate is None else gate.judge(place, scores)
            found.update(_summary(reports))
            write_object(place / PARITY, found["parity"])
            write_object(place / REPORT, {"recipe": recipe.model_dump(mode="json"), **found})
            card = _card(opening, found, [digest.result() for digest in digests] or [("", "")] * len(opening.parents))
            (place / CARD).write_text(merge_card(card), encoding="utf-8")
            return writer.entries

        facts = {"method": recipe.method.as_recipe(), "parents": [each.name for each in opening.parents]}
        # Durable, with digests of the bytes as they were handed over; reading a model back takes as long as merging it,
        # and what a disk may have lost can be merged again.
        write_folder(out, write, facts, needed_bytes=opening.out_bytes, trust=True)
    return found


def _parity(opening: Opening, place: Path, noticed: Callable[[str], None]) -> dict[str, Any]:
    """What was measured of logits, texts and all tensors. Raises GateError where that is another model."""
    recipe = opening.recipe
    if recipe.parity == "none":
        return {"passed": None, "not_compared": "nobody asked for it (parity is none)"}
    # It brings the model zoo, which takes seconds, and a merge needs no model.
    from luthier.merge.parity import Merge
    from luthier.recipes.merging.parity import parity_of_models

    merge = Merge(parents=opening.parents, plan=opening.plan, united=opening.united, room=opening.room,
                  dtype=REAL[recipe.dtype], stacked=bool(recipe.slices))  # fmt: skip
    return parity_of_models(merge, place, noticed)


def _card(opening: Opening, found: Mapping[str, Any], digests: Sequence[tuple[str, str]]) -> CardFacts:
    recipe, out = opening.recipe, Path(found["folder"]).name
    shares = [*(each.weight for each in recipe.models), *([] if recipe.base is None else ["base"])]
    return CardFacts(
        title=out,
        command=f"luthier merge recipe.yaml --out {out}",
        parents=[ParentFacts(parent.name, *digest, share=share)
                 for parent, digest, share in zip(opening.parents, digests, shares, strict=True)],
        recipe=recipe.model_dump(mode="json", exclude_defaults=True),
        method=recipe.method.method_name(),
        evaluation=found["evaluation"],
        parity=found["parity"],
        notices=found["notices"],
        architecture=str((opening.parents[0].config.get("architectures") or [""])[0]),
    )  # fmt: skip


def _named(name: str, adapter: str | None) -> tuple[str, str | None]:
    return (name, adapter) if is_run(Path(name)) else (resolve_source(name), adapter)


def _summary(reports: Sequence[TensorReport]) -> dict[str, Any]:
    lerps = [report.told["lerp"] for report in reports if "lerp" in report.told]
    more = {"lerp_tensors": sum(lerps), "slerp_tensors": len(lerps) - sum(lerps)} if lerps else {}
    return {**more, "roles": by_role(reports), "by_tensor": [report.as_dict() for report in reports]}


def _wanted(recipe: MergeRecipe, joined: United) -> Wanted:
    count = len(recipe.models)
    numbers = {each.model: number for number, each in enumerate(recipe.models)}
    numbers |= {recipe.base: count} if recipe.base is not None else {}
    slices = tuple(
        Slice(
            each.sources[0].layers[1] - each.sources[0].layers[0],
            tuple((numbers[source.model], source.layers[0]) for source in each.sources),
            {key: Setting.of(value, key) for key, value in each.vary.items()},
            {numbers[source.model]: Setting.of(source.weight, "weight")
             for source in each.sources if source.weight is not None},
        )
        for each in recipe.slices
    )  # fmt: skip
    return Wanted(
        method=recipe.method,
        models=tuple(range(count)),
        base=None if recipe.base is None else count,
        weights=tuple(Setting.of(each.weight, "weight") for each in recipe.models),
        dtype=REAL[recipe.dtype],
        vary={key: Setting.of(value, key) for key, value in recipe.vary.items()},
        slices=slices,
        vocabulary=joined.rows,
        vocabulary_rows=joined.count,
    )
