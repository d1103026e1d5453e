"""Arrays from a safetensors file whose header has been checked, as copies in memory; no torch.

Idea: before anything is allocated the header is compared with the file (`tensor_headers.py`). A view of the file would
change under a run when somebody writes over the file, and would end the process when somebody cuts it short.

Use when: numbers of any safetensors file are read, and no model computes with them. As tensors: `tensor_files.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final, final

import numpy as np

from luthier.kernels.floats import REAL, DType
from luthier.model.files.tensor_headers import opened, read_header, refuse

DTYPES: Final[dict[str, DType]] = {
    "F64": REAL["float64"],
    "F32": REAL["float32"],
    "F16": REAL["float16"],
    "BF16": REAL["bfloat16"],
    "F8_E4M3": REAL["float8_e4m3fn"],
    "F8_E5M2": REAL["float8_e5m2"],
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}


@final
@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor of a file: its type, its shape, and the bytes [begin, end) behind the header that hold it."""

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@final
@dataclass(frozen=True, slots=True)
class ArrayFile:
    """An open file: where its tensors lie, in the order of the header, and their numbers."""

    path: Path
    places: dict[str, TensorPlace]
    file: FileIO
    start: int

    def read(self, name: str, into: np.ndarray) -> None:
        """Fill an array of the tensor's type and shape, whose numbers lie one behind the other."""
        self.file.seek(self.start + self.places[name].begin)
        bytes_ = into.reshape(-1, copy=False).view(np.uint8)
        view, done = bytes_.data, 0
        while done < len(view):
            more = self.file.readinto(view[done:])
            if not more:
                refuse(self.path, name, "the file ends inside it", "all its bytes")
            done += more
        if into.dtype == np.bool_ and len(view) and int(bytes_.max()) > 1:
            refuse(self.path, name, "a byte that is neither 0 nor 1", "0 or 1 for BOOL")


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, in the order of the header.

    Raises UnsafeArtifactError for a pickle, CorruptError with field and reason for a file that is damaged or no
    safetensors file, MissingError when there is none.
    """
    found = {}
    with opened_arrays(path) as file:
        for name, place in file.places.items():
            found[name] = np.empty(place.shape, place.dtype)
            file.read(name, found[name])
    return found


@contextmanager
def opened_arrays(path: Path) -> Iterator[ArrayFile]:
    """A safetensors file, for whoever gives the memory for its numbers; raises as `load_arrays` does."""
    with opened(path) as (file, size):
        places = read_places(path, file, size)
        yield ArrayFile(path, places, file, size - max((place.end for place in places.values()), default=0))


def tensor_places(path: Path) -> dict[str, TensorPlace]:
    """Type, shape and place of each tensor of a file, without reading any; raises as `load_arrays` does."""
    with opened(path) as (file, size):
        return read_places(path, file, size)


def read_places(path: Path, file: FileIO, size: int) -> dict[str, TensorPlace]:
    """The header of an open file of this size, with numpy's types."""
    header = read_header(path, file, size)
    return {name: TensorPlace(DTYPES[at.dtype], at.shape, at.begin, at.end) for name, at in header.items()}
