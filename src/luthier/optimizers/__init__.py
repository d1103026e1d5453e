"""Optimizers: from a gradient to a change of the parameters.

The contract: an optimizer builds a torch optimizer over float32 tensors (the loop keeps float32 masters of parameters
in a lower precision), and states how many bytes of state it keeps for tensors of given names and shapes, which is
tested. Some parameters may have a learning rate of their own, as a factor of the others': `set_factors` makes groups of
them in whatever was built, and `set_rate` sets the rate of each. `PerTensor` is for those that torch does not have;
they can also step in the backward pass, tensor by tensor (train/in_backward.py).
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

from luthier.core.knobs import Method

FACTOR: Final = "rate_factor"
"""What a group of a torch optimizer calls the factor of its learning rate; a group without it has one."""


class Optimizer(Method):
    """A way to step. Subclasses have a `learning_rate` knob, which schedules scale."""

    @property
    @abstractmethod
    def peak_learning_rate(self) -> float:
        """The learning rate that a schedule's factor 1 stands for."""

    @abstractmethod
    def build(self, parameters: Mapping[str, Tensor]) -> TorchOptimizer:
        """A torch optimizer over these float32 tensors, by name; the names decide about weight decay."""

    @abstractmethod
    def state_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of state that are kept for tensors of these names and shapes, master copies and counters left out."""

    def resident_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Of these, what takes memory of the device that trains, at the widest moment of a step."""
        return self.state_bytes(shapes)

    @property
    def steps_in_backward(self) -> bool:
        """Whether each tensor is stepped as soon as its gradient has come, so that the others' need not be there."""
        return False

    def update_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes at work in the update of one tensor beside its gradient, at most; it matters where activations are
        there meanwhile, in the backward pass."""
        return 8 * max(map(math.prod, shapes.values()), default=0)


class WithoutCompiler(TorchOptimizer):
    """A torch optimizer whose methods are called as they are.

    Torch keeps its compiler out of them by a decorator that first imports it, which takes longer than a first step.
    """

    add_param_group = inspect.unwrap(TorchOptimizer.add_param_group)
    zero_grad = inspect.unwrap(TorchOptimizer.zero_grad)
    state_dict = inspect.unwrap(TorchOptimizer.state_dict)
    load_state_dict = inspect.unwrap(TorchOptimizer.load_state_dict)


class PerTensor(WithoutCompiler, ABC):
    """A torch optimizer whose step looks at one tensor at a time."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every tensor that has a gradient. A closure is torch's way to compute the loss again; nobody does."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self.update(tensor, tensor.grad, self.state[tensor], group)

    @abstractmethod
    def update(
        self, tensor: Tensor, gradient: Tensor, state: MutableMapping[str, Any], group: Mapping[str, Any]
    ) -> None:
        """Step one tensor in place. `state` is saved in checkpoints: tensors of its own, numbers and texts."""


def decay_groups(parameters: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Groups in which matrices decay and vectors (norms, biases) never do."""
    groups = [
        {"params": [tensor for tensor in parameters.values() if tensor.ndim > 1], "weight_decay": weight_decay},
        {"params": [tensor for tensor in parameters.values() if tensor.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_factors(optimizer: TorchOptimizer, parameters: Mapping[str, Tensor], factors: Mapping[str, float]) -> None:
    """Divide the optimizer's groups, so that each holds parameters of one factor of the learning rate, by name."""
    by_tensor = {id(tensor): factors.get(name, 1.0) for name, tensor in parameters.items()}
    divided = []
    for group in optimizer.param_groups:
        own: dict[float, list[Tensor]] = {}
        for tensor in group["params"]:
            own.setdefault(by_tensor[id(tensor)], []).append(tensor)
        for factor, tensors in sorted(own.items()):
            divided.append({**group, "params": tensors, **({} if factor == 1.0 else {FACTOR: factor})})
    # The list itself stays: it is the optimizer's.
    optimizer.param_groups[:] = divided


def set_rate(optimizer: TorchOptimizer, rate: float) -> None:
    """Let the next step have this learning rate, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(FACTOR, 1.0)
