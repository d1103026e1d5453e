"""Mixture: answers to imitate and answers that were compared, or sampled, learned from in one run.

Idea: what is imitated keeps a model able while preferences steer it. Each row goes to the objective that it is for: a
conversation or a text to one, a prompt with compared or judged answers to the other, wherever they lie in the files.
Rows are the common coin: a pair weighs 1, and a conversation `share`, spread over its tokens. Beside rollouts
(ppo, grpo) the texts of a step weigh `share` times what its answers weigh, however many there are of either.
Equation: L = [sum_pairs L_compared + share sum_rows mean_t(-log p(y_t))] / (number of pairs + share number of rows);
    beside rollouts L = [L_rollout + share mean_rows mean_t(-log p(y_t))] / (1 + share): PPO-ptx, with gamma = share.
Source: Ouyang et al., arXiv 2203.02155, equation 2 (a pre-training loss mixed into what preferences ask for); Pang et
    al., arXiv 2404.19733 (likelihood beside DPO).
Cost: that of each objective for its own rows; only rows that need a reference are given one.
Use when: a model forgets how to answer, or what it knows, while it learns from preferences.
Not when: the answers to imitate are the chosen ones: dpo and simpo have `sft` for that, and orpo is that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Self, final

import numpy as np
import torch
from pydantic import Field, model_validator

from luthier.core.chosen import Chosen, choose
from luthier.core.errors import RecipeError
from luthier.data.conversation import WORDS, Meaning
from luthier.data.forest import Forest, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.training_rows import TrainingRows
from luthier.model.editing.edits import Edit
from luthier.model.running.outputs import LossReport, TokenOutputs, of_trees
from luthier.model.tasks import CAUSAL, Task
from luthier.objectives import Objective, Vocabulary


@final
class Mixture(Objective):
    """One objective for rows to imitate, another for answers that were compared."""

    separable: ClassVar[bool] = False

    said: Annotated[Objective, Chosen("objectives")] = Field(
        default_factory=lambda: choose("objectives", Objective, "sft"), description="for conversations and texts"
    )
    compared: Annotated[Objective, Chosen("objectives")] = Field(
        default_factory=lambda: choose("objectives", Objective, "dpo"), description="for answers compared or judged"
    )
    share: float = Field(1.0, gt=0, description="what a conversation or text weighs, where a pair weighs 1")

    @model_validator(mode="after")
    def _fits(self) -> Mixture:
        kinds = set(self.compared.meanings or ())
        if not kinds or not (kinds <= {"preference", "judged"} or kinds == {"asked"}):
            raise RecipeError(
                f"compared is {self.compared.method_name()}, which learns from other rows",
                allowed="an objective of preferences, judged answers or rollouts: dpo, orpo, simpo, kto, ppo, grpo",
            )
        if not set(self.said.meanings or WORDS) <= set(WORDS):
            raise RecipeError(
                f"said is {self.said.method_name()}, which learns from other rows", allowed="sft or language_model"
            )
        for part in (self.said, self.compared):
            if part.task(()) != CAUSAL or part.policy_temperature != 1.0 or part.taught:
                raise RecipeError(
                    f"{part.method_name()} is one of two objectives of a mixture",
                    allowed="objectives of a model that goes on with a text, at temperature 1 and without a teacher",
                )
        return self

    @property
    def needs(self) -> frozenset[str]:
        return self.said.needs | self.compared.needs

    @property
    def learner(self) -> RolloutLearner | None:
        return self.compared.learner

    @property
    def reference(self) -> bool:
        return self.said.reference or self.compared.reference

    def refers(self, tree: Tree) -> bool:
        return self._of(tree).refers(tree)

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        return (*(self.said.meanings or WORDS), *(self.compared.meanings or ()))

    def task(self, classes: tuple[str, ...]) -> Task:
        return CAUSAL

    def own(self, size: int, device: torch.device) -> list[Edit]:
        return [*self.said.own(size, device), *self.compared.own(size, device)]

    def with_vocabulary(self, vocabulary: Vocabulary) -> Self:
        parts = {name: getattr(self, name).with_vocabulary(vocabulary) for name in ("said", "compared")}
        return self.model_copy(update=parts)

    def remarks(self, rows: TrainingRows) -> list[str]:
        compared, imitated = rows.answered, rows.trained & ~rows.answered
        others = len(rows) - int(imitated.sum())
        told = self.compared.remarks(rows.of(compared)) if compared.any() else []
        if others in (0, len(rows)):
            idle, busy = ("said", "compared") if others else ("compared", "said")
            names = {"said": self.said.method_name(), "compared": self.compared.method_name()}
            told.append(
                f"of {len(rows):,} training rows {len(rows) - others:,} are conversations or texts and {others:,} "
                f"prompts with answers that were compared or judged: {idle} ({names[idle]}) has nothing to learn from; "
                f"add rows for it, or take the objective {names[busy]} alone"
            )
        return told

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        if view.answers is not None or not view.weights.any():
            # Answers to compare, or a prompt that is yet to be answered.
            return self.compared.trees(view, epoch=epoch)
        return [_weighing(tree, self.share) for tree in self.said.trees(view, epoch=epoch)]

    def probes(self, trees: Sequence[Tree]) -> list[Tree]:
        return self.compared.probes([tree for tree in trees if _is_compared(tree)])

    def informed(self, trees: Sequence[Tree], log_ratio: float) -> list[Tree]:
        told = iter(self.compared.informed([tree for tree in trees if _is_compared(tree)], log_ratio))
        return [next(told) if _is_compared(tree) else tree for tree in trees]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        total = torch.zeros((), device=outputs.log_probs.device)
        of_each = torch.zeros(len(forest.trees), device=total.device)
        metrics: dict[str, tuple[float, float]] = {}
        most: dict[str, float] = {}
        for name, part in (("said", self.said), ("compared", self.compared)):
            places = [place for place, tree in enumerate(forest.trees) if self._of(tree) is part]
            if not places:
                continue
            own, said = of_trees(forest, outputs, places)
            report = part.loss(said, own)
            total = total + report.sum
            of_each[places] = _by_tree(report, said, len(places))
            metrics |= {**report.metrics, f"{name}_loss": (float(report.sum.detach()), report.weight)}
            most |= report.most
        return LossReport(total, forest.weight, metrics, of_each, most)

    def _of(self, tree: Tree) -> Objective:
        """The objective that a tree is for."""
        return self.compared if _is_compared(tree) else self.said


def _is_compared(tree: Tree) -> bool:
    """Whether a tree is a prompt with answers; what is imitated is one segment."""
    return len(tree.segments) > 1


def _weighing(tree: Tree, share: float) -> Tree:
    """The tree with weights that add up to `share`."""
    if not (whole := tree.weight):
        return tree
    factor = np.float32(share / whole)
    return replace(tree, segments=tuple(replace(each, weights=each.weights * factor) for each in tree.segments))


def _by_tree(report: LossReport, outputs: TokenOutputs, trees: int) -> torch.Tensor:
    """The loss of each tree of a part."""
    if report.tree_losses is not None:
        return report.tree_losses.detach()
    losses = -(outputs.weights * outputs.log_probs.detach())
    return torch.zeros(trees, device=losses.device).index_add(0, outputs.trees.long(), losses)
