"""KTO: Kahneman-Tversky optimisation, a policy learned from answers that were judged one by one.

Idea: people weigh gains and losses from a point of reference, and with less and less feeling the further away they are.
An answer's gain is how much likelier the policy finds it than the reference does, and the point is how much likelier it
finds any answer: the KL between the two, estimated on answers to other prompts of the same step. A good answer shall be
above the point and a bad one below it.
Equation: r = log pi(y|x) - log ref(y|x); z = max(0, mean over the step of r(x_i, y_{i+1})), without gradient;
    L = w_good (1 - sigmoid(beta (r - z))) for a good answer, w_bad (1 - sigmoid(beta (z - r))) for a bad one.
Source: Ethayarajh et al., arXiv 2402.01306, equations 7 and 8, and its appendix A on the estimate.
Cost: a forward and backward pass over prompt and answer, one forward pass of the reference, and, for the point, a
    forward pass of policy and reference over prompts with each other's answers.
Use when: there are thumbs up and down, and no two answers to one prompt; also when most of them are of one kind.
Not when: answers were compared in pairs (dpo), which says more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, final

import numpy as np
import torch
from pydantic import Field

from luthier.data.conversation import Meaning
from luthier.data.forest import Forest, Segment, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.data.training_rows import TrainingRows
from luthier.maths.preferences import kto_losses
from luthier.model.compared import Answers, compared_tree, is_good
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.objectives import Objective

GOOD, BAD = 1.0, 0.0


@final
class KTO(Objective):
    """Gains of good answers and losses of bad ones, seen from a point of reference."""

    separable: ClassVar[bool] = False

    beta: float = Field(0.1, gt=0, description="how quickly feeling for gains and losses fades")
    good: float = Field(1.0, ge=0, description="factor of the loss of good answers (lambda_D)")
    bad: float = Field(1.0, ge=0, description="factor of the loss of bad answers (lambda_U)")

    @property
    def reference(self) -> bool:
        return True

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        return ("judged",)

    def remarks(self, rows: TrainingRows) -> list[str]:
        told, bad = [], int(rows.wrong.sum())
        if len(rows) and bad in (0, len(rows)):
            one, other = ("bad", "good") if bad else ("good", "bad")
            told.append(
                f"all {len(rows):,} judged training rows are {one} answers, and none is {other}: whatever is said "
                f"becomes {'un' if bad else ''}likelier, with nothing to tell apart; add {other} answers"
                + ("" if bad else ", or imitate these with objective sft")
            )
        if rows.step_rows == 1:
            told.append(
                "batch.rows is 1, and the point of reference is found on the other answers of a step, so that it stays "
                "0: set batch.rows to 8 or more"
            )
        return told

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        tree = compared_tree(view)
        mark = np.full(len(tree.segments[1].tokens), GOOD if is_good(view) else BAD, dtype=np.float32)
        leaf = replace(tree.segments[1], notes={"return": mark})
        return [replace(tree, segments=(tree.segments[0], leaf))]

    def probes(self, trees: Sequence[Tree]) -> list[Tree]:
        """Each prompt with the answer to the next one, as far as it is no longer than the longest of the step."""
        if len(trees) < 2:
            return []
        room = max(tree.token_count for tree in trees)
        following = [*trees[1:], trees[0]]
        return [
            replace(one, segments=(one.segments[0], _cut(two.segments[1], room - len(one.segments[0].tokens))))
            for one, two in zip(trees, following, strict=True)
        ]

    def informed(self, trees: Sequence[Tree], log_ratio: float) -> list[Tree]:
        """The trees with their point of reference, the note "value"."""
        point = max(0.0, log_ratio)
        return [replace(tree, segments=(tree.segments[0], _noted(tree.segments[1], point))) for tree in trees]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        answers = Answers.of(outputs, forest)
        ratios = answers.sums(outputs.log_probs - outputs.notes["reference"])
        good = answers.means(outputs.notes["return"]) > (GOOD + BAD) / 2
        # A micro-batch that is rehearsed by itself belongs to no step, and has no point.
        point = answers.means(outputs.notes["value"]) if "value" in outputs.notes else torch.zeros_like(ratios)
        losses = kto_losses(ratios, good, beta=self.beta, point=point, desirable=self.good, undesirable=self.bad)
        of_trees = answers.by_tree(losses, answers.tree)
        return LossReport(of_trees.sum(), forest.weight, self._metrics(answers, outputs, ratios, good, point), of_trees)

    def _metrics(
        self, answers: Answers, outputs: TokenOutputs, ratios: torch.Tensor, good: torch.Tensor, point: torch.Tensor
    ) -> dict[str, tuple[float, float]]:
        reward, log_probs = self.beta * ratios.detach(), answers.means(outputs.log_probs.detach())
        total = float(len(good))
        found = {"kl": (float(point.sum()), total), "accuracy": (float(((ratios > point) == good).sum()), total)}
        for name, kind in (("good", good), ("bad", ~good)):
            count = float(kind.sum())
            found[f"{name}_reward"] = (float(reward[kind].sum()), count)
            found[f"{name}_log_prob"] = (float(log_probs[kind].sum()), count)
        return found


def _cut(leaf: Segment, room: int) -> Segment:
    """The first `room` tokens of an answer."""
    tokens, weights = leaf.tokens[:room], leaf.weights[:room]
    return Segment(tokens, weights if weights.any() else np.ones_like(weights), leaf.parent)


def _noted(leaf: Segment, point: float) -> Segment:
    return replace(leaf, notes={**(leaf.notes or {}), "value": np.full(len(leaf.tokens), point, dtype=np.float32)})
