"""Quantizing the base model of a recipe, and finding out how a result's base was quantized."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.core.units import bytes_text
from luthier.model.language_model import LanguageModel
from luthier.model.packed import Packing, stored_bytes
from luthier.model.packing import pack_weights
from luthier.quantizers import Quantizer

KEY = "quantizer"
"""Where a result says how its base was quantized."""


def quantize(model: LanguageModel, quantizer: Quantizer) -> None:
    """Pack the weights of the model's blocks, and note what that saves; nothing happens with the quantizer `none`."""
    if "packed-weights" not in quantizer.provides:
        return
    parameters = list(model.module.parameters())
    before = sum(map(stored_bytes, parameters))

    def pack(weight: Float[Tensor, "out in"]) -> Packing:
        packing = quantizer.pack(weight, model.executor.backend)
        if packing is None:
            raise RecipeError(f"{quantizer.method_name()} keeps no matrix of shape {tuple(weight.shape)}")
        return packing

    count = pack_weights(model, pack)
    after = sum(map(stored_bytes, model.module.parameters()))
    model.notices.append(
        f"quantizer: {quantizer.method_name()} holds {count} matrices; weights {bytes_text(before)}, now "
        f"{bytes_text(after)}"
    )


def kept_quantizer(extras: Mapping[str, object]) -> Quantizer:
    """How the base of a result was quantized when it was trained, as was written beside it."""
    return choose("quantizers", Quantizer, extras.get(KEY, "none"))
