"""The output head of a zoo model as plain tensors and numbers, or as a module with edits around it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier.core.errors import RecipeError
from luthier.kernels.head import Head
from luthier.model.editing.edits import EditedModule
from luthier.model.editing.token_rows import HeadRows
from luthier.model.routes import Parts
from luthier.model.zoo import ZooModule


@dataclass(frozen=True)
class EditedHead:
    """An output head with edits around it: its logits come from the module, scale and cap from the model as ever.

    `only` are the attachments whose edits count, with their weights; None takes all that are switched on.
    """

    module: EditedModule
    scale: float
    cap: float | None
    only: Parts | None = None

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n V"]:
        """The logits of a few rows, in float32."""
        own = self.only
        made = self.module(hidden) if own is None else self.module.through(hidden, self.module.own(own))
        logits = made.float() * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def edited_head(module: ZooModule, only: Parts | None = None) -> EditedHead | Head | None:
    """The output head while an edit at it is switched on, else None; that of some attachments where `only` names them.

    Where the edits are trained rows and nothing else, they are tensors too, and the chunked head takes them.
    """
    linear = module.get_output_embeddings()
    if not isinstance(linear, EditedModule):
        return None
    disabled = linear.disabled
    every = tuple((name, 1.0) for name in linear.edits if name not in disabled)
    active = linear.own(every if only is None else only)
    if not active:
        return None
    plain = head_of(module)
    rows = [edit.change_by(weight) for edit, weight in active if isinstance(edit, HeadRows)]
    if len(rows) == len(active):
        return replace(plain, changes=tuple(rows))
    return EditedHead(linear, plain.scale, plain.cap, only)


def head_of(module: ZooModule) -> Head:
    """The output head of a zoo model, with the scale and soft cap its config asks for."""
    linear = module.get_output_embeddings()
    if isinstance(linear, EditedModule):
        linear = linear.base
    if not isinstance(linear, nn.Linear):
        raise RecipeError(f"the output head is a {type(linear).__name__}", allowed="a linear layer")
    config = module.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(scaling or 1.0)
    if getattr(config, "scale_decoder_outputs", False):
        scale *= float(config.d_model) ** -0.5
    cap = getattr(config, "final_logit_softcapping", None)
    bias: Tensor | None = linear.bias
    return Head(linear.weight, bias, scale, float(cap) if cap else None)
