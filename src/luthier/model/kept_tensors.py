"""What a pass keeps for its backward pass, counted.

Idea: what autograd holds on to is decided by the code of the zoo's modules: which activation they call, where they
drop out, whether attention takes a bias. No config says it, and a pass over a few tokens shows it. Torch tells of each
tensor that is kept, and hooks around the blocks say in which of them that is; what several keep counts for the first of
them, as the backward pass is done with that one last.
Cost: a forward pass of the tokens at hand; nothing of it remains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.data.forest import Forest
from luthier.kernels.head import Head
from luthier.kernels.torch_backend import TorchBackend
from luthier.model.language_model import LanguageModel
from luthier.model.packed import PackedWeight
from luthier.model.running.zoo_head import FeatureHead


def kept_by_stage(model: LanguageModel, forest: Forest) -> list[int]:
    """Bytes kept before the first block, by it, between it and the next, and so on; the last are those after all.

    The model's own tensors are left out, and the slopes of a trained head, of which only so many rows are ever kept.
    """
    was_training = model.module.training
    devices = [model.device] if model.device.type == "cuda" else []
    executor = model.executor
    if model.device.type == "meta":
        # Kernels of others would write where there is no memory; they keep what plain torch keeps.
        model.executor = replace(executor, backend=TorchBackend())
    with torch.random.fork_rng(devices=devices):
        model.train()
        try:
            noted = _Notes(model)
            with noted, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(noted.note, lambda kept: kept):
                model.token_outputs(forest)
        finally:
            model.train(was_training)
            model.executor = executor
    return noted.stages


class _Notes:
    """The tensors that are kept, by the stage in which they are kept first."""

    def __init__(self, model: LanguageModel) -> None:
        own = [*model.module.parameters(), *model.module.buffers()]
        own += [each for attachment in model.attachments.values() for each in attachment.named_parameters().values()]
        self._seen = {_place(each.untyped_storage()) for whole in own for each in _parts(whole)}
        # Kept as long as this is: a place that is free again would be taken for the tensor that was there.
        self._alive: list[Any] = []
        self._blocks: Sequence[nn.Module] = [site.module for site in model.sites.role("block")]
        self._slopes = _slope_width(model)
        self._handles: list[Any] = []
        self.stages = [0]

    def __enter__(self) -> None:
        for block in self._blocks:
            self._handles.append(block.register_forward_pre_hook(self._next))
            self._handles.append(block.register_forward_hook(self._next))

    def __exit__(self, *failure: object) -> None:
        for handle in self._handles:
            handle.remove()

    def note(self, kept: Tensor) -> Tensor:
        if isinstance(kept, PackedWeight):
            # One of the model's own: what is unpacked of it is let go after each product.
            return kept
        storage = kept.untyped_storage()
        if _place(storage) not in self._seen and not (self._slopes and kept.shape[-1:] == (self._slopes,)):
            self._seen.add(_place(storage))
            self._alive.append(storage)
            self.stages[-1] += storage.nbytes()
        return kept

    def _next(self, *call: object) -> None:
        self.stages.append(0)


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    """The tensors that a tensor of a model is: of a packed weight, which has no memory of its own, those it packs."""
    return tensor.packing.tensors.values() if isinstance(tensor, PackedWeight) else (tensor,)


def _place(storage: torch.UntypedStorage) -> int:
    """What tells a storage from all others: where it lies, or the object itself where it is without memory."""
    return storage.data_ptr() or storage._cdata


def _slope_width(model: LanguageModel) -> int:
    """The rows of a plain head that is trained over a vocabulary; 0 where there is none."""
    if model.task.classifies:
        return 0
    head = model.head
    plain = head.plain if isinstance(head, FeatureHead) else head
    trained = isinstance(plain, Head) and plain.weight.requires_grad
    return len(plain.weight) if trained and isinstance(plain, Head) else 0
