"""Steps in the backward pass: a tensor is stepped as soon as its gradient is whole, and the gradient is let go.

Idea: the gradients of all weights are as much memory as the weights in float32, and are only needed together for the
norm of all of them. Without clipping by that norm each tensor can be stepped when its own gradient has come, so that
only those of one layer exist at a time. The step is the same to the bit.
What it excludes: clipping by the norm of all gradients, and steps of several micro-batches, where a gradient is whole
only after the last of them. What cannot be undone: a gradient that is not finite is found when it comes, and the
tensors whose gradients came before it, those of the layers above, have been stepped by then. They keep their steps; it
and all that come after it are left as they are. A loss that is not finite stops the step before anything is stepped.
Source: PyTorch's post-accumulate-gradient hooks; Lv et al., arXiv 2306.09782 (LOMO); Zhao et al., arXiv 2403.03507,
    section 4.3 (per-layer weight updates).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from luthier.core.errors import RecipeError
from luthier.optimizers import Optimizer, PerTensor


@final
class InBackward:
    """Steps `masters` with `optimizer` as the gradients of `parameters` come; outside of a step they are dropped.

    `norms` are those of the gradients that came in a step, `bad` is the name of the first that is not finite, and
    `stepped` counts the tensors that were stepped. While it `rehearses` nothing is.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masters: Mapping[str, Tensor], optimizer: PerTensor
    ) -> None:
        self._masters = masters
        self._optimizer = optimizer
        self._steps = False
        self._scale = 0.0
        self._groups: Mapping[int, Mapping[str, Any]] = {}
        self.rehearses = False
        self.norms: dict[str, Tensor] = {}
        self.bad = ""
        self.stepped = 0
        self.before: list[Tensor] = []
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))

    @property
    def norm(self) -> float:
        """The norm of all gradients of the step."""
        return float(nn.utils.get_total_norm([self.norms[name] for name in self._masters if name in self.norms]))

    @contextmanager
    def step(self, before: list[Tensor]) -> Iterator[None]:
        """Within this block the backward pass is a step; `before` is what a watch has seen before it."""
        self.forget()
        self.before = before
        # Made anew each time: a checkpoint that is loaded brings groups of its own.
        self._groups = {id(each): group for group in self._optimizer.param_groups for each in group["params"]}
        self._steps = not self.rehearses
        try:
            yield
        finally:
            self._steps = False

    @contextmanager
    def divided(self, loss: float, weight: float) -> Iterator[None]:
        """Within this block the gradients that come are those of the sum `loss`, to be divided by its `weight`."""
        self._scale = 1.0 / weight if self._steps and weight > 0 and math.isfinite(loss) else 0.0
        try:
            yield
        finally:
            self._scale = 0.0

    def forget(self) -> None:
        """What came belongs to no step any more."""
        self.norms, self.bad, self.stepped, self.before = {}, "", 0, []

    def why(self, reason: str) -> str:
        """Why a step cannot be made again."""
        return f"{reason}; {self.stepped} of {len(self._masters)} tensors had been stepped in the backward pass"

    @torch.no_grad()
    def _arrived(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        # Nobody steps in a rehearsal, in a diagnosis, or behind a bad number.
        if gradient is None or not self._scale or self.bad:
            return
        if name in self.norms:
            raise RecipeError(
                f"the gradient of {name} came in two parts, and it was stepped after the first",
                do="set optimizer.per_layer to false",
            )
        master = self._masters[name]
        # Where masters lie with the host, it is the host that steps.
        whole = gradient.to(master.device, torch.float32).mul_(self._scale)
        self.norms[name] = norm = nn.utils.get_total_norm([whole])
        if not math.isfinite(float(norm)):
            self.bad = name
            return
        self._optimizer.update(master, whole, self._optimizer.state[master], self._groups[id(master)])
        if master is not parameter:
            parameter.copy_(master)
        self.stepped += 1


def in_backward(
    method: Optimizer,
    optimizer: TorchOptimizer,
    parameters: Mapping[str, nn.Parameter],
    masters: Mapping[str, Tensor],
    max_grad_norm: float | None,
) -> InBackward | None:
    """What steps in the backward pass, where the method wants that. Raises RecipeError for what it excludes."""
    if not method.steps_in_backward:
        return None
    require_no_clipping(method, max_grad_norm)
    if not isinstance(optimizer, PerTensor):
        raise RecipeError(f"{method.method_name()} steps all tensors at once", do="set optimizer.per_layer to false")
    return InBackward(parameters, masters, optimizer)


def require_no_clipping(method: Optimizer, max_grad_norm: float | None) -> None:
    """Raise RecipeError for a bound on the norm of all gradients: it is known when the last tensor has been stepped."""
    if max_grad_norm is not None:
        raise RecipeError(
            f"max_grad_norm is {max_grad_norm}, and {method.method_name()} steps each tensor in the backward pass, "
            "before the norm of all gradients is known",
            allowed="max_grad_norm: null",
            do="set max_grad_norm to null, or optimizer.per_layer to false",
        )


def cut(tokens: int, micro_tokens: int) -> RecipeError:
    """The error for a step that does not go through the model at once."""
    return RecipeError(
        f"a step of {tokens:,} tokens goes through the model in several micro-batches of {micro_tokens:,}, and the "
        "optimizer steps in the backward pass of each",
        allowed="steps of one micro-batch",
        do=f"set batch.micro_tokens to {tokens} or more, make steps smaller with batch.tokens, or set "
        "optimizer.per_layer to false",
    )
