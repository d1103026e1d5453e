"""What probing has found, remembered: the same weights, code and libraries are asked once.

Idea: probing runs a model a dozen times over six tokens, which reads all its weights as often, at every start. What it
finds follows from the weights, the config, the precision, the code and the libraries, so it is kept in the cache under
a digest of all of these; any other digest is probed.
Cost: reading a file.
Not when: on a GPU, where probing compiles what will run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from importlib.metadata import version
from typing import Any, Final

import torch

from luthier.core.paths import cache_folder
from luthier.kernels.backend import Backend
from luthier.model.attending.kept import AttentionCall
from luthier.model.own.decoder import Decoder
from luthier.model.running.blocks import Blocks
from luthier.model.running.executor import Executor
from luthier.model.running.probing import probe
from luthier.model.zoo import ZooModule
from luthier.store.environment import processor
from luthier.store.remembered import code_of, recalled, remember

FOLDER: Final = "probed"
_CODE: Final = ("model", "kernels", "data/forest.py")
"""Whose files decide what probing finds."""


def known_executor(module: ZooModule, backend: Backend, *, fused: bool, digest: str) -> Executor:
    """What `probe` finds, from memory where it has found it before. `digest` is that of the weights.

    Without one, and on a GPU, the model is probed. Of our own modules all of it is known.
    """
    if isinstance(module, Decoder):
        return Executor("segments", True, backend, "", Blocks.of(module, module.shape.calls, backend))
    if not digest or module.device.type != "cpu":
        return probe(module, backend, fused=fused)
    path = cache_folder() / FOLDER / f"{_key(module, backend, fused=fused, digest=digest)}.json"
    known = _restored(module, backend, recalled(path))
    if known is not None:
        return known
    found = probe(module, backend, fused=fused)
    calls = None if found.blocks is None else [[layer, *astuple(call)] for layer, call in found.blocks.calls.items()]
    if calls is None or _calls(calls) is not None:
        remember(path, {"kind": found.kind, "own_head": found.own_head, "reason": found.reason, "calls": calls})
    return found


def _restored(module: ZooModule, backend: Backend, known: dict[str, Any]) -> Executor | None:
    """The executor that a file tells of; None where it tells of none that can be."""
    match known:
        case {"kind": "segments" | "unrolled", "own_head": bool(own_head), "reason": str(reason), "calls": None}:
            return Executor(known["kind"], own_head, backend, reason, None)
        case {"kind": "segments" | "unrolled", "own_head": bool(own_head), "reason": str(reason), "calls": list(told)}:
            calls = _calls(told)
            blocks = None if calls is None else Blocks.of(module, calls, backend)
            return None if blocks is None else Executor(known["kind"], own_head, backend, reason, blocks)
    return None


def _calls(told: list[Any]) -> dict[int, AttentionCall] | None:
    """How each layer calls its attention; None where that is not what was told."""
    calls: dict[int, AttentionCall] = {}
    for each in told:
        match each:
            case [int(layer), int() | float() | None as scale, int() | None as window, int() | float() | None as cap]:
                calls[layer] = AttentionCall(scale, window, cap)
            case _:
                return None
    return calls


def _key(module: ZooModule, backend: Backend, *, fused: bool, digest: str) -> str:
    facts = [digest, module.config.to_json_string(), type(module).__name__, str(module.dtype), fused, backend.identity,
             torch.__version__, version("transformers"), processor(), *code_of(_CODE)]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
