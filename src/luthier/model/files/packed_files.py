"""Model folders whose weights are packed: files that other tools read too.

Idea: a packing says how it lies in a file (`Packing.file_tensors`) and what `config.json` says of it; everything else
in the folder is what any model's folder holds. Reading goes the other way: the tensors of each packed module are taken
out of what was read, and the zoo builds its module around a number that stands for each of them. So no packed weight
is ever whole in memory, neither when it is written nor when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor, nn

from luthier.core.errors import CorruptError, RecipeError
from luthier.data.strict_json import excerpt
from luthier.kernels.backend import Backend
from luthier.model.files.json_files import read_object, write_object
from luthier.model.language_model import LanguageModel
from luthier.model.packed import Pack, PackedWeight, Packing, packing_of
from luthier.model.zoo import ZooModule, is_conv1d

CONFIG: Final = "config.json"
_KEY: Final = "quantization_config"
_SKIPPED: Final = "llm_int8_skip_modules"


@final
@dataclass(frozen=True)
class PackedReader:
    """How files of one packing are read: each packed module has a tensor called `mark` below it.

    `read` makes a packing of the tensors of one module, and says how another matrix is packed in the same way.
    """

    mark: str
    read: Callable[[Mapping[str, Tensor], Backend], tuple[Packing, Pack]]


@final
@dataclass(frozen=True)
class Found:
    """The packing of one module of a file."""

    packing: Packing
    pack: Pack


@torch.no_grad()
def save_packed(model: LanguageModel, folder: Path) -> None:
    """Write a model whose weights are packed. Raises RecipeError where no other tool reads what packed them."""
    if model.attachments:
        raise RecipeError(f"{', '.join(model.attachments)} is on the model", do="merge or detach it, then save")
    tensors: dict[str, Tensor] = dict(model.module.state_dict())
    config: Mapping[str, object] = {}
    plain = []
    for name, module in model.module.named_modules():
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            continue
        packing = packing_of(module.weight)
        if packing is None:
            plain.append(name)
            continue
        held, config = packing.file_tensors(model.dtype), packing.file_config()
        if not held:
            kind = type(packing).__name__.removesuffix("Packing")
            raise RecipeError(f"no other tool reads weights that are packed as {kind}", do="use quantizer nf4")
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{key}": tensor for key, tensor in held.items()})
    if not config:
        raise RecipeError(f"no weight of {model.source} is packed", do="quantize it first")
    model.module.save_pretrained(folder, state_dict=tensors)
    said = read_object(folder / CONFIG)
    write_object(folder / CONFIG, {**said, _KEY: {**config, _SKIPPED: plain}})


def take_packed(
    tensors: dict[str, Tensor], reader: PackedReader, backend: Backend, module: ZooModule, dtype: torch.dtype
) -> dict[str, Found]:
    """Take the packed weights out of the tensors of a file, and leave one number in the place of each.

    `module` says what the tensors are for; its own weights are not looked at. Raises CorruptError where a packing does
    not fit it.
    """
    ending = f".{reader.mark}"
    names = sorted(key.removesuffix(ending) for key in tensors if key.endswith(ending))
    if not names:
        raise CorruptError(
            f"config.json says that weights are packed, and no tensor is called *{ending}",
            do="the weight files do not belong to this config.json",
        )
    known = {name: each for name, each in module.named_modules() if (isinstance(each, nn.Linear) or is_conv1d(each))}
    found = {}
    for name in names:
        own = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.") and key != f"{name}.bias"}
        try:
            packing, pack = reader.read({key.removeprefix(f"{name}."): each for key, each in own.items()}, backend)
        except CorruptError as failure:
            raise CorruptError(
                f"{excerpt(name)}: {failure.received}", allowed=failure.allowed, do="fetch or save the files again"
            ) from None
        place = name if name in known else f"{module.base_model_prefix}.{name}"
        _require_fit(name, known.get(place), packing, module)
        shape = packing.shape[::-1] if is_conv1d(known[place]) else packing.shape
        tensors[f"{name}.weight"] = torch.zeros(1, dtype=dtype).expand(shape)
        found[place] = Found(packing, pack)
    return found


def make_room(module: ZooModule, found: Mapping[str, Found]) -> None:
    """Let go of what stands for packed weights, before the module goes to its device."""
    for name in found:
        own = module.get_submodule(name)
        own.register_parameter("weight", nn.Parameter(own.get_parameter("weight").new_empty(0), requires_grad=False))


def put_packed(
    module: ZooModule, found: Mapping[str, Found], device: torch.device, dtype: torch.dtype
) -> None:
    """Let packed weights stand in their places in `module`, on `device`."""
    for name, each in found.items():
        own = module.get_submodule(name)
        weight = PackedWeight(each.packing.to(device), dtype, each.pack, transposed=is_conv1d(own))
        own.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def _require_fit(name: str, own: nn.Module | None, packing: Packing, module: ZooModule) -> None:
    if own is None:
        raise CorruptError(
            f"{excerpt(name)} is packed, and the model has no linear layer of that name",
            do="the weight files do not belong to this config.json",
        )
    if own is module.get_output_embeddings():
        raise RecipeError(
            f"the output head ({name}) is packed",
            allowed="packed layers in the blocks",
            do=f"take a version of this model whose {_SKIPPED} names it",
        )
    shape = tuple(own.get_parameter("weight").shape)
    wanted = shape[::-1] if is_conv1d(own) else shape
    if packing.shape != wanted:
        raise CorruptError(
            f"{excerpt(name)} is packed from {list(packing.shape)} and should be {list(wanted)}",
            do="the weight files do not belong to this config.json",
        )
