"""Lanes between a device's memory and its host's: copies that run beside the work, and who has to wait for them.

Idea: a GPU copies and computes at once, as long as nobody reads what has not arrived. So a copy is begun, and whoever
needs it waits for that copy alone: the device's own queue, which costs the host no time, or the host. What is copied
stays alive until somebody has waited, so its memory cannot be given to somebody else under way.
On a CPU there is one memory. `PlainLane` copies within it, at once: for tests of all that uses lanes.
Cost: the bytes, at the rate of the link; host memory that is pinned, which the system cannot move or swap.
`StreamLane` is written against torch 2.13 and has not yet run on a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from jaxtyping import Shaped
from torch import Tensor


class Transfer(ABC):
    """A copy that has been begun. `tensor` is where it goes; it holds nothing before one of the waits."""

    def __init__(self, tensor: Shaped[Tensor, "*shape"]) -> None:
        self.tensor = tensor

    @abstractmethod
    def on_device(self) -> Shaped[Tensor, "*shape"]:
        """The tensor; what the device does from now on comes after the copy."""

    @abstractmethod
    def on_host(self) -> Shaped[Tensor, "*shape"]:
        """The tensor, when the copy is done."""


class Lane(ABC):
    """A way for tensors from one device to its host and back. Copies are made in the order in which they are begun."""

    @abstractmethod
    def room(self, shape: torch.Size, dtype: torch.dtype) -> Shaped[Tensor, "*shape"]:
        """Memory of the host that the device's copies reach; nothing is in it."""

    @abstractmethod
    def out(self, tensor: Shaped[Tensor, "*shape"]) -> Transfer:
        """Begin to copy a tensor of the device into new memory of the host."""

    @abstractmethod
    def back(self, tensor: Shaped[Tensor, "*shape"]) -> Transfer:
        """Begin to copy a tensor of the host, which may itself be under way, into new memory of the device."""


@final
class StreamLane(Lane):
    """A CUDA stream of its own: its copies wait for the work that was asked for before them, and for nothing else."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def room(self, shape: torch.Size, dtype: torch.dtype) -> Shaped[Tensor, "*shape"]:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def out(self, tensor: Shaped[Tensor, "*shape"]) -> Transfer:
        return self._begun(tensor.detach(), self.room(tensor.shape, tensor.dtype))

    def back(self, tensor: Shaped[Tensor, "*shape"]) -> Transfer:
        return self._begun(tensor, torch.empty_like(tensor, device=self._device))

    def _begun(self, source: Tensor, goal: Tensor) -> Transfer:
        # Also before a copy into new memory of the device: whoever had that memory before may still be at work.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            goal.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        return _Streamed(goal, source, done, self._device)


@final
class _Streamed(Transfer):
    def __init__(self, goal: Tensor, source: Tensor, done: torch.cuda.Event, device: torch.device) -> None:
        super().__init__(goal)
        self._source: Tensor | None = source
        self._done = done
        self._device = device

    def on_device(self) -> Shaped[Tensor, "*shape"]:
        torch.cuda.current_stream(self._device).wait_event(self._done)
        self._source = None
        return self.tensor

    def on_host(self) -> Shaped[Tensor, "*shape"]:
        self._done.synchronize()
        self._source = None
        return self.tensor


@final
class PlainLane(Lane):
    """Copies within the memory of a CPU, done when they are begun."""

    def room(self, shape: torch.Size, dtype: torch.dtype) -> Shaped[Tensor, "*shape"]:
        return torch.empty(shape, dtype=dtype)

    def out(self, tensor: Shaped[Tensor, "*shape"]) -> Transfer:
        return _Done(tensor.detach().clone())

    def back(self, tensor: Shaped[Tensor, "*shape"]) -> Transfer:
        return _Done(tensor.clone())


@final
class _Done(Transfer):
    def on_device(self) -> Shaped[Tensor, "*shape"]:
        return self.tensor

    def on_host(self) -> Shaped[Tensor, "*shape"]:
        return self.tensor
