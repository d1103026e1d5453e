"""Tensors from a safetensors file whose header has been checked, as copies in memory.

Idea: before anything is allocated the header is compared with the file (`tensor_headers.py`). A view of the file would
change under a run when somebody writes over the file, and would end the process when somebody cuts it short.

Use when: tensors of any safetensors file are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from luthier.model.files.tensor_headers import opened, read_header, refuse

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor of a file: its type, its shape, and the bytes [begin, end) behind the header that hold it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


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
    with opened(path) as (file, size):
        places = read_places(path, file, size)
        start = size - max((place.end for place in places.values()), default=0)
        for name, place in places.items():
            yield name, _read(path, file, start, name, place)


def tensor_places(path: Path) -> dict[str, TensorPlace]:
    """Type, shape and place of each tensor of a file, without reading any; raises as `load_tensors` does."""
    with opened(path) as (file, size):
        return read_places(path, file, size)


def read_places(path: Path, file: FileIO, size: int) -> dict[str, TensorPlace]:
    """The header of an open file of this size, with torch's types."""
    header = read_header(path, file, size)
    return {name: TensorPlace(DTYPES[at.dtype], at.shape, at.begin, at.end) for name, at in header.items()}


def _read(path: Path, file: FileIO, start: int, name: str, place: TensorPlace) -> Tensor:
    tensor = torch.empty(place.shape, dtype=place.dtype)
    file.seek(start + place.begin)
    bytes_ = tensor.reshape(-1).view(torch.uint8)
    view = memoryview(bytes_.numpy().data)
    done = 0
    while done < len(view):
        more = file.readinto(view[done:])
        if not more:
            refuse(path, name, "the file ends inside it", "all its bytes")
        done += more
    if place.dtype == torch.bool and len(view) and int(bytes_.max()) > 1:
        refuse(path, name, "a byte that is neither 0 nor 1", "0 or 1 for BOOL")
    return tensor
