"""A model whose weights are never all in memory: the zoo's own forward, with rows that come when a module needs them.

Idea: the zoo builds its model around stand-ins, tensors that claim a shape and hold one number; so names, shapes and
config are checked as they always are, and no memory is taken. A linear layer then multiplies by blocks of rows as they
come, and any other module gets its own few parameters when it computes and loses them behind it. All prompts go through
at once, so every row is asked for once. Rows are sketched as they pass: what was multiplied by is what is remembered.
Cost: a read of each row, and of a table that embeds and predicts two; in memory a block, the largest module that is no
    linear layer, and the logits.
Use when: what a model computes is asked once, and it may be larger than memory.
Not when: it is asked again and again, or sees what lies behind a token: prompts of unlike lengths lie side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from luthier.core.errors import CorruptError, MissingError, RecipeError
from luthier.data.forest import Ints
from luthier.kernels.floats import is_real
from luthier.kernels.vectors import vectors_for
from luthier.kernels.wanted import wanted_kernels
from luthier.model.attending import attention
from luthier.model.comparing.sketches import Sketch, Sketching
from luthier.model.files.array_views import tensor_of
from luthier.model.files.shards import Slot
from luthier.model.files.weights import module_with
from luthier.model.load import without_bars
from luthier.model.tasks import CAUSAL, kind_of

NO_MODEL: Final = (RecipeError, CorruptError, MissingError)
"""What is raised for files that no causal language model of the zoo can be made of."""
_TABLE: Final = 1 << 24
"""Numbers of an embedding beyond which only the rows of the prompts' tokens are held."""


class RowSource(ABC):
    """The tensors of a model by the names of its files."""

    slots: Mapping[str, Slot]

    @abstractmethod
    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """A tensor in blocks of rows, in their order; in float32, or as it is where it is no tensor of such numbers."""


@final
class StreamedModel:
    """A causal language model in float32 over a source of rows. Raises RecipeError for one that cannot be streamed."""

    def __init__(self, config: PretrainedConfig, rows: RowSource, source: str) -> None:
        if kind_of(config) != "causal":
            raise RecipeError(f"{source} does not read from left to right", allowed="a causal language model")
        self.rows, self._sketches = rows, dict[str, Sketch]()
        self._vectors = vectors_for(wanted_kernels())
        attention.register()
        stand_ins = {name: _stand_in(rows, name) for name in rows.slots}
        with without_bars(local=True):
            self.module = module_with(config, stand_ins, torch.float32, source, task=CAUSAL, seed=0).module
        self.module.eval().requires_grad_(False)
        self._by_place = {tensor.data_ptr(): name for name, tensor in stand_ins.items()}
        self._prompts: Int[Tensor, "B T"] = torch.zeros(0, 0, dtype=torch.int64)
        for path, module in self.module.named_modules():
            self._streamed(path, module, source)

    def _streamed(self, path: str, module: nn.Module, source: str) -> None:
        """Have one module ask for its rows."""
        for key, held in module._buffers.items():
            if held is not None and held.dtype.is_floating_point and held.data_ptr() in self._by_place:
                module._buffers[key] = self._whole(self._by_place[held.data_ptr()])
        names = {}
        for key, tensor in module._parameters.items():
            if tensor is None:
                continue
            if (name := self._by_place.get(tensor.data_ptr())) is None:
                raise RecipeError(f"{source} puts tensors of its files together in memory ({path}.{key})",
                                  allowed="a model whose tensors are used as its files hold them")  # fmt: skip
            names[key] = name
        if type(module) is nn.Linear:
            module.forward = partial(self._multiplied, names["weight"], names.get("bias"))  # type: ignore[method-assign]
        elif names:
            kept = {key: held for key, held in module._parameters.items() if held is not None}
            module.register_forward_pre_hook(partial(self._brought, names))
            module.register_forward_hook(partial(_put_back, kept))

    @torch.no_grad()
    def logits(self, prompts: Sequence[Ints]) -> list[Float[np.ndarray, "n v"]]:
        """What comes out at each token of each prompt. One pass: shorter prompts have zeros behind, which none sees."""
        longest = max(map(len, prompts))
        ids = np.stack([np.pad(prompt.astype(np.int64), (0, longest - len(prompt))) for prompt in prompts])
        self._prompts = torch.from_numpy(ids)
        found: Tensor = self.module(input_ids=self._prompts).logits.float()
        return [rows[: len(prompt)].numpy() for rows, prompt in zip(found, prompts, strict=True)]

    def sketches(self) -> dict[str, Sketch]:
        """A sketch of every tensor: of those that no module has asked for yet, too."""
        for name in self.rows.slots:
            if name not in self._sketches:
                for _ in self._passing(name):
                    pass
        return self._sketches

    def _passing(self, name: str) -> Iterator[Tensor]:
        """The blocks of a tensor, sketched as they pass."""
        growing = Sketching(self._vectors)
        for block in self.rows.blocks(name):
            growing.add(block)
            yield tensor_of(block)
        self._sketches[name] = growing.sketch(self.rows.slots[name].shape)

    def _multiplied(self, weight: str, bias: str | None, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        found, first = x.new_empty(*x.shape[:-1], self.rows.slots[weight].rows), 0
        for block in self._passing(weight):
            found[..., first : first + len(block)] = x @ block.t()
            first += len(block)
        return found if bias is None else found.add_(self._whole(bias))

    def _brought(self, names: Mapping[str, str], module: nn.Module, _given: Any) -> None:
        for key, name in names.items():
            slot = self.rows.slots[name]
            large = module is self.module.get_input_embeddings() and slot.rows * slot.columns > _TABLE
            rows = self._of_prompts(name) if large else self._whole(name)
            module._parameters[key] = nn.Parameter(rows, requires_grad=False)

    def _whole(self, name: str) -> Tensor:
        return torch.cat(list(self._passing(name))).view(self.rows.slots[name].shape)

    def _of_prompts(self, name: str) -> Float[Tensor, "rows columns"]:
        """A table that takes memory for the rows of the prompts' tokens alone: the system gives pages when written."""
        slot, first = self.rows.slots[name], 0
        table = torch.from_numpy(np.zeros((slot.rows, slot.columns), np.float32))
        wanted = self._prompts.unique()
        for block in self._passing(name):
            own = wanted[(wanted >= first) & (wanted < first + len(block))]
            table[own] = block[own - first]
            first += len(block)
        return table


def _stand_in(rows: RowSource, name: str) -> Tensor:
    slot = rows.slots[name]
    if not is_real(slot.dtype):
        return tensor_of(np.concatenate(list(rows.blocks(name))).reshape(slot.shape))
    return torch.zeros(1).expand(slot.shape) if slot.shape else torch.zeros(())


def _put_back(kept: Mapping[str, nn.Parameter], module: nn.Module, _given: Any, _found: Any) -> None:
    module._parameters.update(kept)
