"""Optimizers: from a gradient to a change of the parameters.

The contract: an optimizer builds a torch optimizer over float32 tensors (the loop keeps float32 masters of parameters
in a lower precision), and states how many bytes of state it keeps for a parameter, which is tested.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

from luthier.core.knobs import Method


class Optimizer(Method):
    """A way to step. Subclasses have a `learning_rate` knob, which schedules scale."""

    @property
    @abstractmethod
    def peak_learning_rate(self) -> float:
        """The learning rate that a schedule's factor 1 stands for."""

    @abstractmethod
    def build(self, parameters: Mapping[str, Tensor]) -> TorchOptimizer:
        """A torch optimizer over these float32 tensors, by name; the names decide about weight decay."""

    @abstractmethod
    def bytes_per_parameter(self) -> float:
        """Bytes of optimizer state kept for each trained parameter, master copies not counted."""
