"""The stepper: forward and backward over trees, then one optimizer step.

`forward_backward` (done in batcher.py) adds the gradient of the *sum* of losses and its weight; `optim_step` divides
once by the weight of everything since the last step, clips, and steps. So however a step is cut into micro-batches, the
gradient is the same.
Parameters in a lower precision have float32 masters: gradients are added up in float32, the optimizer steps on the
masters, and the result is rounded once.
A loss or gradient that is not finite is never applied. An optimizer that steps in the backward pass (in_backward.py)
has stepped when `forward_backward` returns; `optim_step` then only tells of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Tree
from luthier.kernels.lanes import Lane
from luthier.model.editing.attachment import Attachment
from luthier.model.language_model import LanguageModel
from luthier.model.running.parts import Part
from luthier.objectives import Objective
from luthier.optimizers import Optimizer, set_factors, set_rate
from luthier.train.batcher import Batcher
from luthier.train.in_backward import InBackward, cut, in_backward
from luthier.train.masters import Gradients, master_of
from luthier.train.pass_report import PassReport
from luthier.train.random_state import RandomState
from luthier.train.rounding import RoundingWatch
from luthier.train.shortage import exhausted, shortage

NAMED_TENSORS = 8
"""How many tensors that are not finite a report names."""


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

    `first_groups` are the optimizer's groups as the recipe made them. With a `batcher` it is one of several learners,
    whose trees go through the model together, and goes by the name of its attachment. With a `lane` the host
    steps: masters, gradients and what the optimizer keeps lie at its end.
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
        batcher: Batcher | None = None,
        lane: Lane | None = None,
    ) -> None:
        self.model = model
        self.batcher = Batcher(model, micro_tokens=micro_tokens) if batcher is None else batcher
        self.name = "" if batcher is None else attachment.name
        self.objective = objective
        self.method = optimizer
        self.max_grad_norm = max_grad_norm
        self.parameters: dict[str, nn.Parameter] = attachment.named_parameters()
        if not self.parameters:
            raise RecipeError(f"the adapter {attachment.name!r} trains no parameter", do="choose targets or layers")
        self.constants: dict[str, Tensor] = attachment.named_constants()
        self.masters: dict[str, Tensor] = {name: master_of(each, lane) for name, each in self.parameters.items()}
        self.copies = {name: each for name, each in self.parameters.items() if self.masters[name] is not each}
        self.optimizer = optimizer.build(self.masters)
        set_factors(self.optimizer, self.masters, attachment.rate_factors())
        self.in_backward = in_backward(optimizer, self.optimizer, self.parameters, self.masters, max_grad_norm)
        self.gradients = Gradients({} if self.in_backward is not None else self.copies, self.masters, lane)
        self.first_groups = [{**group, "params": []} for group in self.optimizer.param_groups]
        self.pending_weight = 0.0
        self._factor = 1.0
        lower = {name: each for name, each in self.copies.items() if each.dtype != torch.float32}
        self._watch = RoundingWatch(self.masters, lower)
        self.batcher.join(self.name, self)

    @property
    def micro_tokens(self) -> int:
        """Tokens that go through the model at once; see `Batcher`."""
        return self.batcher.micro_tokens

    @micro_tokens.setter
    def micro_tokens(self, count: int) -> None:
        self.batcher.micro_tokens = count

    @property
    def planned_bytes(self) -> Mapping[str, int]:
        """What a plan expects each part to need."""
        return self.batcher.planned_bytes

    @planned_bytes.setter
    def planned_bytes(self, planned: Mapping[str, int]) -> None:
        self.batcher.planned_bytes = planned

    @property
    def began(self) -> RandomState:
        """The random numbers that the step at hand began with."""
        return self.batcher.began

    def set_rate(self, factor: float) -> None:
        """Step at `factor` times the peak learning rate; what steps in the backward pass must know it before that."""
        self._factor = factor
        set_rate(self.optimizer, self.method.peak_learning_rate * factor)

    def forward_backward(self, trees: Sequence[Tree]) -> PassReport:
        """Add the gradient of the summed loss over `trees`; nothing is stepped. See `Batcher.forward_backward`."""
        return self.batcher.forward_backward({self.name: trees})[self.name]

    def evaluate(self, trees: Sequence[Tree]) -> PassReport:
        """The loss over `trees`, without dropout and without gradients. Memory may run out as in a step."""
        return self.batcher.evaluate({self.name: trees})[self.name]

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
        for name, parameter in self.copies.items():
            # The host goes on meanwhile; it comes back to a master after the next gradients, which come after this.
            parameter.copy_(self.masters[name], non_blocking=True)
        self.zero_grad()
        # The weights themselves: a master that is finite may still be too large for its rounded copy.
        bad = not_finite(self.parameters)
        return StepReport(norm, True, bad, bool(bad), self._watch.rounded_away(before) if before else None)

    def zero_grad(self) -> None:
        """Forget all gradients and the weight and the trees they belong to."""
        self.clear_gradients()
        self.pending_weight = 0.0
        self.batcher.forget(self.name)
        if self.in_backward is not None:
            self.in_backward.forget()

    def clear_gradients(self) -> None:
        """Forget all gradients, and nothing else."""
        self.gradients.forget()
        for name, master in self.masters.items():
            master.grad = None
            # Not yet added to its master when a backward pass failed midway.
            self.parameters[name].grad = None

    def micro_batches(self, trees: Iterable[Tree]) -> list[Forest]:
        """Trees as this learner's, in micro-batches."""
        return self.batcher.micro_batches(self.batcher.named(self.name, trees))

    def passes(self, forest: Forest) -> Iterator[Part]:
        """Run one micro-batch forward and backward, in parts when it is one tree that is too large."""
        with self.gradients.gathered():
            for _, part in self.batcher.run(forest):
                yield part

    def step_or_gather(self, trees: Sequence[Tree], *, begun: bool) -> AbstractContextManager[None]:
        """Where gradients are only added up, all are there in the end; else these trees are a step, if they can be one.

        `begun` says that others belong to the same step.
        """
        if self.in_backward is None:
            return self.gradients.gathered()
        if begun:
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

    def _step(self) -> None:
        """Step. The optimizer makes its state at the first one, and no smaller micro-batch would help with that."""
        try:
            self.optimizer.step()
        except (MemoryError, RuntimeError) as failure:
            reason = shortage(failure)
            if reason is None:
                raise
            raise exhausted(None, f"in the optimizer's step: {reason}", self.planned_bytes) from failure


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
