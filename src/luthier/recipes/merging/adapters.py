"""Merge adapters: several LoRA adapters of one base become one, in PEFT's format, without the base's weights.

Read top to bottom: find the adapters (a run is its result), see that they belong to one base, merge the factors of each
module, hold the base with the new adapter against the base with all of them, and write the folder whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from pydantic import Field
from safetensors.numpy import save_file

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import DriftError, RecipeError
from luthier.core.knobs import Knobs, validate
from luthier.core.nearest import choice
from luthier.core.units import percent_text
from luthier.merge.adapters import CAT, SVD, Joining, share_lost
from luthier.merge.lora import CONFIG, PREFIX, TENSORS, Factors, config_of, pairs_of
from luthier.mergers import Merger
from luthier.model.files.json_files import read_object, write_object
from luthier.model.files.weight_files import folder_digest
from luthier.recipes.exporting.card_parts import CARD, PARITY
from luthier.recipes.merging.card import CardFacts, ParentFacts, merge_card
from luthier.recipes.opening.results import result_of
from luthier.store.folder import write_folder
from luthier.store.runs import RunDirectory, is_run

EXTRAS: Final = "luthier.json"
GENERATION: Final = "generation_config.json"


@final
class AdapterKnobs(Knobs):
    """Which adapters are merged, and how."""

    adapters: tuple[str, ...] = Field(min_length=1, description="adapter folders or runs")
    weights: tuple[float, ...] = Field(description="a weight for each")
    method: str = Field(description="cat (side by side), svd (cut to a rank), or a merger")
    rank: int | None = Field(None, ge=1, description="rank of the result; empty is the largest, for cat the sum")
    knobs: dict[str, Any] = Field(default_factory=dict, description="knobs of the merger")

    @classmethod
    def from_flags(
        cls, names: list[str], method: str, weights: list[float] | None, given: Mapping[str, Any]
    ) -> AdapterKnobs:
        """The knobs of a command line. Raises RecipeError for what it cannot mean."""
        if weights and len(weights) != len(names):
            raise RecipeError(f"{len(weights)} weights for {len(names)} adapters", allowed="--weight once for each")
        known = [CAT, SVD, *catalog.names("mergers")]
        if method not in known:
            raise RecipeError(f"there is no way {method!r} to merge adapters", do=choice(method, known))
        knobs = {key.removeprefix("method."): value for key, value in given.items() if key.startswith("method.")}
        if other := sorted(set(given) - {"rank"} - {f"method.{key}" for key in knobs}):
            raise RecipeError(f"--set {other[0]}", allowed="--set rank=N, or --set method.KNOB=VALUE")
        values = {"adapters": tuple(names), "weights": tuple(weights or [1.0] * len(names)), "method": method,
                  "rank": given.get("rank"), "knobs": knobs}  # fmt: skip
        return validate(cls, values)

    @property
    def merger(self) -> Merger | None:
        """What merges changes; None for their weighted sum."""
        if self.method in (CAT, SVD):
            if self.knobs:
                raise RecipeError(f"{self.method} has no knob {min(self.knobs)}", allowed="--set rank=N")
            return None
        return choose("mergers", Merger, {"method": self.method, **self.knobs})


def planned_adapters(knobs: AdapterKnobs) -> dict[str, Any]:
    """What would be merged, without merging it."""
    folders, pairs = _read(knobs)
    modules = sorted({module for each in pairs for module in each})
    rank = _rank(knobs, pairs)
    return {"adapters": [str(folder) for folder in folders], "method": knobs.method, "weights": list(knobs.weights),
            "modules": len(modules), "rank": rank}  # fmt: skip


def merge_adapters(knobs: AdapterKnobs, out: Path) -> dict[str, Any]:
    """Merge into the new folder `out`. Raises DriftError for adapters of different bases.

    Raises GateError, with nothing left there, where the files compute something else than the adapters do together.
    """
    folders, pairs = _read(knobs)
    merger, rank = knobs.merger, _rank(knobs, pairs)
    if merger is not None:
        merger.require(len(folders), base=True)
    cut = None if knobs.method == CAT and knobs.rank is None else rank
    joining = Joining(pairs, knobs.weights, merger)
    found = {module: joining.joined(module, cut) for module in joining.modules}
    config = {**config_of(folders[0]), "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {},
              "alpha_pattern": {}, "target_modules": sorted(found)}  # fmt: skip
    told: dict[str, Any] = {
        "method": knobs.method, "adapters": [str(folder) for folder in folders], "weights": list(knobs.weights),
        "folder": str(out), "modules": len(found), "rank": rank, "lost": share_lost(list(found.values())),
    }  # fmt: skip

    def write(place: Path) -> None:
        tensors = {}
        for module, each in found.items():
            down, up = _padded(each.factors, rank)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = down
            tensors[f"{PREFIX}{module}.lora_B.weight"] = up
        save_file(tensors, place / TENSORS, metadata={"format": "pt"})
        # Full names as targets: endings could mean modules that no adapter has.
        write_object(place / CONFIG, config)
        for name in (EXTRAS, GENERATION):
            if (folders[0] / name).is_file():
                write_object(place / name, read_object(folders[0] / name))
        # It brings the model zoo, which takes seconds: not where a merge is only planned.
        from luthier.recipes.merging.parity import parity_of_adapters

        told["parity"] = parity_of_adapters(knobs.adapters[0], folders[0], joining, found, place)
        write_object(place / PARITY, told["parity"])
        (place / CARD).write_text(merge_card(_card(knobs, folders, told)), encoding="utf-8")

    write_folder(out, write, {key: told[key] for key in ("method", "adapters", "weights")})
    return told


def _read(knobs: AdapterKnobs) -> tuple[list[Path], list[dict[str, Factors]]]:
    folders = [_folder(name) for name in knobs.adapters]
    digests: dict[str, Path] = {}
    for folder in folders:
        said = read_object(folder / EXTRAS).get("base_digest") if (folder / EXTRAS).is_file() else None
        name = str(said or config_of(folder).get("base_model_name_or_path"))
        digests.setdefault(name, folder)
    if len(digests) > 1:
        (one, first), (other, second) = list(digests.items())[:2]
        raise DriftError(
            f"{first} was trained on {one[:60]}, {second} on {other[:60]}",
            allowed="adapters of one base model",
            do="merge the tuned models instead of the adapters",
        )
    return folders, [pairs_of(folder) for folder in folders]


def _folder(name: str) -> Path:
    if not is_run(Path(name)):
        return Path(name)
    folder, _ = result_of(RunDirectory.open(Path(name)))
    return folder


def _rank(knobs: AdapterKnobs, pairs: list[dict[str, Factors]]) -> int:
    """The rank of the result."""
    if knobs.rank is not None:
        return knobs.rank
    ranks = [max((len(each.down) for each in one.values()), default=1) for one in pairs]
    if knobs.method != CAT:
        return max(ranks)
    modules = {module for each in pairs for module in each}
    return max(sum(len(each[module].down) if module in each else 1 for each in pairs) for module in modules)


def _padded(factors: Factors, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors with zeros up to a rank, since PEFT has one for all modules."""
    more = (0, rank - len(factors.down))
    return (np.ascontiguousarray(np.pad(factors.down, (more, (0, 0)))),
            np.ascontiguousarray(np.pad(factors.up, ((0, 0), more))))  # fmt: skip


def _card(knobs: AdapterKnobs, folders: Sequence[Path], told: Mapping[str, Any]) -> CardFacts:
    title, parity = Path(told["folder"]).name, told["parity"]
    flags = [*(f"--weight {weight:g}" for weight in knobs.weights),
             *([f"--set rank={knobs.rank}"] if knobs.rank else []),
             *(f"--set method.{key}={value}" for key, value in knobs.knobs.items())]  # fmt: skip
    return CardFacts(
        title=title,
        command=f"luthier merge {' '.join(knobs.adapters)} --adapters --method {knobs.method} {' '.join(flags)} "
        f"--out {title}",
        parents=[ParentFacts(name, adapter=folder_digest(folder), share=weight)
                 for name, folder, weight in zip(knobs.adapters, folders, knobs.weights, strict=True)],
        recipe={},
        method=knobs.method,
        evaluation=None,
        parity=parity,
        notices=(),
        base=parity["base"],
        more=_of_cut(told),
    )  # fmt: skip


def _of_cut(told: Mapping[str, Any]) -> str:
    """What a smaller rank has cost, where one was cut."""
    cost = told["parity"]["cut"]
    if cost is None:
        return ""
    lost = f"The merged change was cut to rank {told['rank']}, which takes {percent_text(told['lost'])} of its norm"
    return f"## What the rank costs\n\n{lost}. Beside the change as it was before: {cost['numbers']}.\n"
