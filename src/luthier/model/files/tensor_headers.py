"""The header of a safetensors file: what it holds and where, checked against the file, without torch.

Idea: a header of a few bytes can claim any size, so every number in it is compared with the size of the file first:
tensors lie one behind the other, without gap or overlap, from the end of the header to the end of the file, and each
has the bytes that its type and shape need. Whatever is wrong is one error with the file, the field and the reason.

Source: the safetensors format, https://huggingface.co/docs/safetensors (header, dtypes, rules).
Use when: names and shapes are enough; the tensors themselves are read in `tensor_files.py`. Pickles are refused,
whatever they are called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Final, Never

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
ITEM_BYTES: Final = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
"""Types of tensors by the name in the file, and the bytes of a number."""
_MOST = 2**53
_MAX_DIMENSIONS = 64
_PREFIX = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: the name of its type, its shape, and its bytes [begin, end) behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a file.

    Raises UnsafeArtifactError for a pickle, CorruptError with field and reason for a file that is damaged or no
    safetensors file, MissingError when there is none.
    """
    with opened(path) as (file, size):
        return {name: entry.shape for name, entry in read_header(path, file, size).items()}


@contextmanager
def opened(path: Path) -> Iterator[tuple[FileIO, int]]:
    """A file that may be one of tensors, and its size. Raises UnsafeArtifactError for what is called a pickle."""
    if path.suffix.lower() in PICKLES:
        raise _pickle(path)
    with open_regular(path) as found:
        yield found


def read_header(path: Path, file: FileIO, size: int) -> dict[str, Entry]:
    """The header of an open file of this size, every number in it compared with the size."""
    head = file.read(_PREFIX)
    count = int.from_bytes(head, "little")
    if len(head) < _PREFIX or not 2 <= count <= min(MAX_HEADER, size - _PREFIX):
        if _is_pickle(head):
            raise _pickle(path)
        refuse(path, "the header", f"{count} bytes in a file of {size}", f"2 to {MAX_HEADER} bytes inside the file")
    raw = _exactly(path, file, count)
    if not raw.startswith(b"{"):
        if _is_pickle(head):
            raise _pickle(path)
        refuse(path, "the header", "no JSON object", "a JSON object")
    try:
        values = parse(decode_text(raw, Place(str(path))), Place(str(path)))
    except DataError as failure:
        refuse(path, "the header", failure.received, failure.allowed)
    if not isinstance(values, dict):
        refuse(path, "the header", "no JSON object", "a JSON object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        refuse(path, "__metadata__", "values that are no text", "texts by name")
    places = {name: _place(path, name, entry) for name, entry in values.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            what = "a gap before it" if place.begin > end else "it overlaps the tensor before it"
            refuse(path, name, f"bytes {place.begin} to {place.end}, {what}", f"bytes from {end} on")
        end = place.end
    if _PREFIX + count + end != size:
        refuse(path, "the end of the tensors", f"byte {_PREFIX + count + end} in a file of {size}", f"byte {size}")
    return places


def _place(path: Path, name: str, entry: object) -> Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse(path, name, "another entry", "dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        refuse(path, name, f"dtype {excerpt(str(dtype))}", ", ".join(ITEM_BYTES))
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _whole(shape) or len(shape) > _MAX_DIMENSIONS:
        refuse(path, name, f"shape {excerpt(str(shape))}", "a list of whole numbers from 0 on")
    if not _whole(offsets) or len(offsets) != 2:
        refuse(path, name, f"data_offsets {excerpt(str(offsets))}", "two whole numbers from 0 on")
    begin, end = offsets
    needed = prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed:
        refuse(path, name, f"{end - begin} bytes", f"{needed} bytes for {dtype} of shape {shape}")
    return Entry(dtype, tuple(shape), begin, end)


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MOST for value in values)


def _exactly(path: Path, file: FileIO, count: int) -> bytes:
    pieces = []
    while count:
        piece = file.read(min(count, 1 << 24))
        if not piece:
            refuse(path, "the header", "the file ends inside it", "all its bytes")
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


def refuse(path: Path, field: str, received: str, allowed: str) -> Never:
    """Raise CorruptError for a file that is not as its format says."""
    raise CorruptError(
        f"no sound safetensors file: {excerpt(field)} has {received}",
        allowed=allowed,
        do="the file was cut short or damaged: fetch it again",
        where=str(path),
    )
