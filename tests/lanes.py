"""A lane whose copies are only made when somebody waits for them, in memory that torch does not count."""

from __future__ import annotations

import math
from typing import final

import numpy as np
import torch
from torch import Tensor

from luthier.kernels.lanes import Lane, Transfer


@final
class LateLane(Lane):
    """As late as a device could be: what is read before its copy was waited for is NaN, and what is written over too
    early arrives as what it was written over with."""

    def __init__(self) -> None:
        self.begun: list[_Late] = []
        self.out_bytes = 0
        self.back_bytes = 0

    def room(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return far(shape, dtype)

    def out(self, tensor: Tensor) -> Transfer:
        self.out_bytes += tensor.nbytes
        return self._late(tensor.detach(), far(tensor.shape, tensor.dtype))

    def back(self, tensor: Tensor) -> Transfer:
        self.back_bytes += tensor.nbytes
        return self._late(tensor, torch.empty_like(tensor))

    def _late(self, source: Tensor, goal: Tensor) -> _Late:
        goal.fill_(math.nan)
        self.begun.append(_Late(self, source, goal))
        return self.begun[-1]


@final
class _Late(Transfer):
    def __init__(self, lane: LateLane, source: Tensor, goal: Tensor) -> None:
        super().__init__(goal)
        self.lane, self.source = lane, source

    def on_device(self) -> Tensor:
        # In the order in which they were begun, up to this one.
        while self in self.lane.begun:
            first = self.lane.begun.pop(0)
            first.tensor.copy_(first.source)
            del first.source
        return self.tensor

    on_host = on_device


def far(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory that is no tensor's own, as the host's is not the device's."""
    return torch.from_numpy(np.zeros(max(1, shape.numel() * dtype.itemsize), np.uint8)).view(dtype)[
        : shape.numel()
    ].view(shape)
