"""Tensors from a safetensors file whose header has been checked, in torch's own memory; see `array_files.py`.

Use when: a model computes with the numbers of a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from luthier.core.errors import CorruptError
from luthier.data.strict_json import excerpt
from luthier.model.files.array_files import opened_arrays
from luthier.model.files.array_views import array_of, tensor_type


def load_tensors(path: Path, *, widen: bool = False) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in the order of the header; `widen` turns half precision into float32.

    Raises UnsafeArtifactError for a pickle, CorruptError with field and reason for a file that is damaged or no
    safetensors file, MissingError when there is none.
    """
    tensors = {}
    for name, tensor in each_tensor(path):
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        tensors[name] = tensor.float() if widen and half else tensor
    return tensors


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one after another, for whoever needs no two of them at once; raises as `load_tensors` does."""
    with opened_arrays(path) as file:
        for name, place in file.places.items():
            # Torch's memory begins where wide instructions like it to.
            tensor = torch.empty(place.shape, dtype=tensor_type(place.dtype))
            file.read(name, array_of(tensor))
            yield name, tensor


def read_weights(paths: list[Path], *, widen: bool) -> dict[str, Tensor]:
    """The tensors of all files; `widen` turns half precision into float32 while reading."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        held = load_tensors(path, widen=widen)
        twice = sorted(tensors.keys() & held.keys())
        if twice:
            raise CorruptError(f"{excerpt(twice[0])} stands in two files", where=str(path), do="fetch the model again")
        tensors.update(held)
    return tensors
