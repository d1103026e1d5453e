"""The stepper: forward and backward over trees, then one optimizer step.

`forward_backward` adds the gradient of the *sum* of losses and its weight; `optim_step` divides once by the weight of
everything since the last step, clips, and steps. So however a step is cut into micro-batches, the gradient is the same.
Parameters in a lower precision have float32 masters: gradients are added up in float32, the optimizer steps on the
masters, and the result is rounded once.
When memory runs out the step is done again, from its beginning, in micro-batches of half the size.
A loss or gradient that is not finite is never applied. An optimizer that steps in the backward pass (in_backward.py)
has stepped when `forward_backward` returns; `optim_step` then only tells of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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
from luthier.model.parts import Part, can_split
from luthier.objectives import Objective
from luthier.optimizers import Optimizer
from luthier.train.in_backward import InBackward, cut, in_backward
from luthier.train.masters import collect_in, master_of
from luthier.train.random_state import RandomState
from luthier.train.rounding import RoundingWatch
from luthier.train.shortage import Split, exhausted, release, shortage

Group = tuple[Tree, ...]
"""The trees of one call: they are cut into micro-batches together."""

NAMED_TENSORS = 8
"""How many tensors that are not finite a report names."""


@dataclass(frozen=True)
class PassReport:
    """What a forward (and backward) pass over some trees found: sums, not means.

    `splits` says how often micro-batches were made smaller on the way.
    """

    loss_sum: float
    weight: float
    tokens: int
    trained_tokens: int
    row_losses: dict[int, tuple[float, float]]
    splits: tuple[Split, ...] = ()

    @property
    def loss(self) -> float:
        """The mean loss over the weight; NaN when there is none, never 0."""
        return self.loss_sum / self.weight if self.weight else math.nan


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: the gradient norm before clipping, and whether the step was applied.

    `bad_tensors` names what is not finite: gradients of a step that was not applied, or, when `broken`, the weights
    that the step has made so. `rounded_away` is the share of updates that did not change the rounded weights, None
    where all trained weights are float32. `stepped_before` counts tensors that were stepped in the backward pass
    before a gradient came that is not finite.
    """

    grad_norm: float
    applied: bool
    bad_tensors: tuple[str, ...] = ()
    broken: bool = False
    rounded_away: float | None = None
    stepped_before: int = 0


@final
class Stepper:
    """Holds what a step needs: model, objective, masters and the torch optimizer.

    `micro_tokens` only ever becomes smaller. `first_groups` are the optimizer's groups as the recipe made them, and
    `planned_bytes` what a plan expects each part to need, for the error when memory is exhausted.
    """

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
        self.planned_bytes: Mapping[str, int] = {}
        self.parameters: dict[str, nn.Parameter] = attachment.named_parameters()
        if not self.parameters:
            raise RecipeError(f"the adapter {attachment.name!r} trains no parameter", do="choose targets or layers")
        self.masters: dict[str, Tensor] = {name: master_of(each) for name, each in self.parameters.items()}
        self.lower = {name: each for name, each in self.parameters.items() if self.masters[name] is not each}
        self.optimizer = optimizer.build(self.masters)
        self.in_backward = in_backward(optimizer, self.optimizer, self.parameters, self.masters, max_grad_norm)
        for name, parameter in self.lower.items() if self.in_backward is None else ():
            collect_in(self.masters[name], parameter)
        self.first_groups = [{**group, "params": []} for group in self.optimizer.param_groups]
        self.pending_weight = 0.0
        self._factor = 1.0
        self.began = RandomState.now(model.device)
        self._groups: list[Group] = []
        self._running: Tree | None = None
        self._watch = RoundingWatch(self.masters, self.lower)

    def set_rate(self, factor: float) -> None:
        """Step at `factor` times the peak learning rate; what steps in the backward pass must know it before that."""
        self._factor = factor
        for group in self.optimizer.param_groups:
            group["lr"] = self.method.peak_learning_rate * factor

    def forward_backward(self, trees: Sequence[Tree]) -> PassReport:
        """Add the gradient of the summed loss over `trees`; nothing is stepped.

        When memory runs out, everything since the last optimizer step is done again in smaller micro-batches. Raises
        MemoryExhaustedError when there are no smaller ones.
        """
        self.model.train()
        if not self._groups:
            self.began = RandomState.now(self.model.device)
        todo, splits = [tuple(trees)], list[Split]()
        with self._step_or_gather(trees):
            while (found := self._attempt(self._add_gradients, todo, splits, in_parts=True)) is None:
                # A backward pass that failed midway has left part of its gradient behind: all of it is made again, with
                # the random numbers of the first attempt.
                self._clear_gradients()
                self.began.restore()
                todo = [*self._groups, tuple(trees)]
        self._groups.append(tuple(trees))
        report = found[-1]
        self.pending_weight += report.weight
        return _with_splits(report, splits)

    @torch.no_grad()
    def evaluate(self, trees: Sequence[Tree]) -> PassReport:
        """The loss over `trees`, without dropout and without gradients. Memory may run out as in a step."""
        self.model.train(False)
        splits: list[Split] = []
        while (found := self._attempt(self._losses, [tuple(trees)], splits, in_parts=False)) is None:
            pass
        return _with_splits(found[-1], splits)

    @torch.no_grad()
    def optim_step(self, *, factor: float = 1.0) -> StepReport:
        """Divide by the accumulated weight, clip, and step at `factor` times the peak learning rate.

        A gradient norm that is not finite is reported and not applied; the gradients are cleared either way.
        """
        if self.in_backward is not None:
            return self._stepped(self.in_backward, factor)
        gradients = {name: master.grad for name, master in self.masters.items() if master.grad is not None}
        if not gradients or self.pending_weight <= 0:
            raise RecipeError("optim_step was called without a gradient", do="call forward_backward first")
        torch._foreach_mul_(list(gradients.values()), 1.0 / self.pending_weight)
        norm = float(nn.utils.get_total_norm(list(gradients.values())))
        if not math.isfinite(norm):
            bad = not_finite(gradients)
            self.zero_grad()
            return StepReport(norm, False, bad)
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            torch._foreach_mul_(list(gradients.values()), self.max_grad_norm / norm)
        self.set_rate(factor)
        before = self._watch.look()
        self._step()
        for name, parameter in self.lower.items():
            parameter.copy_(self.masters[name])
        self.zero_grad()
        # The weights themselves: a master that is finite may still be too large for its rounded copy.
        bad = not_finite(self.parameters)
        return StepReport(norm, True, bad, bool(bad), self._watch.rounded_away(before) if before else None)

    def zero_grad(self) -> None:
        """Forget all gradients and the weight and the trees they belong to."""
        self._clear_gradients()
        self.pending_weight = 0.0
        self._groups = []
        if self.in_backward is not None:
            self.in_backward.forget()

    def micro_batches(self, trees: Iterable[Tree], *, micro_tokens: int | None = None) -> list[Forest]:
        """Trees in micro-batches. Longest first: equal ones then share an attention call, and memory peaks at once."""
        ordered = sorted(trees, key=lambda tree: tree.token_count, reverse=True)
        return pack(ordered, max_tokens=self.micro_tokens if micro_tokens is None else micro_tokens)

    def passes(self, forest: Forest) -> Iterator[Part]:
        """Run one micro-batch forward and backward, in parts when it is one tree that is too large."""
        if self._can_run_in_parts(forest) and forest.token_count > self.micro_tokens:
            yield from self.model.backward_in_parts(forest.trees[0], self.objective.loss, max_tokens=self.micro_tokens)
            return
        outputs = self.model.token_outputs(forest)
        report = self.objective.loss(outputs, forest)
        steps = self.in_backward
        with nullcontext() if steps is None else steps.divided(float(report.sum.detach()), report.weight):
            report.sum.backward()
        yield forest, outputs, report

    def _step_or_gather(self, trees: Sequence[Tree]) -> AbstractContextManager[None]:
        """Where gradients are only added up there is nothing to do; else these trees are a step, if they can be one."""
        if self.in_backward is None:
            return nullcontext()
        if self._groups:
            raise RecipeError(
                "a second pass for one step, whose tensors the first one has stepped",
                allowed="one forward_backward a step",
                do="call optim_step after each pass, or set optimizer.per_layer to false",
            )
        if (tokens := sum(tree.token_count for tree in trees)) > self.micro_tokens:
            raise cut(tokens, self.micro_tokens)
        return self.in_backward.step(self._watch.look())

    def _stepped(self, steps: InBackward, factor: float) -> StepReport:
        """What the backward pass has stepped."""
        if not steps.norms:
            raise RecipeError("optim_step was called without a gradient", do="call forward_backward first")
        if factor != self._factor:
            raise RecipeError(
                f"optim_step at {factor} times the learning rate, after steps at {self._factor} times it",
                do="call set_rate before forward_backward",
            )
        norm, bad, stepped, before = steps.norm, steps.bad, steps.stepped, steps.before
        self.zero_grad()
        if bad:
            return StepReport(norm, False, (bad,), stepped_before=stepped)
        broken = not_finite(self.parameters)
        return StepReport(norm, True, broken, bool(broken), self._watch.rounded_away(before) if before else None)

    def _attempt(
        self,
        run: Callable[[Sequence[Tree]], PassReport],
        groups: Sequence[Group],
        splits: list[Split],
        *,
        in_parts: bool,
    ) -> list[PassReport] | None:
        """What `run` finds for each group; None when memory ran out, after choosing a smaller micro-batch."""
        try:
            return [run(trees) for trees in groups]
        except (MemoryError, RuntimeError) as failure:
            reason = shortage(failure)
            if reason is None:
                raise
        # Only here, where the exception is gone, is the memory that its frames held free again.
        release(self.model.device)
        splits.append(self._halve(groups, reason, in_parts=in_parts))
        return None

    def _add_gradients(self, trees: Sequence[Tree]) -> PassReport:
        reports = []
        for forest in self._one_by_one(trees):
            found = [_report(float(loss.sum.detach()), loss.weight, 0, outputs)
                     for _, outputs, loss in self.passes(forest)]  # fmt: skip
            reports += [*found, PassReport(0.0, 0.0, forest.token_count, 0, {})]
        return add_up(reports)

    def _losses(self, trees: Sequence[Tree]) -> PassReport:
        reports = []
        for forest in self._one_by_one(trees):
            outputs = self.model.token_outputs(forest)
            report = self.objective.loss(outputs, forest)
            reports.append(_report(float(report.sum), report.weight, forest.token_count, outputs))
        return add_up(reports)

    def _one_by_one(self, trees: Sequence[Tree]) -> Iterator[Forest]:
        for forest in self.micro_batches(trees):
            # Should it be the one that does not fit, an error can name it.
            self._running = forest.trees[0]
            yield forest

    def _halve(self, groups: Sequence[Group], reason: str, *, in_parts: bool) -> Split:
        """Halve `micro_tokens`, until some micro-batch becomes smaller. Raises MemoryExhaustedError when none can."""
        now = self._cut(groups, self.micro_tokens, in_parts)
        if in_parts and self.in_backward is not None:
            raise exhausted(self._running, self.in_backward.why(reason), self.planned_bytes)
        if now == self._cut(groups, 1, in_parts):
            self.zero_grad()
            raise exhausted(self._running, reason, self.planned_bytes)
        smaller = self.micro_tokens // 2
        while self._cut(groups, smaller, in_parts) == now:
            smaller //= 2
        split = Split(self.micro_tokens, smaller, reason)
        self.micro_tokens = smaller
        return split

    def _cut(self, groups: Sequence[Group], micro_tokens: int, in_parts: bool) -> list[tuple[int, int]]:
        """How groups are cut at a size: for each micro-batch its trees, and its tokens or those of its parts."""
        found = []
        for trees in groups:
            for forest in self.micro_batches(trees, micro_tokens=micro_tokens):
                tokens = forest.token_count
                parts = in_parts and self._can_run_in_parts(forest)
                found.append((len(forest.trees), min(micro_tokens, tokens) if parts else tokens))
        return found

    def _can_run_in_parts(self, forest: Forest) -> bool:
        """Whether this micro-batch is one tree that may be cut at its root."""
        possible = self.model.executor.kind == "segments" and self.objective.separable
        return possible and len(forest.trees) == 1 and can_split(forest.trees[0])

    def _step(self) -> None:
        """Step. The optimizer makes its state at the first one, and no smaller micro-batch would help with that."""
        try:
            self.optimizer.step()
        except (MemoryError, RuntimeError) as failure:
            reason = shortage(failure)
            if reason is None:
                raise
            raise exhausted(None, f"in the optimizer's step: {reason}", self.planned_bytes) from failure

    def _clear_gradients(self) -> None:
        for name, master in self.masters.items():
            master.grad = None
            # Not yet added to its master when a backward pass failed midway.
            self.parameters[name].grad = None


def not_finite(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of tensors that hold NaN or infinity, the first few of them. One pass, one transfer for each dtype."""
    by_dtype: dict[torch.dtype, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            by_dtype.setdefault(tensor.dtype, {})[name] = tensor
    bad: set[str] = set()
    for same in by_dtype.values():
        # Both ends of the range, which NaN spreads to: torch's norm of infinite order is slow on a CPU.
        ends = torch.stack([end for tensor in same.values() for end in tensor.detach().aminmax()])
        fine = torch.isfinite(ends).view(-1, 2).all(1).tolist()
        bad.update(name for name, is_fine in zip(same, fine, strict=True) if not is_fine)
    return tuple(name for name in tensors if name in bad)[:NAMED_TENSORS]


def add_up(reports: Sequence[PassReport]) -> PassReport:
    """The report of all passes together."""
    rows: dict[int, tuple[float, float]] = {}
    for report in reports:
        for row, (loss, weight) in report.row_losses.items():
            before = rows.get(row, (0.0, 0.0))
            rows[row] = (before[0] + loss, before[1] + weight)
    return PassReport(
        loss_sum=_sum([report.loss_sum for report in reports]),
        weight=math.fsum(report.weight for report in reports),
        tokens=sum(report.tokens for report in reports),
        trained_tokens=sum(report.trained_tokens for report in reports),
        row_losses=rows,
        splits=tuple(split for report in reports for split in report.splits),
    )


def _with_splits(report: PassReport, splits: Sequence[Split]) -> PassReport:
    return replace(report, splits=tuple(splits))


def _report(loss_sum: float, weight: float, tokens: int, outputs: TokenOutputs) -> PassReport:
    rows = outputs.rows.cpu().numpy()
    weights = outputs.weights.cpu().numpy().astype(np.float64)
    losses = -outputs.log_probs.detach().cpu().numpy().astype(np.float64) * weights
    return PassReport(loss_sum, weight, tokens, len(rows), _by_row(rows, losses, weights))


def _sum(losses: Sequence[float]) -> float:
    # fsum refuses infinities of both signs; a plain sum makes NaN of them, which is what they are.
    return math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses)


def _by_row(
    rows: NDArray[np.int64], losses: NDArray[np.float64], weights: NDArray[np.float64]
) -> dict[int, tuple[float, float]]:
    unique, inverse = np.unique(rows, return_inverse=True)
    loss_sums = np.bincount(inverse, losses, minlength=len(unique))
    weight_sums = np.bincount(inverse, weights, minlength=len(unique))
    return {
        int(row): (float(loss), float(weight)) for row, loss, weight in zip(unique, loss_sums, weight_sums, strict=True)
    }
