"""Adapters of checkpoints: what a finished run had learned at earlier steps, as folders that can be put on its base.

Idea: a checkpoint holds the trained parameters and the result their names in PEFT's format, so the folder of a step is
that of the result with the tensors of the step; LoRA's two factors are its parameters as they are. The files are read
against their manifests, and written as every result is.
Use when: an earlier state is to be asked too, as clients of fine-tunes may. Not when: training is to go on from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors import safe_open
from safetensors.torch import save_file

from luthier.core.errors import CorruptError, RecipeError
from luthier.model.files.adapter_config import CONFIG, EXTRAS, TENSORS, read_config
from luthier.model.files.tensor_headers import tensor_shapes
from luthier.recipes.opening.results import of_policy, result_of
from luthier.store.folder import write_folder
from luthier.store.runs import RunDirectory
from luthier.train import state

_FACTORS: Final[Mapping[str, str]] = {".lora_A.weight": ".down", ".lora_B.weight": ".up"}
_PREFIX: Final = "base_model.model."


def step_of_result(run: RunDirectory) -> int | None:
    """The step whose state is the result of a finished run: the best where there was an evaluation, else the last."""
    checkpoints = of_policy(run).checkpoints
    return checkpoints.linked("best") or max(checkpoints.steps(), default=None)


def earlier_steps(run: RunDirectory) -> list[int]:
    """The steps of a finished run that checkpoints are there of, but for the one that is its result."""
    result = step_of_result(run)
    return [step for step in of_policy(run).checkpoints.steps() if step != result]


def write_adapter_at(run: RunDirectory, step: int, place: Path) -> None:
    """Let `place` hold the LoRA adapter of a checkpoint; what was written before a server died is whole and stays.

    Raises RecipeError for a run without such a result, CorruptError for files that are damaged or do not fit.
    """
    if place.is_dir():
        return
    run = of_policy(run)
    result, manifest = result_of(run)
    kind = read_config(result).get("peft_type")
    if kind != "LORA":
        raise RecipeError(f"the result of {run.folder} is of the kind {kind}", allowed="LORA")
    saved = run.checkpoints.require(step) / state.TENSORS

    def write(folder: Path) -> None:
        for name in (CONFIG, EXTRAS):
            shutil.copyfile(result / name, folder / name)
        with safe_open(saved, framework="pt") as file:
            names = {name: _parameter(name) for name in tensor_shapes(result / TENSORS)}
            if missing := sorted(set(names.values()) - set(file.keys())):
                raise CorruptError(f"{saved} holds no {missing[0]}, which the result has")
            tensors = {name: file.get_tensor(own).float().contiguous() for name, own in names.items()}
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})

    write_folder(place, write, {"base": manifest.facts.get("base"), "steps": step, "format": "peft"})


def _parameter(name: str) -> str:
    """What a checkpoint calls the parameter that is this tensor in PEFT's format."""
    for ending, factor in _FACTORS.items():
        if name.endswith(ending):
            return f"master/{name.removeprefix(_PREFIX).removesuffix(ending)}{factor}"
    raise RecipeError(f"{name} is no factor of LoRA", allowed=", ".join(_FACTORS))
