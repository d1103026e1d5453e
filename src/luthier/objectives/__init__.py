"""Objectives: what is optimised, from rendered rows to a loss.

The contract: `trees` turns a rendered row into trees whose tokens carry weights, `loss` turns per-token outputs into a
`LossReport`, a sum and its weight. An objective that needs more than log-probabilities says so in `requires`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from luthier.core.knobs import Method
from luthier.data.forest import Forest, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.model.outputs import LossReport, TokenOutputs


class Objective(Method):
    """A training objective."""

    separable: ClassVar[bool] = True
    """Whether the loss of a tree is the sum of the losses of its branches, so that a large tree may run in parts."""

    @abstractmethod
    def trees(self, view: Rendered) -> list[Tree]:
        """The trees of one rendered row. Raises DataError when the row cannot be trained on."""

    @abstractmethod
    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        """The loss over a forest, as a sum and the weight it is to be divided by."""
