"""Masters: float32 copies of trained parameters in a lower precision, in which their gradients are added up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.kernels.sums import add_to


def master_of(parameter: nn.Parameter) -> Tensor:
    """The float32 tensor that is stepped for a parameter: itself, or a copy."""
    return parameter if parameter.dtype == torch.float32 else parameter.detach().float().clone()


def collect_in(master: Tensor, parameter: nn.Parameter) -> None:
    """From now on let the gradients of a parameter in a lower precision be added up in its master's."""

    def collect(low: Tensor) -> None:
        # Added up in float32, micro-batch by micro-batch: in bfloat16 the later ones would be rounded away.
        if low.grad is not None:
            master.grad = low.grad.float() if master.grad is None else add_to(master.grad, low.grad)
            low.grad = None

    parameter.register_post_accumulate_grad_hook(collect)
