"""What the config of an adapter in PEFT's format says, and what luthier wrote beside it, without torch.

`adapter_config.json` and `adapter_model.safetensors` are what PEFT reads and writes; `luthier.json` beside them holds
what PEFT has no place for: the digest of the base weights the adapter was trained on, and the run it came from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.core.errors import CorruptError, RecipeError, UnsafeArtifactError
from luthier.model.editing.role_names import PEFT_PREFIX
from luthier.model.files.json_files import read_object, write_object
from luthier.model.files.tensor_headers import tensor_shapes

PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""What PEFT's `init_lora_weights` is where it has left the base as it was."""
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
EXTRAS = "luthier.json"


def save_extras(folder: Path, extras: Mapping[str, Any]) -> None:
    """Write what luthier knows of a result beside it."""
    write_object(folder / EXTRAS, dict(extras))


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises RecipeError when the folder holds no adapter.

    A pattern of target modules is not run but replaced by the modules that the tensor file names: matching it against
    the model could take for ever.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise RecipeError(f"{folder} holds no {CONFIG}", do="name a folder in PEFT's format, or a run directory")
    if not (folder / TENSORS).is_file():
        if list(folder.glob("*.bin")):
            raise UnsafeArtifactError(f"{folder} holds its tensors as a pickle", allowed=TENSORS)
        raise CorruptError(f"{folder} holds no {TENSORS}")
    config = read_object(path)
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear" and not re.fullmatch(r"[\w.]+", targets):
        config["target_modules"] = sorted({_module_of(name) for name in tensor_sizes(folder)} - {""})
    return config


def tensor_sizes(folder: Path) -> dict[str, int]:
    """The number of elements of each tensor in the adapter file, without reading the tensors."""
    return {name: math.prod(shape) for name, shape in tensor_shapes(folder / TENSORS).items()}


def trained_beside(folder: Path) -> tuple[str, ...]:
    """A sentence on the weights that an adapter of ours was trained beside, where these were packed."""
    kept = read_extras(folder).get("quantizer")
    name = kept.get("method", "none") if isinstance(kept, Mapping) else "none"
    if name == "none":
        return ()
    return (f"the adapter was trained beside weights in {name}, and compared beside them: beside a base in another "
            "format it says something else",)  # fmt: skip


def read_extras(folder: Path) -> dict[str, Any]:
    """What luthier wrote beside the adapter; empty for adapters from elsewhere."""
    path = folder / EXTRAS
    return read_object(path) if path.is_file() else {}


def require_plain_start(config: Mapping[str, Any]) -> None:
    """Raise RecipeError when low-rank factors are for a base that PEFT has changed: ours is as it was."""
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise RecipeError(
            f"the adapter file has init_lora_weights = {start!r:.80}: it is for a base whose weights were changed",
            allowed=", ".join(map(str, PLAIN_STARTS[1:])),
            do="save it with PEFT's path_initial_model_for_weight_conversion, which makes it fit the base as it is",
        )


def _module_of(name: str) -> str:
    """The module that a low-rank factor belongs to; "" for another tensor."""
    found = re.match(r"(.*)\.lora_(?:embedding_)?A\b", name.removeprefix(PEFT_PREFIX))
    return "" if found is None else found[1]
