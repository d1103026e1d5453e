"""SFT: supervised fine-tuning on the answers of conversations.

Idea: raise the probability of each trained token given everything before it; prompts are context and carry no loss.
Equation: L = -sum_t w_t log p(x_t | x_{<t}) / sum_t w_t, over all trained tokens of the optimizer step.
Source: Ouyang et al., arXiv 2203.02155, section 3.5 (SFT); weights per token as in the data's own train_on and weight.
Cost: one forward and backward pass; the head is evaluated on trained tokens only.
Use when: there are good answers to imitate.
Not when: there are only judgements of answers (preferences, rewards), or plain text without answers (language_model).
"""

from __future__ import annotations

from typing import final

from luthier.core.errors import DataError
from luthier.data.forest import Forest, Tree, row_tree
from luthier.data.rendering.rendered import Rendered
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.objectives import Objective


@final
class SFT(Objective):
    """Cross-entropy on the trained tokens."""

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        if view.trained_count == 0:
            raise DataError(f"row {view.row} has no trained token", do="look at it with: luthier data show")
        return [row_tree(view.tokens, view.weights, row=view.row)]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        return LossReport(-(outputs.weights * outputs.log_probs).sum(), forest.weight)
