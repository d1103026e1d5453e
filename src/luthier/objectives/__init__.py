"""Objectives: what is optimised, from rendered rows to a loss.

The contract: `task` says what the model is loaded for, `trees` turns a rendered row into trees whose tokens carry
weights, `loss` turns per-token outputs into a `LossReport`, a sum and its weight. An objective that needs more than
log-probabilities says so: a `reference` (what the model says without the adapter, in `outputs.notes`), a policy at
another `policy_temperature`, trainable parts of its `own`, such as a value head, or something that is found out about
the trees of a whole step before its first pass: `probes`, and how trees are `informed` by them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from luthier.core.knobs import Method
from luthier.data.conversation import Meaning
from luthier.data.forest import Forest, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.training_rows import TrainingRows
from luthier.maths.divergences import Comparison
from luthier.model.editing.edits import Edit
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.model.tasks import CAUSAL, Task


@dataclass(frozen=True)
class Vocabulary:
    """What an objective may ask of a tokenizer: how many tokens it has, and which of them hides another."""

    size: int
    mask_id: int | None = None


class Objective(Method):
    """A training objective."""

    separable: ClassVar[bool] = True
    """Whether the loss of a tree is the sum of the losses of its branches, so that a large tree may run in parts."""

    @property
    def reference(self) -> bool:
        """Whether `outputs.notes["reference"]` shall have the tokens' log-probabilities without the adapter."""
        return False

    def refers(self, tree: Tree) -> bool:
        """Whether the loss of this tree looks at the reference."""
        return self.reference

    @property
    def needs(self) -> frozenset[str]:
        """What it cannot do without beside the data."""
        return self.requires

    @property
    def learner(self) -> RolloutLearner | None:
        """What of it learns from rollouts, if anything does."""
        return self if isinstance(self, RolloutLearner) else None

    @property
    def taught(self) -> bool:
        """Whether its reference is a teacher that the recipe names, instead of the model without the adapter."""
        return False

    @property
    def comparison(self) -> Comparison | None:
        """How `outputs.divergences` compare the whole policy with the reference's; None where nothing asks for it."""
        return None

    @property
    def policy_temperature(self) -> float:
        """The temperature of the policy that is trained: that at which it was sampled."""
        return 1.0

    def own(self, size: int, device: torch.device) -> list[Edit]:
        """Trainable parts beside the adapter's, for a model with states of `size`; they are in no adapter file."""
        return []

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        """What rows have to be for it, such as texts with a label; None where whatever the model reads will do."""
        return None

    def task(self, classes: tuple[str, ...]) -> Task:
        """What the model is loaded for; `classes` are those of the data. Raises DataError where they do not do."""
        return CAUSAL

    def remarks(self, rows: TrainingRows) -> list[str]:
        """What to say of the training rows before the first step. Raises DataError where they lack what it is for."""
        return []

    def with_vocabulary(self, vocabulary: Vocabulary) -> Self:
        """The objective with what it needs of a tokenizer. Raises RecipeError where the tokenizer lacks it."""
        return self

    def probes(self, trees: Sequence[Tree]) -> list[Tree]:
        """Trees whose likelihood, under the policy and the reference, all `trees` of a step depend on; none mostly."""
        return []

    def informed(self, trees: Sequence[Tree], log_ratio: float) -> list[Tree]:
        """The trees of a step, told the mean over its probes of log policy - log reference."""
        return list(trees)

    @abstractmethod
    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        """The trees of one rendered row, in the pass number `epoch` over the data.

        Raises DataError when the row cannot be trained on.
        """

    @abstractmethod
    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        """The loss over a forest, as a sum and the weight it is to be divided by."""
