"""A model without memory: the sites, edits and sizes that its weights would have, on torch's meta device.

Idea: everything a plan asks of a model (its sites, what an adapter trains there, which of our operations would run its
blocks) is told by its modules, and none of it by a number in its weights. So one model serves plans and runs, and a
plan for 70 billion parameters takes the memory of a plan for a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from luthier.kernels.chosen import planned_backend
from luthier.kernels.wanted import wanted_kernels
from luthier.model.attending import attention
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import Edit
from luthier.model.editing.sites import Sites
from luthier.model.files.weights import fresh_module
from luthier.model.language_model import LanguageModel
from luthier.model.tasks import CAUSAL
from luthier.model.zoo import ZooConfig

_FEW: Final = 2**20
"""Permutations of so few are made: a prompt starts from the rows that one names."""


def empty_model(config: ZooConfig, source: str, *, dtype: torch.dtype, device: str) -> LanguageModel:
    """The model of a config as it would run on a kind of device, "cpu" or "cuda", which need not be here."""
    attention.register()
    with torch.device("meta"):
        module = fresh_module(config, dtype, 0, source, task=CAUSAL).module
    model = LanguageModel(module, source=source, digest="", kernels=wanted_kernels())
    backend = planned_backend(wanted_kernels(), device, dtype)
    blocks = model.executor.blocks
    blocks = None if blocks is None else replace(blocks, backend=backend)
    model.executor = replace(model.executor, backend=backend, blocks=blocks)
    return model


def attach_empty(model: LanguageModel, make: Callable[[Sites], list[Edit]]) -> Attachment:
    """Put the edits of an adapter on a model without memory, in place of those that are there, without memory too."""
    for name in tuple(model.attachments):
        model.detach(name)
    with _WithoutMemory():
        return model.attach(make(model.sites))


class _WithoutMemory(TorchFunctionMode):
    """New tensors are on the meta device, wherever nobody says another one."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        few = func is torch.randperm and args and args[0] <= _FEW
        if func in _MAKERS and not few:
            given["device"] = "meta"
            # What is drawn needs no numbers.
            given.pop("generator", None)
        return func(*args, **given)


_MAKERS: Final = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm,
     torch.arange, torch.eye}
)  # fmt: skip
