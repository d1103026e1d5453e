"""Fingerprints: what an answer's bits depend on beside its request, in a few letters.

Idea: whoever asks twice with one seed wants to know whether the same may be expected. OpenAI's API has a name for it,
`system_fingerprint`: it changes when the weights, their precision or packing, the kernels or the versions do. Which
adapter computes is said by the name of the model.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Final

import torch

from luthier.model.language_model import LanguageModel
from luthier.model.packed import packing_of

_LETTERS: Final = 10


def fingerprint(model: LanguageModel) -> str:
    """The fingerprint of answers that `model` gives in this process."""
    found = map(packing_of, model.module.parameters())
    parts = {
        "weights": model.digest,
        "precision": str(model.dtype),
        "packed": sorted({type(each).__name__ for each in found if each is not None}),
        "kernels": model.kernels,
        "threads": torch.get_num_threads(),
        "device": model.device.type,
        "torch": torch.__version__,
        "luthier": version("luthier"),
    }
    return "fp_" + hashlib.blake2b(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:_LETTERS]
