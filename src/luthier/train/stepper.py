"""The stepper: forward and backward over trees, then one optimizer step.

`forward_backward` adds the gradient of the *sum* of losses and its weight; `optim_step` divides once by the weight of
everything since the last step, clips, and steps. So however a step is cut into micro-batches, the gradient is the same.
Parameters in a lower precision have float32 masters: gradients are added up in float32, the optimizer steps on the
masters, and the result is rounded once.
A loss or gradient that is not finite is never applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Tree, pack
from luthier.model.attachment import Attachment
from luthier.model.language_model import LanguageModel
from luthier.model.outputs import TokenOutputs
from luthier.model.parts import can_split
from luthier.objectives import Objective
from luthier.optimizers import Optimizer


@dataclass(frozen=True)
class PassReport:
    """What a forward (and backward) pass over some trees found: sums, not means."""

    loss_sum: float
    weight: float
    tokens: int
    trained_tokens: int
    row_losses: dict[int, tuple[float, float]]

    @property
    def loss(self) -> float:
        """The mean loss over the weight; NaN when there is none, never 0."""
        return self.loss_sum / self.weight if self.weight else math.nan


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: the gradient norm before clipping, and whether the step was applied."""

    grad_norm: float
    applied: bool


@final
class Stepper:
    """Holds what a step needs: model, objective, masters and the torch optimizer."""

    def __init__(
        self,
        model: LanguageModel,
        attachment: Attachment,
        objective: Objective,
        optimizer: Optimizer,
        *,
        max_grad_norm: float | None = 1.0,
        micro_tokens: int = 4096,
    ) -> None:
        self.model = model
        self.objective = objective
        self.method = optimizer
        self.max_grad_norm = max_grad_norm
        self.micro_tokens = micro_tokens
        self.parameters: dict[str, nn.Parameter] = attachment.named_parameters()
        if not self.parameters:
            raise RecipeError(f"the adapter {attachment.name!r} trains no parameter", do="choose targets or layers")
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            self.masters[name] = parameter if parameter.dtype == torch.float32 else self._master(parameter)
        self.optimizer = optimizer.build(self.masters)
        self.pending_weight = 0.0

    def forward_backward(self, trees: Sequence[Tree]) -> PassReport:
        """Add the gradient of the summed loss over `trees`; nothing is stepped."""
        self.model.train()
        reports = []
        for forest in self._forests(trees):
            if self._runs_in_parts(forest):
                parts = self.model.backward_in_parts(
                    forest.trees[0], self.objective.loss, max_tokens=self.micro_tokens
                )
                found = [_report(float(loss.sum.detach()), loss.weight, 0, outputs) for _, outputs, loss in parts]
                reports += [*found, PassReport(0.0, 0.0, forest.token_count, 0, {})]
                continue
            outputs = self.model.token_outputs(forest)
            report = self.objective.loss(outputs, forest)
            report.sum.backward()
            reports.append(_report(float(report.sum.detach()), report.weight, forest.token_count, outputs))
        total = add_up(reports)
        self.pending_weight += total.weight
        return total

    @torch.no_grad()
    def evaluate(self, trees: Sequence[Tree]) -> PassReport:
        """The loss over `trees`, without dropout and without gradients."""
        self.model.train(False)
        reports = []
        for forest in self._forests(trees):
            outputs = self.model.token_outputs(forest)
            report = self.objective.loss(outputs, forest)
            reports.append(_report(float(report.sum), report.weight, forest.token_count, outputs))
        return add_up(reports)

    @torch.no_grad()
    def optim_step(self, *, factor: float = 1.0) -> StepReport:
        """Divide by the accumulated weight, clip, and step at `factor` times the peak learning rate.

        A gradient norm that is not finite is reported and not applied; the gradients are cleared either way.
        """
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        if not gradients or self.pending_weight <= 0:
            raise RecipeError("optim_step was called without a gradient", do="call forward_backward first")
        torch._foreach_mul_(gradients, 1.0 / self.pending_weight)
        norm = float(nn.utils.get_total_norm(gradients))
        applied = math.isfinite(norm)
        if applied:
            if self.max_grad_norm is not None and norm > self.max_grad_norm:
                torch._foreach_mul_(gradients, self.max_grad_norm / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = self.method.peak_learning_rate * factor
            self.optimizer.step()
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])
        self.zero_grad()
        return StepReport(norm, applied)

    def zero_grad(self) -> None:
        """Forget all gradients and the weight they belong to."""
        for master in self.masters.values():
            master.grad = None
        self.pending_weight = 0.0

    def _runs_in_parts(self, forest: Forest) -> bool:
        """Whether this micro-batch is one tree that is too large, and may be cut at its root."""
        too_large = len(forest.trees) == 1 and forest.token_count > self.micro_tokens
        possible = self.model.executor.kind == "segments" and self.objective.separable
        return too_large and possible and can_split(forest.trees[0])

    def _forests(self, trees: Sequence[Tree]) -> list[Forest]:
        """Micro-batches. Longest trees first: equal ones then share an attention call, and memory peaks at once."""
        ordered = sorted(trees, key=lambda tree: tree.token_count, reverse=True)
        return pack(ordered, max_tokens=self.micro_tokens)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        master = parameter.detach().float().clone()

        def collect(low: Tensor) -> None:
            # Added up in float32, micro-batch by micro-batch: in bfloat16 the later ones would be rounded away.
            if low.grad is not None:
                high = low.grad.float()
                master.grad = high if master.grad is None else master.grad.add_(high)
                low.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
        return master


def add_up(reports: Sequence[PassReport]) -> PassReport:
    """The report of all passes together."""
    rows: dict[int, tuple[float, float]] = {}
    for report in reports:
        for row, (loss, weight) in report.row_losses.items():
            before = rows.get(row, (0.0, 0.0))
            rows[row] = (before[0] + loss, before[1] + weight)
    return PassReport(
        loss_sum=math.fsum(report.loss_sum for report in reports),
        weight=math.fsum(report.weight for report in reports),
        tokens=sum(report.tokens for report in reports),
        trained_tokens=sum(report.trained_tokens for report in reports),
        row_losses=rows,
    )


def _report(loss_sum: float, weight: float, tokens: int, outputs: TokenOutputs) -> PassReport:
    rows = outputs.rows.cpu().numpy()
    weights = outputs.weights.cpu().numpy().astype(np.float64)
    losses = -outputs.log_probs.detach().cpu().numpy().astype(np.float64) * weights
    return PassReport(loss_sum, weight, tokens, len(rows), _by_row(rows, losses, weights))


def _by_row(
    rows: NDArray[np.int64], losses: NDArray[np.float64], weights: NDArray[np.float64]
) -> dict[int, tuple[float, float]]:
    unique, inverse = np.unique(rows, return_inverse=True)
    loss_sums = np.bincount(inverse, losses, minlength=len(unique))
    weight_sums = np.bincount(inverse, weights, minlength=len(unique))
    return {
        int(row): (float(loss), float(weight))
        for row, loss, weight in zip(unique, loss_sums, weight_sums, strict=True)
    }
