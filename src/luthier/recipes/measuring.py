"""Measuring: the loss of a model over some trees, with all that the objective asks to be told, without gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from luthier.data.forest import Forest, Tree, pack
from luthier.model.language_model import LanguageModel
from luthier.objectives import Objective
from luthier.train.reference import ITSELF, Reference, looked_at, mean_log_ratio, noted


@dataclass(frozen=True)
class Measured:
    """The loss over some trees, the number of tokens that carried it, and an objective's own metrics."""

    loss: float
    tokens: int
    metrics: Mapping[str, float]

    def as_dict(self) -> dict[str, float]:
        """As plain values; instead of a perplexity, which says nothing of classes, their metrics."""
        return {"loss": self.loss, **(self.metrics or {"perplexity": math.exp(min(self.loss, 700.0))})}


def mean_loss(
    model: LanguageModel,
    objective: Objective,
    trees: Sequence[Tree],
    *,
    micro_tokens: int = 4096,
    reference: Reference = ITSELF,
) -> tuple[float, int]:
    """The loss over all trees, divided once by their weight, and the number of tokens that carried it."""
    found = measured(model, objective, trees, micro_tokens=micro_tokens, reference=reference)
    return found.loss, found.tokens


@torch.no_grad()
def measured(
    model: LanguageModel,
    objective: Objective,
    trees: Sequence[Tree],
    *,
    micro_tokens: int = 4096,
    reference: Reference = ITSELF,
) -> Measured:
    """The loss and the metrics over all trees, each divided once by its weight, with what the objective asks for.

    A `reference` is given where it is not the model with its adapter switched off.
    """
    model.train(False)
    heat = objective.policy_temperature
    if probes := objective.probes(trees):
        ratio = mean_log_ratio(model, _cut(probes, micro_tokens), temperature=heat, reference=reference)
        trees = objective.informed(trees, ratio)
    total = weight = 0.0
    tokens = 0
    sums: dict[str, tuple[float, float]] = {}
    for bare in _cut(trees, micro_tokens):
        forest = noted(model, bare, objective.refers, temperature=heat, reference=reference)
        outputs = looked_at(model, forest, objective.comparison, temperature=heat, reference=reference)
        report = objective.loss(outputs, forest)
        total += float(report.sum)
        weight += report.weight
        tokens += forest.trained_count
        for name, (one, of) in report.metrics.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + one, before[1] + of)
    metrics = {name: one / of for name, (one, of) in sums.items() if of}
    return Measured(total / weight if weight else math.nan, tokens, metrics)


def _cut(trees: Sequence[Tree], micro_tokens: int) -> list[Forest]:
    """Trees in micro-batches, as a run cuts them."""
    return pack(sorted(trees, key=lambda tree: -tree.token_count), max_tokens=micro_tokens)
