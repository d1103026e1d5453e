"""Quantize: a model folder whose weights are packed, written, read back, and found to compute the same.

Read top to bottom: load and pack the base, write the folder, load it as anybody would, compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from luthier.core.chosen import Chosen
from luthier.core.errors import GateError, RecipeError
from luthier.core.knobs import Knobs
from luthier.data.tokenizer import Tokenizer
from luthier.model.files.adapter_config import save_extras
from luthier.model.files.generation_files import save_generation_config
from luthier.model.files.packed_files import save_packed
from luthier.model.language_model import LanguageModel
from luthier.model.load import Precision, resolve_source, without_bars
from luthier.model.packed import stored_bytes
from luthier.quantizers import Quantizer
from luthier.recipes.opening.quantized import KEY, load_base, quantize
from luthier.store.folder import require_new, write_folder
from luthier.train.result import release


class QuantizeKnobs(Knobs):
    """How weights are packed."""

    quantizer: Annotated[Quantizer, Chosen("quantizers")] = Field(description="how the frozen weights are kept")


PROBE_TOKENS = 64
"""Tokens whose logits the folder has to give as the model in memory did."""


def quantize_model(
    model: str, quantizer: Quantizer, out: Path, *, precision: Precision = "auto", device: str = "auto"
) -> dict[str, Any]:
    """Write `model` with packed weights into the new folder `out`; what it holds and takes.

    Raises RecipeError for a quantizer without files, RefusedError where `out` is there already, and GateError, with
    nothing left there, where the folder computes something else than the model it was written from.
    """
    if not quantizer.file_mark:
        raise RecipeError(
            f"quantizer is {quantizer.method_name()}, and no other tool has files of it",
            allowed="nf4",
            do="name it in a recipe instead: training packs the weights when it loads them",
        )
    require_new(out)
    base = load_base(model, precision=precision, device=device)
    before = sum(map(stored_bytes, base.module.parameters()))
    quantize(base, quantizer)
    after, digest, notices = sum(map(stored_bytes, base.module.parameters())), base.digest, list(base.notices)
    ids = _probe(base)
    wanted = _logits(base, ids)
    dtype: Precision = "bfloat16" if base.dtype == torch.bfloat16 else "float32"

    def write(place: Path) -> None:
        with without_bars(local=True):
            save_packed(base, place)
        tokenizer = Tokenizer.load(resolve_source(model))
        tokenizer.save(place, chat_template=tokenizer.chat_template)
        save_generation_config(place, base, tokenizer.stop_ids, bos_id=tokenizer.bos_id)
        save_extras(place, {"base": model, "base_digest": digest, "precision": dtype, KEY: quantizer.as_recipe()})
        release(base)
        if not torch.equal(_logits(load_base(str(place), precision=dtype, device=device), ids), wanted):
            raise GateError(
                f"read back, the folder gives other logits than {model} with quantizer {quantizer.method_name()}; "
                "nothing was kept",
                do="report this: it should not happen",
            )

    write_folder(out, write, {"base": model, "base_digest": digest}, needed_bytes=after)
    return {
        "folder": str(out),
        "base": model,
        "base_digest": digest,
        "quantizer": quantizer.as_recipe(),
        "precision": dtype,
        "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "weights": {"before": before, "after": after},
        "notices": notices,
    }


def _probe(model: LanguageModel) -> Tensor:
    ids = np.random.default_rng(0).integers(0, model.vocabulary_size, min(PROBE_TOKENS, model.context_tokens or 64))
    return torch.from_numpy(ids)[None].to(model.device)


@torch.no_grad()
def _logits(model: LanguageModel, ids: Tensor) -> Tensor:
    found: Tensor = model.module(input_ids=ids, use_cache=False).logits
    return found
