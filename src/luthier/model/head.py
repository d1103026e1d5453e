"""The output head of a zoo model as plain tensors and numbers."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.core.errors import RecipeError
from luthier.kernels.head import Head
from luthier.model.edits import EditedModule


def head_of(module: PreTrainedModel) -> Head:
    """The output head of a zoo model, with the scale and soft cap its config asks for."""
    linear = module.get_output_embeddings()
    if isinstance(linear, EditedModule):
        linear = linear.base
    if not isinstance(linear, nn.Linear):
        raise RecipeError(f"the output head is a {type(linear).__name__}", allowed="a linear layer")
    config = module.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(scaling or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    bias: Tensor | None = linear.bias
    return Head(linear.weight, bias, scale, float(cap) if cap else None)
