"""A LoRA adapter as a GGUF file, and back to PEFT's format.

Idea: llama.cpp adds (alpha / r) B A x to a layer, with one alpha for the file and r from the tensor; what has another
scale in PEFT has the rest of it multiplied into B. A has the inputs of the layer and stays as it is, B has its outputs
and is turned as the rows of the layer are.
Equation: B' = turn(B) s r / alpha, with s = alpha_i / r, or alpha_i / sqrt(r) with rslora.
Source: llama.cpp's loader of adapters: `general.type` adapter, `adapter.type` lora, `NAME.lora_a`, `NAME.lora_b`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from torch import Tensor

from luthier.core.errors import CorruptError, RecipeError
from luthier.maths.ggml import FORMATS
from luthier.model.editing.role_names import PEFT_PREFIX
from luthier.model.files.adapter_config import CONFIG, TENSORS, read_config
from luthier.model.files.json_files import write_object
from luthier.model.files.tensor_files import load_tensors
from luthier.model.files.tensor_headers import tensor_shapes
from luthier.model.files.weights import without_weights
from luthier.model.gguf.families import Layout
from luthier.model.gguf.reading import GgufFile
from luthier.model.gguf.writing import Planned, real, text, write_gguf
from luthier.model.tasks import CAUSAL

_FACTOR: Final = re.compile(re.escape(PEFT_PREFIX) + r"(.+)\.lora_([AB])\.weight")
_ENDINGS: Final = {"A": ".lora_a", "B": ".lora_b"}
_MERGE: Final = "export the whole model (--to gguf without part=adapter), or the adapter for PEFT (--to peft)"


def require_writable(folder: Path, config: Any) -> None:
    """Raise RecipeError for an adapter that GGUF has no place for, before anything is computed."""
    held = read_config(folder)
    layout = Layout.of(config)
    if held.get("peft_type") != "LORA" or held.get("use_dora"):
        kind = "DoRA" if held.get("use_dora") else str(held.get("peft_type"))
        raise RecipeError(f"the adapter is of the kind {kind}", allowed="LoRA", do=_MERGE)
    for name in tensor_shapes(folder / TENSORS):
        found = _FACTOR.fullmatch(name)
        if found is None or layout.name(f"{found[1]}.weight") in (None, "token_embd.weight", "output.weight"):
            raise RecipeError(f"the adapter has the tensor {name}", allowed="factors of the layers inside the blocks",
                              do=_MERGE)  # fmt: skip
        _scale(held, found[1], 1)


def write_lora(
    path: Path, folder: Path, config: Any, *, name: str, told: Callable[[str], None] = lambda _line: None
) -> None:
    """Write the adapter in `folder` (PEFT's format) for a base with `config`, in float32."""
    require_writable(folder, config)
    layout, held = Layout.of(config), read_config(folder)
    alpha = float(held["lora_alpha"])
    written: dict[str, Tensor] = {}
    for own, tensor in load_tensors(folder / TENSORS, widen=True).items():
        found = _FACTOR.fullmatch(own)
        place = layout.name(f"{found[1]}.weight") if found is not None else None
        if found is None or place is None:
            continue
        factor = tensor.float()
        if found[2] == "B":
            rank = tensor.shape[1]
            factor = layout.stored(place, factor * (_scale(held, found[1], rank) * rank / alpha))
        written[place + _ENDINGS[found[2]]] = factor
    keys = {
        "general.architecture": text(layout.family.architecture),
        "general.type": text("adapter"),
        "general.name": text(name),
        "adapter.type": text("lora"),
        "adapter.lora.alpha": real(alpha),
    }
    plan = [Planned(place, tuple(tensor.shape), FORMATS["F32"]) for place, tensor in written.items()]
    size = write_gguf(path, keys, plan, written.items())
    told(f"{path.name}: {len(plan)} tensors, {size:,} bytes")


def lora_to_peft(file: GgufFile, config: Any, folder: Path) -> None:
    """Write what a file holds as an adapter in PEFT's format, from the file alone, for a base with `config`.

    Raises CorruptError for a file that is no LoRA adapter for it.
    """
    layout = Layout.of(config)
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": layout.family.architecture}
    for key, value in wanted.items():
        if file.text(key) != value:
            raise _unsound(file, f"{key} is {file.text(key)!r}", value)
    alpha = file.keys.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not math.isfinite(alpha) or alpha <= 0:
        raise _unsound(file, f"adapter.lora.alpha is {alpha!r}", "a number above 0")
    empty = without_weights(config, str(file.path), task=CAUSAL).state_dict()
    back = {name: own for own in empty if (name := layout.name(own)) is not None}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for place, tensor in file.each():
        name, _, factor = place.rpartition(".")
        own = back.get(name)
        if own is None or factor not in ("lora_a", "lora_b") or tensor.ndim != 2:
            raise _unsound(file, f"the tensor {place} has no layer", "factors of layers")
        side = 1 if factor == "lora_a" else 0
        if tensor.shape[side] != empty[own].shape[side]:
            raise _unsound(file, f"{place} has shape {tuple(tensor.shape)}", f"{empty[own].shape[side]} there")
        module = own.removesuffix(".weight")
        rank = int(tensor.shape[1 - side])
        if ranks.setdefault(module, rank) != rank:
            raise _unsound(file, f"the factors of {name} have different ranks", "one rank")
        restored = tensor if factor == "lora_a" else layout.restored(name, tensor)
        tensors[f"{PEFT_PREFIX}{module}.lora_{factor[-1].upper()}.weight"] = restored.contiguous()
    if len(tensors) != 2 * len(ranks):
        raise _unsound(file, f"{len(tensors)} factors for {len(ranks)} layers", "two for each")
    _write_peft(folder, tensors, ranks, alpha)


def _write_peft(folder: Path, tensors: Mapping[str, Tensor], ranks: Mapping[str, int], alpha: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(tensors.items())), folder / TENSORS, metadata={"format": "pt"})
    write_object(folder / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "inference_mode": True,
        "r": max(ranks.values(), default=1), "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "rank_pattern": dict(ranks), "alpha_pattern": {}, "fan_in_fan_out": False,
        "target_modules": sorted(ranks), "init_lora_weights": True,
    })  # fmt: skip


def _scale(held: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B A by at a module of this rank."""
    alpha = float(held["lora_alpha"])
    for ending, own in dict(held.get("alpha_pattern") or {}).items():
        if not re.fullmatch(r"[\w.]+", ending):
            raise RecipeError(f"alpha_pattern has the pattern {ending!r:.80}", allowed="endings of module names",
                              do=_MERGE)  # fmt: skip
        if module == ending or module.endswith(f".{ending}"):
            alpha = float(own)
            break
    return alpha / (math.sqrt(rank) if held.get("use_rslora") else rank)


def _unsound(file: GgufFile, received: str, allowed: str) -> CorruptError:
    return CorruptError(f"{file.path.name} is not the adapter that was exported: {received}", allowed=allowed,
                        do="export it again")  # fmt: skip


