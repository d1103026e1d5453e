"""Learning from rollouts: what an objective is besides, when it learns from what the model itself has answered.

Idea: whoever makes rollouts asks for the tree of each group of answers, has noted on it what the objective wants to be
recalled, and lets it turn rewards into advantages. Then it is an objective like any other, for as many steps as a
rollout serves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from luthier.data.conversation import Meaning
from luthier.data.forest import Note, Segment, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.data.rollouts import Group


class RolloutLearner(ABC):
    """Beside an objective: what it does with answers and what they were worth.

    A rollout is used for `passes` rounds of `minibatches` steps each, and its answers are sampled at `temperature`.
    What is `recalled` is noted on its trees before the first step, by the model as it is then; from that, and from
    rewards, answers get their `credited` advantages.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"rollouts"})
    rewarded: ClassVar[bool] = True
    """Whether it learns from what answers were worth."""
    compared: ClassVar[bool] = False
    """Whether answers to one prompt are compared with each other: one that stands alone teaches nothing."""

    passes: int
    minibatches: int
    temperature: float

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        """Rows are prompts, with the facts by which answers are checked."""
        return ("asked",)

    @property
    def policy_temperature(self) -> float:
        """The temperature at which answers are sampled is that of the policy."""
        return self.temperature

    @property
    def recalled(self) -> frozenset[Note]:
        """What trees have to bear before advantages are known, out of "old", "reference" and "value"."""
        return frozenset()

    @property
    def leash(self) -> float:
        """The factor of a penalty that is adapted from rollout to rollout, as it is at first."""
        return 0.0

    @abstractmethod
    def grow(self, group: Group) -> Tree:
        """The tree of a group, with the weights of its tokens."""

    @abstractmethod
    def credited(self, groups: Sequence[Group], trees: Sequence[Tree], *, leash: float) -> tuple[list[Tree], float]:
        """The trees of a rollout, one for each of its groups, with notes of advantages; and the leash from then on."""

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        """The prompt alone, which trains nothing: answers are yet to come."""
        return [Tree((Segment(view.tokens, np.zeros(len(view.tokens), np.float32)),), row=view.row)]
