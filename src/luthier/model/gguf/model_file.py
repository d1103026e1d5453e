"""A whole model as a GGUF file, and back.

Idea: writing plans the file from shapes alone and then sends one tensor after another through the layout and the number
format. Reading starts from the file: names and order are turned back by functions of their own, what the header says of
the shape replaces what the config said, and a tensor that is missing, or that nobody asked for, is an error.
"""

from __future__ import annotations

import copy
import math
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import CorruptError
from luthier.data.tokenizer import Tokenizer
from luthier.maths.ggml import FORMATS
from luthier.model.files.weights import without_weights
from luthier.model.gguf.families import OUTPUT, ROPE_FACTORS, Layout
from luthier.model.gguf.formats import FILE_TYPES, Choice, fallbacks, format_for
from luthier.model.gguf.reading import GgufFile
from luthier.model.gguf.reading_tokens import STRIPPING, backend_of, strips_by_name
from luthier.model.gguf.shape_keys import rope_factors, shape_keys, shape_notices
from luthier.model.gguf.vocabulary import PREFIX, TEMPLATE, vocabulary
from luthier.model.gguf.writing import Key, Planned, text, whole, write_gguf
from luthier.model.tasks import CAUSAL

_SETTINGS: Final = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""What a config calls what a header says."""
_PATIENCE: Final = 5.0
"""Seconds until somebody who waits is told how far it is."""


@final
@dataclass(frozen=True, kw_only=True)
class Model:
    """What is written: weights by transformers' names, and all that belongs to them.

    `adds_bos` says whether readers put BOS before every text; None for as the tokenizer does.
    """

    name: str
    config: Any
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer
    template: str | None
    stop_ids: tuple[int, ...]
    adds_bos: bool | None = None


def model_keys(model: Model, choice: Choice) -> tuple[dict[str, Key], tuple[str, ...]]:
    """The header of a model's file, and what a user should know. Raises RecipeError for what GGUF has no place for."""
    layout = Layout.of(model.config)
    words = vocabulary(model.tokenizer, size=int(model.config.vocab_size), stop_ids=model.stop_ids,
                       template=model.template, adds_bos=model.adds_bos)  # fmt: skip
    # A name decides how special tokens are read: what says otherwise than the tokenizer is changed.
    name = model.name
    if strips_by_name(name) != words.strips:
        name = f"{name} ({STRIPPING})" if words.strips else re.sub(r"(?i)phi-?3", "phi 3", name)
    keys = {
        "general.architecture": text(layout.family.architecture),
        "general.type": text("model"),
        "general.name": text(name),
        "general.file_type": whole(FILE_TYPES[choice]),
        "general.quantization_version": whole(2),
    }
    return keys | shape_keys(model.config) | dict(words.keys), (*shape_notices(model.config), *words.notices)


def write_model(
    path: Path, model: Model, choice: Choice, *, told: Callable[[str], None] = lambda _line: None
) -> None:
    """Write `model` to `path`; `told` hears what a user should know. Raises as `model_keys` and `write_gguf` do."""
    keys, notices = model_keys(model, choice)
    layout, factors = Layout.of(model.config), rope_factors(model.config)
    planned = _planned(layout, model.config, model.tensors, choice)
    plan = list(planned.values())
    if factors is not None:
        plan.insert(0, Planned(ROPE_FACTORS, tuple(factors.shape), FORMATS["F32"]))

    def stored() -> Iterator[tuple[str, Tensor]]:
        if factors is not None:
            yield ROPE_FACTORS, factors
        last = time.monotonic()
        for number, (own, each) in enumerate(planned.items()):
            if time.monotonic() - last > _PATIENCE:
                told(f"{number} of {len(planned)} tensors are written")
                last = time.monotonic()
            yield each.name, layout.stored(each.name, model.tensors[own].detach())

    for notice in (*notices, *fallbacks(plan, choice)):
        told(notice)
    told(f"writing {len(plan)} tensors")
    size = write_gguf(path, keys, plan, stored())
    told(f"{path.name}: {len(plan)} tensors, {size:,} bytes")


def notices_of(model: Model, choice: Choice) -> tuple[str, ...]:
    """What a user should know of a model's file; the weights may be gone."""
    _, notices = model_keys(model, choice)
    empty = without_weights(model.config, model.name, task=CAUSAL).state_dict()
    plan = _planned(Layout.of(model.config), model.config, empty, choice)
    return (*notices, *fallbacks(list(plan.values()), choice))


def _planned(
    layout: Layout, config: Any, tensors: Mapping[str, Tensor], choice: Choice
) -> dict[str, Planned]:
    """The tensors of a file by the names they have in the model."""
    made = {}
    for own, tensor in tensors.items():
        name = layout.name(own)
        if name is not None:
            shape = tuple(tensor.shape)
            kind = format_for(name, shape, choice, layers=int(config.num_hidden_layers), tied=layout.tied)
            made[own] = Planned(name, shape, kind)
    return made


def read_weights_back(file: GgufFile, config: Any) -> dict[str, Tensor]:
    """The weights in a file by transformers' names, in float32.

    Raises CorruptError for a file that is not the whole model of `config`.
    """
    layout = Layout.of(config)
    empty = without_weights(config, str(file.path), task=CAUSAL).state_dict()
    wanted = {own: name for own in empty if (name := layout.name(own)) is not None}
    missing = sorted(set(wanted.values()) - set(file.places))
    strange = sorted(set(file.places) - set(wanted.values()) - {ROPE_FACTORS})
    if missing or strange:
        raise _another(file, f"{len(missing)} tensors are missing ({', '.join(missing[:3])}) and {len(strange)} have no"
                       f" place in the model ({', '.join(strange[:3])})")  # fmt: skip
    _require_factors(file, rope_factors(config))
    back = {name: own for own, name in wanted.items()}
    held: dict[str, Tensor] = {}
    for name, tensor in file.each():
        if name == ROPE_FACTORS:
            continue
        own = back[name]
        if tuple(tensor.shape) != tuple(empty[own].shape):
            raise _another(file, f"{name} has shape {tuple(tensor.shape)}, and the config wants "
                           f"{tuple(empty[own].shape)}")  # fmt: skip
        held[own] = layout.restored(name, tensor)
    if layout.tied:
        _tie(held, layout, empty)
    return held


def config_of_file(file: GgufFile, config: Any) -> Any:
    """A copy of `config` in which all that the header names has the header's value."""
    architecture = file.text("general.architecture")
    made = copy.deepcopy(config)
    for key, name in _SETTINGS.items():
        found = file.keys.get(f"{architecture}.{key}")
        if found is not None and not _same(found, getattr(made, name, None)):
            setattr(made, name, found)
    theta = file.keys.get(f"{architecture}.rope.freq_base")
    rope = made.rope_parameters.get("full_attention", made.rope_parameters)
    if theta is not None and not _same(theta, rope["rope_theta"]):
        rope["rope_theta"] = theta
    made.tie_word_embeddings = OUTPUT not in file.places
    return made


def tokenizer_of_file(file: GgufFile) -> tuple[Tokenizer, frozenset[int]]:
    """The tokenizer that a file describes, with its chat template, and where answers end by its header."""
    keys = file.keys
    backend = backend_of(keys)
    named = {f"{own}_token": keys[f"{PREFIX}{key}_token_id"] for own, key in
             (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
             if f"{PREFIX}{key}_token_id" in keys}  # fmt: skip
    tokens = keys[f"{PREFIX}tokens"]
    if any(not isinstance(number, int) or number >= len(tokens) for number in named.values()):
        raise _another(file, f"{max(named.values())} is named as a special token of {len(tokens)}")
    raw = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False,
        **{name: tokens[number] for name, number in named.items()},
    )  # fmt: skip
    raw.chat_template = keys.get(TEMPLATE)
    ends = [keys[f"{PREFIX}{key}_token_id"] for key in ("eos", "eot", "eom") if f"{PREFIX}{key}_token_id" in keys]
    return Tokenizer.of(raw, generation_eos=ends), frozenset(ends)


def _tie(held: dict[str, Tensor], layout: Layout, empty: Mapping[str, Tensor]) -> None:
    embedding = next(own for own in held if layout.name(own) == "token_embd.weight")
    for own in empty:
        if layout.name(own) is None:
            held[own] = held[embedding]


def _require_factors(file: GgufFile, wanted: Tensor | None) -> None:
    found = file.tensor(ROPE_FACTORS) if ROPE_FACTORS in file.places else None
    if (wanted is None) != (found is None) or (wanted is not None and found is not None
                                               and not torch.allclose(wanted, found)):  # fmt: skip
        raise _another(file, f"{ROPE_FACTORS} is not what the scaling of the config gives")


def _same(found: Any, wanted: Any) -> bool:
    """Whether a number of a header, which has 32 bits, is that of a config."""
    if type(found) not in (int, float) or type(wanted) not in (int, float):
        return found is wanted
    return found == wanted or math.isclose(found, struct.unpack("<f", struct.pack("<f", wanted))[0], rel_tol=1e-7)


def _another(file: GgufFile, what: str) -> CorruptError:
    return CorruptError(f"{file.path.name} is not the model that was exported: {what}",
                        allowed="each tensor of the model once", do="export it again")  # fmt: skip
