"""Tensors from a safetensors file: the header is checked against the file before anything is allocated.

Idea: a header of a few bytes can claim any size, so every number in it is compared with the size of the file first:
tensors lie one behind the other, without gap or overlap, from the end of the header to the end of the file, and each
has the bytes that its type and shape need. Whatever is wrong is one error with the file, the field and the reason.
The tensors are copies in memory. A view of the file would change under a run when somebody writes over the file, and
would end the process when somebody cuts it short.

Source: the safetensors format, https://huggingface.co/docs/safetensors (header, dtypes, rules).
Use when: any safetensors file is read. Pickles are refused, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Final, Never

import torch
from torch import Tensor

from luthier.core.errors import CorruptError, DataError, UnsafeArtifactError
from luthier.data.hub import open_regular
from luthier.data.strict_json import Place, decode_text, excerpt, parse

PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack", ".joblib")
"""Endings of files that hold weights as a pickle, or as something else that may run code when it is loaded."""
CONVERT: Final = (
    "take the safetensors version of this model, or make one where running its code does no harm: transformers' "
    "from_pretrained(FOLDER).save_pretrained(NEW)"
)
MAX_HEADER: Final = 100_000_000
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
_MOST = 2**53
_MAX_DIMENSIONS = 64
_PREFIX = 8


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
    with _opened(path) as (file, size):
        places = read_places(path, file, size)
        start = size - max((place.end for place in places.values()), default=0)
        for name, place in places.items():
            yield name, _read(path, file, start, name, place)


def tensor_places(path: Path) -> dict[str, TensorPlace]:
    """Type, shape and place of each tensor of a file, without reading any; raises as `load_tensors` does."""
    with _opened(path) as (file, size):
        return read_places(path, file, size)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a file, without reading any; raises as `load_tensors` does."""
    return {name: place.shape for name, place in tensor_places(path).items()}


@contextmanager
def _opened(path: Path) -> Iterator[tuple[FileIO, int]]:
    if path.suffix.lower() in PICKLES:
        raise _pickle(path)
    with open_regular(path) as opened:
        yield opened


def read_places(path: Path, file: FileIO, size: int) -> dict[str, TensorPlace]:
    """The header of an open file of this size, every number in it compared with the size."""
    head = file.read(_PREFIX)
    count = int.from_bytes(head, "little")
    if len(head) < _PREFIX or not 2 <= count <= min(MAX_HEADER, size - _PREFIX):
        if _is_pickle(head):
            raise _pickle(path)
        _refuse(path, "the header", f"{count} bytes in a file of {size}", f"2 to {MAX_HEADER} bytes inside the file")
    raw = _exactly(path, file, count)
    if not raw.startswith(b"{"):
        if _is_pickle(head):
            raise _pickle(path)
        _refuse(path, "the header", "no JSON object", "a JSON object")
    try:
        values = parse(decode_text(raw, Place(str(path))), Place(str(path)))
    except DataError as failure:
        _refuse(path, "the header", failure.received, failure.allowed)
    if not isinstance(values, dict):
        _refuse(path, "the header", "no JSON object", "a JSON object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        _refuse(path, "__metadata__", "values that are no text", "texts by name")
    places = {name: _place(path, name, entry) for name, entry in values.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            what = "a gap before it" if place.begin > end else "it overlaps the tensor before it"
            _refuse(path, name, f"bytes {place.begin} to {place.end}, {what}", f"bytes from {end} on")
        end = place.end
    if _PREFIX + count + end != size:
        _refuse(path, "the end of the tensors", f"byte {_PREFIX + count + end} in a file of {size}", f"byte {size}")
    return places


def _place(path: Path, name: str, entry: object) -> TensorPlace:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, name, "another entry", "dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        _refuse(path, name, f"dtype {excerpt(str(entry['dtype']))}", ", ".join(DTYPES))
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _whole(shape) or len(shape) > _MAX_DIMENSIONS:
        _refuse(path, name, f"shape {excerpt(str(shape))}", "a list of whole numbers from 0 on")
    if not _whole(offsets) or len(offsets) != 2:
        _refuse(path, name, f"data_offsets {excerpt(str(offsets))}", "two whole numbers from 0 on")
    begin, end = offsets
    needed = prod(shape) * dtype.itemsize
    if end - begin != needed:
        _refuse(path, name, f"{end - begin} bytes", f"{needed} bytes for {entry['dtype']} of shape {shape}")
    return TensorPlace(dtype, tuple(shape), begin, end)


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MOST for value in values)


def _read(path: Path, file: FileIO, start: int, name: str, place: TensorPlace) -> Tensor:
    tensor = torch.empty(place.shape, dtype=place.dtype)
    file.seek(start + place.begin)
    bytes_ = tensor.reshape(-1).view(torch.uint8)
    view = memoryview(bytes_.numpy().data)
    done = 0
    while done < len(view):
        more = file.readinto(view[done:])
        if not more:
            _refuse(path, name, "the file ends inside it", "all its bytes")
        done += more
    if place.dtype == torch.bool and len(view) and int(bytes_.max()) > 1:
        _refuse(path, name, "a byte that is neither 0 nor 1", "0 or 1 for BOOL")
    return tensor


def _exactly(path: Path, file: FileIO, count: int) -> bytes:
    pieces = []
    while count:
        piece = file.read(min(count, 1 << 24))
        if not piece:
            _refuse(path, "the header", "the file ends inside it", "all its bytes")
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _is_pickle(head: bytes) -> bool:
    """Whether a file that is no safetensors file begins as a pickle, a zip of one (torch), an array or HDF5 does."""
    return (head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05") or head.startswith(
        (b"PK\x03\x04", b"\x93NUMPY", b"\x89HDF", b"cos\n", b"cposix\n", b"c__buil", b"cbuiltin", b"(lp0", b"(dp0")
    )


def _pickle(path: Path) -> UnsafeArtifactError:
    return UnsafeArtifactError(
        f"{path.name} is a pickle or the like, which could run code when loaded",
        allowed="safetensors",
        do=CONVERT,
        where=str(path),
    )


def _refuse(path: Path, field: str, received: str, allowed: str) -> Never:
    raise CorruptError(
        f"no sound safetensors file: {excerpt(field)} has {received}",
        allowed=allowed,
        do="the file was cut short or damaged: fetch it again",
        where=str(path),
    )
