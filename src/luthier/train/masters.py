"""Masters: float32 copies of trained parameters, in which their gradients are added up and which the optimizer steps.

A parameter in float32 is its own master. With a lane to the host all masters lie there, with their gradients and what
the optimizer keeps, and the host's processor steps: the device holds the parameters, and of the gradients one that has
just come and one on its way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from luthier.kernels.lanes import Lane, Transfer
from luthier.kernels.sums import add_to


def master_of(parameter: nn.Parameter, lane: Lane | None = None) -> Tensor:
    """The float32 tensor that is stepped for a parameter: itself, or a copy; at the end of a lane always a copy."""
    own = parameter.detach()
    if lane is not None:
        return lane.room(own.shape, torch.float32).copy_(own)
    return parameter if parameter.dtype == torch.float32 else own.float().clone()


@final
class Gradients:
    """Adds up in float32, in their masters, the gradients of parameters that are not their own masters.

    At the end of a `lane` one is added up while the next is on its way.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masters: Mapping[str, Tensor], lane: Lane | None = None
    ) -> None:
        self._lane = lane
        self._coming: tuple[Tensor, Transfer] | None = None
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, masters[name]))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """At the end of this block all gradients that came within it are in the masters."""
        yield
        self._land()

    def forget(self) -> None:
        """What is on its way belongs to no step any more."""
        self._coming = None

    def _arrived(self, master: Tensor, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if self._lane is None:
            _add(master, gradient)
            return
        coming = self._lane.out(gradient)
        self._land()
        self._coming = (master, coming)

    def _land(self) -> None:
        if self._coming is not None:
            (master, coming), self._coming = self._coming, None
            _add(master, coming.on_host())


def _add(master: Tensor, gradient: Tensor) -> None:
    # Added up in float32, micro-batch by micro-batch: in bfloat16 the later ones would be rounded away.
    master.grad = gradient.float() if master.grad is None else add_to(master.grad, gradient)
