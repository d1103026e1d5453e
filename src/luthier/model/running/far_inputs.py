"""The inputs of recomputed blocks, in the host's memory until the backward pass comes to them.

Idea: of a recomputed block only its input is kept. Where even these do not fit, each goes to the host while the blocks
above compute, and comes back while the block above goes backward. It is the one tensor for which that pays: a block's
inside is some twelve times as much, and to make it again takes a GPU less time than a link to carry it.
Equation: of n blocks, two inputs at most are on the device: in the forward pass what a block has just been given and
    what is on its way out, in the backward pass what is at work and what is on its way in.
Source: Rhu et al., arXiv 1602.08124 (vDNN), for activations that go to the host; Chen et al., arXiv 1604.06174.
Cost: the link carries d numbers of a token and block twice; the host holds them.
"""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from luthier.kernels.lanes import Lane, Transfer

UNDER_WAY = 2
"""Inputs of which the device's memory is held at once."""


@final
class FarInputs:
    """What one pass has sent out, in order; hooks for `torch.autograd.graph.saved_tensors_hooks`."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._sent: list[Transfer] = []
        self._coming: dict[int, Transfer] = {}

    def keep(self, x: Float[Tensor, "T d"]) -> int:
        """Send an input out; its number."""
        if len(self._sent) >= UNDER_WAY:
            # Its memory is free for the block that follows, and not before.
            self._sent[-UNDER_WAY].on_device()
        self._sent.append(self._lane.out(x))
        return len(self._sent) - 1

    def give(self, number: int) -> Float[Tensor, "T d"]:
        """An input, back on the device; the one that will be asked for next is on its way."""
        for sent in self._sent[-UNDER_WAY:]:
            sent.on_device()
        for wanted in (number, number - 1):
            if wanted >= 0 and wanted not in self._coming:
                self._coming[wanted] = self._lane.back(self._sent[wanted].tensor)
        return self._coming.pop(number).on_device()
