"""What probing has found, remembered: the same weights, code and libraries are asked once.

Idea: probing runs a model a dozen times over six tokens, which reads all its weights as often, at every start. What it
finds follows from the weights, the config, the precision, the code and the libraries, so it is kept in the cache under
a digest of all of these; any other digest is probed.
Cost: one pass of one token, which tells how each layer calls its attention.
Not when: on a GPU, where probing compiles what will run.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
import transformers
from transformers import PreTrainedModel

from luthier.core.paths import cache_folder
from luthier.kernels.backend import Backend
from luthier.model.running.blocks import Blocks
from luthier.model.running.executor import Executor
from luthier.model.running.probing import attention_calls, probe
from luthier.store.environment import processor
from luthier.store.remembered import recalled, remember

FOLDER: Final = "probed"
_CODE: Final = ("model", "kernels", "data/forest.py")
"""Whose files decide what probing finds."""


def known_executor(module: PreTrainedModel, backend: Backend, *, fused: bool, digest: str) -> Executor:
    """What `probe` finds, from memory where it has found it before. `digest` is that of the weights.

    Without one, and on a GPU, the model is probed.
    """
    if not digest or module.device.type != "cpu":
        return probe(module, backend, fused=fused)
    path = cache_folder() / FOLDER / f"{_key(module, backend, fused=fused, digest=digest)}.json"
    known = _restored(module, backend, recalled(path))
    if known is not None:
        return known
    found = probe(module, backend, fused=fused)
    remember(path, {"kind": found.kind, "own_head": found.own_head, "reason": found.reason,
                    "blocks": found.blocks is not None})  # fmt: skip
    return found


def _restored(module: PreTrainedModel, backend: Backend, known: dict[str, Any]) -> Executor | None:
    """The executor that a file tells of; None where it tells of none that can be."""
    match known:
        case {"kind": "segments" | "unrolled", "own_head": bool(own_head), "reason": str(reason), "blocks": bool(ours)}:
            kind: Literal["segments", "unrolled"] = known["kind"]
            blocks = Blocks.of(module, attention_calls(module), backend) if ours else None
            return None if ours and blocks is None else Executor(kind, own_head, backend, reason, blocks)
    return None


def _key(module: PreTrainedModel, backend: Backend, *, fused: bool, digest: str) -> str:
    facts = [digest, module.config.to_json_string(), type(module).__name__, str(module.dtype), fused, backend.identity,
             torch.__version__, transformers.__version__, processor(), *_code(_CODE)]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@cache
def _code(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Names, sizes and times of the files of this package that decide: in a checkout they change between versions."""
    home = Path(__file__).parents[2]
    found = []
    for part in parts:
        place = home / part
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.suffix in (".py", ".cpp", ".h"):
                stat = path.stat()
                found.append(f"{path.relative_to(home)} {stat.st_size} {stat.st_mtime_ns}")
    return tuple(found)
