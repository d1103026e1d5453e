"""In which precision a CPU makes text, where it has no instructions for products of bfloat16 numbers.

Idea: a token of an answer takes as long as its weights take to be read, and bfloat16 numbers are half the bytes. Our
kernels widen them on their way from memory and multiply floats, and the many rows of a prompt are multiplied as floats
too, of weights that are widened piece by piece. So such a CPU makes text in bfloat16: from half the bytes, and faster
where few texts are made at once (docs/generation.md has figures). It is decided by what is known of the kernels
and not by a measurement at the start, which a busy machine would falsify: a model shall speak alike on all days.
Cost: the model's modules without memory, at each start.
Not when: the files hold other numbers, which would be rounded; a cache holds the model; its blocks or their products
are not ours, since a library imitates bfloat16 products number by number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import torch

from luthier.kernels.chosen import backend_for
from luthier.kernels.floats import BFLOAT16, is_real
from luthier.kernels.halves import multiplies_halves
from luthier.kernels.wanted import wanted_kernels
from luthier.model.files.array_files import tensor_places
from luthier.model.zoo import ZooConfig

CACHED: Final = 64 << 20
"""Bytes of a model in float32 that a cache may hold: reading it costs little in either precision."""
REASON: Final = "bfloat16, as in the files: this CPU reads it in half the time"
"""What a model that is loaded so says of its precision."""
_WIDENING: Final = ("AVX2", "AVX512")
"""Instructions for which our kernels widen bfloat16 numbers in vectors; with others nothing was measured."""


def speaks_in_halves(paths: Sequence[Path]) -> bool:
    """Whether this CPU makes text faster in bfloat16 than in float32 where blocks are ours, and files lose nothing."""
    if multiplies_halves() or torch.backends.cpu.get_cpu_capability() not in _WIDENING or not _hold_halves(paths):
        return False
    wanted = wanted_kernels()
    return wanted != "torch" and backend_for(wanted, torch.device("cpu"), torch.bfloat16)[0].name == "native"


def has_our_blocks(config: ZooConfig, source: str) -> bool:
    """Whether our operations run the blocks of the model of a config."""
    from luthier.model.empty import empty_model

    return empty_model(config, source, dtype=torch.bfloat16, device="cpu").executor.blocks is not None


def is_told(notices: Iterable[str]) -> str:
    """What a user has to be told of the precision of a model that was opened to make text; empty where it is that of
    training."""
    return next((each for each in notices if each.endswith(REASON)), "")


def _hold_halves(paths: Sequence[Path]) -> bool:
    """Whether files hold bfloat16 wherever they hold a matrix of real numbers, and more than a cache does."""
    places = [place for path in paths for place in tensor_places(path).values()]
    real = [place for place in places if is_real(place.dtype) and len(place.shape) > 1]
    size = sum(place.end - place.begin for place in places)
    return all(place.dtype == BFLOAT16 for place in real) and 2 * size > CACHED
