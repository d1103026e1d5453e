"""A value head: how good the state is in which each token was chosen, as one number.

Idea: a linear layer over the final state that predicts a token says what return is to be expected from there on. It
learns beside an adapter and shares the model's body; it belongs to training, and no adapter file has it.
Equation: V(s_t) = w^T h_t + b, with h_t the final state before token t is chosen; w = 0 and b = 0 at the start.
Source: Schulman et al., arXiv 1707.06347, section 5 (shared parameters); Ouyang et al., arXiv 2203.02155, appendix C.4.
Cost: d + 1 parameters, 2 d FLOPs a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier.model.editing.edits import Edit


@final
class ValueHead(Edit):
    """A value of each state, in float32. Where it is `apart`, its gradient ends at the state and leaves the body be."""

    def __init__(self, size: int, *, device: torch.device, rate_factor: float = 1.0, apart: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float32, device=device))
        self.rate_factor = rate_factor
        self.apart = apart

    def values(self, hidden: Float[Tensor, "N d"]) -> Float[Tensor, " N"]:
        """The value of each state."""
        states = hidden.detach() if self.apart else hidden
        return states.float() @ self.weight + self.bias

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def rate_factors(self) -> Mapping[str, float]:
        return {"weight": self.rate_factor, "bias": self.rate_factor}


def value_head_of(edits: Sequence[Edit]) -> ValueHead | None:
    """The value head among the edits of an adapter, if there is one."""
    return next((edit for edit in edits if isinstance(edit, ValueHead)), None)
