"""The base model of a recipe: loaded, packed as the recipe says or as its files are, and how a result's base was."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from jaxtyping import Float
from torch import Tensor

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.core.units import bytes_text
from luthier.kernels.backend import Backend
from luthier.model.files.packed_files import PackedReader
from luthier.model.language_model import LanguageModel
from luthier.model.load import Precision, load_model
from luthier.model.packed import Pack, Packing, packing_of, stored_bytes
from luthier.model.packing import pack_weights
from luthier.model.tasks import CAUSAL, Task
from luthier.quantizers import Quantizer

KEY = "quantizer"
"""Where a result says how its base was quantized."""


def load_base(
    source: str,
    *,
    precision: Precision = "auto",
    device: str = "auto",
    seed: int = 0,
    task: Task = CAUSAL,
    speaks: bool = False,
    own_modules: bool = False,
) -> LanguageModel:
    """The base model `source` for `task`, whose files may hold weights that some quantizer has packed.

    `speaks` and `own_modules` are those of `load_model`.
    """
    return load_model(
        source, precision=precision, device=device, seed=seed, task=task, packed=packed_reader, speaks=speaks,
        own_modules=own_modules,
    )  # fmt: skip


def packed_reader(config: Mapping[str, object]) -> PackedReader:
    """What reads files with this `quantization_config`. Raises RecipeError where no quantizer does."""
    kinds = [catalog.load("quantizers", name) for name in catalog.names("quantizers")]
    known = [kind for kind in kinds if issubclass(kind, Quantizer) and kind.file_mark]
    for kind in known:
        if kind.reads(config):
            return PackedReader(kind.file_mark, partial(_read, kind))
    said = {key: config.get(key) for key in ("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")}
    raise RecipeError(
        f"the weights are quantized ({', '.join(f'{key} {value!r:.40}' for key, value in said.items())})",
        allowed=f"weights in float32, bfloat16 or float16, or as {', '.join(kind.method_name() for kind in known)}",
        do="take the version of this model that is not quantized",
    )


def _read(kind: type[Quantizer], held: Mapping[str, Tensor], backend: Backend) -> tuple[Packing, Pack]:
    quantizer, packing = kind.from_file(held, backend)
    return packing, partial(_packed, quantizer, backend)


def _packed(quantizer: Quantizer, backend: Backend, weight: Float[Tensor, "out in"]) -> Packing:
    packing = quantizer.pack(weight, backend)
    if packing is None:
        raise RecipeError(f"{quantizer.method_name()} keeps no matrix of shape {tuple(weight.shape)}")
    return packing


def quantize(model: LanguageModel, quantizer: Quantizer, *, head: bool = False) -> None:
    """Pack the weights of the model's blocks, and note what that saves; nothing happens with the quantizer `none`.

    With `head` the output head is packed too, for a model that only speaks: it is read whole for every token.
    """
    if "packed-weights" not in quantizer.provides:
        return
    parameters = list(model.module.parameters())
    if any(packing_of(parameter) is not None for parameter in parameters):
        raise RecipeError(
            f"quantizer is {quantizer.method_name()}, and the files of {model.source} hold packed weights",
            allowed="none",
            do="take the quantizer out of the recipe; the weights stay as their files have them",
        )
    before = sum(map(stored_bytes, parameters))

    count = pack_weights(model, partial(_packed, quantizer, model.executor.backend), head=head)
    after = sum(map(stored_bytes, model.module.parameters()))
    model.notices.append(
        f"quantizer: {quantizer.method_name()} holds {count} matrices; weights {bytes_text(before)}, now "
        f"{bytes_text(after)}"
    )


def quantizer_named(name: str) -> Quantizer | None:
    """The quantizer of this name with its defaults, None for `none`. Raises RecipeError for an unknown one."""
    chosen = choose("quantizers", Quantizer, name)
    return chosen if "packed-weights" in chosen.provides else None


def kept_quantizer(extras: Mapping[str, object]) -> Quantizer:
    """How the base of a result was quantized when it was trained, as was written beside it."""
    return choose("quantizers", Quantizer, extras.get(KEY, "none"))
