"""Language modelling: every token of a text is predicted, for continued pre-training.

Idea: raise the probability of plain text, token by token. Conversations are taken as text too: all their tokens carry
loss, whatever their role.
Equation: L = -sum_t log p(x_t | x_{<t}) / T, over all tokens but the first of each piece.
Source: Radford et al., Improving Language Understanding by Generative Pre-Training (2018), equation 1.
Cost: one forward and backward pass; the head is evaluated on every token.
Use when: the model shall learn a domain's text, or a base is grown from nothing.
Not when: it shall learn to answer; then sft trains the answers only.
"""

from __future__ import annotations

from typing import final

import numpy as np

from luthier.data.forest import Forest, Tree, row_tree
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.objectives import Objective

TEXT = TOKEN_ROLES.index("text")


@final
class LanguageModelling(Objective):
    """Cross-entropy on all tokens."""

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        # A long text comes in pieces that overlap by their first token, and its weights already say so.
        weights = view.weights if TEXT in view.roles else np.ones(len(view.tokens), dtype=np.float32)
        return [row_tree(view.tokens, weights, row=view.row)]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        return LossReport(-(outputs.weights * outputs.log_probs).sum(), forest.weight)
