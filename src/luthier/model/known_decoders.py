"""What the zoo has shown of a decoder, remembered: its next start needs no zoo.

Idea: that our modules compute what the zoo's do is proved where the zoo has loaded a model (`running/likeness.py`), and
kept in the cache in two parts. What follows from the files beside the weights is under a digest of these: the values of
the config and the shape of the modules. What follows from the weights too, that the proof was made and how attention is
called, is under a digest of all that `running/known.py` asks for. Code and versions are in both.
Cost: two small files a model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, final

import torch

from luthier.core.paths import cache_folder
from luthier.data.hub import MAX_JSON, ModelFiles, read_bytes
from luthier.kernels.backend import Backend
from luthier.model.attending.kept import AttentionCall
from luthier.model.language_model import LanguageModel
from luthier.model.own.config import OwnConfig, as_json, plain_values
from luthier.model.own.decoder import Shape
from luthier.model.running.likeness import likeness_of
from luthier.store.environment import processor
from luthier.store.remembered import code_of, recalled, remember

FOLDER: Final = "decoders"
_CODE: Final = ("model", "kernels", "data/forest.py")
_BESIDE: Final = ("config.json", "generation_config.json")


@final
@dataclass(frozen=True)
class Known:
    """What is known of a decoder by the files beside its weights; `key` is their digest."""

    key: str
    config: OwnConfig
    notices: tuple[str, ...]
    generation: Mapping[str, Any] | None
    shape: Shape


def known_decoder(files: ModelFiles) -> Known | None:
    """What the zoo has shown of the model in a folder; None where it has not, or it is no such decoder."""
    if files.folder is None:
        return None
    key = _key(files)
    match recalled(_place(key)):
        case {"config": dict(values), "notices": list(notices), "generation": dict() | None as generation,
              "shape": dict(shape)}:  # fmt: skip
            try:
                return Known(key, OwnConfig(values), tuple(map(str, notices)), generation, _shape_of(shape))
            except (TypeError, ValueError, LookupError, AttributeError):
                return None
    return None


def proved(known: Known, digest: str, dtype: torch.dtype, backend: Backend) -> Shape | None:
    """The shape with the calls of its attention, where these weights were seen to give the zoo's numbers."""
    match recalled(_place(_proof(known.key, digest, dtype, backend))):
        case {"calls": list(told)}:
            calls = _calls(told)
            if set(calls) == set(range(known.shape.layers)):
                return dataclasses.replace(known.shape, calls=calls)
    return None


def _calls(told: list[Any]) -> dict[int, AttentionCall]:
    """How each layer calls its attention, as far as it is told."""
    calls = {}
    for each in told:
        match each:
            case [int(layer), int() | float() | None as scale, int() | None as window]:
                calls[layer] = AttentionCall(scale, window, None)
    return calls


def remember_decoder(files: ModelFiles, model: LanguageModel, notices: tuple[str, ...]) -> None:
    """Keep what the zoo shows of a model that was loaded whole from files, where our own modules do for it."""
    module, said = model.module, model.module.generation_config
    values = plain_values(module.config)
    generation = as_json({} if said is None else said.to_diff_dict())
    shape = None if values is None or generation is None else likeness_of(module, model.executor)
    if shape is None or files.folder is None:
        return
    key = _key(files)
    own = {name: value for name, value in dataclasses.asdict(shape).items() if name != "calls"}
    remember(_place(key), {"config": values, "notices": notices, "shape": own,
                           "generation": None if said is None else generation})  # fmt: skip
    calls = [[layer, *astuple(call)[:2]] for layer, call in shape.calls.items()]
    remember(_place(_proof(key, model.digest, model.dtype, model.executor.backend)), {"calls": calls})


def _shape_of(said: Mapping[str, Any]) -> Shape:
    parameters = {str(name): tuple(map(int, sizes)) for name, sizes in said["parameters"].items()}
    return Shape(
        parameters=parameters,
        head_size=int(said["head_size"]),
        epsilon=float(said["epsilon"]),
        padding=None if said["padding"] is None else int(said["padding"]),
        tied=bool(said["tied"]),
        frequencies=tuple(map(float, said["frequencies"])),
        scaling=float(said["scaling"]),
        calls={},
    )


def _place(key: str) -> Path:
    return cache_folder() / FOLDER / f"{key}.json"


def _key(files: ModelFiles) -> str:
    """A digest of the files beside the weights, of the code and of the libraries."""
    total = hashlib.sha256()
    for name in _BESIDE:
        path = files.find(name)
        total.update(b"none" if path is None else hashlib.sha256(read_bytes(path, most=MAX_JSON)).digest())
    total.update(json.dumps([torch.__version__, version("transformers"), *code_of(_CODE)]).encode())
    return total.hexdigest()[:32]


def _proof(key: str, digest: str, dtype: torch.dtype, backend: Backend) -> str:
    facts = [key, digest, str(dtype), backend.identity, processor()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
