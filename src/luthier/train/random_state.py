"""The state of the random generators, taken and put back: what makes a repeated pass the same pass."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RandomState:
    """The generators a pass may draw from: torch's on the CPU and on the model's device, Python's and numpy's."""

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None
    python: tuple[Any, ...]
    numpy: dict[str, Any]

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """As they stand at this moment."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        numpy = np.random.get_state(legacy=False)
        return cls(device, torch.get_rng_state(), cuda, random.getstate(), dict(numpy))

    def restore(self) -> None:
        """Put the generators back to where they stood."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
